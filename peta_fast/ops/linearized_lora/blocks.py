"""Block shapes of the kernels, and what else the GPU decides: measured where a table (table.py) has it, or by rule.

    sm_90/fused_general/M64-K4096-N4096-R16     ->  {"BM": 64, "BN": 64, "BK": 64, "GROUP": 8, ...}
    sm_90/crossover_general/K4096-N4096-R16     ->  {"rows": 256}: up to so many rows the fused kernel runs

M, K and N stand for all sizes up to them and above half of them (up to 16 for the smallest), R for the padded rank.
A kernel's name ends in _general where B0 is not 0, then in _dual where a tangent is carried.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from peta_fast.ops.linearized_lora import table

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FUSED_ROWS = 256
"""Where no table says otherwise: beyond so many rows cuBLAS adds the base product to what prefill wrote."""
PROGRAMS = 132
"""What a launch should have at least where no GPU says how many multiprocessors it has: an H100's or H200's."""

Blocks = dict[str, int]


@dataclass(frozen=True)
class Place:
    """A kind of GPU: the tables' name for it, and its number of multiprocessors."""

    name: str
    programs: int


@functools.cache
def place_of(device: torch.device) -> Place:
    """Of any device; one that is no GPU of NVIDIA's stands in no table."""
    if device.type != "cuda":
        return Place("interpreter" if INTERPRETED else "none", PROGRAMS)
    found = torch.cuda.get_device_properties(device)
    return Place(f"sm_{found.major}{found.minor}", found.multi_processor_count)


def padded_rank(r: int) -> int:
    return max(16, power_of_two(r))


def power_of_two(n: int) -> int:
    """The smallest that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def bucket(n: int) -> int:
    return max(16, power_of_two(n))


def name_of(kernel: str, general: bool, dual: bool = False) -> str:
    return kernel + "_general" * general + "_dual" * dual


def key_of(kernel: str, place: Place, M: int, N: int, K: int, R: int) -> str:
    return f"{place.name}/{kernel}/M{bucket(M)}-K{bucket(K)}-N{bucket(N)}-R{R}"


def crossover_key(kind: str, place: Place, N: int, K: int, R: int) -> str:
    return f"{place.name}/{kind}/K{bucket(K)}-N{bucket(N)}-R{R}"


# ---------------------------------------------------------------- what runs

_forced: dict[str, Blocks] = {}
_fitting: dict[str, Blocks] = {}


def chosen(kernel: str, place: Place, M: int, N: int, K: int, R: int) -> Blocks:
    """The blocks that a launch takes: forced, or found to fit, or in a table, or by rule."""
    if kernel in _forced:
        return _forced[kernel]
    key = key_of(kernel, place, M, N, K, R)
    if key not in _fitting:
        measured = table.lookup(key)
        _fitting[key] = rule(kernel, M, R) if measured is None else measured
    return _fitting[key]


def fused_rows(general: bool, dual: bool, place: Place, N: int, K: int, R: int) -> int:
    measured = table.lookup(crossover_key(name_of("crossover", general, dual), place, N, K, R))
    return FUSED_ROWS if measured is None else measured["rows"]


def shrink(kernel: str, place: Place, M: int, N: int, K: int, R: int) -> bool:
    """Remembers smaller blocks for a GPU that has no room for those that were chosen; False where none are left."""
    smaller = None if kernel in _forced else smaller_than(chosen(kernel, place, M, N, K, R))
    if smaller is None:
        return False
    _fitting[key_of(kernel, place, M, N, K, R)] = smaller
    return True


def smaller_than(blocks: Blocks) -> Blocks | None:
    """One stage less, and from two on halves of the largest side; None below 16 x 16."""
    if blocks["num_stages"] > 2:
        return {**blocks, "num_stages": blocks["num_stages"] - 1}
    side = max((s for s in blocks if s in ("BM", "BN", "BK")), key=blocks.__getitem__)
    return {**blocks, side: blocks[side] // 2} if blocks[side] > 16 else None


@contextlib.contextmanager
def forced(**blocks: Blocks) -> Iterator[None]:
    """Inside, the kernels of these names take these blocks or raise."""
    before = dict(_forced)
    _forced.update(blocks)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def forget() -> None:
    """Tables are read again at the next launch."""
    _fitting.clear()
    table.forget()


# ---------------------------------------------------------------- rules


def rule(kernel: str, M: int, R: int) -> Blocks:
    """What runs where nothing was measured. The same for all sizes of a bucket, so that a size decides no rounding."""
    dual = kernel.endswith("_dual")
    rules = {
        "fused": lambda: fused_blocks(bucket(M), R, dual),
        "prefill": lambda: prefill_blocks(R, dual),
        "partials": lambda: partials_blocks(R),
        "finish": lambda: finish_blocks(R),
        "dA": lambda: dA_blocks(R),
    }
    return rules[kernel.partition("_")[0]]()


def fused_blocks(M: int, R: int, dual: bool = False) -> Blocks:
    """Narrow columns where few rows leave few programs, and no more sums than a program's registers hold."""
    BM = 16 if M <= 16 else 32 if M <= 32 or R > 64 or (dual and R > 16) else 64 if M <= 64 or dual or R > 16 else 128
    BN = 32 if BM <= 32 else 64 if BM == 64 else 128
    warps = 4 if BM * BN <= 4096 and R <= 32 else 8
    BK = 128 if BM <= 32 and R <= 32 and not dual else 64
    return {"BM": BM, "BN": BN, "BK": BK, "GROUP": 8, "num_warps": warps, "num_stages": 3 if dual or R > 32 else 4}


def prefill_blocks(R: int, dual: bool = False) -> Blocks:
    if R > 64:
        return {"BM": 64, "BN": 64, "BK": 32, "num_warps": 8, "num_stages": 3}
    BM = 32 if dual or R > 32 else 64
    return {"BM": BM, "BN": 64 if R > 32 else 128, "BK": 64, "num_warps": 4, "num_stages": 3}


def partials_blocks(R: int) -> Blocks:
    """gdB's part [R, BN] stays in registers; the wider, the fewer parts of v."""
    BN = 256 if R <= 32 else 128
    return {"BM": 64 if R <= 64 else 32, "BN": BN, "num_warps": 8, "num_stages": 3 if R <= 64 else 2}


def finish_blocks(R: int) -> Blocks:
    return {"BM": 64 if R <= 32 else 32, "BN": 64, "BK": 128 if R <= 32 else 64, "num_warps": 4, "num_stages": 2}


def dA_blocks(R: int) -> Blocks:
    return {"BM": 128 if R <= 64 else 64, "BK": 32, "num_warps": 4, "num_stages": 4}


# ---------------------------------------------------------------- what else tuning tries

CANDIDATES: dict[str, tuple[tuple[int, ...], ...]] = {
    "fused": ((16, 64, 128, 4, 4), (32, 64, 128, 4, 3), (64, 128, 64, 8, 4), (128, 64, 64, 8, 4), (128, 128, 64, 8, 3)),
    "fused_dual": ((32, 64, 64, 8, 3), (64, 64, 64, 8, 3)),
    "prefill": ((32, 128, 128, 4, 3), (128, 128, 64, 8, 3)),
    "prefill_dual": ((64, 128, 64, 8, 3),),
    "partials": ((64, 128, 4, 4), (128, 256, 8, 2)),
    "finish": ((32, 64, 128, 4, 3), (64, 64, 256, 8, 2)),
    "dA": ((64, 64, 4, 4), (128, 16, 4, 4)),
}
"""For ranks up to 16: BM, BN and BK, those that the kernel has, then warps and stages."""


def candidates(kernel: str, M: int, R: int) -> list[Blocks]:
    """Some that are worth a try, the rule's first; none with twice the rows that there are."""
    first = rule(kernel, M, R)
    if R > 16:
        return [first, {**first, "num_stages": first["num_stages"] - 1}]
    base = kernel.partition("_")[0]
    kind = name_of(base, False, kernel.endswith("_dual"))
    names = [name for name in first if name != "GROUP"]
    tried = [dict(zip(names, numbers, strict=True)) for numbers in CANDIDATES[kind]]
    tried = [{**first, **blocks} for blocks in tried if blocks["BM"] <= bucket(M)]
    return [first, *(blocks for blocks in tried if blocks != first)]
