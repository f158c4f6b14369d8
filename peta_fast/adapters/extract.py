"""From a full fine-tune to an adapter: the best low-rank approximation of every weight's change, and how good it is.

    model - base ~ B A        a randomized SVD that reads the change (q + 2) times, tile by tile; error measured

What the adapter leaves out (embeddings, norms and biases unless they are saved whole) counts as error, by name.
Source: Halko, Martinsson and Tropp, SIAM Review 2011.
"""

from __future__ import annotations

import difflib
import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peta_fast._assignment import layer_of
from peta_fast.adapters.inputs import reference
from peta_fast.adapters.merge import DTYPES
from peta_fast.adapters.replaced import as_tensor
from peta_fast.adapters.results import AdapterReport, ModuleReport, Stored, adapter_card, refuse_output, write_lora
from peta_fast.buffers import MERGEABLE, Buffer
from peta_fast.errors import CheckpointError, CompatibilityError, RecipeError
from peta_fast.formats import Checkpoint, open_checkpoint
from peta_fast.formats.hub import locate
from peta_fast.formats.lora_adapter import numbers
from peta_fast.formats.peft_adapter import PREFIX, target_modules
from peta_fast.merging import parse_bytes
from peta_fast.ops.low_rank import DenseTiles, LowRank, Tiles, refactored

TILE = 1 << 22
"""Elements of a run of rows."""
REST = ("drop", "save", "refuse")
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
"""model_type of configs whose layers are transformers' Conv1D: weights [in, out]."""


def extract_adapter(
    model: str | Path,
    base: str | Path,
    out: str | Path,
    *,
    rank: int = 16,
    energy: float | None = None,
    targets: Sequence[str] | None = None,
    rest: str = "drop",
    seed: int = 0,
    dtype: str = "float32",
    max_memory: str | int = "768MB",
    force: bool = False,
) -> AdapterReport:
    """Writes an adapter that makes of the base, as nearly as its rank allows, the model.

        extract_adapter("math-7b", "base-7b", "math-lora", rank=32)

    rank     of every module, at most
    energy   keep the fewest ranks that hold this share of the squared norm of a change, from 0 to 1
    targets  tails of module names (q_proj, self_attn.q_proj) or regular expressions that match whole names; all
             matrices of the layers when not given
    rest     what becomes of changes outside: "drop" and report, "save" whole (modules_to_save, biases), or "refuse"
    max_memory  a change is kept in memory where a third of this holds it, else read again for every pass

    Raises RecipeError, CheckpointError, CompatibilityError or ResourceError; nothing is written then.
    """
    began = time.perf_counter()
    _check(rank, energy, rest, dtype, seed)
    references = [reference(what, str(name)) for what, name in (("model", model), ("base", base))]
    tuned, start = (open_checkpoint(locate(ref.path, ref.revision)) for ref in references)
    out = Path(out)
    refuse_output(out, [Path(c.directory or c.path) for c in (tuned, start)], force)
    pairs = _Pairs(tuned, start)
    chosen = pairs.chosen(targets)
    kept = parse_bytes(max_memory, "max_memory") // 3
    conv1d = start.config.get("model_type") in CONV1D_MODELS
    modules, reports = {}, []
    for name in (n for n in chosen if pairs.differ(n)):
        try:
            found = refactored(pairs.tiles(name, kept), rank, seed=seed, dtype=DTYPES[dtype], energy=energy)
        except ValueError as error:
            raise CheckpointError(
                f"{tuned.path} and {start.path}", f"{name!r}: {error}", "Mend that checkpoint."
            ) from error
        change = LowRank(found.change.A.T.contiguous(), found.change.B.T.contiguous()) if conv1d else found.change
        shape = start.tensors[name].shape
        channels, tail = (change.A.shape[1] // math.prod(shape[2:]), shape[2:]) if len(shape) > 2 else (0, ())
        modules[module_of(name)] = Stored(change, tail=tail, channels=channels)
        reports.append(ModuleReport(name.removesuffix(".weight"), change.rank, found.norm, found.error))
        for checkpoint in (tuned, start):
            checkpoint.release(name)
    if not modules:
        raise CompatibilityError(
            str(tuned.path), f"changes none of the chosen modules of {start.path}", "Choose others."
        )
    left = [name for name in start.tensors if name not in chosen and pairs.differ(name)]
    replaced, fields = _rest(rest, left, pairs, set(modules))
    reports += [ModuleReport(name, 0, norm, norm) for name, norm in ((n, pairs.norm(n)) for n in left) if not replaced]
    config = {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": str(base), "fan_in_fan_out": conv1d,
        "inference_mode": True, "init_lora_weights": True, "lora_dropout": 0.0, **fields,
        "target_modules": target_modules(modules, sorted({module_of(n) for n in start.tensors})),
    }  # fmt: skip
    text = f"extract: {model}\nbase: {base}\nrank: {rank}\n"
    write_lora(out, modules, replaced, config, adapter_card(str(base), [str(model)], "extract", text))
    notes = [f"left out, and counted as error: {name} ({pairs.norm(name):.3g})" for name in left if not replaced]
    seconds = {"all": time.perf_counter() - began}
    return AdapterReport(out, "extract", "model - base", reports, sorted(replaced), seconds, notes)


def module_of(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _check(rank: int, energy: float | None, rest: str, dtype: str, seed: int) -> None:
    if type(seed) is not int or not 0 <= seed < 1 << 63:
        raise RecipeError("seed", f"expected an integer from 0 to 2^63 - 1, got {seed!r}")
    if type(rank) is not int or rank < 1:
        raise RecipeError("rank", f"expected an integer of at least 1, got {rank!r}")
    if energy is not None and not 0.0 < energy <= 1.0:
        raise RecipeError("energy", f"expected a share above 0, up to 1, got {energy!r}")
    for what, name, known in (("rest", rest, REST), ("dtype", dtype, DTYPES)):
        if name not in known:
            raise RecipeError(what, f"expected one of {', '.join(known)}, got {name!r}")


class _Pairs:
    """Tensors of a model and of its base. Raises CompatibilityError where names or shapes differ."""

    def __init__(self, tuned: Checkpoint, base: Checkpoint):
        self.tuned, self.base = tuned, base
        self._differ: dict[str, bool] = {}
        for name, info in base.tensors.items():
            stored = tuned.aliases.get(name, name)
            if stored not in tuned.tensors:
                raise CompatibilityError(str(tuned.path), f"lacks {name!r}, which {base.path} has", "They do not fit.")
            other = tuned.tensors[stored]
            if other.shape != info.shape:
                raise CompatibilityError(
                    str(tuned.path), f"{name!r} is {list(other.shape)}, in {base.path} {list(info.shape)}",
                    "Its vocabulary was changed, or it belongs to another base.",
                )  # fmt: skip
        extra = [n for n in tuned.tensors if n not in base.tensors and n not in base.aliases]
        if extra:
            raise CompatibilityError(str(tuned.path), f"has {extra[0]!r}, which {base.path} lacks", "They do not fit.")

    def chosen(self, targets: Sequence[str] | None) -> list[str]:
        """The weights to be factored, in the base's order."""
        matrices = [
            name for name, info in self.base.tensors.items()
            if name.endswith(".weight") and len(info.shape) > 1 and info.dtype in MERGEABLE
        ]  # fmt: skip
        if targets is None:
            return [name for name in matrices if layer_of(name)]
        found = []
        for target in targets:
            mine = [name for name in matrices if _matches(target, module_of(name))]
            if not mine:
                names = sorted({module_of(n).rpartition(".")[2] for n in matrices})
                near = difflib.get_close_matches(target, names, 3, 0.3) or names[:8]
                raise RecipeError("targets", f"{target!r} matches no matrix", f"There are {', '.join(near)}.")
            found += mine
        return list(dict.fromkeys(found))

    def buffers(self, name: str, start: int = 0, stop: int | None = None) -> tuple[Buffer, Buffer]:
        """(the model's, the base's) elements."""
        stored = self.tuned.aliases.get(name, name)
        return self.tuned.buffer(stored, start, stop), self.base.buffer(name, start, stop)

    def differ(self, name: str) -> bool:
        if name not in self._differ:
            a, b = self.buffers(name)
            self._differ[name] = a.dtype != b.dtype or a.as_bytes() != b.as_bytes()
        return self._differ[name]

    def tiles(self, name: str, kept: int) -> Tiles:
        shape = self.base.tensors[name].shape
        found = DifferenceTiles(self, name, (shape[0], math.prod(shape[1:])))
        if 4 * math.prod(shape) > kept:
            return found
        return DenseTiles(torch.cat([tile for _, tile in found]))

    def norm(self, name: str) -> float:
        """Of the change."""
        a, b = (numbers(buffer).astype(np.float64) for buffer in self.buffers(name))
        return float(np.linalg.norm(a - b))


@dataclass(frozen=True)
class DifferenceTiles:
    """model - base in fp32, in runs of rows, read anew every time."""

    pairs: _Pairs
    name: str
    shape: tuple[int, int]

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        rows, columns = self.shape
        step = max(1, TILE // columns)
        for row in range(0, rows, step):
            a, b = self.pairs.buffers(self.name, row * columns, min(row + step, rows) * columns)
            yield row, (as_tensor(a).float() - as_tensor(b).float()).view(-1, columns)


def _matches(target: str, module: str) -> bool:
    if module == target or module.endswith(f".{target}"):
        return True
    try:
        return re.fullmatch(target, module) is not None
    except re.error:
        return False


def _rest(
    policy: str, left: Sequence[str], pairs: _Pairs, adapted: set[str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(whole tensors by key, fields of the config) for what changed outside the chosen modules."""
    fields: dict[str, Any] = {"bias": "none", "modules_to_save": None}
    if not left or policy == "drop":
        return {}, fields
    if policy == "refuse":
        raise CompatibilityError(
            str(pairs.tuned.path), f"{left[0]!r} and {len(left) - 1} more changed outside the chosen modules",
            "Use --rest save to carry them whole, or --rest drop to leave them out.",
        )  # fmt: skip
    keys: dict[str, str] = {}
    saved = sorted({module_of(name) for name in left} - adapted)
    for name in pairs.base.tensors:
        module, _, last = name.rpartition(".")
        if module in saved:
            keys[name] = f"{PREFIX}{name}"
        elif module in adapted and name in left:
            keys[name] = f"{PREFIX}{module}.base_layer.{last}"
            fields["bias"] = "lora_only"
    fields["modules_to_save"] = saved or None
    shapes = {name: pairs.base.tensors[name].shape for name in keys}
    return {key: as_tensor(pairs.buffers(name)[0]).reshape(shapes[name]) for name, key in keys.items()}, fields
