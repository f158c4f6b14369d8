"""Checkpoints as networks that run: built by transformers from config.json, or by a function of the user's own.

A function that needs an argument is given the checkpoint's path and loads it itself; one that needs none builds the
network, and the checkpoint's weights are put into it here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from peta_fast.errors import CheckpointError, CompatibilityError, RecipeError

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Networks:
    """How networks come into being.

    build   what --model names; None: transformers
    takes_path  whether it loads the weights itself
    device  where they run
    dtype   "auto": as stored
    """

    build: Callable | None = None
    takes_path: bool = False
    device: str = "cpu"
    dtype: str = "auto"

    @classmethod
    def of(cls, model: str | None, device: str, dtype: str) -> Networks:
        """By the command line's options. Raises UsageError, RecipeError."""
        from peta_fast.cli._functions import function_at

        if dtype not in DTYPES:
            raise RecipeError("--dtype", f"expected one of {', '.join(DTYPES)}, got {dtype!r}")
        _check_device(device)
        build = function_at("--model", model) if model else None
        takes_path = build is not None and not takes(build) and takes(build, None)
        return cls(build, takes_path, device, dtype)

    def load(self, path: str | None, heads: Sequence[str] = ()) -> Any:
        """The network with the checkpoint's weights, in eval mode; without a path as it was built.

        heads  names or patterns of what the checkpoint may lack, or have in another size

        Raises CheckpointError, CompatibilityError for weights that are not all of the network's.
        """
        from peta_fast.cli.fit._user import called
        from peta_fast.formats.hub import locate

        if self.build is None:
            network = _by_transformers(path, self.dtype, heads)
        elif self.takes_path:
            network = called("--model", self.build, path and locate(path))
        else:
            network = called("--model", self.build)
        self._require_module(network)
        if path is not None and self.build is not None and not self.takes_path:
            _put_weights(network, path, heads)
        if self.dtype != "auto" and self.build is not None:
            import torch

            network = network.to(getattr(torch, self.dtype))
        return network.to(self.device).eval()

    def state(self, path: str, heads: Sequence[str]) -> dict[str, Any]:
        """The checkpoint's tensors by the network's names, on the CPU; heads in their sizes. Raises as load does."""
        from peta_fast._engine import as_torch

        network = self.load(path, heads if self.build is not None and not self.takes_path else ())
        refuse_other_names(network, path)
        state = {name: tensor.detach().cpu() for name, tensor in network.state_dict().items()}
        if self.build is not None and not self.takes_path:  # one network for all sizes
            source = _opened(path)
            for name in filter(lambda name: is_head(name, heads), source.tensors):
                state[name] = as_torch(source.buffer(name)).reshape(tuple(source.tensors[name].shape))
        return state

    def _require_module(self, network: Any) -> None:
        import torch

        if not isinstance(network, torch.nn.Module):
            raise CompatibilityError("--model", f"expected a torch.nn.Module, got {type(network).__name__}")


def takes(function: Callable, *words: Any) -> bool:
    """Whether it can be called with these."""
    import inspect

    try:
        inspect.signature(function).bind(*words)
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature
        return bool(words)
    return True


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RecipeError("--device", f"{device!r} cannot be used: {str(error).splitlines()[0]}") from error


def _by_transformers(path: str, dtype: str, heads: Sequence[str]) -> Any:
    from peta_fast.formats.adapted_checkpoint import refuse_bare_adapter
    from peta_fast.formats.hub import locate

    folder = locate(path)
    refuse_bare_adapter(folder)
    architecture = _architecture(folder, path)
    try:
        import transformers
    except ImportError as error:
        raise CheckpointError(
            path, "is built by transformers, which is not installed",
            "pip install 'peta_fast[peft]', or say --model MODULE:FUNCTION.",
        ) from error  # fmt: skip
    kind = getattr(transformers, architecture, None)
    if kind is None:
        raise CheckpointError(
            path, f"is a {architecture}, which transformers {transformers.__version__} does not have",
            "Say --model MODULE:FUNCTION, which loads it.",
        )  # fmt: skip
    transformers.utils.logging.set_verbosity_error()  # what it would say is checked below
    transformers.utils.logging.disable_progress_bar()
    try:
        network, found = kind.from_pretrained(
            str(folder),
            dtype=dtype,
            output_loading_info=True,
            local_files_only=True,
            ignore_mismatched_sizes=bool(heads),
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(path, f"transformers cannot load it: {str(error).splitlines()[0]}") from error
    wrong = [*found["missing_keys"], *(entry[0] for entry in found["mismatched_keys"])]
    _refuse(path, [name for name in sorted(wrong) if not is_head(name, heads)], "lacks")
    return network


def _architecture(folder: Path, path: str) -> str:
    try:
        names = json.loads((folder / "config.json").read_text()).get("architectures")
    except (OSError, ValueError, AttributeError):
        names = None
    if not names:
        raise CheckpointError(
            path, "expected a config.json that names an architecture, found none",
            "Say --model MODULE:FUNCTION: the function builds the network, and loads it if it takes a path.",
        )  # fmt: skip
    return names[0]


def _put_weights(network: Any, path: str, heads: Sequence[str]) -> None:
    """The checkpoint's tensors into the network; a tied name needs but one of them."""
    import torch

    from peta_fast._engine import as_torch

    source = _opened(path)
    names = {**{n: n for n in source.tensors}, **source.aliases}
    state = network.state_dict(keep_vars=True)
    there = {_memory(t) for n, t in state.items() if n in names}
    _refuse(path, [n for n, t in state.items() if n not in names and _memory(t) not in there and not is_head(n, heads)],
            "lacks")  # fmt: skip
    _refuse(path, [n for n in source.tensors if n not in state and not is_head(n, heads)], "has")
    with torch.no_grad():
        for name, tensor in state.items():
            if name not in names:
                continue
            shape = tuple(source.tensors[names[name]].shape)
            if shape == tuple(tensor.shape):
                tensor.copy_(as_torch(source.buffer(names[name])).reshape(shape))
            elif not is_head(name, heads):
                raise CompatibilityError(
                    path, f"{name!r} is {list(shape)}, the network has {list(tensor.shape)}",
                    f"Heads that tasks have for themselves stay out of fits: --heads {name.rpartition('.')[0]}. "
                    "Else --model must build it in this size.",
                )  # fmt: skip


def _memory(tensor: Any) -> Any:
    return tensor.data_ptr() or id(tensor), tuple(tensor.shape)


def is_head(name: str, heads: Sequence[str]) -> bool:
    """Whether a tensor is one of those of which each task has its own."""
    return any(name == head or name.startswith(f"{head}.") or fnmatch(name, head) for head in heads)


def _refuse(path: str, names: Sequence[str], verb: str) -> None:
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        other = "the network has" if verb == "lacks" else "the network lacks"
        raise CompatibilityError(
            path, f"{verb} {names[0]!r}{more}, which {other}",
            f"Is it a checkpoint of this network? `peta-fast inspect {path}` shows what it holds.",
        )  # fmt: skip


def _opened(path: str) -> Any:
    from peta_fast.formats import open_checkpoint
    from peta_fast.formats.hub import locate

    return open_checkpoint(locate(path))


def refuse_other_names(network: Any, path: str, heads: Sequence[str] = ()) -> None:
    """Raises CompatibilityError where the file has other names than the network, so that no recipe would fit."""
    source = _opened(path)
    names = {*source.tensors, *source.aliases}
    state = {n: p for n, p in network.named_parameters(remove_duplicate=False)}
    there = {_memory(p) for n, p in state.items() if n in names}
    lacking = [n for n, p in state.items() if n not in names and _memory(p) not in there and not is_head(n, heads)]
    if lacking:
        near = next(
            (n for n in names if n.endswith(lacking[0].rpartition(".")[0].rpartition(".")[2] + ".weight")), None
        )
        raise CompatibilityError(
            path,
            f"has no {lacking[0]!r}, as the network calls it" + (f"; it has {near!r}" if near else ""),
            "A merge goes by the files' names: save the network again under its own, with save_pretrained or by its "
            "state_dict().",
        )


def tied_elsewhere(network: Any, path: str) -> list[str]:
    """Modules whose weight the file holds under another module's name alone: a merge meets it there, as what it is."""
    source = _opened(path)
    names = {*source.tensors, *source.aliases}
    parameters = dict(network.named_parameters(remove_duplicate=False))
    return [n.removesuffix(".weight") for n in parameters if n.endswith(".weight") and n not in names]
