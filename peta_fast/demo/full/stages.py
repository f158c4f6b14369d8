"""Finished stages as files: whole or not there, and named by all that they depend on.

A stage's name ends in a fingerprint of its settings and of the stages before it, so that what was computed under other
settings is never taken for its result, and a second run finds everything that still holds.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

SCORES = "scores"


def fingerprint(*settings: Any) -> str:
    """12 hexadecimal digits of what can be written as JSON."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


@dataclass(frozen=True)
class Stage:
    """One stage. path: without its suffix; .json holds numbers, .safetensors tensors with numbers in its header."""

    path: Path

    @property
    def mark(self) -> str:
        return self.path.name

    @property
    def numbers_file(self) -> Path:
        return self.path.with_name(f"{self.path.name}.json")

    @property
    def tensors_file(self) -> Path:
        return self.path.with_name(f"{self.path.name}.safetensors")

    def done(self) -> bool:
        return self.numbers_file.is_file() or self.tensors_file.is_file()

    def numbers(self) -> dict[str, Any]:
        """Of either file."""
        if self.numbers_file.is_file():
            return json.loads(self.numbers_file.read_text(encoding="utf-8"))
        with safe_open(self.tensors_file, framework="pt") as file:
            return json.loads(file.metadata()[SCORES])

    def tensors(self) -> dict[str, Tensor]:
        with safe_open(self.tensors_file, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def write(self, numbers: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> None:
        if tensors is None:
            with published(self.numbers_file) as partial:
                partial.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
            return
        kept = {name: tensor.contiguous() for name, tensor in tensors.items()}
        with published(self.tensors_file) as partial:
            save_file(kept, partial, metadata={"format": "pt", SCORES: json.dumps(numbers)})

    def remove(self) -> None:
        self.tensors_file.unlink(missing_ok=True)


@contextlib.contextmanager
def published(file: Path) -> Iterator[Path]:
    """A file beside it, which takes its name when the body has ended without an error."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial-{os.getpid()}")
    try:
        yield partial
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
