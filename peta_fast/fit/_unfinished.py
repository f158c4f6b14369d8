"""What a killed fit had learned so far, in one file that the next call goes on from.

    coefficients, logits, and the moments of their optimizers, fp32; in the metadata the steps done, phase by phase

The file is written whole or not at all, every so many steps, and gone when the fit is done.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peta_fast.errors import RecipeError, ResourceError
from peta_fast.fit._merged_model import MergedModel
from peta_fast.fit._steps import History, Progress
from peta_fast.fit._store import read, write


class Unfinished:
    """The state of one fit; without a file nothing is kept and nothing is there.

    settings  all that the outcome depends on, beside models and batches

    Raises ResourceError for the state of a fit of other models or with other settings, CheckpointError for a damaged
    file.
    """

    def __init__(self, file: str | Path | None, every: int, merged: MergedModel, history: History, settings: Mapping):
        if every < 1:
            raise RecipeError("save_every", f"expected a number of steps above 0, got {every!r}")
        self.file, self.every, self.merged, self.history = file and Path(file), every, merged, history
        self.tensors: dict[str, Tensor] = {}
        self.phase, self.done = "", 0
        if self.file is None:
            return
        self.mark = _mark(merged, settings)
        if self.file.exists():
            self._read()

    def _read(self) -> None:
        tensors, metadata = read(self.file)
        if metadata.get("mark") != self.mark:
            raise ResourceError(
                str(self.file), "holds an unfinished fit of other models or with other settings",
                "Go on with those, or remove it to start anew.",
            )  # fmt: skip
        state = json.loads(metadata["state"])
        self.tensors, self.phase, self.done = tensors, state["phase"], state["done"]
        self.history.steps = [Progress(p, s, n, tuple(losses)) for p, s, n, losses in state["history"]]
        self.merged.advance(len(self.history.steps))

    def take(self, name: str) -> dict[str, Tensor]:
        """The tensors kept under `name/`, by the rest of their names; they are not held here any more."""
        mine = [key for key in self.tensors if key.startswith(f"{name}/")]
        return {key.removeprefix(f"{name}/"): self.tensors.pop(key) for key in mine}

    def keep(self, phase: str, done: int, parts: Callable[[], Mapping[str, Mapping[str, Tensor]]]) -> None:
        """Writes the file, when as many steps of the phase are done that it is time to."""
        if self.file is None or done % self.every:
            return
        tensors = {f"{name}/{key}": t.detach().cpu() for name, part in parts().items() for key, t in part.items()}
        steps = [[p.phase, p.step, p.steps, p.losses] for p in self.history.steps]
        state = {"phase": phase, "done": done, "history": steps}
        write(self.file, tensors, {"mark": self.mark, "state": json.dumps(state)})

    def remove(self) -> None:
        if self.file is not None:
            self.file.unlink(missing_ok=True)


def _mark(merged: MergedModel, settings: Mapping[str, Any]) -> str:
    """Of settings, tasks, and of what the models are: norms of the task vectors in fp64."""
    tasks = [task.name for task in merged.tasks]
    norms = [[v.norm(dtype=torch.float64).item() for v in piece.task_vectors] for piece in merged.pieces]
    text = json.dumps([settings, tasks, merged.names, norms], default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
