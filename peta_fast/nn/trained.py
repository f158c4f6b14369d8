"""What was trained, alone: as a state dict, to disk and back. A merge takes everything else from the base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from peta_fast.errors import CheckpointError, CompatibilityError, RecipeError
from peta_fast.formats import open_checkpoint
from peta_fast.formats.disk import write_whole
from peta_fast.formats.peft_adapter import write_tensors
from peta_fast.formats.torch_state import torch_state
from peta_fast.formats.trained_only import METADATA, TrainedTensors, holds_trained_only

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def trained_tensors(model: nn.Module) -> TrainedTensors:
    """The parameters with requires_grad by name, detached, not copied. Raises RecipeError when there are none."""
    found = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise RecipeError("trained_tensors", "every parameter is frozen", "Call it on the model that was trained.")
    return TrainedTensors(found)


def trained_difference(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> TrainedTensors:
    """The tensors of a whole state dict that are not bit for bit those of the base: what its training touched.

    Raises CompatibilityError where names or shapes differ, RecipeError when all tensors are the same.
    """
    if set(base) != set(tuned):
        other = sorted(set(base) ^ set(tuned))
        raise CompatibilityError("tuned", f"{other[0]!r} is in one alone; {len(other) - 1} more names differ from base")
    unlike = [n for n in base if base[n].shape != tuned[n].shape]
    if unlike:
        shapes = f"{list(tuned[unlike[0]].shape)}, in the base {list(base[unlike[0]].shape)}"
        raise CompatibilityError("tuned", f"{unlike[0]!r} is {shapes}")
    found = {n: t for n, t in tuned.items() if not _same_bits(t, base[n])}
    if not found:
        raise RecipeError("tuned", "every tensor is the base's own", "Give the checkpoint that was trained.")
    return TrainedTensors(found)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


def extract_trained(base: Path | str, tuned: Path | str, folder: Path | str) -> list[str]:
    """Writes what differs between two whole checkpoints on disk as save_trained does; returns the tensors' names.

    For models that were saved as a whole, and where a library saves tensors under other names than the model has them.
    Raises what trained_difference raises, and CheckpointError for files that cannot be read.
    """
    with open_checkpoint(base) as first, open_checkpoint(tuned) as second:
        states = [{n: t for n, t in torch_state(c).items() if n not in c.aliases} for c in (first, second)]
        found = trained_difference(*states)
        save_trained(found, folder)
        if second.directory is not None and (second.directory / CONFIG).exists():
            text = (second.directory / CONFIG).read_text(encoding="utf-8")
            write_whole(Path(folder) / CONFIG, text.encode())
    return list(found)


def save_trained(model: nn.Module | TrainedTensors, folder: Path | str) -> None:
    """Writes model.safetensors with the trained parameters alone, and the model's config.json where it has one.

    The file's header says that the rest is the base's; `merge` and `load_trained` go by it. Raises CompatibilityError
    for sharded parameters (gather them first) and CheckpointError for values that are not finite: nothing is written.
    """
    folder = Path(folder)
    found = model if isinstance(model, TrainedTensors) else trained_tensors(model)
    for name, tensor in found.items():
        if type(tensor).__name__ == "DTensor":
            raise CompatibilityError(name, "is sharded over several processes", "Gather the model first.")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            count = int((~tensor.isfinite()).sum())
            raise CheckpointError(name, f"expected finite values, got {count} NaN or inf", "Its training has diverged.")
    write_tensors(folder / WEIGHTS, {n: t.cpu().contiguous() for n, t in found.items()}, {"format": "pt", **METADATA})
    config = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        text = json.dumps(config.to_dict(), indent=2, sort_keys=True, default=str) + "\n"
        write_whole(folder / CONFIG, text.encode())


def load_trained(model: nn.Module, folder: Path | str) -> nn.Module:
    """Puts what save_trained wrote into the base model, in place, and returns it.

    Raises CheckpointError when the folder holds another kind of checkpoint, CompatibilityError, before anything is
    changed, for names that the model lacks and for other shapes.
    """
    from safetensors.torch import load_file

    with open_checkpoint(folder) as checkpoint:
        if not holds_trained_only(checkpoint):
            problem = "expected a checkpoint of trained tensors alone, as save_trained writes it"
            raise CheckpointError(str(folder), problem, "Load a whole checkpoint with load_state_dict.")
        stored = {name: t for file in checkpoint.files for name, t in load_file(file).items()}
    places = dict(model.named_parameters())
    unknown = [n for n in stored if n not in places]
    if unknown:
        problem = f"{unknown[0]!r} is not in the model; {len(unknown) - 1} more names differ"
        raise CompatibilityError(str(folder), problem, "It belongs to another architecture.")
    unlike = [n for n, t in stored.items() if t.shape != places[n].shape]
    if unlike:
        shapes = f"{list(stored[unlike[0]].shape)}, in the model {list(places[unlike[0]].shape)}"
        raise CompatibilityError(str(folder), f"{unlike[0]!r} is {shapes}")
    with torch.no_grad():
        for name, tensor in stored.items():
            places[name].copy_(tensor)
    return model
