"""A merged adapter: what is written, whole or not at all, and what is said about it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from peta_fast.errors import ResourceError
from peta_fast.formats import model_card
from peta_fast.formats.disk import real_path, save_tensors, write_together
from peta_fast.formats.peft_adapter import CONFIG, PREFIX, SIDECAR, WEIGHTS, rank_fields
from peta_fast.ops.low_rank import LowRank

CARD = "README.md"
OLD_FILES = (SIDECAR, "adapter_model.bin")


@dataclass(frozen=True)
class ModuleReport:
    """One module of the result.

    rank   of its factors
    norm   Frobenius norm of the exact change
    error  Frobenius norm of what is stored minus the exact change
    """

    name: str
    rank: int
    norm: float
    error: float

    @property
    def energy(self) -> float:
        """Share of the squared norm that is kept."""
        return 1.0 - (self.error / self.norm) ** 2 if self.norm else 1.0


@dataclass(frozen=True)
class AdapterReport:
    """What came out.

    exact    what "exact change" means here, in words
    seconds  by phase
    notes    what the reader should know besides
    """

    out: Path
    method: str
    exact: str
    modules: Sequence[ModuleReport]
    replaced: Sequence[str] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def relative_error(self) -> float:
        """|| stored - exact || / || exact || over all modules."""
        norm = math.sqrt(sum(m.norm**2 for m in self.modules))
        return math.sqrt(sum(m.error**2 for m in self.modules)) / norm if norm else 0.0

    @property
    def energy(self) -> float:
        return 1.0 - self.relative_error**2

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "method": self.method,
            "exact": self.exact,
            "relative_error": self.relative_error,
            "energy": self.energy,
            "replaced": list(self.replaced),
            "seconds": dict(self.seconds),
            "notes": list(self.notes),
            "modules": [{"name": m.name, "rank": m.rank, "norm": m.norm, "error": m.error, "energy": m.energy}
                        for m in self.modules],
        }  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """One module's factors as they are to be written: B A in the orientation of the file, and the file's own shapes.

    tail  dimensions of a convolution's kernel behind (r, in), () for others
    """

    change: LowRank
    embedding: bool = False
    tail: tuple[int, ...] = ()
    channels: int = 0

    def tensors(self, name: str) -> dict[str, Tensor]:
        B, A = self.change.B.contiguous(), self.change.A.contiguous()
        if self.embedding:
            return {f"{PREFIX}{name}.lora_embedding_A": A, f"{PREFIX}{name}.lora_embedding_B": B}
        if self.tail:
            A = A.reshape(A.shape[0], self.channels, *self.tail)
            B = B.reshape(*B.shape, *(1 for _ in self.tail))
        return {f"{PREFIX}{name}.lora_A.weight": A, f"{PREFIX}{name}.lora_B.weight": B}


def refuse_output(out: Path, inputs: Sequence[Path], force: bool) -> None:
    """Raises ResourceError where the folder holds something already, or is an input or lies in one."""
    if os.path.lexists(out) and not out.is_dir():
        raise ResourceError(
            str(out), "expected a folder for the adapter, found a file or a broken link", "Choose another folder."
        )
    place = real_path(out)
    for path in inputs:
        folder = real_path(path)
        if place == folder or folder in place.parents or place in folder.parents:
            raise ResourceError(
                str(out), f"lies in, or holds, the input {path}", "Choose a folder outside of all inputs."
            )
    held = [name for name in (CONFIG, WEIGHTS, *OLD_FILES, CARD) if os.path.lexists(out / name)]
    if held and not force:
        raise ResourceError(str(out), f"holds {held[0]} already", "Use --force to replace it.")


def write_lora(
    out: Path, modules: Mapping[str, Stored], replaced: Mapping[str, Tensor], config: Mapping[str, Any], card: str
) -> None:
    """adapter_model.safetensors, README.md and the config, all or none. replaced: by the keys they are to have.

    Raises ResourceError when a file cannot be written; what the folder held is there as it was then.
    """
    tensors = {key: t for name, stored in modules.items() for key, t in stored.tensors(name).items()}
    ranks = {name: stored.change.rank for name, stored in modules.items()}
    text = json.dumps({**config, **rank_fields(ranks)}, indent=2, sort_keys=True, default=str) + "\n"
    files = {
        WEIGHTS: lambda path: save_tensors({**tensors, **replaced}, path, {"format": "pt"}),
        CARD: card.encode(),
        CONFIG: text.encode(),
    }
    write_together(out, files, old=OLD_FILES)


def adapter_card(base: str | None, models: Sequence[str], method: str, recipe: str) -> str:
    return model_card(base, models, method, recipe).replace("# Merged model", "# Merged adapter", 1)
