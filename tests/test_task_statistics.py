"""Sums over task vectors against exact sums, and bit for bit on every backend and number of threads."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from backends import BACKENDS, DTYPES, assert_same_bits, buffer_of, running_on, same_on_every_backend, store, widen
from hypothesis import given, settings
from hypothesis import strategies as st

from peta_fast.ops import records as r
from peta_fast.ops.task_statistics import TaskStatistics, task_statistics

FIELDS = ("sums", "l1", "gram", "largest", "nonfinite", "nonzero", "conflicts")


def statistics_of(base, models, dtypes, *, offset=0, base_kind=r.BASE_TENSOR) -> TaskStatistics:
    """The same from every backend; base and models as stored, dtypes the base's first."""
    found = {}
    base_buffer = None if base is None else buffer_of(base, dtypes[0], offset)
    buffers = [buffer_of(m, d, offset) for m, d in zip(models, dtypes[1:], strict=True)]

    def field(name):
        def run(module, threads):
            key = id(module), module.simd() if hasattr(module, "simd") else "plain", threads
            if key not in found:
                found[key] = task_statistics(base_buffer, buffers, base_kind=base_kind, threads=threads)
            return getattr(found[key], name)

        return run

    for name in FIELDS:
        same_on_every_backend(field(name), threads=(1, 2, 4))
    assert len({s.any_conflict for s in found.values()}) == 1
    return next(iter(found.values()))


def random_tasks(size: int, num_tasks: int, dtypes=("F32",), seed: int = 0):
    """base, models as stored, their dtypes, and the task vectors in fp32."""
    draw = np.random.default_rng(seed)
    dtypes = tuple(dtypes[i % len(dtypes)] for i in range(num_tasks + 1))
    base = draw.standard_normal(size)
    stored = [store(base, dtypes[0])]
    stored += [store(base + 0.1 * draw.standard_normal(size) * (draw.random(size) < 0.8), d) for d in dtypes[1:]]
    wide = [widen(x, d) for x, d in zip(stored, dtypes, strict=True)]
    return stored[0], stored[1:], dtypes, [x - wide[0] for x in wide[1:]]


def assert_summed(actual: float, addends: np.ndarray) -> None:
    """Within the error of 128 additions a lane, 5 among lanes, and a level of the tree for each doubling of blocks."""
    depth = 128 + 5 + math.ceil(math.log2(max(addends.size / 4096, 1)))
    allowed = depth * 2.0**-53 * math.fsum(np.abs(addends))
    assert abs(actual - math.fsum(addends)) <= allowed


def assert_exact_counts(found: TaskStatistics, deltas: list[np.ndarray]) -> None:
    up, down = np.array([d > 0 for d in deltas]), np.array([d < 0 for d in deltas])
    assert found.nonzero.tolist() == [int((d != 0).sum()) for d in deltas]
    assert found.nonfinite.tolist() == [int((~np.isfinite(d)).sum()) for d in deltas]
    for s, t in itertools.product(range(len(deltas)), repeat=2):
        opposite = int(((up[s] & down[t]) | (down[s] & up[t])).sum()) if s != t else 0
        assert found.conflicts[s, t] == opposite
    assert found.any_conflict == int((up.any(axis=0) & down.any(axis=0)).sum())


# ---------------------------------------------------------------- by hand


def test_statistics_worked_on_paper():
    base = np.float32([10, 20, 30, 40])
    deltas = np.float32([[4, -1, 0, 2], [3, 1, 2, -1], [-1, 8, 0, -2]])
    found = statistics_of(base, list(base + deltas), ("F32",) * 4)
    assert found.sums.tolist() == [5, 5, 5] and found.l1.tolist() == [7, 7, 11]
    assert found.gram.tolist() == [[21, 9, -16], [9, 15, 7], [-16, 7, 69]]
    assert found.l2.tolist() == [math.sqrt(21), math.sqrt(15), math.sqrt(69)]
    assert found.largest.tolist() == [4, 3, 8] and found.nonzero.tolist() == [3, 4, 3]
    assert found.conflicts.tolist() == [[0, 2, 3], [2, 0, 1], [3, 1, 0]] and found.any_conflict == 3
    assert found.nonfinite.tolist() == [0, 0, 0] and found.size == 4


# ---------------------------------------------------------------- against exact sums


@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 4095, 4096, 4097, 70_001, 300_000])
@pytest.mark.parametrize("num_tasks", [1, 3])
def test_any_size_against_exact_sums(size, num_tasks):
    base, models, dtypes, deltas = random_tasks(size, num_tasks)
    found = statistics_of(base, models, dtypes)
    wide = [d.astype(np.float64) for d in deltas]
    for t, d in enumerate(wide):
        assert_summed(found.sums[t], d)
        assert_summed(found.l1[t], np.abs(d))
        assert found.largest[t] == np.abs(d).max(initial=0)
    for s, t in itertools.product(range(num_tasks), repeat=2):
        assert_summed(found.gram[s, t], wide[s] * wide[t])
        assert found.gram[s, t] == found.gram[t, s]
    assert_exact_counts(found, deltas)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9000), st.integers(1, 6), st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3),
       st.integers(0, 2**32), st.integers(0, 9))  # fmt: skip
def test_any_dtypes_at_any_address(size, num_tasks, dtypes, seed, offset):
    base, models, all_dtypes, deltas = random_tasks(size, num_tasks, dtypes, seed)
    found = statistics_of(base, models, all_dtypes, offset=offset)
    assert_exact_counts(found, deltas)
    assert_summed(found.gram[0, -1], deltas[0].astype(np.float64) * deltas[-1])


def test_without_a_base_the_models_are_taken_as_they_are():
    base, models, dtypes, _ = random_tasks(5000, 2, ("BF16", "F16"))
    found = statistics_of(None, models, dtypes, base_kind=r.BASE_ZERO)
    assert_exact_counts(found, [widen(m, d) for m, d in zip(models, dtypes[1:], strict=True)])


def test_many_tasks():
    base, models, dtypes, deltas = random_tasks(4500, 33)
    assert_exact_counts(statistics_of(base, models, dtypes), deltas)


# ---------------------------------------------------------------- cancellation


def test_a_gram_that_cancels_to_a_few_units_is_exact():
    """Products of 40 bits and sums below 2^53: fp64 rounds nothing, and fp32 would lose it all."""
    draw = np.random.default_rng(0)
    x = draw.integers(-(2**20), 2**20, 8000).astype(np.float64)
    y = draw.integers(-(2**20), 2**20, 8000).astype(np.float64)
    twice = np.concatenate([x, -x, [3.0]]), np.concatenate([y, y, [5.0]])
    models = [v.astype(np.float32) for v in twice]
    found = statistics_of(np.zeros(16_001, np.float32), models, ("F32",) * 3)
    assert found.gram[0, 1] == 15 and found.sums[0] == 3
    assert found.gram[0, 0] == int((twice[0] ** 2).sum())


def test_task_vectors_that_are_nearly_orthogonal():
    """Their dot product is 1e-9 of the product of norms, yet right to 1e-6 of itself."""
    size = 100_000
    x = np.random.default_rng(1).standard_normal(size).astype(np.float32)
    y = np.roll(x, 1)
    y[0::2] *= -1
    y = (y - (np.dot(x.astype(np.float64), y) / np.dot(x.astype(np.float64), x) - 1e-9) * x).astype(np.float32)
    found = statistics_of(np.zeros(size, np.float32), [x, y], ("F32",) * 3)
    exact = math.fsum(x.astype(np.float64) * y)
    assert abs(exact) < 1e-6 * found.l2[0] * found.l2[1]
    assert found.gram[0, 1] == pytest.approx(exact, rel=1e-6)


def test_tiny_and_huge_values_neither_vanish_nor_overflow():
    tiny, huge = np.full(5000, 2.0**-149, np.float32), np.full(5000, 3e38, np.float32)
    found = statistics_of(np.zeros(5000, np.float32), [tiny, huge], ("F32",) * 3)
    assert found.sums[0] == 5000 * 2.0**-149 and found.gram[0, 0] == 5000 * 2.0**-298
    assert found.gram[1, 1] == pytest.approx(5000 * float(np.float32(3e38)) ** 2, rel=1e-13)


# ---------------------------------------------------------------- NaN and infinity


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite_are_counted_wherever_they_are(dtype):
    for place in (0, 31, 4095, 4096, 5000):
        wide = np.ones(5001, np.float32)
        wide[place] = np.nan
        wide[17] = -np.inf
        found = statistics_of(None, [store(wide, dtype)], (dtype, dtype), base_kind=r.BASE_ZERO)
        assert found.nonfinite.tolist() == [2] and found.nonzero.tolist() == [5001]
        assert found.largest.tolist() == [np.inf]
    only_nan = store(np.full(40, np.nan, np.float32), dtype)
    assert statistics_of(None, [only_nan], (dtype, dtype), base_kind=r.BASE_ZERO).largest.tolist() == [0]


# ---------------------------------------------------------------- the order of summation is part of the result


def ordered_sum(values: np.ndarray) -> float:
    """Blocks of 4096 in flat order: lane j takes elements j, j + 32, ...; halves onto halves; then pairs of blocks."""
    blocks = []
    for start in range(0, len(values), 4096):
        lanes = [0.0] * 32
        for i, value in enumerate(values[start : start + 4096].tolist()):
            lanes[i % 32] += value
        while len(lanes) > 1:
            half = len(lanes) // 2
            lanes = [lanes[j] + lanes[j + half] for j in range(half)]
        blocks.append(lanes[0])
    return sum_in_pairs(blocks)


def sum_in_pairs(values: list[float]) -> float:
    if len(values) < 2:
        return values[0] if values else 0.0
    pairs = [sum(values[i : i + 2]) for i in range(0, len(values), 2)]
    return sum_in_pairs(pairs)


def test_sums_are_taken_in_the_documented_order():
    base, models, dtypes, deltas = random_tasks(6 * 4096 + 100, 2)
    found = statistics_of(base, models, dtypes)
    wide = [d.astype(np.float64) for d in deltas]
    assert found.sums.tolist() == [ordered_sum(d) for d in wide]
    assert found.l1.tolist() == [ordered_sum(np.abs(d)) for d in wide]
    assert found.gram[0, 1] == ordered_sum(wide[0] * wide[1])


@pytest.mark.parametrize("size", [0, 1, 2, 3, 7, 8, 9, 1000])
def test_the_tree_adds_adjacent_pairs(size):
    values = np.random.default_rng(size).standard_normal(size) * 10.0 ** np.arange(size).clip(max=12)
    expected = np.array([sum_in_pairs(values.tolist())])
    assert_same_bits(same_on_every_backend(lambda module, _: np.array([module.tree_sum(values.copy())])), expected)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("backend", BACKENDS)
def test_buffers_of_different_sizes_are_refused(backend):
    x, y = buffer_of(np.zeros(5, np.float32), "F32"), buffer_of(np.zeros(6, np.float32), "F32")
    with running_on(backend):
        with pytest.raises(ValueError, match=r"task_statistics: expected buffers of 5 elements, got \[5, 6\]"):
            task_statistics(None, [x, y], base_kind=r.BASE_ZERO)
        with pytest.raises(ValueError, match="expected buffers of 5 elements"):
            task_statistics(y, [x])
