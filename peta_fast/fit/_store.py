"""Statistics on the disk: whole or not at all, and what a killed run had so far beside them, to go on from.

<out>               the finished file
<out>.unfinished    sums over the batches so far; gone when the file is there
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from peta_fast.errors import CheckpointError, ResourceError
from peta_fast.formats.disk import PARTIAL, make_directory, publish, resource_error

UNFINISHED = ".unfinished"


class Store:
    """The files of one collection.

    path   where the statistics go
    mark   of all that they depend on but the data
    """

    def __init__(self, path: Path, mark: str):
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
        self._write(self.unfinished, tensors, {"mark": self.mark, "state": json.dumps(state)})

    def finish(self, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        self._write(self.path, tensors, {**metadata, "mark": self.mark})
        self.unfinished.unlink(missing_ok=True)

    def _write(self, path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        make_directory(path.parent)
        partial = path.with_name(path.name + PARTIAL)
        try:
            save_file(tensors, partial, metadata={"format": "pt", **metadata})
            with open(partial, "rb") as stream:
                os.fsync(stream.fileno())
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise resource_error(path, "written", error) from error
        publish(partial, path)


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
