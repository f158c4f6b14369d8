"""The passes in native code, csrc/concrete_mask: contiguous tensors on the CPU, all those of a model in one call."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from peta_fast._native import native
from peta_fast.ops import records
from peta_fast.ops.concrete_mask.pieces import Adam, Piece

CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
SAMPLE, MEAN, MERGE, REDUCE, UPDATE = range(5)


def serves(piece: Piece) -> bool:
    """Whether native code is there and takes these tensors."""
    if piece.logits is not None and piece.logits.dtype != torch.float32:
        return False
    fit = all(t.device.type == "cpu" and t.dtype in CODES and t.is_contiguous() for t in piece.tensors)
    return fit and native() is not None


def sample(logits: Tensor, key: int, temperature: float, out: Tensor) -> None:
    """out [*S] fp32 = m"""
    _run(SAMPLE, [Piece(logits=logits, key=key, out=out)], temperature)


def means(pieces: Sequence[Piece], temperature: float) -> list[Tensor]:
    """The mean of every mask, 0-dimensional fp64."""
    sums = _run(MEAN, pieces, temperature, sums=np.arange(len(pieces) + 1))
    return [torch.tensor(s / max(p.size, 1), dtype=torch.float64) for s, p in zip(sums, pieces, strict=True)]


def merge(pieces: Sequence[Piece], temperature: float) -> None:
    """out = base + sum_t lambda_t (tau_t m) / mean"""
    _run(MERGE, pieces, temperature)


def coefficient_gradients(pieces: Sequence[Piece], temperature: float, products: bool = False) -> list[Tensor]:
    """[T] fp64 each. products: g, which is fp32 then, becomes g sum_t lambda_t tau_t, in place."""
    places = np.cumsum([0, *(len(p.task_vectors) for p in pieces)])
    more = {"product": [p.g.data_ptr() for p in pieces]} if products else {}
    sums = torch.from_numpy(_run(REDUCE, pieces, temperature, sums=places, **more))
    return [
        sums[a:b] * (1 / p.mean if p.mean > 0 else 0.0) for a, b, p in zip(places[:-1], places[1:], pieces, strict=True)
    ]


def logit_gradients(pieces: Sequence[Piece], shifts: Sequence[Tensor], temperature: float) -> list[Tensor]:
    """The gradients of the logits, fp32."""
    found = [torch.empty_like(p.logits) for p in pieces]
    _run(UPDATE, pieces, temperature, shift=[float(s) for s in shifts], gradient=[t.data_ptr() for t in found])
    return found


def adam(
    pieces: Sequence[Piece],
    shifts: Sequence[Tensor],
    temperature: float,
    moments: Sequence[tuple[Tensor, Tensor]],
    rule: Adam,
) -> None:
    """A step of the logits against their gradients, which are not stored. moments: two fp32 tensors a piece."""
    first, second = ([m[which].data_ptr() for m in moments] for which in (0, 1))
    _run(UPDATE, pieces, temperature, rule, shift=[float(s) for s in shifts], exp_avg=first, exp_avg_sq=second)


def _run(mode: int, pieces: Sequence[Piece], temperature: float, rule: Adam | None = None, sums=None, **columns):
    tensors, tasks = np.zeros(len(pieces), records.MASK_TENSOR), []
    for record, piece in zip(tensors, pieces, strict=True):
        record["size"], record["key"] = piece.size, piece.key
        record["mean"] = 1.0 if piece.mean is None else float(piece.mean)
        record["first_task"], record["tasks"] = len(tasks), len(piece.task_vectors)
        record["logits"] = 0 if piece.logits is None else piece.logits.data_ptr()
        for name, tensor in (("base", piece.base), ("out", piece.out), ("g", piece.g)):
            if tensor is not None:
                record[name], record[f"{name}_dtype"] = tensor.data_ptr(), CODES[tensor.dtype]
        coefficients = [] if piece.coefficients is None else piece.coefficients.tolist()
        for place, x in enumerate(piece.task_vectors):
            tasks.append((x.data_ptr(), coefficients[place] if coefficients else 0.0, CODES[x.dtype]))
    for name, values in columns.items():
        tensors[name] = values
    if sums is not None:
        tensors["first_sum"] = sums[:-1]
    found = np.zeros(0 if sums is None else sums[-1])
    settings = np.zeros(1, records.MASK_SETTINGS)
    settings["temperature"] = temperature
    if rule is not None:
        for name in ("beta1", "beta2", "rate", "root", "epsilon"):
            settings[name] = getattr(rule, name)
    native().concrete_mask(mode, tensors, np.array(tasks, records.MASK_TASK), settings, found, torch.get_num_threads())
    return found
