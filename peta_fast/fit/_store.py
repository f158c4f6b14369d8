"""Statistics on the disk: whole or not at all, and what a killed run had so far beside them, to go on from.

<out>               the finished file
<out>.unfinished    sums over the batches so far; gone when the file is there
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from peta_fast.buffers import SHORT_NAMES
from peta_fast.errors import CheckpointError, RecipeError, ResourceError
from peta_fast.fit._batches import bytes_of
from peta_fast.formats import ShardWriter, layout_shards
from peta_fast.formats.disk import make_directory

SUFFIX = ".safetensors"
UNFINISHED = ".unfinished"


class Store:
    """The files of one collection.

    path   where the statistics go
    mark   of all that they depend on but the data

    Raises RecipeError for another suffix than .safetensors.
    """

    def __init__(self, path: Path, mark: str):
        if path.suffix != SUFFIX:
            raise RecipeError("out", f"expected a name that ends in {SUFFIX}, got {path.name!r}")
        self.path, self.mark = path, mark
        self.unfinished = path.with_name(path.name + UNFINISHED)

    def finished(self, force: bool) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """The file, where it is there already and of the same model and settings.

        Raises ResourceError when it is of others and not to be replaced.
        """
        if force or not self.path.exists():
            return None
        tensors, metadata = read(self.path)
        if metadata.get("mark") != self.mark:
            raise ResourceError(
                str(self.path), "is there already, collected from another model or with other settings",
                "Use force=True to replace it, or another name.",
            )  # fmt: skip
        return tensors, metadata

    def refuse_existing(self, force: bool) -> None:
        """Raises ResourceError when the file is there already and not to be replaced."""
        if self.path.exists() and not force:
            raise ResourceError(str(self.path), "is there already", "Use force=True to replace it, or another name.")

    def begun(self) -> tuple[dict[str, Tensor], dict] | None:
        """The sums of a killed run, and how far it came; None where there are none that fit."""
        if not self.unfinished.exists():
            return None
        tensors, metadata = read(self.unfinished)
        if metadata.get("mark") != self.mark:
            return None
        return tensors, json.loads(metadata["state"])

    def keep(self, tensors: dict[str, Tensor], state: dict) -> None:
        write(self.unfinished, tensors, {"mark": self.mark, "state": json.dumps(state)})

    def finish(self, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        write(self.path, tensors, {**metadata, "mark": self.mark})
        self.unfinished.unlink(missing_ok=True)


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Tensors on the CPU, the same bytes for the same content. Raises ResourceError; no partial file stays then."""
    make_directory(path.parent)
    dtypes = {name: SHORT_NAMES[str(tensor.dtype).removeprefix("torch.")] for name, tensor in tensors.items()}
    entries = [(name, dtypes[name], tuple(tensor.shape)) for name, tensor in tensors.items()]
    (layout,) = layout_shards(entries, max_shard_size=1 << 62, metadata=metadata)
    writer = ShardWriter(replace(layout, filename=path.name), path.parent)
    try:
        with writer:
            for name, offset in layout.offsets.items():
                writer.write(offset, bytes_of(tensors[name]))
            writer.publish()
    except BaseException:
        writer.partial.unlink(missing_ok=True)
        raise


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Raises CheckpointError when there is no such file, or it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        return load_file(path), metadata
    except FileNotFoundError:
        raise CheckpointError(str(path), "expected a statistics file, found none") from None
    except Exception as error:  # safetensors raises an exception of its own for damaged files
        raise CheckpointError(str(path), f"cannot be read as safetensors: {error}", "Collect it again.") from error
