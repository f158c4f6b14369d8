"""Tensors given by low-rank factors: formed elements, and merges and statistics that form them on the way."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from backends import BACKENDS, NATIVE, assert_same_bits, buffer_of, contents, output_of, running_on, store, widen

from peta_fast.buffers import FactorsBuffer
from peta_fast.ops.delta_merge import Band, DeltaMerge, Inputs, Job, Random, RankedRandom, Term, Top, merge, prepare
from peta_fast.ops.order_statistics import MagnitudeHistogram, Selection, kth_magnitudes
from peta_fast.ops.task_statistics import task_statistics

SHAPES = {
    "one element": (1, 1, 1), "one row": (1, 777, 3), "one column": (777, 1, 2), "narrow": (300, 7, 4),
    "rows of a power of two": (40, 2048, 16), "odd": (67, 1001, 5), "high rank": (30, 300, 290),
}  # fmt: skip


def factors_of(rows: int, columns: int, rank: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    return draw.standard_normal((rows, rank), np.float32), draw.standard_normal((rank, columns), np.float32)


def product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """[rows * columns] fp32, one rank after another, each product and its sum rounded once.

    In long double, whose second rounding is seen where 40 bits chance to be those of a tie.
    """
    total = np.zeros((len(left), right.shape[1]), np.float32)
    for k in range(right.shape[0]):
        total = (left[:, k : k + 1].astype(np.longdouble) * right[k] + total).astype(np.float32)
    return total.reshape(-1)


def formed_on(backend: str, buffer: FactorsBuffer, threads: int = 1) -> np.ndarray:
    with running_on(backend) as module:
        out = np.full(buffer.size, np.nan, np.float32)
        module.form_factors(buffer.record, buffer.size, out, threads)
    return out


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("origin", [None, "F32", "F16", "BF16"])
def test_elements_are_summed_in_ascending_rank_on_every_backend(shape, origin):
    left, right = factors_of(*shape)
    expected, under = product(left, right), None
    if origin:
        stored = store(np.random.default_rng(1).standard_normal(expected.size), origin)
        under, expected = buffer_of(stored, origin), widen(stored, origin) + expected
    buffer = FactorsBuffer.of(left, right, under)
    for start, stop in ((0, buffer.size), (buffer.size // 3, buffer.size - buffer.size // 5)):
        for backend in BACKENDS:
            for threads in (1, 3):
                assert_same_bits(formed_on(backend, buffer.slice(start, stop), threads), expected[start:stop], backend)


def rounded(exact: Fraction) -> float:
    """To the nearest float, ties to even, with nothing in between; normal numbers only."""
    if not exact:
        return 0.0
    exponent = math.floor(math.log2(abs(exact)))
    exponent += (abs(exact) >= Fraction(2) ** (exponent + 1)) - (abs(exact) < Fraction(2) ** exponent)
    unit = Fraction(2) ** (exponent - 23)
    return float(round(exact / unit) * unit)


def test_a_term_is_rounded_once_where_twice_would_show():
    """c + a b with a b just above, at and just below half a unit of c, where rounding in double first makes a tie."""
    rng, rows = np.random.default_rng(3), []
    for _ in range(400):
        c = np.float32(rng.uniform(1, 2) * rng.choice([-1, 1]))
        near = [np.float32(2.0**-12 * (1 + step * 2.0**-23)) for step in rng.integers(-1, 2, 2)]
        a = np.float32(2.0**-12 * rng.choice([-1, 1]))
        rows.append((c, near[0] * np.float32(rng.choice([-1, 1])), near[1]))
        rows.append((c, np.float32(rng.standard_normal()), np.float32(rng.standard_normal())))
        rows.append((c, a, np.float32(2.0**-12 * (1 + 2.0**-22 * rng.integers(0, 2)))))
    c, a, b = (np.array(column, np.float32) for column in zip(*rows, strict=True))
    expected = [rounded(Fraction(float(z)) + Fraction(float(x)) * Fraction(float(y))) for z, x, y in rows]
    twice = (c.astype(np.float64) + a.astype(np.float64) * b).astype(np.float32)
    assert (twice != np.array(expected, np.float32)).any(), "no case tells one rounding from two"
    for i in range(0, len(c), 48):  # [n, n] products whose diagonal is what is asked for
        part = slice(i, i + 48)
        left = np.stack([c[part], a[part]], 1)
        right = np.stack([np.ones(len(left), np.float32), b[part]])
        for backend in BACKENDS:
            got = formed_on(backend, FactorsBuffer.of(left, right)).reshape(len(left), -1).diagonal()
            assert got.tolist() == expected[part], backend


def test_a_change_is_told_from_a_tensor():
    left, right = factors_of(3, 4, 2)
    assert FactorsBuffer.of(left, right).is_delta
    whole = FactorsBuffer.of(left, right, buffer_of(np.zeros(12, np.float32), "F32"))
    assert not whole.is_delta and not whole.slice(2, 9).is_delta
    with pytest.raises(TypeError, match="form them"):
        whole.as_bytes()


@pytest.mark.parametrize("bad", ["dtype", "rank", "origin", "order"])
def test_factors_that_make_no_tensor_are_refused(bad):
    left, right = factors_of(3, 4, 2)
    origin = buffer_of(np.zeros(11 if bad == "origin" else 12, np.float32), "F32")
    left = {"dtype": left.astype(np.float64), "rank": left[:, :1].copy(), "order": np.asfortranarray(left)}.get(
        bad, left
    )
    with pytest.raises(ValueError, match="do not make the tensor"):
        FactorsBuffer.of(left, right, origin)


@pytest.mark.skipif(NATIVE is None, reason="the native module is not built")
@pytest.mark.parametrize(
    "field, value", [("rank", 0), ("columns", 0), ("first", -1), ("left", 0), ("right", 0), ("origin_dtype", 3)]
)
def test_a_damaged_record_is_refused(field, value):
    buffer = FactorsBuffer.of(*factors_of(3, 4, 2))
    buffer.record[field] = value
    with pytest.raises(ValueError, match="factors|unknown dtype code"):
        NATIVE.form_factors(buffer.record, 12, np.empty(12, np.float32), 1)


RULES = {
    "sum": lambda keep: DeltaMerge((Term(0.5), Term(-0.25), Term(2.0)), divide=3.0, scaling=0.7),
    "ties": lambda keep: DeltaMerge(
        tuple(Term(w, keep) for w in (0.5, 1.0, 0.25)), elect="weighted", divide="agreeing-weight"
    ),
    "l1": lambda keep: DeltaMerge(tuple(Term(w, Random(0.4), "l1") for w in (0.5, 1.0, 0.25))),
    "ranked": lambda keep: DeltaMerge(tuple(Term(w, RankedRandom(0.2, 0.6), "1/p") for w in (0.5, 1.0, 0.25))),
    "band": lambda keep: DeltaMerge(tuple(Term(w, Band(50, 3000)) for w in (0.5, 1.0, 0.25))),
    "median": lambda keep: DeltaMerge((Term(1.0),) * 3, aggregate="median"),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("base_kind", ["tensor", "zero"])
@pytest.mark.parametrize("out_dtype", ["F32", "BF16"])
def test_a_merge_of_factors_is_that_of_the_tensors_they_form(rule, base_kind, out_dtype):
    """Two changes and one whole tensor, whose base is the merge's base or another one."""
    shape = (130, 1030)
    spec = RULES[rule](Top(9000, "first"))
    spec = DeltaMerge(**{**vars(spec), "base": base_kind})
    base = store(np.random.default_rng(9).standard_normal(shape), out_dtype).reshape(-1)
    other = buffer_of(store(np.random.default_rng(8).standard_normal(shape), "F16"), "F16")
    low = [FactorsBuffer.of(*factors_of(*shape, rank, rank), origin=other if rank == 5 else None) for rank in (3, 5, 4)]
    dense = []
    for rank in (3, 5, 4):
        full = product(*factors_of(*shape, rank, rank))
        dense.append(widen(contents(other), "F16") + full if rank == 5 else full)
    results = {}
    for backend in BACKENDS:
        with running_on(backend):
            results[backend] = merged(spec, shape, base, out_dtype, tuple(low), threads=2)
    for backend, result in results.items():
        assert_same_bits(result, results["plain"], backend)
    if base_kind == "zero":  # then changes and tensors alike are taken as they are
        with running_on("plain"):
            expected = merged(spec, shape, base, out_dtype, tuple(buffer_of(d, "F32") for d in dense))
        assert_same_bits(results["plain"], expected)
    elif rule == "sum":
        wide = widen(base, out_dtype).astype(np.float64)
        d = [dense[0], dense[1] - widen(base, out_dtype), dense[2]]
        exact = wide + 0.7 * (0.5 * d[0].astype(np.float64) - 0.25 * d[1].astype(np.float64) + 2.0 * d[2]) / 3.0
        assert np.abs(widen(results["plain"], out_dtype) - exact).max() < (1e-5 if out_dtype == "F32" else 0.07)


def merged(spec, shape, base, dtype, models, threads=1) -> np.ndarray:
    inputs = Inputs("w", shape, buffer_of(base, dtype) if spec.base == "tensor" else None, models)
    (prepared,) = prepare([(spec, inputs)], seed=4, threads=threads)
    size = shape[0] * shape[1]
    out = output_of(size, dtype)
    ends = (0, 70_001, size)
    merge([Job(prepared, a, b, out.slice(a, b)) for a, b in zip(ends, ends[1:], strict=False)], threads=threads)
    return contents(out)


def test_statistics_of_factors_are_those_of_the_tensors_they_form():
    left, right = factors_of(90, 1111, 6)
    buffer, dense = FactorsBuffer.of(left, right), product(left, right)
    plain_buffer = buffer_of(dense, "F32")
    counts = (1, 777, 50_000, 99_989)
    for backend in BACKENDS:
        with running_on(backend):
            ours = kth_magnitudes([Selection(None, buffer, counts, 1)])
            assert ours == kth_magnitudes([Selection(None, plain_buffer, counts, 1)]), backend
            a, b = (task_statistics(None, [x], base_kind=1) for x in (buffer, plain_buffer))
            assert a.gram.tolist() == b.gram.tolist() and a.l1.tolist() == b.l1.tolist() and a.size == b.size
            histogram = MagnitudeHistogram()
            histogram.add(None, buffer, base_kind=1)
            histogram.narrow(counts)
            histogram.add(None, buffer, base_kind=1)
            thresholds = [rank.threshold for rank in histogram.thresholds(counts)]
            assert thresholds == [rank.threshold for rank in ours[0]], backend
