"""The merge kernel on its records: weights by element, given signs, ready task vectors, floors, far-off pieces."""

from __future__ import annotations

import numpy as np
import pytest
from backends import DTYPES, NATIVE, running_on, store, widen
from delta_merge_reference import Merged, Part, assert_close, combine, ranked_probabilities
from merge_records import Stored, merge_records, same_records_on_every_backend
from philox_reference import philox4x32_10

from peta_fast.ops import plain
from peta_fast.ops import records as r
from peta_fast.ops.delta_merge import RankedRandom

SIZE = 1045
ELECTIONS = {"weighted": r.ELECT_WEIGHTED, "unweighted": r.ELECT_UNWEIGHTED, "count": r.ELECT_COUNT,
             "given": r.ELECT_GIVEN, None: r.ELECT_NONE}  # fmt: skip
DIVIDES = {"agreeing-weight": r.DIVIDE_AGREEING_WEIGHT, "agreeing-count": r.DIVIDE_AGREEING_COUNT}
AGGREGATES = {"sum": r.SUM, "max": r.MAX, "largest": r.LARGEST_FIRST, "largest-last": r.LARGEST_LAST,
              "median": r.MEDIAN}  # fmt: skip


def random_stored(dtype: str, seed: int, scale: float = 1.0) -> Stored:
    draw = np.random.default_rng(seed)
    return Stored(store(draw.standard_normal(SIZE) * scale, dtype), dtype)


def positive_stored(dtype: str, seed: int) -> Stored:
    return Stored(store(np.random.default_rng(seed).random(SIZE) + 0.01, dtype), dtype)


def wide(stored: Stored) -> np.ndarray:
    return widen(*stored)


def check(tasks, parts, *, dtype="F32", scaling=1.0, base=None, sign=None, elect=None, floor=0.0, divide=1.0,
          aggregate="sum"):  # fmt: skip
    """tasks as records, and the same as Parts, under one rule."""
    rule = {"elect": ELECTIONS[elect], "divide": DIVIDES.get(divide, r.DIVIDE_CONSTANT), "floor": floor,
            "scaling": scaling, "aggregate": AGGREGATES[aggregate], "divisor": 1.0 if divide in DIVIDES else divide,
            "base_kind": r.BASE_TENSOR if base else r.BASE_ZERO}  # fmt: skip
    outcome = same_records_on_every_backend(tasks, rule, base=base, sign=sign, size=SIZE, out_dtype=dtype)
    given_sign = wide(sign) if sign else None
    added = combine(parts, elect=elect, divide=divide, floor=floor, aggregate=aggregate, sign=given_sign)
    start = wide(base).astype(np.float64) if base else np.zeros(SIZE)
    exact = Merged(start + scaling * added.value, np.abs(start) + np.abs(scaling * added.terms))
    assert_close(widen(outcome.out, dtype), exact, len(parts), dtype)
    assert outcome.nonfinite == 0
    return outcome.out


def weighted_tasks(base, models, weights, task_weight=0.7):
    tasks = [{"x": x, "weights": w, "weight": task_weight} for x, w in zip(models, weights, strict=True)]
    deltas = [wide(x) - wide(base) for x in models]
    scalar = np.float32(task_weight)
    parts = [Part(d, d.astype(np.float64), scalar * wide(w)) for d, w in zip(deltas, weights, strict=True)]
    return tasks, parts


@pytest.mark.parametrize("weights_dtype", DTYPES)
@pytest.mark.parametrize(
    "rule",
    [{}, {"aggregate": "largest"}, {"aggregate": "median"}, {"elect": "weighted", "divide": "agreeing-weight"},
     {"elect": "unweighted", "divide": "agreeing-count"}, {"elect": "weighted", "aggregate": "max"},
     {"elect": "count", "divide": "agreeing-weight", "floor": 0.5}],
    ids=["sum", "largest", "median", "ties", "ties-count", "max", "clamped"],
)  # fmt: skip
def test_weights_by_element_multiply_the_tasks_weight(weights_dtype, rule):
    """Fisher-weighted merging and its kin: the weights are tensors, streamed like models."""
    base, models = random_stored("BF16", 0), [random_stored("BF16", s) for s in (1, 2, 3)]
    weights = [positive_stored(weights_dtype, s) for s in (4, 5, 6)]
    check(*weighted_tasks(base, models, weights), base=base, **rule)


@pytest.mark.parametrize("divide", ["agreeing-weight", "agreeing-count", 1.0])
def test_a_given_sign_chooses_who_is_summed(divide):
    """Plus, minus, or nobody where it is 0, whatever the tasks' own sum says."""
    base, models = random_stored("F32", 0), [random_stored("F32", s) for s in (1, 2, 3)]
    for dtype in DTYPES:
        sign = Stored(store(np.random.default_rng(9).choice([-3.0, 0.0, -0.0, 0.5], SIZE), dtype), dtype)
        deltas = [wide(x) - wide(base) for x in models]
        parts = [Part(d, d.astype(np.float64), np.full(SIZE, 0.5, np.float32)) for d in deltas]
        tasks = [{"x": x, "weight": 0.5} for x in models]
        out = check(tasks, parts, base=base, sign=sign, elect="given", divide=divide)
        nobody = wide(sign) == 0
        assert (out[nobody] == wide(base)[nobody]).all() and nobody.any()


@pytest.mark.parametrize("floor", [0.0, 0.3, 1e-12])
def test_agreeing_weights_below_the_floor_become_it(floor):
    base, models = random_stored("F32", 0), [random_stored("F32", s) for s in (1, 2)]
    weights = [Stored(np.full(SIZE, w, np.float32), "F32") for w in (0.25, 0.125)]
    tasks, parts = weighted_tasks(base, models, weights, 1.0)
    check(tasks, parts, base=base, elect="unweighted", divide="agreeing-weight", floor=floor)


def test_weights_that_cancel_to_zero_divide_by_one():
    """Without an election's help: 1 and -1 agree on plus, their sum is 0."""
    x = Stored(np.full(SIZE, 2.0, np.float32), "F32")
    tasks = [{"x": x, "weight": 1.0}, {"x": x, "weight": -1.0}, {"x": x, "weight": 0.0}]
    rule = {"elect": r.ELECT_UNWEIGHTED, "divide": r.DIVIDE_AGREEING_WEIGHT, "base_kind": r.BASE_ZERO}
    outcome = same_records_on_every_backend(tasks, rule, size=SIZE)
    assert (outcome.out == 0).all() and not outcome.nonfinite


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("elect", [None, "weighted"])
def test_ready_task_vectors_beside_finetuned_tensors(dtype, elect):
    base = random_stored(dtype, 0)
    finetuned, ready = random_stored(dtype, 1), random_stored("F16", 2, 0.1)
    tasks = [{"x": finetuned}, {"x": ready, "is_delta": 1, "weight": 0.5}]
    deltas = [(wide(finetuned) - wide(base), 1.0), (wide(ready), 0.5)]
    parts = [Part(d, d.astype(np.float64), np.full(SIZE, w, np.float32)) for d, w in deltas]
    check(tasks, parts, base=base, elect=elect, dtype=dtype, scaling=0.5)


@pytest.mark.parametrize("first", [0, 1, 6, 2**34 - 8, 2**40 + 3])
def test_random_keeps_depend_on_the_flat_index_alone(first):
    """Beyond 2^34 the counter's upper word is in use."""
    p, key = 0.4, 0x0123456789ABCDEF
    x = Stored(np.ones(SIZE, np.float32), "F32")
    task = {"x": x, "keep": r.KEEP_RANDOM, "p": p, "key": key}
    outcome = same_records_on_every_backend([task], {"base_kind": r.BASE_ZERO}, size=SIZE, start=first)
    assert (outcome.out.astype(bool) == (uniforms_at(key, first, SIZE) < np.float32(p))).all()


def uniforms_at(key: int, first: int, count: int) -> np.ndarray:
    return (words_at(key, first, count) >> np.uint64(8)).astype(np.float32) * np.float32(2.0**-24)


def words_at(key: int, first: int, count: int) -> np.ndarray:
    index = np.arange(first, first + count)
    counters = (index // 4).astype(np.uint64)
    zero = np.zeros_like(counters)
    words = philox4x32_10(np.stack([counters & 0xFFFFFFFF, counters >> 32, zero, zero]), [key & 0xFFFFFFFF, key >> 32])
    return words[index % 4, np.arange(count)]


@pytest.mark.parametrize("module", [plain, *([NATIVE] if NATIVE else [])], ids=["plain", "native"][: 1 + bool(NATIVE)])
def test_philox_words_are_those_of_random123(module):
    """The published answer for key 0 and counter 0, and the reference's words elsewhere."""
    assert [hex(w) for w in module.philox_words(0, 0, 4)] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]
    for key, first, count in [(2**64 - 1, 0, 700), (0x9E3779B97F4A7C15, 4 * (2**32 - 2), 17)]:
        assert (module.philox_words(key, first, count)[:count] == words_at(key, first, count)).all()


def test_random_keeps_the_share_that_is_asked_for():
    """Within five standard deviations, for several keys."""
    n, p = 1_000_000, 0.37
    for key in (1, 2**63, 0xDEADBEEF):
        task = {"x": Stored(np.ones(n, np.float32), "F32"), "keep": r.KEEP_RANDOM, "p": p, "key": key}
        with running_on("plain" if not NATIVE else NATIVE.simd()) as module:
            kept = merge_records(module, [task], {"base_kind": r.BASE_ZERO}, size=n).out
        assert abs(kept.sum(dtype=np.float64) - n * p) < 5 * np.sqrt(n * p * (1 - p))


@pytest.mark.parametrize("low_index", [-1, 0, 99, 100, 612, 10**9])
def test_equals_of_the_threshold_are_kept_up_to_an_index_of_the_whole_tensor(low_index):
    """All |d| equal the threshold; the piece starts at element 100."""
    x = Stored(np.where(np.arange(SIZE) % 2, 1.0, -1.0).astype(np.float32), "F32")
    for high_index in (-1, 105):
        task = {"x": x, "low": r.bits(1.0), "low_index": low_index, "high": r.bits(1.0), "high_index": high_index}
        index = np.arange(100, 100 + SIZE)
        for keep, expected in [
            (r.KEEP_TOP, index <= low_index),
            (r.KEEP_BAND, (index <= low_index) & ~(index <= high_index)),
        ]:
            outcome = same_records_on_every_backend(
                [{**task, "keep": keep}], {"base_kind": r.BASE_ZERO}, size=SIZE, start=100
            )
            assert (outcome.out.astype(bool) == expected).all()


@pytest.mark.parametrize("start", [0, 1, 7, 8, 13, 4095])
def test_bits_of_a_mask_begin_anywhere_within_a_byte(start):
    packed = np.random.default_rng(0).integers(0, 256, 1000, dtype=np.uint8)
    bits = np.unpackbits(packed, bitorder="little")[start : start + SIZE]
    task = {"x": Stored(np.ones(SIZE, np.float32), "F32"), "mask": Stored(packed, "BITS")}
    outcome = same_records_on_every_backend([task], {"base_kind": r.BASE_ZERO}, size=SIZE, start=start)
    assert (outcome.out == bits).all()


@pytest.mark.parametrize("columns", [1, 5, 11, 209, 1045])
def test_ranked_probabilities_row_by_row(columns):
    """Coarse values, so that rows are full of equals; the rows of the middle alone, too."""
    keep = RankedRandom(0.15, 0.85)
    base, x = random_stored("BF16", 0), random_stored("BF16", 1)
    x = Stored(store(np.round(wide(x) * 4) / 4, "BF16"), "BF16")
    rows = np.abs(wide(x) - wide(base)).reshape(-1, columns)
    expected = np.concatenate([ranked_probabilities(keep, row) for row in rows])
    delta = np.array([(base.array.ctypes.data, x.array.ctypes.data, r.BASE_TENSOR, 2, 2, 0)], r.DELTA)
    for first in (0, len(rows) // 2):
        out = np.empty((len(rows) - first) * columns, np.float32)
        for name in ("plain", *([NATIVE.simd()] if NATIVE else [])):
            out[:] = np.nan
            with running_on(name) as module:
                module.ranked_probability(delta, first, len(rows) - first, columns, keep.low, keep.high, out, 2)
            assert (out == expected[first * columns :]).all(), name


@pytest.mark.parametrize("elect", ["weighted", "unweighted", "count"])
def test_the_sign_total_of_a_model_with_nan_in_it(elect):
    """NaN has no sign; it must not keep the merge from finding and naming it later."""
    x = random_stored("F32", 1).array.copy()
    x[7] = np.nan
    tasks = [{"x": Stored(x, "F32")}, {"x": random_stored("F32", 2)}]
    rule = {"elect": ELECTIONS[elect], "base_kind": r.BASE_ZERO}
    outcome = same_records_on_every_backend(tasks, rule, size=SIZE, mode=r.SIGN_TOTAL)
    assert abs(outcome.sign_total) <= SIZE


@pytest.mark.parametrize("size", [1, 5, 16, 31, 33, 520])
def test_the_sign_total_counts_elements_and_no_padding(size):
    """Beyond the last element a base of one would leave deltas of -1."""
    task = {"x": Stored(np.full(size, 1.5, np.float32), "F32")}
    rule = {"elect": r.ELECT_WEIGHTED, "base_kind": r.BASE_ONE}
    assert same_records_on_every_backend([task], rule, size=size, mode=r.SIGN_TOTAL).sign_total == size
