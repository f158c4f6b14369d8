"""TIES: trim small changes, elect one sign an entry, average the task vectors that agree with it.

    native        trim per scope, keep |delta| >= the k-th largest, k = max(1, int(density n)); the sign of the weighted
                  sum; a zero sum leaves the base; divide by the sum of the agreeing weights
    mergekit      exactly k, equals lowest index first; a zero sum counts as plus
    peft          exactly int(density n); the sign of the unweighted sum, zero as plus; divide by the agreeing number
    ties-authors  one threshold a task over the whole model, int(density N) + 1 and all equals; unweighted; a zero sum
                  takes the majority sign of the model, and counts as minus where that is zero too
    peta          as the authors, but density 1 keeps everything and a zero majority counts as plus

Source: Yadav et al., NeurIPS 2023.
"""

from __future__ import annotations

from dataclasses import dataclass

from peta_fast.methods import MethodParams, TensorSpec, per_model, shared
from peta_fast.methods._terms import elected, elected_by_peft, terms, trimmed
from peta_fast.ops.delta_merge import All, DeltaMerge, Keep, Top

REFERENCE = "https://arxiv.org/abs/2306.01708"
COMPAT = ("native", "mergekit", "peft", "ties-authors", "peta")
SCOPE = {"ties-authors": "model", "peta": "model"}


@dataclass(frozen=True)
class Params(MethodParams):
    weight: tuple[float, ...] = per_model(1.0, help="multiplies each trimmed task vector")
    density: tuple[float, ...] = per_model(1.0, low=0.0, high=1.0, help="fraction of each task vector that is kept")
    normalize: bool = shared(True, help="divide by the agreeing weights (mergekit, native)")
    scaling: float = shared(1.0, alias="lambda", help="multiplies the merged task vector")
    merge_func: str = shared("mean", choices=("mean", "sum", "max"), help="of the agreeing (ties-authors, peta)")


def check(params: Params, compat: str) -> list[str]:
    faults = []
    if compat in SCOPE and any(w != 1 for w in params.weight):
        faults.append(f"weight: compat {compat!r} knows no weights but 1, got {params.weight}; use scaling")
    if compat == "ties-authors" and any(d >= 1 for d in params.density):
        faults.append("density: the authors' code has no 1; use compat 'peta' or 'native' to keep everything")
    if compat not in SCOPE and params.merge_func != "mean":
        faults.append(f"merge_func: {params.merge_func!r} belongs to compat 'ties-authors' and 'peta'")
    return faults


def lower(params: Params, tensor: TensorSpec) -> DeltaMerge:
    if tensor.compat in SCOPE:
        return _as_authors(params, tensor)
    if tensor.compat == "peft":
        keeps = [trimmed(d, tensor, at_least_one=False) for d in params.density]
        return elected_by_peft(params, terms(params.weight, keeps), tensor)
    return elected(params, terms(params.weight, [trimmed(d, tensor) for d in params.density]), tensor)


def _as_authors(params: Params, tensor: TensorSpec) -> DeltaMerge:
    return DeltaMerge(
        terms(params.weight, [_authors_keep(d, tensor) for d in params.density]),
        elect="unweighted",
        zero="majority-minus" if tensor.compat == "ties-authors" else "majority-plus",
        aggregate="max" if params.merge_func == "max" else "sum",
        divide="agreeing-count" if params.merge_func == "mean" else 1.0,
        scaling=params.scaling,
        scope="model",
    )


def _authors_keep(density: float, tensor: TensorSpec) -> Keep:
    """The threshold is the (N - int(N density))-th smallest, so that one more than int(N density) is kept."""
    n = tensor.trim_size
    smallest = max(1, n - int(n * density))
    return Top(n - smallest + 1) if smallest > 1 else All()
