"""A linearized adapter on disk: what plain PEFT loads, and beside it what linearization starts from.

    adapter_model.safetensors   base_model.model.<module>.lora_A.weight [k, in], .lora_B.weight [out, k]
    adapter_config.json         r = alpha = k, so that PEFT multiplies by 1; k = 2r, or r where B0 = 0
    linearization.safetensors   <module>.A0 .B0 .delta_A .delta_B; no B0 and delta_A where B0 = 0

    dW = s (B A0 + B0 (A - A0)) = s [B | B0] · [A0 ; A - A0]        B = B0 + delta_B, A - A0 = delta_A

Tensors of half precision are written in fp32. The sidecar's metadata: format_version "1"; scope "layer" or "model";
scaling, alpha and rslora, JSON objects by module. It is a file of its own since PEFT drops keys that it does not know
without a word, and servers refuse them.
Source: PEFT 0.21, docs/source/developer_guides/checkpoint.md.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peta_fast.errors import CheckpointError, CompatibilityError
from peta_fast.formats.disk import save_tensors, write_file, write_together

Tensor = Any
"""A torch.Tensor; torch is imported where it is needed, and not before."""

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
SIDECAR = "linearization.safetensors"
FORMAT_VERSION = "1"
SCOPES = ("layer", "model")
PREFIX = "base_model.model."
PARTS = ("A0", "B0", "delta_A", "delta_B")
BY_MODULE = ("scaling", "alpha", "rslora")
"""JSON objects in a sidecar's metadata: a value by module."""

VARIANTS = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "arrow_config", "alora_invocation_tokens", "kasa_config",
    "layer_replication", "megatron_config", "monteclora_config", "target_parameters", "trainable_token_indices",
    "velora_config",
)  # fmt: skip
"""Fields of a LoraConfig that make of it another function than s B A x."""
PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that leave the base weight as it was."""


@dataclass(frozen=True)
class LinearizedFactors:
    """One module's adapter, at the step (delta_A, delta_B) from the point (A0, B0).

    A0, delta_A  [r, in];  B0, delta_B  [out, r];  B0 and delta_A are both None where B0 = 0
    alpha        as given by the user; scaling = alpha / r, or alpha / sqrt(r) with rslora
    """

    A0: Tensor
    B0: Tensor | None
    delta_A: Tensor | None
    delta_B: Tensor
    scaling: float
    alpha: float
    rslora: bool = False

    @property
    def r(self) -> int:
        return self.A0.shape[0]


@dataclass(frozen=True)
class Linearization:
    """What a sidecar holds: the adapter of every module, by the module's name in the base model."""

    modules: Mapping[str, LinearizedFactors]
    scope: str = "layer"


def at_least_fp32(tensor: Tensor) -> Tensor:
    """A detached, contiguous copy on the CPU: fp64 as it is, everything else in fp32."""
    import torch

    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.detach().to("cpu", dtype, copy=True).contiguous()


def plain_factors(factors: LinearizedFactors) -> tuple[Tensor, Tensor]:
    """A [k, in] and B [out, k] with B A = dW, the scaling folded into B; k = 2r, or r where B0 = 0.

    The sum B0 + delta_B and its product with the scaling are rounded once, to fp32 (fp64 for fp64 adapters).
    """
    import torch

    A0, delta_B = at_least_fp32(factors.A0), at_least_fp32(factors.delta_B)
    s = factors.scaling
    if factors.B0 is None or factors.delta_A is None:
        return A0, (s * delta_B.double()).to(delta_B.dtype)
    B0 = at_least_fp32(factors.B0)
    both = torch.cat((B0.double() + delta_B.double(), B0.double()), 1)
    return torch.cat((A0, at_least_fp32(factors.delta_A))), (s * both).to(B0.dtype)


def plain_tensors(modules: Mapping[str, LinearizedFactors]) -> dict[str, Tensor]:
    """The content of adapter_model.safetensors."""
    tensors = {}
    for name, factors in modules.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"] = plain_factors(factors)
    return tensors


def plain_ranks(modules: Mapping[str, LinearizedFactors]) -> dict[str, int]:
    return {name: f.r if f.B0 is None else 2 * f.r for name, f in modules.items()}


def rank_fields(ranks: Mapping[str, int]) -> dict[str, Any]:
    """The fields of a LoraConfig that give every module its rank, and a scaling of 1: r, lora_alpha, their patterns."""
    most = Counter(ranks.values()).most_common(1)[0][0]
    others = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != most}
    return {"r": most, "lora_alpha": most, "rank_pattern": others, "alpha_pattern": dict(others), "use_rslora": False}


def target_modules(adapted: Iterable[str], all_modules: Iterable[str]) -> list[str] | str:
    """What makes PEFT choose exactly these: their last names where that is enough, else a regular expression."""
    adapted, everything = set(adapted), list(all_modules)
    short = {name.rpartition(".")[2] for name in adapted}
    if {name for name in everything if name.rpartition(".")[2] in short} == adapted:
        return sorted(short)
    return "|".join(re.escape(name) for name in sorted(adapted))


def plain_config(modules: Mapping[str, LinearizedFactors], all_modules: Iterable[str], **fields: Any) -> dict[str, Any]:
    """adapter_config.json of the plain form."""
    return {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": None, "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "lora_dropout": 0.0,
        "modules_to_save": None, "target_modules": target_modules(modules, all_modules),
        **rank_fields(plain_ranks(modules)), **fields,
    }  # fmt: skip


def refuse_variants(config: Mapping[str, Any], who: str = "PEFT config") -> None:
    """Raises CompatibilityError where a PEFT config describes anything but plain LoRA, naming it."""
    kind = str(getattr(config.get("peft_type"), "value", config.get("peft_type") or "LORA"))
    if kind != "LORA":
        raise CompatibilityError(
            who, f"peft_type is {kind!r}, expected 'LORA'", "Only LoRA adapters can be linearized."
        )
    found = variants_of(config)
    if config.get("bias", "none") != "none":
        found.append(f"bias={config['bias']!r}")
    if found:
        raise CompatibilityError(
            who,
            f"expected plain LoRA, got {', '.join(found)}",
            "Linearization is defined here for y = W x + s B A x over an unchanged W; convert the adapter to it first.",
        )


def variants_of(config: Mapping[str, Any]) -> list[str]:
    """What makes of a LoRA adapter another function than W x + s B A x over the W it was made for."""
    found = [name for name in VARIANTS if config.get(name) not in (None, False, [], {}, "")]
    start = config.get("init_lora_weights", True)
    return found if start in PLAIN_INITS else [*found, f"init_lora_weights={start!r}"]


def sidecar_tensors(modules: Mapping[str, LinearizedFactors]) -> dict[str, Tensor]:
    """The content of linearization.safetensors."""
    tensors = {}
    for name, factors in modules.items():
        for part in PARTS:
            if getattr(factors, part) is not None:
                tensors[f"{name}.{part}"] = at_least_fp32(getattr(factors, part))
    return tensors


def write_sidecar(folder: Path, linearization: Linearization) -> None:
    """Raises ResourceError."""
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / SIDECAR, sidecar_writer(linearization))


def sidecar_writer(linearization: Linearization) -> Callable[[Path], None]:
    """Writes linearization.safetensors to a path."""
    modules = linearization.modules
    by_module = {part: {n: getattr(f, part) for n, f in modules.items()} for part in BY_MODULE}
    metadata = {"format": "pt", "format_version": FORMAT_VERSION, "scope": linearization.scope}
    metadata |= {part: json.dumps(values) for part, values in by_module.items()}
    return lambda path: save_tensors(sidecar_tensors(modules), path, metadata)


def write_adapter(
    folder: Path,
    linearization: Linearization,
    config: Mapping[str, Any],
    replaced: Mapping[str, Tensor],
    others: Mapping[str, bytes] | None = None,
) -> None:
    """Writes the three files, all or none, the config last.

    replaced  tensors of modules_to_save by their names in the base model: full values, not differences
    others    further files, by name
    Raises CompatibilityError for a whole-model linearization, which equals no adapter of plain PEFT; ResourceError.
    """
    if linearization.scope != "layer":
        raise no_plain_equal(str(folder))
    tensors = plain_tensors(linearization.modules)
    tensors |= {f"{PREFIX}{name}": tensor.detach().cpu().contiguous() for name, tensor in replaced.items()}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_together(
        folder,
        {
            **(others or {}),
            SIDECAR: sidecar_writer(linearization),
            WEIGHTS: lambda path: save_tensors(tensors, path, {"format": "pt"}),
            CONFIG: text.encode(),
        },
    )


def no_plain_equal(who: str) -> CompatibilityError:
    return CompatibilityError(
        who,
        "a whole-model linearization has no equal among plain PEFT adapters: J (phi - phi0) is not a change of weights",
        "Save the linearization alone with save_adapter(..., plain=False) and load it with load_adapter.",
    )


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Raises ResourceError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, lambda partial: save_tensors(tensors, partial, metadata))


def read_linearization(folder: Path) -> Linearization:
    """The sidecar of a folder. Raises CheckpointError when it is missing, of another version, or incomplete."""
    from safetensors import SafetensorError, safe_open

    file = Path(folder) / SIDECAR
    if not file.is_file():
        raise CheckpointError(
            str(folder),
            f"expected a linearized adapter, found no {SIDECAR}",
            "For a plain adapter: load it with peft.PeftModel.from_pretrained and give that to linearize.",
        )
    try:
        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(str(file), f"cannot be read: {error}", "Save the adapter again.") from error
    return linearization_of(tensors, metadata, str(file))


def linearization_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], who: str) -> Linearization:
    version = metadata.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(who, f"format_version is {version!r}, expected {FORMAT_VERSION!r}", "Update peta_fast.")
    by_module = {part: json_object(metadata, part, who) for part in BY_MODULE}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.rpartition(".")
        parts.setdefault(name, {})[part] = tensor
    modules = {}
    for name, found in parts.items():
        missing = [part for part, values in by_module.items() if name not in values]
        if set(found) not in ({"A0", "delta_B"}, {"A0", "B0", "delta_A", "delta_B"}) or missing:
            raise CheckpointError(
                who, f"{name!r} has {sorted(found)} without {missing or 'the rest'}", "Save the adapter again."
            )
        values = {part: by_module[part][name] for part in by_module}
        modules[name] = LinearizedFactors(
            found["A0"], found.get("B0"), found.get("delta_A"), found["delta_B"], **values
        )
        _check_factors(modules[name], name, who)
    if not modules:
        raise CheckpointError(who, "holds no module", "Save the adapter again.")
    scope = metadata.get("scope", "layer")
    if scope not in SCOPES:
        raise CheckpointError(who, f"scope is {scope!r}, expected {' or '.join(SCOPES)}", "Update peta_fast.")
    return Linearization(modules, scope)


def _check_factors(f: LinearizedFactors, name: str, who: str) -> None:
    """Raises CheckpointError where shapes, dtypes or numbers cannot be those of a linearized adapter."""
    shapes = {part: list(t.shape) for part in PARTS if (t := getattr(f, part)) is not None}
    r = f.A0.shape[0] if f.A0.dim() == 2 else 0
    expected = {"A0": [r, f.A0.shape[-1:].numel()], "delta_B": [f.delta_B.shape[:1].numel(), r]}
    expected |= {"delta_A": expected["A0"], "B0": expected["delta_B"]}
    if r < 1 or any(shape != expected[part] for part, shape in shapes.items()):
        said = ", ".join(f"{part} {shape}" for part, shape in shapes.items())
        raise CheckpointError(
            who, f"{name!r} has {said}, expected A0 and delta_A [r, in], B0 and delta_B [out, r] with r >= 1",
            "Save the adapter again.",
        )  # fmt: skip
    strange = [f"{part} of {getattr(f, part).dtype}" for part in shapes if not getattr(f, part).is_floating_point()]
    numbers = {"scaling": f.scaling, "alpha": f.alpha}
    strange += [f"{k} {v!r}" for k, v in numbers.items() if type(v) not in (int, float) or not math.isfinite(v)]
    strange += [] if isinstance(f.rslora, bool) else [f"rslora {f.rslora!r}"]
    if strange:
        raise CheckpointError(
            who, f"{name!r} has {', '.join(strange)}, expected floating-point factors and finite numbers",
            "Save the adapter again.",
        )  # fmt: skip


def refuse_nonfinite(linearization: Linearization, who: str) -> None:
    """Raises CheckpointError that names the first factor with NaN or infinities."""
    for name, factors in linearization.modules.items():
        for part in PARTS:
            tensor = getattr(factors, part)
            bad = 0 if tensor is None else int((~tensor.isfinite()).sum())
            if bad:
                raise CheckpointError(
                    who, f"'{name}.{part}': expected finite values, got {bad} NaN or inf",
                    "Train or download it again.",
                )  # fmt: skip


def json_object(metadata: Mapping[str, str], part: str, who: str) -> dict[str, Any]:
    try:
        value = json.loads(metadata[part])
    except (KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(who, f"its metadata holds no JSON object {part!r}", "Save the adapter again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(who, f"its metadata holds no JSON object {part!r}", "Save the adapter again.")
    return value


def read_replaced(folder: Path) -> dict[str, Tensor]:
    """The tensors of modules_to_save in adapter_model.safetensors, by their names in the base model.

    Raises CheckpointError when the file cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = Path(folder) / WEIGHTS
    try:
        stored = load_file(file) if file.is_file() else {}
    except SafetensorError as error:
        raise CheckpointError(str(file), f"cannot be read: {error}", "Save the adapter again.") from error
    return {
        key.removeprefix(PREFIX): t
        for key, t in stored.items()
        if not key.endswith((".lora_A.weight", ".lora_B.weight"))
    }
