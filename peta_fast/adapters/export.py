"""A linearized adapter as plain PEFT: s [B | B0] [A0 ; A - A0], which is the same function."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from peta_fast.adapters.results import AdapterReport, ModuleReport, Stored, adapter_card, refuse_output, write_lora
from peta_fast.formats.hub import locate
from peta_fast.formats.lora_config import check_fields, read_object
from peta_fast.formats.peft_adapter import (
    CONFIG,
    PREFIX,
    SIDECAR,
    LinearizedFactors,
    no_plain_equal,
    plain_factors,
    read_linearization,
    read_replaced,
    refuse_nonfinite,
)
from peta_fast.ops.low_rank import LowRank, distance, norm_of, stacked


def export_adapter(
    adapter: str | Path, out: str | Path, *, base: str | None = None, force: bool = False
) -> AdapterReport:
    """Writes a linearized adapter as one that PEFT, and servers that know nothing else, load.

    adapter  a folder with linearization.safetensors; its adapter_config.json and adapter_model.safetensors, where they
             are there, give the base's name, the targets and modules trained in full
    base     the base's name in the result

    Raises CheckpointError where there is no linearization, CompatibilityError for a whole-model linearization.
    """
    began = time.perf_counter()
    folder, out = locate(str(adapter), weights=False), Path(out)
    read = read_linearization(folder)
    if read.scope != "layer":
        raise no_plain_equal(str(folder))
    refuse_output(out, [folder], force)
    refuse_nonfinite(read, str(folder / SIDECAR))
    modules, reports = {}, []
    for name, factors in read.modules.items():
        A, B = plain_factors(factors)
        modules[name] = Stored(LowRank(B, A))
        exact = exact_change(factors)
        reports.append(ModuleReport(name, A.shape[0], norm_of(exact), distance(modules[name].change, exact)))
    config = _config(folder, list(modules))
    config["base_model_name_or_path"] = base or config.get("base_model_name_or_path")
    replaced = {f"{PREFIX}{name}": tensor for name, tensor in read_replaced(folder).items()}
    card = adapter_card(config["base_model_name_or_path"], [str(adapter)], "export", f"export: {adapter}")
    write_lora(out, modules, replaced, config, card)
    seconds = {"all": time.perf_counter() - began}
    return AdapterReport(out, "export", "the linearized adapter's change", reports, sorted(replaced), seconds)


def exact_change(factors: LinearizedFactors) -> LowRank:
    """s (B0 + delta_B) A0 + s B0 delta_A in fp64."""
    terms = [LowRank(factors.delta_B.double(), factors.A0.double())]
    if factors.B0 is not None and factors.delta_A is not None:
        B0 = factors.B0.double()
        terms = [LowRank(B0 + terms[0].B, terms[0].A), LowRank(B0, factors.delta_A.double())]
    return stacked(terms, [factors.scaling] * len(terms))


def _config(folder: Path, modules: list[str]) -> dict[str, Any]:
    """The config beside the linearization, or the least that PEFT wants."""
    file = folder / CONFIG
    if file.is_file():
        config = read_object(file)
        check_fields(config, str(file))
        return config
    return {
        "peft_type": "LORA", "task_type": None, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True, "lora_dropout": 0.0, "modules_to_save": None, "target_modules": sorted(modules),
    }  # fmt: skip
