"""Exact selection against a stable sort, where the sample finds the threshold and where it cannot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from backends import BACKENDS, DTYPES, NATIVE, SIMD, buffer_of, running_on, store, widen
from hypothesis import given, settings
from hypothesis import strategies as st

from peta_fast.ops import records as r
from peta_fast.ops.order_statistics import EVERYTHING, NOTHING, MagnitudeHistogram, Rank, Selection, kth_magnitudes

SOURCE = Path(__file__).parents[1] / "csrc" / "order_statistics" / "order_statistics.cpp"


def magnitude_bits(base: np.ndarray | None, x: np.ndarray, base_dtype: str, dtype: str) -> np.ndarray:
    """int64 [n]: the bits of fp32 |x - base|, or of |x|."""
    delta = widen(x, dtype) if base is None else widen(x, dtype) - widen(base, base_dtype)
    return (delta.view(np.uint32) & np.uint32(r.ABS_MASK)).astype(np.int64)


def rank_reference(bits: np.ndarray, count: int, order: np.ndarray | None = None) -> Rank:
    """By a stable sort: largest first, equals by index."""
    if count <= 0:
        return NOTHING
    if count >= bits.size:
        return EVERYTHING
    order = np.argsort(-bits, kind="stable") if order is None else order
    threshold = int(bits[order[count - 1]])
    above, equal = int((bits > threshold).sum()), int((bits == threshold).sum())
    return Rank(threshold, r.LAST if above + equal == count else int(order[count - 1]), above, equal)


def check(x, counts, *, dtype="F32", base=None, base_dtype="F32", threads=(1, 2, 4), offset=0) -> list[Rank]:
    """Every backend and number of threads finds what the sort finds; returns it."""
    bits = magnitude_bits(base, x, base_dtype, dtype)
    order = np.argsort(-bits, kind="stable")
    expected = [rank_reference(bits, k, order) for k in counts]
    kind = r.BASE_ZERO if base is None else r.BASE_TENSOR
    base_buffer = None if base is None else buffer_of(base, base_dtype, offset)
    selection = Selection(base_buffer, buffer_of(x, dtype, offset), counts, kind)
    for name in BACKENDS:
        for count in threads if name in SIMD else (1,):
            with running_on(name):
                assert kth_magnitudes([selection], threads=count) == [expected], f"{name} on {count} threads"
    return expected


def counts_of(size: int) -> list[int]:
    """Ranks at the ends, in the middle, and outside."""
    inside = [1, 2, size // 100, size // 5, size // 2, size * 4 // 5, size - 2, size - 1]
    return sorted({-1, 0, *(k for k in inside if 0 < k), size, size + 5})


def normal(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


# ---------------------------------------------------------------- by hand


def test_ranks_worked_on_paper():
    """|d| = 3 1 3 2 3 0: the second largest is a 3, and the last of the first two 3s stands at index 2."""
    x = np.float32([3, -1, -3, 2, 3, 0])
    ranks = check(x, [0, 1, 2, 3, 4, 5, 6])
    assert [rank.magnitude for rank in ranks[1:6]] == [3, 3, 3, 2, 1]
    assert [rank.last_index for rank in ranks] == [-1, 0, 2, r.LAST, r.LAST, r.LAST, r.LAST]
    assert [(rank.above, rank.equal) for rank in ranks[1:6]] == [(0, 3), (0, 3), (0, 3), (3, 1), (4, 1)]
    assert ranks[0] == NOTHING and ranks[6] == EVERYTHING


def test_infinity_ranks_above_finite_values_and_nan_above_infinity():
    x = np.float32([1, np.inf, np.nan, -np.inf, 2, -np.nan, 0])
    ranks = check(x, [1, 2, 3, 4, 5])
    assert np.isnan([ranks[0].magnitude, ranks[1].magnitude]).all()
    assert [rank.magnitude for rank in ranks[2:]] == [np.inf, np.inf, 2]


# ---------------------------------------------------------------- sizes, dtypes, ties

SIZES = [1, 2, 3, 31, 32, 4095, 4096, 4097, 16383, 16384, 16385, 70_000]


@pytest.mark.parametrize("size", SIZES)
def test_any_size(size):
    """16,384 is the largest tensor whose every value is kept."""
    check(normal(size), counts_of(size), base=normal(size, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("base_dtype", [None, *DTYPES])
def test_any_dtypes_at_any_address(dtype, base_dtype):
    """16-bit task vectors are full of equals."""
    for size, offset in [(5001, 1), (40_003, 2), (40_003, 0)]:
        x = store(normal(size) * 0.1, dtype)
        base = None if base_dtype is None else store(normal(size, 1), base_dtype)
        check(x, counts_of(size), dtype=dtype, base=base, base_dtype=base_dtype or "F32", offset=offset, threads=(2,))


@pytest.mark.parametrize("size", [9, 4100, 20_000, 300_001])
@pytest.mark.parametrize(
    "values",
    [[1.0], [0.0], [0.0, -0.0], [np.nan], [1.0, -1.0, 2.0], [0.0, 0.0, 0.0, 5.0], [np.inf, 0.0, np.nan, 1e-45]],
)
def test_few_different_values(size, values):
    x = np.float32(values)[np.random.default_rng(0).integers(0, len(values), size)]
    check(x, counts_of(size), threads=(2,))


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 20_000), st.integers(0, 2**32), st.sampled_from([1, 3, 50, 4000]), st.data())
def test_any_coarse_tensor(size, seed, steps, data):
    x = np.round(normal(size, seed) * steps) / np.float32(steps)
    counts = data.draw(st.lists(st.integers(1, size), min_size=1, max_size=4))
    check(x, counts, threads=(2,))


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_three_million_elements(dtype):
    x, base = store(normal(3_000_001), dtype), store(normal(3_000_001, 1) * 0.01, dtype)
    check(x, [1, 30_000, 600_000, 2_999_999], dtype=dtype, base=base, base_dtype=dtype, threads=(1, 3))


# ---------------------------------------------------------------- where a sample misleads


def sampled_places(size: int) -> np.ndarray:
    """Where csrc/order_statistics looks before its pass: runs of 32, a whole number of them from the start, scattered
    within equal strides."""
    runs = min(max(size // 128, 4096), 1 << 19) // 32
    stride = size // runs
    j = np.arange(runs, dtype=np.uint64)
    scattered = ((j + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(20)) % np.uint64(stride - 31)
    starts = (j * np.uint64(stride) + scattered) // np.uint64(32) * np.uint64(32)
    return (starts[:, None] + np.arange(32, dtype=np.uint64)).reshape(-1)


@pytest.mark.skipif(not SOURCE.is_file(), reason="not in a checkout")
def test_the_sampled_places_are_still_those():
    """Else the tests below mislead nobody: put `sampled_places` right."""
    for line in (
        "kSmallestSample = 4096, kLargestSample = 1 << 19;",
        "kRun = 32;",
        "std::clamp(task.size / 128, kSmallestSample, kLargestSample), runs = wanted / kRun;",
        "(uint64_t(j) + 1) * 0x9E3779B97F4A7C15u >> 20;",
        "(j * stride + int64_t(scattered % uint64_t(stride - kRun + 1))) / kRun * kRun;",
    ):
        assert line in SOURCE.read_text(), line


@pytest.mark.parametrize("seen", [0.0, 100.0, np.nan])
def test_every_value_that_a_sample_sees_is_beside_the_point(seen):
    """Zeros, or the largest, wherever it looks: the bracket misses twice and the histograms decide."""
    for size in (16_385, 300_001, 2_200_000):
        x = normal(size)
        x[sampled_places(size)] = seen
        counts = [size // 100, size // 3, size // 2, size - size // 50]
        check(x, counts, threads=(2,))
        if size < 10**6:
            check(np.round(x * 2), counts, threads=(2,))


@pytest.mark.parametrize("sigmas", [-8, -5, 5, 8])
def test_a_sample_that_is_off_by_several_sigmas(sigmas):
    """Past the first bracket of 3.5 sigma, within the second of 14."""
    size, q = 500_000, 0.2
    draw, places = np.random.default_rng(3), sampled_places(size)
    large = draw.random(size) < q
    shifted = q + sigmas * np.sqrt(q * (1 - q) / places.size)
    large[places] = draw.random(places.size) < shifted
    x = np.where(large, 2 + draw.random(size), draw.random(size)).astype(np.float32)
    check(x, [int(large.sum()) - 5, int(large.sum()), int(large.sum()) + 1, size // 5], threads=(2,))


@pytest.mark.parametrize("length", [100, 1000, 5000])
def test_neighbours_that_are_alike(length):
    """Runs of neighbours tell less than as many scattered elements: wherever one looks, brackets miss now and then."""
    size = 400_000
    for seed in range(6):
        levels = normal(size // length + 1, seed)
        x = np.repeat(levels, length)[:size] + normal(size, seed) * np.float32(1e-3)
        check(x, list(range(size // 40, size, size // 20)), threads=(2,))


@pytest.mark.parametrize(
    "order",
    ["ascending", "descending", "periodic-128", "periodic-32768", "tail-of-outliers", "head-of-outliers"],
)
def test_tensors_in_order(order):
    size = 600_000
    x = np.sort(np.abs(normal(size)))
    if order == "descending":
        x = x[::-1].copy()
    elif order.startswith("periodic"):
        x = np.resize(np.sort(np.abs(normal(int(order.split("-")[1])))), size)
    elif order.endswith("outliers"):
        x = np.abs(normal(size))
        x[-5000:] += 100
        x = x if order.startswith("tail") else x[::-1].copy()
    check(x, [3, 4999, 5000, 5001, 6000, size // 2], threads=(2,))


# ---------------------------------------------------------------- many at once


def test_tasks_of_one_tensor_and_of_others_in_one_call():
    """Groups of tasks that share a pass, tensors too small to sample, and queries that are trivial between them."""
    selections, expected = [], []
    for group, (size, num_tasks) in enumerate([(50_000, 3), (7, 2), (300_000, 2), (0, 1), (16_385, 1)]):
        base = normal(size, group)
        shared = buffer_of(base, "F32")
        for task in range(num_tasks):
            dtype = DTYPES[task]
            x = store(normal(size, 100 * group + task) * 0.1, dtype)
            counts = counts_of(size)[task:] if size else [0, 3]
            bits = magnitude_bits(base, x, "F32", dtype)
            order = np.argsort(-bits, kind="stable")
            selections.append(Selection(shared, buffer_of(x, dtype), counts, group=group))
            expected.append([rank_reference(bits, k, order) for k in counts])
    for name in BACKENDS:
        with running_on(name):
            for threads in (1, 4):
                assert kth_magnitudes(selections, threads=threads) == expected, name


@pytest.mark.parametrize("size", [33, 4096 * 3 + 41, 40_009])
def test_tasks_counted_side_by_side(size):
    """bf16 tasks of one base share a loop, up to four brackets in it; other dtypes and bases interrupt them."""
    bases = [store(normal(size, 90 + i), "BF16") for i in range(2)]
    buffers = [buffer_of(base, "BF16") for base in bases]
    layout = ["0", "00", "000", "00000", "0 1", "00f0", "1001", "f00"]  # tasks by base; f: the first, model in fp16
    selections, expected = [], []
    for group, tasks in enumerate(layout):
        for task, kind in enumerate(tasks.replace(" ", "")):
            dtype, which = ("F16", 0) if kind == "f" else ("BF16", int(kind))
            base = widen(bases[which], "BF16")
            x = store(base + normal(size, 10 * group + task) * 0.01, dtype)
            bits = magnitude_bits(bases[which], x, "BF16", dtype)
            counts = [1 + size * (task + 1) // 9, size // 2][: 1 + task % 2]
            selections.append(Selection(buffers[which], buffer_of(x, dtype), counts, group=group))
            expected.append([rank_reference(bits, k) for k in counts])
    for name in BACKENDS:
        with running_on(name):
            assert kth_magnitudes(selections, threads=2) == expected, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_smallest_of_all_is_a_rank_of_its_own_for_the_kernel(backend):
    x = normal(20_000)
    table = np.zeros(1, r.SELECT_TASK)
    table[0] = ((0, x.ctypes.data, r.BASE_ZERO, 0, 0, 0), x.size, 0, 0, 1, 0)
    query = np.array([(x.size, 0, 0, 0, 0, 0)], r.SELECT_QUERY)
    with running_on(backend) as module:
        module.select_magnitudes(table, query, 2)
    assert query["threshold"][0] == r.bits(np.abs(x).min()) and query["above"][0] == x.size - 1


# ---------------------------------------------------------------- histograms


def histogram_of(parts, counts: Sequence[int], threads: int = 1) -> list[Rank]:
    histogram = MagnitudeHistogram()
    for _ in range(2):
        for base, x in parts:
            histogram.add(base, x, threads=threads)
        if not histogram.narrowed:
            histogram.narrow(counts)
    return histogram.thresholds(counts)


def without_places(rank: Rank) -> Rank:
    """A histogram tells no equals apart."""
    return rank if rank in (NOTHING, EVERYTHING) else Rank(rank.threshold, r.LAST, rank.above, rank.equal)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("steps", [None, 8])
def test_a_histogram_of_many_tensors_finds_the_ranks_of_all_together(backend, steps):
    sizes, dtypes = (1, 5000, 300_000, 4097, 0), ("BF16", "F32", "F16", "F32", "BF16")
    wide = [(normal(n, n), normal(n, n + 1)) for n in sizes]
    if steps:
        wide = [tuple(np.round(a * steps) / np.float32(steps) for a in pair) for pair in wide]
    stored = [(store(b, d), store(x, d)) for (b, x), d in zip(wide, dtypes, strict=True)]
    bits = np.concatenate([magnitude_bits(b, x, d, d) for (b, x), d in zip(stored, dtypes, strict=True)])
    parts = [(buffer_of(b, d), buffer_of(x, d, 1)) for (b, x), d in zip(stored, dtypes, strict=True)]
    counts = counts_of(bits.size)
    order = np.argsort(-bits, kind="stable")
    expected = [without_places(rank_reference(bits, k, order)) for k in counts]
    with running_on(backend):
        assert histogram_of(parts, counts) == expected
        assert histogram_of(parts[::-1], counts, threads=3) == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_histograms_of_shards_add_up(backend):
    """Each shard sees its half alone; the first passes merge before, the second ones after the narrowing."""
    halves = [(None, buffer_of(normal(30_000, seed), "F32")) for seed in (1, 2)]
    counts = [1, 600, 30_000, 59_999]
    with running_on(backend):
        shards = [MagnitudeHistogram() for _ in halves]
        for shard, (base, x) in zip(shards, halves, strict=True):
            shard.add(base, x, base_kind=r.BASE_ZERO)
        whole = MagnitudeHistogram()
        for shard in shards:
            whole.merge(shard)
        assert whole.size == 60_000
        whole.narrow(counts)
        for base, x in halves:
            shard = MagnitudeHistogram()
            shard.narrowed, shard.low = True, {prefix: np.zeros_like(bins) for prefix, bins in whole.low.items()}
            shard.add(base, x, base_kind=r.BASE_ZERO)
            whole.merge(shard)
        found = whole.thresholds(counts)
    bits = magnitude_bits(None, np.concatenate([normal(30_000, s) for s in (1, 2)]), "F32", "F32")
    assert found == [without_places(rank_reference(bits, k)) for k in counts]


@pytest.mark.skipif(NATIVE is None, reason="the native module is not built")
def test_selection_and_histogram_agree_on_every_nan_and_denormal():
    """All 65,536 patterns of bf16, several of each: every rank is somewhere on the way."""
    x = np.tile(np.arange(65536, dtype=np.uint16), 3)
    ranks = check(x, list(range(1, x.size, 4999)), dtype="BF16", threads=(2,))
    histogram = MagnitudeHistogram()
    for _ in range(2):
        histogram.add(None, buffer_of(x, "BF16"), base_kind=r.BASE_ZERO)
        if not histogram.narrowed:
            histogram.narrow(range(1, x.size, 4999))
    assert histogram.thresholds(range(1, x.size, 4999)) == [without_places(rank) for rank in ranks]
