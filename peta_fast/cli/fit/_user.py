"""What users' functions do: batches for a task, losses. Their errors are theirs, and are said to be so."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from peta_fast.cli._errors import UsageError
from peta_fast.errors import PetaFastError


def called(option: str, function: Callable, *words: Any) -> Any:
    """What it returns. Raises UsageError, naming the option, for whatever it raises."""
    try:
        return function(*words)
    except (PetaFastError, UsageError):
        raise
    except Exception as error:
        raise _theirs(option, function, error) from error


def _theirs(option: str, function: Callable, error: Exception) -> UsageError:
    name = getattr(function, "__name__", str(function))
    return UsageError(
        option, f"{name} raised {type(error).__name__}: {error}", "Run it again with --debug for the traceback."
    )


class Batches:
    """What --data returns for a task, to be gone through as often as wanted; a generator is asked for anew."""

    def __init__(self, function: Callable, task: str, first: Iterable):
        self.function, self.task = function, task
        self.first: Iterable | None = first

    def __iter__(self) -> Iterator[Any]:
        found = self.first if self.first is not None else _asked(self.function, self.task)
        if isinstance(found, Iterator):  # it serves once
            self.first = None
        return self._guarded(found)

    def _guarded(self, found: Iterable) -> Iterator[Any]:
        batches = called("--data", iter, found)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except PetaFastError:
                raise
            except Exception as error:
                raise _theirs("--data", self.function, error) from error
            yield batch


class SizedBatches(Batches):
    """The same where the number of batches is known."""

    def __len__(self) -> int:
        return len(self.first)


def batches_of(data: Sequence[str], names: Sequence[str]) -> list[Batches]:
    """One a task: what --data's functions give for their names. Raises UsageError."""
    from peta_fast.cli._functions import function_at
    from peta_fast.cli.fit._networks import takes

    if not data:
        raise UsageError("--data", "is missing", "Say which function returns the batches: --data MODULE:FUNCTION.")
    functions = [function_at("--data", text) for text in data]
    if len(functions) not in (1, len(names)):
        raise UsageError(
            "--data", f"expected one function, or one for each of {len(names)} models, got {len(functions)}"
        )
    if len(functions) < len(names):
        if not takes(functions[0], None):
            raise UsageError(
                "--data", f"{data[0]} takes no argument, and there are {len(names)} models",
                "Let it take the task's name, which is the model's, or name a function for each.",
            )  # fmt: skip
        functions *= len(names)
    return [_batches(function, name) for function, name in zip(functions, names, strict=True)]


def _batches(function: Callable, task: str) -> Batches:
    first = _asked(function, task)
    return (SizedBatches if hasattr(first, "__len__") else Batches)(function, task, first)


def _asked(function: Callable, task: str) -> Iterable:
    from peta_fast.cli.fit._networks import takes

    found = called("--data", function, *([task] if takes(function, task) else []))
    if not isinstance(found, Iterable):
        raise UsageError("--data", f"expected batches for {task!r}, got {type(found).__name__}")
    return found


def names_of(models: Sequence[str], names: str | None) -> list[str]:
    """Of the tasks: --names, or the last parts of the models' paths. Raises UsageError where two are the same."""
    from pathlib import Path

    found = names.split(",") if names is not None else [_stem(Path(model)) for model in models]
    if len(found) != len(models):
        raise UsageError("--names", f"expected {len(models)}, one a model, got {len(found)}")
    twice = next((name for name in found if found.count(name) > 1 or not name or "/" in name), None)
    if twice is not None:
        raise UsageError("--names", f"expected a name of its own for each model, got {', '.join(found)}")
    return found


def _stem(path: Any) -> str:
    """math/ -> math; math/model.safetensors -> math; math.safetensors -> math"""
    if path.suffix in (".safetensors", ".bin", ".pt"):
        return path.parent.name if path.stem in ("model", "pytorch_model") and path.parent.name else path.stem
    return path.resolve().name if str(path) in (".", "..") else path.name
