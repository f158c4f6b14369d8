"""The adapters of a merge, opened together: whether they belong together, and each one's change of a module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from peta_fast.errors import CompatibilityError, RecipeError
from peta_fast.formats.hub import locate
from peta_fast.formats.lora_adapter import LoraAdapter, LoraModule, open_adapter
from peta_fast.ops.low_rank import LowRank
from peta_fast.recipe import ModelRef


@dataclass(frozen=True)
class Change:
    """One adapter's change of one module: place among the adapters, B A without its scaling."""

    place: int
    module: LoraModule
    factors: LowRank

    def scaled(self, weight: float = 1.0) -> LowRank:
        """weight * scaling * B A; the product is folded into B and rounded once."""
        factor = weight * self.module.scaling
        B = self.factors.B
        return LowRank(B if factor == 1 else (factor * B.double()).to(B.dtype), self.factors.A)


class AdapterSet:
    """Adapters of one base.

    modules  name -> the adapters' modules by place, in the order in which they are first met
    Raises CompatibilityError where they name different bases, or a module's shapes differ.
    """

    def __init__(self, adapters: Sequence[LoraAdapter], base: str | None = None):
        self.adapters = tuple(adapters)
        self.base = base or _one_base(adapters)
        self.modules: dict[str, dict[int, LoraModule]] = {}
        for place, adapter in enumerate(adapters):
            for name, module in adapter.modules.items():
                self.modules.setdefault(name, {})[place] = module
        for name, found in self.modules.items():
            self._check_shapes(name, found)
        _check_orientation(adapters)

    def _check_shapes(self, name: str, found: Mapping[int, LoraModule]) -> None:
        first = next(iter(found))
        for place, module in found.items():
            mine, theirs = found[first], module
            if (mine.shape, mine.stored[0][1:], mine.embedding) != (
                theirs.shape,
                theirs.stored[0][1:],
                theirs.embedding,
            ):
                raise CompatibilityError(
                    str(self.adapters[place]),
                    f"changes {name!r} as one of {list(theirs.shape)}, "
                    f"{self.adapters[first]} as one of {list(mine.shape)}",
                    "They belong to different base models.",
                )

    @property
    def tensors(self) -> list[str]:
        return [module.tensor for found in self.modules.values() for module in list(found.values())[:1]]

    def changes(self, name: str) -> list[Change]:
        """What the adapters that know this module do to it, in the order of the adapters."""
        found = []
        for place, module in sorted(self.modules[name].items()):
            A, B = self.adapters[place].factors(module)
            found.append(Change(place, module, LowRank(torch.from_numpy(B), torch.from_numpy(A))))
        return found


def open_adapters(names: Sequence[str]) -> list[LoraAdapter]:
    """By path or hub id with an optional revision."""
    references = [reference("adapters", name) for name in names]
    return [open_adapter(locate(ref.path, ref.revision)) for ref in references]


def reference(what: str, name: str) -> ModelRef:
    """A path or hub id with an optional revision, and nothing on it. Raises RecipeError, `what` saying of what."""
    try:
        found = ModelRef.parse(name)
    except ValueError as error:
        raise RecipeError(what, f"expected a path or hub id, got {name!r}: {error}") from None
    if found.adapters:
        raise RecipeError(
            what, f"expected a path or hub id alone, got {name!r}, a model with adapters on it",
            "Apply them first: `peta-fast adapter apply`.",
        )  # fmt: skip
    return found


def _one_base(adapters: Sequence[LoraAdapter]) -> str | None:
    named = [adapter for adapter in adapters if adapter.base_name]
    for adapter in named[1:]:
        if adapter.base_name != named[0].base_name:
            raise CompatibilityError(
                f"{named[0]} and {adapter}",
                f"belong to different bases: {named[0].base_name!r} and {adapter.base_name!r}",
                "If these are two names of one model, give the one that is to stand in the result: --base NAME.",
            )
    return named[0].base_name if named else None


def _check_orientation(adapters: Sequence[LoraAdapter]) -> None:
    ways = {adapter.fan_in_fan_out for adapter in adapters}
    if len(ways) > 1:
        raise CompatibilityError(
            ", ".join(map(str, adapters)), "fan_in_fan_out is true in some and false in others",
            "They belong to different base models, or one config is wrong.",
        )  # fmt: skip
