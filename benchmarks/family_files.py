"""The families that merges are measured on: made where missing, described, and read by safetensors' own library."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ties_reference import NOTHING_COMPARED, Error, Tensors, error_of, error_where_clear

GENERATOR = Path(__file__).resolve().parent / "make_llama_family.py"
SIZES = ("tiny", "160m", "1b")
WEIGHTS = (0.5, 0.3, 0.4)
DENSITY = 0.2


@dataclass(frozen=True)
class Family:
    """A base and its fine-tunes, one folder each."""

    size: str
    folder: Path
    recipe: Path

    @property
    def models(self) -> tuple[Path, ...]:
        return tuple(self.folder / f"task{t}" for t in range(len(WEIGHTS)))

    @property
    def checkpoints(self) -> tuple[Path, ...]:
        return (self.folder / "base", *self.models)

    def weight_files(self) -> list[Path]:
        return [file for folder in self.checkpoints for file in sorted(folder.glob("*.safetensors"))]

    @property
    def output_bytes(self) -> int:
        """Bytes of the merged checkpoint: those of the base."""
        return sum(file.stat().st_size for file in (self.folder / "base").glob("*.safetensors"))

    @property
    def input_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.weight_files())

    @property
    def shape(self) -> str:
        return f"{self.output_bytes / 2e6:.3g}e6 parameters, base + {len(WEIGHTS)}, bf16"


def get_family(families: Path, size: str) -> Family:
    """The family of this size, made first where it is missing, and its recipe."""
    families = families.resolve()
    folder = families / size
    if not folder.exists():
        families.mkdir(parents=True, exist_ok=True)
        unfinished = families / f".{size}.unfinished"
        command = [sys.executable, GENERATOR, unfinished, "--size", size, "--tasks", len(WEIGHTS)]
        subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)
        unfinished.rename(folder)
    family = Family(size, folder, families / f"ties-{size}.yml")
    family.recipe.write_text(recipe_text(family), encoding="utf-8")
    return family


def recipe_text(family: Family) -> str:
    """TIES as mergekit's users write it."""
    listed = "".join(
        f"  - model: {model}\n    parameters: {{weight: {weight}, density: {DENSITY}}}\n"
        for model, weight in zip(family.models, WEIGHTS, strict=True)
    )
    return f"merge_method: ties\nbase_model: {family.folder / 'base'}\nmodels:\n{listed}dtype: bfloat16\n"


class StoredTensors:
    """The tensors of a checkpoint folder, by the safetensors library."""

    def __init__(self, folder: Path):
        from safetensors import safe_open

        self.files = {}
        for file in sorted(folder.glob("*.safetensors")):
            opened = safe_open(file, framework="pt")
            self.files.update(dict.fromkeys(opened.keys(), opened))

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.files[name].get_slice(name).get_shape())

    def tensor(self, name: str):
        return self.files[name].get_tensor(name)

    def bf16(self, name: str) -> np.ndarray:
        """uint16 [n]"""
        import torch

        return self.tensor(name).flatten().view(torch.int16).numpy().view(np.uint16)


def one_of_each_shape(stored: StoredTensors) -> list[str]:
    """The last tensor of every shape: a sample that holds every kind."""
    return list({stored.shape(name): name for name in sorted(stored.files)}.values())


def tensors_of(family: Family, name: str, opened: Sequence[StoredTensors]) -> Tensors:
    base, *models = (stored.bf16(name) for stored in opened)
    return Tensors(base, tuple(models))


def merge_error(family: Family, out: Path) -> Error:
    """Of a merge by peta_fast from the family's recipe, over the sample. Raises ValueError when a tensor is missing."""
    return _sampled(family, out, lambda o, t: error_of(o, t, _densities(), WEIGHTS, "first"))


def mergekit_error(family: Family, out: Path) -> Error:
    """Of a merge by mergekit, which computes in bf16, where neither that nor its choice among equals decides."""
    return _sampled(family, out, lambda o, t: error_where_clear(o, t, _densities(), WEIGHTS))


def _densities() -> list[float]:
    return [DENSITY] * len(WEIGHTS)


def _sampled(family: Family, out: Path, compare) -> Error:
    opened = [StoredTensors(folder) for folder in family.checkpoints]
    merged = StoredTensors(out)
    if set(merged.files) != set(opened[0].files):
        raise ValueError(f"{out}: expected the tensors of the base, got {len(merged.files)} others")
    errors = (compare(merged.bf16(n), tensors_of(family, n, opened)) for n in one_of_each_shape(opened[0]))
    return sum(errors, NOTHING_COMPARED)
