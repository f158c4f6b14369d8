"""A LoraConfig that completes what PEFT's save_pretrained has written: the exact plain form, and the linearization.

PEFT writes a layer's tensors as they are, and then the config, by config.save_pretrained: the last step, in the main
process alone, whatever gathered the tensors. There the tensors are turned into the plain form. Until then a file of a
linearization with B0 != 0 is one that plain PEFT refuses for its shapes.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import Tensor

from peta_fast.errors import CompatibilityError
from peta_fast.formats.lora_config import pattern_value
from peta_fast.formats.peft_adapter import (
    PREFIX,
    WEIGHTS,
    Linearization,
    LinearizedFactors,
    plain_ranks,
    plain_tensors,
    rank_fields,
    write_sidecar,
    write_tensors,
)
from peta_fast.nn.adapter import scaling_of

PARTS = ("lora_A.weight", "lora_A.step", "lora_B.weight", "lora_B.step")


class LinearizedLoraConfig(LoraConfig):
    """A LoraConfig whose adapters are linearized; `register` turns a LoraConfig into one, in place.

    It cannot be made otherwise: dataclasses.replace, by which add_weighted_adapter starts, ends here.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        raise CompatibilityError(
            "PEFT",
            "add_weighted_adapter, and copies of a linearized adapter's config, are not defined for linearized layers: "
            "it would add lora_A and lora_B of different points and products",
            "Use peta_fast.add_adapters(model, {name: weight}, new_name), which adds the steps and is exact; for a new "
            "adapter, peta_fast.register(LoraConfig(...)).",
        )

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Rewrites adapter_model.safetensors where B0 != 0, writes linearization.safetensors and adapter_config.json.

        Raises CompatibilityError when the tensors were saved as a pickle (safe_serialization=False).
        """
        folder = Path(save_directory)
        if not (folder / WEIGHTS).is_file():
            raise CompatibilityError(
                str(folder), f"PEFT has written no {WEIGHTS}", "Call save_pretrained with safe_serialization=True."
            )
        stored = read(folder / WEIGHTS)
        modules = self._modules(stored)
        config = plain_copy(self)
        if any(factors.B0 is not None for factors in modules.values()):
            others = {key: t for key, t in stored.items() if not key.endswith(PARTS)}
            write_tensors(folder / WEIGHTS, others | plain_tensors(modules), {"format": "pt"})
            for field, value in rank_fields(plain_ranks(modules)).items():
                setattr(config, field, value)
            config.init_lora_weights = True
        write_sidecar(folder, Linearization(modules))
        config.save_pretrained(save_directory, **kwargs)

    def _modules(self, stored: dict[str, Tensor]) -> dict[str, LinearizedFactors]:
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in stored.items():
            part = next((p for p in PARTS if key.endswith(f".{p}")), None)
            if part is not None:
                parts.setdefault(key.removeprefix(PREFIX).removesuffix(f".{part}"), {})[part] = tensor
        return {name: self._factors(name, found) for name, found in parts.items()}

    def _factors(self, name: str, found: dict[str, Tensor]) -> LinearizedFactors:
        alpha, rslora = pattern_value(self.alpha_pattern, name, self.lora_alpha), self.use_rslora
        A, B = found["lora_A.weight"], found["lora_B.weight"]
        scaling = scaling_of(A.shape[-2], alpha, rslora)
        if "lora_A.step" not in found:
            return LinearizedFactors(A, None, None, B, scaling, alpha, rslora)
        return LinearizedFactors(A[0], B[0], found["lora_A.step"], found["lora_B.step"], scaling, alpha, rslora)


def read(file: Path) -> dict[str, Tensor]:
    """Copies of all tensors, since the file is about to be replaced."""
    from safetensors.torch import load_file

    return {name: tensor.clone() for name, tensor in load_file(file).items()}


def plain_copy(config: LoraConfig) -> LoraConfig:
    plain = copy.deepcopy(config)
    plain.__class__, plain._custom_modules = LoraConfig, None
    return plain


def as_linearized(config: LoraConfig) -> LoraConfig:
    """The same object, of the class above. Raises CompatibilityError for other subclasses of LoraConfig."""
    if type(config) is LoraConfig:
        config.__class__ = LinearizedLoraConfig
    if type(config) is not LinearizedLoraConfig:
        problem = f"is a {type(config).__name__}, expected peft.LoraConfig"
        raise CompatibilityError("config", problem, "Other kinds of adapters cannot be linearized.")
    return config
