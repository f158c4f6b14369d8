"""What fitting hands back: coefficients, masks, history, and the files and settings of the same merge elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peta_fast.errors import RecipeError
from peta_fast.fit._merged_model import MergedModel
from peta_fast.fit._steps import Progress
from peta_fast.fit._store import write
from peta_fast.formats.disk import write_whole
from peta_fast.ops.concrete_mask import sample_mask
from peta_fast.ops.concrete_mask.noise import mask_key

KINDS = ("soft", "binary", "expected")


@dataclass(frozen=True)
class Masks:
    """Learned masks: logits by tensor name, and the one draw of the noise that the fitted model has."""

    logits: Mapping[str, Tensor]
    temperature: float
    seed: int
    draw: int

    def of(self, name: str, kind: str = "soft") -> Tensor:
        """The mask of a tensor: "soft", one relaxed sample; "binary", bool, that sample above 1/2; "expected"."""
        if kind not in KINDS:
            raise RecipeError("kind", f"expected one of {', '.join(KINDS)}, got {kind!r}")
        logits, key = self.logits[name], mask_key(self.seed, self.draw, name)
        if kind == "expected":
            return torch.sigmoid(logits)
        return sample_mask(logits, key=key, temperature=self.temperature, binary=kind == "binary")


class Fitted:
    """The outcome of a fit. The model that was given holds the merge.

    model         the merged model, with the base's head where heads stay apart
    coefficients  tensor name -> [T] fp32; of tensors that no task has changed, and of heads, there are none
    masks         of a Concrete fit, else None
    heads         for each task, the tensors that stayed out of the merge
    history       the steps, in order
    """

    def __init__(
        self,
        merged: MergedModel,
        coefficients: Tensor,
        history: Sequence[Progress],
        masks: Masks | None = None,
        trimmed: bool = False,
    ):
        self.model, self.heads, self.history = merged.model, merged.heads, tuple(history)
        self.coefficients = dict(zip(merged.names, coefficients.cpu(), strict=True))
        self.masks = masks
        self._num_models = merged.count
        self._kept = _kept_entries(merged) if trimmed else None
        state = merged.model.state_dict(keep_vars=True)
        first: dict[int, str] = {}
        self._shapes = {
            name: tensor.shape
            for name, tensor in state.items()
            if tensor.is_floating_point() and first.setdefault(id(tensor), name) == name
        }

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of the merged model's tensors, on the CPU."""
        return {n: t.detach().cpu().clone() for n, t in self.model.state_dict().items()}

    def mask_tensors(self, kind: str = "soft") -> dict[str, Tensor]:
        """Name -> mask, as masked_task_arithmetic takes them; see save_masks."""
        if not self.has_masks:
            raise RecipeError("masks", "this fit has learned coefficients alone", "Fit with peta_fast.fit.concrete.")
        if self._kept is not None:
            apart = [name for name in self._shapes if f"0/{name}" not in self._kept]
            return {name: self._nothing(name) for name in apart} | self._kept
        return {name: self._mask(name, kind) for name in self._shapes}

    @property
    def has_masks(self) -> bool:
        """Whether the merge wants them: those learned, or where trimmed task vectors have entries left."""
        return self.masks is not None or self._kept is not None

    def _nothing(self, name: str) -> Tensor:
        return torch.zeros(-(-self._shapes[name].numel() // 8), dtype=torch.uint8)

    def _mask(self, name: str, kind: str) -> Tensor:
        if name not in self.masks.logits:
            return self._nothing(name)
        mask = self.masks.of(name, kind).cpu()
        return bits_of(mask) if kind == "binary" else mask

    def save_masks(self, file: str | Path, kind: str = "soft") -> None:
        """Writes the masks as safetensors; the file appears whole or not at all.

        kind  "soft": the sample that the fitted model has, fp32; "binary": where that is above 1/2, one bit an element;
              "expected": sigmoid(logit), fp32

        A tensor that stayed out of the merge gets a mask of zeros: the base's values stay. The method's
        `mask_rescale: mean` divides by each mask's mean, as the fit did. Trimmed task vectors have masks of their own,
        one bit an element and task, and no rescaling.
        """
        learned = self.masks and {"kind": kind, "temperature": self.masks.temperature, "seed": self.masks.seed}
        settings = learned or {"kind": "trimmed"}
        write(Path(file), self.mask_tensors(kind), {"format": "pt"} | {k: str(v) for k, v in settings.items()})

    def weights(self) -> list[list[dict[str, Any]]]:
        """The coefficients as the recipe's `weight` has them: for each model, values by tensor name, longest first."""
        names, nothing = sorted(self._shapes, key=len, reverse=True), [0.0] * self._num_models
        value = {n: self.coefficients[n].tolist() if n in self.coefficients else nothing for n in names}
        return [
            [*({"filter": n, "value": value[n][task]} for n in names), {"value": 0.0}]
            for task in range(self._num_models)
        ]

    def recipe(self, base: str | Path, models: Sequence[str | Path], mask: str | Path | None = None) -> dict[str, Any]:
        """The same merge as a recipe, of checkpoints on disk.

        mask  the file that save_masks has written, where there are masks: learned, or of trimmed task vectors

        Raises RecipeError where the models or the mask file are not as many.
        """
        if (mask is None) == self.has_masks or len(models) != self._num_models:
            raise RecipeError(
                "recipe",
                f"expected {self._num_models} models and {'a' if self.has_masks else 'no'} mask file, "
                f"got {len(models)} and {mask}",
            )
        entries = [
            {"model": str(model), "parameters": {"weight": weight}}
            for model, weight in zip(models, self.weights(), strict=True)
        ]
        recipe = {"method": "task_arithmetic", "base_model": str(base), "models": entries}
        if mask is not None:
            recipe["method"] = "masked_task_arithmetic"
            recipe["parameters"] = {"mask": str(mask), "mask_rescale": "none" if self.masks is None else "mean"}
        return recipe

    def save_recipe(self, file: str | Path, base: str | Path, models: Sequence[str | Path], mask=None) -> None:
        """Writes recipe() as YAML, for `peta-fast merge`."""
        import yaml

        text = yaml.safe_dump(self.recipe(base, models, mask), sort_keys=False)
        write_whole(Path(file), text.encode())


def _kept_entries(merged: MergedModel) -> dict[str, Tensor]:
    """<task>/<tensor> -> where the task vector is not zero, in bits."""
    return {
        f"{task}/{name}": bits_of(vector.cpu() != 0)
        for name, piece in zip(merged.names, merged.pieces, strict=True)
        for task, vector in enumerate(piece.task_vectors)
    }


def bits_of(mask: Tensor) -> Tensor:
    """bool [*S] -> uint8 [ceil(n / 8)], little-endian: element i is bit i % 8 of byte i // 8."""
    flat = mask.flatten().to(torch.uint8)
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).reshape(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.int64).to(torch.uint8)
