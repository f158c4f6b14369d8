"""What the fused merge does to single values: rounding, denormals, signed zeros, NaN and infinity, and their flags."""

from __future__ import annotations

import numpy as np
import pytest
from backends import BACKENDS, DTYPES, STORED, buffer_of, output_of, running_on, store, widen
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_records import NONFINITE_INPUT, NONFINITE_RESULT, Stored, same_records_on_every_backend

from peta_fast.errors import CheckpointError
from peta_fast.ops import records as r
from peta_fast.ops.delta_merge import DeltaMerge, Inputs, Job, Term, merge, prepare

CANONICAL_NAN = {"F32": 0x7FC00000, "F16": 0x7E00, "BF16": 0x7FC0}
TIES = {"elect": r.ELECT_WEIGHTED, "divide": r.DIVIDE_AGREEING_WEIGHT}


def every_pattern(dtype: str) -> np.ndarray:
    """All 65,536 elements of a 16-bit dtype; of fp32, all upper halves with lower halves around the rounding ties."""
    upper = np.arange(65536, dtype=np.uint32)
    if dtype != "F32":
        return upper.astype(np.uint16).view(STORED[dtype])
    lower = np.array([0, 1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    return (upper[:, None] << 16 | lower).reshape(-1).view(np.float32)


def rounded(x: np.ndarray, bits: int, smallest_exponent: int, largest: float) -> np.ndarray:
    """fp64 rounded half to even to `bits` of mantissa, subnormals at the grid of the smallest exponent."""
    exponent = np.maximum(np.frexp(x)[1] - 1, smallest_exponent)
    grid = np.ldexp(1.0, exponent - bits + 1)
    nearest = np.rint(x / grid) * grid
    return np.where(np.abs(nearest) > largest, np.copysign(np.inf, x), nearest)


FORMATS = {"F16": (11, -14, 65504.0), "BF16": (8, -126, float.fromhex("0x1.fep127"))}


# ---------------------------------------------------------------- one rounding


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_finite_element_passes_a_merge_of_one_bit_for_bit(dtype):
    x = every_pattern(dtype)
    outcome = same_records_on_every_backend(
        [{"x": Stored(x, dtype)}], {"base_kind": r.BASE_ZERO}, size=x.size, out_dtype=dtype
    )
    finite = np.isfinite(widen(x, dtype))
    unsigned = STORED[dtype].str.replace("f", "u")
    assert (outcome.out.view(unsigned)[finite] == x.view(unsigned)[finite]).all()


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_every_16_bit_element_widens_exactly(dtype):
    x = every_pattern(dtype)
    outcome = same_records_on_every_backend([{"x": Stored(x, dtype)}], {"base_kind": r.BASE_ZERO}, size=x.size)
    finite = np.isfinite(widen(x, dtype))
    assert (outcome.out[finite].view(np.uint32) == widen(x, dtype)[finite].view(np.uint32)).all()


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_fp32_rounds_to_nearest_even(dtype):
    x = every_pattern("F32")
    x = x[np.isfinite(x)]
    outcome = same_records_on_every_backend(
        [{"x": Stored(x, "F32")}], {"base_kind": r.BASE_ZERO}, size=x.size, out_dtype=dtype
    )
    expected = rounded(x.astype(np.float64), *FORMATS[dtype])
    assert (widen(outcome.out, dtype) == expected).all()
    assert (np.signbit(widen(outcome.out, dtype)) == np.signbit(x)).all()


def test_denormals_add_up_exactly():
    """Multiples of 2^-149: base + (x - base) + (y - base), all exact in fp32."""
    draw = np.random.default_rng(0)
    ints = draw.integers(-(2**21), 2**21, (3, 4099)).astype(np.int32)
    base, x, y = (np.ldexp(i.astype(np.float64), -149).astype(np.float32) for i in ints)
    tasks = [{"x": Stored(x, "F32")}, {"x": Stored(y, "F32")}]
    outcome = same_records_on_every_backend(tasks, {}, base=Stored(base, "F32"), size=x.size)
    assert (outcome.out.astype(np.float64) == np.ldexp((ints[1] + ints[2] - ints[0]).astype(np.float64), -149)).all()


def test_the_election_goes_by_sign_where_products_underflow():
    """Deltas of 1e-45 are kept and counted although their squares, or shares of them, are 0."""
    tiny = np.float32(2.0**-149)
    tasks = [{"x": Stored(np.full(5, v, np.float32), "F32")} for v in (tiny, tiny, -tiny)]
    outcome = same_records_on_every_backend(tasks, {**TIES, "base_kind": r.BASE_ZERO}, size=5)
    assert (outcome.out == tiny).all()


# ---------------------------------------------------------------- where nothing is added, the base stays


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "task, rule",
    [({}, {}), ({"keep": r.KEEP_NONE}, {}), ({"keep": r.KEEP_NONE}, TIES), ({"weight": 0.0}, TIES),
     ({}, {"aggregate": r.MEDIAN}), ({}, {"aggregate": r.LARGEST_LAST, "divisor": -3.0})],
    ids=["equal", "dropped", "ties-dropped", "ties-weightless", "median", "largest"],
)  # fmt: skip
def test_the_base_stays_bit_for_bit_where_nothing_is_added(dtype, task, rule):
    """-0.0 and denormals too. The model equals the base, or is dropped."""
    base = every_pattern(dtype)[:: 1 if dtype != "F32" else 10]
    base = base[np.isfinite(widen(base, dtype))]
    x = base if not task else store(np.where(np.arange(base.size) % 2, 1.0, -1.0), dtype)
    tasks = [{"x": Stored(x, dtype), **task}, {"x": Stored(base, dtype)}]
    outcome = same_records_on_every_backend(tasks, rule, base=Stored(base, dtype), size=base.size, out_dtype=dtype)
    unsigned = STORED[dtype].str.replace("f", "u")
    assert (outcome.out.view(unsigned) == base.view(unsigned)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "weights", [(1.0,) * 3, (1.0, 1e-5, 1e-5), (0.51, 1.49), (2.0**-16, 1.0, 0.5, 8.0), (3e38, 1.0, 3e38)], ids=str
)
def test_a_zero_of_the_base_stays_where_the_mean_of_the_smallest_rounds_to_zero(dtype, weights):
    """Deltas of the dtype's smallest steps in both signs: means are subnormal, or round to 0, of which either has a
    sign that must not reach the base's."""
    draw = np.random.default_rng(1)
    size, unsigned = 4096 + 33, STORED[dtype].str.replace("f", "u")

    def smallest(largest: int) -> np.ndarray:
        sign = draw.integers(0, 2, size) << (STORED[dtype].itemsize * 8 - 1)
        return (draw.integers(0, largest, size) | sign).astype(unsigned).view(STORED[dtype])

    base = smallest(1)
    tasks = [{"x": Stored(smallest(4), dtype), "weight": w, "keep": r.KEEP_TOP, "low_index": 2 * size} for w in weights]
    outcome = same_records_on_every_backend(tasks, TIES, base=Stored(base, dtype), size=size, out_dtype=dtype)

    contributions = [np.float32(task["weight"]) * widen(task["x"].array, dtype) for task in tasks]
    nobody = (np.array(contributions) == 0.0).all(0)
    assert nobody.any()
    assert (outcome.out.view(unsigned)[nobody] == base.view(unsigned)[nobody]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_tasks_the_base_is_copied(dtype):
    base = store(np.array([1.5, -0.0, 0.0, -(2.0**-14)]), dtype)
    for rule in ({}, TIES):
        outcome = same_records_on_every_backend([], rule, base=Stored(base, dtype), size=4, out_dtype=dtype)
        assert outcome.out.tobytes() == base.tobytes() and not outcome.nonfinite


# ---------------------------------------------------------------- NaN and infinity


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_nan_is_written_in_one_pattern(dtype, out_dtype):
    x = every_pattern(dtype)
    x = x[np.isnan(widen(x, dtype))]
    x = np.concatenate([x, x[:3]])
    zeros = Stored(store(np.zeros(x.size), dtype), dtype)
    for rule in ({"base_kind": r.BASE_ZERO}, {}, {"aggregate": r.LARGEST_FIRST}):
        outcome = same_records_on_every_backend(
            [{"x": Stored(x, dtype)}], rule, base=zeros, size=x.size, out_dtype=out_dtype
        )
        unsigned = STORED[out_dtype].str.replace("f", "u")
        assert (outcome.out.view(unsigned) == CANONICAL_NAN[out_dtype]).all()
        assert outcome.nonfinite == NONFINITE_INPUT | NONFINITE_RESULT


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["base", "x", "mask", "weights", "weights-of-a-median"])
def test_a_single_bad_input_anywhere_is_flagged(value, where):
    """At every place of a tensor with a tail, even where the task is dropped."""
    for place in (0, 15, 511, 512, 529, 530):
        arrays = {name: np.ones(531, np.float32) for name in ("base", "x", "mask", "weights")}
        rule = {"aggregate": r.MEDIAN} if where == "weights-of-a-median" else {}
        arrays[where.removesuffix("-of-a-median")][place] = value
        task = {name: Stored(arrays[name], "F32") for name in ("x", "mask", "weights")}
        base = Stored(arrays["base"], "F32")
        for keep in (r.KEEP_ALL, r.KEEP_NONE):
            outcome = same_records_on_every_backend([{**task, "keep": keep}], rule, base=base, size=531)
            assert outcome.nonfinite & NONFINITE_INPUT, f"{where}[{place}]"


@pytest.mark.parametrize("dtype, out_dtype", [("F32", "BF16"), ("F32", "F16"), ("F32", "F32"), ("BF16", "BF16")])
def test_a_single_nan_in_a_model_taken_as_it_is_is_flagged(dtype, out_dtype):
    """One whose rounding would carry into the sign, among whole chunks and in a tail."""
    for place in (0, 1, 31, 511, 512, 1023, 1039):
        x = store(np.ones(1040), dtype)
        x.view(np.uint16 if dtype == "BF16" else np.uint32)[place] = 0x7FFF if dtype == "BF16" else 0x7FFFFFFF
        outcome = same_records_on_every_backend(
            [{"x": Stored(x, dtype)}], {"base_kind": r.BASE_ZERO}, size=1040, out_dtype=out_dtype
        )
        assert outcome.nonfinite == NONFINITE_INPUT | NONFINITE_RESULT
        assert np.flatnonzero(np.isnan(widen(outcome.out, out_dtype))).tolist() == [place]


def test_finite_inputs_are_not_flagged():
    """The largest finite fp32 is no infinity; neither is what happens in the padding of a tail."""
    largest = np.full(531, np.finfo(np.float32).max)
    outcome = same_records_on_every_backend([{"x": Stored(largest, "F32")}], {"base_kind": r.BASE_ZERO}, size=531)
    assert outcome.nonfinite == 0
    close_to_one = {"x": Stored(store(np.full(5, 1.0009765625), "F16"), "F16"), "weight": 1e6}
    outcome = same_records_on_every_backend([close_to_one], {"base_kind": r.BASE_ONE}, size=5, out_dtype="F16")
    assert outcome.nonfinite == 0


@pytest.mark.parametrize(
    "dtype, fits, overflows",
    [("F16", 65519.996, 65520.0), ("BF16", float.fromhex("0x1.fefffep127"), float.fromhex("0x1.ffp127"))],
)
def test_a_result_beyond_the_outputs_dtype_is_flagged(dtype, fits, overflows):
    for value, flag in ((fits, 0), (-fits, 0), (overflows, NONFINITE_RESULT), (-overflows, NONFINITE_RESULT)):
        for place in (0, 63, 64):
            x = np.ones(65, np.float32)
            x[place] = value
            task = {"x": Stored(x, "F32")}
            outcome = same_records_on_every_backend([task], {"base_kind": r.BASE_ZERO}, size=65, out_dtype=dtype)
            assert outcome.nonfinite == flag, (value, place)


def test_finite_inputs_whose_difference_overflows_are_flagged():
    x, base = np.float32([3e38]), np.float32([-3e38])
    outcome = same_records_on_every_backend([{"x": Stored(x, "F32")}], {}, base=Stored(base, "F32"), size=1)
    assert outcome.nonfinite == NONFINITE_INPUT | NONFINITE_RESULT


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "bad, problem",
    [("base", "a.safetensors: 'w': expected finite values, got 1 NaN or inf"),
     ("model", "c.safetensors: 'w': expected finite values, got 1 NaN or inf"),
     ("difference", "w: elements 0 to 5000: differences between models, masks or weights are not finite"),
     ("result", "w: elements 0 to 5000: the merged values overflow")],
)  # fmt: skip
def test_merge_names_who_is_not_finite(backend, bad, problem):
    arrays = [np.zeros(5000, np.float32) for _ in range(3)]
    if bad in ("base", "model"):
        arrays[0 if bad == "base" else 2][4321] = np.nan
    elif bad == "difference":
        arrays[0][17], arrays[1][17] = 3e38, -3e38
    else:
        arrays[1][17] = 1e5
    base, *models = (buffer_of(a, "F32") for a in arrays)
    inputs = Inputs("w", (5000,), base, tuple(models), labels=("a.safetensors", "b.safetensors", "c.safetensors"))
    out = output_of(5000, "F16")
    with running_on(backend):
        (prepared,) = prepare([(DeltaMerge((Term(), Term())), inputs)])
        with pytest.raises(CheckpointError, match=problem):
            merge([Job(prepared, 0, 5000, out)])
        merge([Job(prepared, 0, 5000, out)], allow_nonfinite=True)


SPECIAL = np.float32([0.0, -0.0, 1.0, -1.0, 0.5, np.inf, -np.inf, np.nan, 1e-45, -1e-40, 3e38, -3e38, 65504.0, 1e-8])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_backends_agree_on_any_special_values_under_any_rule(data):
    """Where NaN and inf are allowed they travel alike, and are flagged alike."""
    dtype, out_dtype = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(DTYPES))
    draw, size = np.random.default_rng(data.draw(st.integers(0, 2**20))), data.draw(st.integers(1, 37))

    def array() -> Stored:
        return Stored(store(draw.choice(SPECIAL, size), dtype), dtype)

    elect = data.draw(
        st.sampled_from([r.ELECT_NONE, r.ELECT_WEIGHTED, r.ELECT_UNWEIGHTED, r.ELECT_COUNT, r.ELECT_GIVEN])
    )
    aggregates = [r.SUM, r.LARGEST_FIRST, r.LARGEST_LAST, r.MEDIAN] if elect == r.ELECT_NONE else [r.SUM, r.MAX]
    divides = [r.DIVIDE_CONSTANT]
    if elect != r.ELECT_NONE:
        divides += [r.DIVIDE_AGREEING_WEIGHT, r.DIVIDE_AGREEING_COUNT]
    rule = {
        "elect": elect,
        "base_kind": data.draw(st.sampled_from([r.BASE_TENSOR, r.BASE_ZERO, r.BASE_ONE])),
        "zero_sign": data.draw(st.sampled_from([-1, 0, 1])),
        "aggregate": data.draw(st.sampled_from(aggregates)),
        "divide": data.draw(st.sampled_from(divides)),
        "divisor": data.draw(st.sampled_from([1.0, 3.0])),
        "floor": data.draw(st.sampled_from([0.0, 0.1])),
        "scaling": data.draw(st.sampled_from([1.0, -0.5])),
    }
    low = data.draw(st.sampled_from([0, 1, 0x3F800000, 0x7F800000, 0x7FC00000, 0x7FFFFFFF]))
    keep = {"keep": data.draw(st.sampled_from([r.KEEP_ALL, r.KEEP_NONE, r.KEEP_TOP])), "low": low, "low_index": 7}
    tasks = []
    for _ in range(data.draw(st.integers(1, 4))):
        weights = {"weights": array()} if data.draw(st.booleans()) else {}
        mask = {"mask": array()} if data.draw(st.booleans()) else {}
        tasks.append({"x": array(), "is_delta": data.draw(st.booleans()), **keep, **weights, **mask})
    same_records_on_every_backend(tasks, rule, base=array(), sign=array(), size=size, out_dtype=out_dtype)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_backends_agree_on_any_special_values_in_the_common_merges(data):
    dtype, size = data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(1, 70))
    draw = np.random.default_rng(data.draw(st.integers(0, 2**20)))
    rule = data.draw(st.sampled_from([{}, {"divisor": 3.0}, *({**TIES, "zero_sign": sign} for sign in (-1, 0, 1))]))
    low = data.draw(st.sampled_from([0, 1, 0x3F800000, 0x7F800000, 0x7FC00000, 0x7FFFFFFF]))
    keep = {"keep": data.draw(st.sampled_from([r.KEEP_ALL, r.KEEP_TOP])), "low": low}
    keep["low_index"] = data.draw(st.sampled_from([-1, 20, r.LAST]))
    tasks = [
        {"x": Stored(store(draw.choice(SPECIAL, size), dtype), dtype), "weight": weight, **keep}
        for weight in data.draw(st.lists(st.sampled_from([1.0, 0.5, -0.5, 0.0]), min_size=1, max_size=6))
    ]
    base = Stored(store(draw.choice(SPECIAL, size), dtype), dtype)
    same_records_on_every_backend(tasks, {"scaling": 0.5, **rule}, base=base, size=size, out_dtype=dtype)
