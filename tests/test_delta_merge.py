"""The fused merge against the fp64 reference, and bit for bit on every backend, thread count, tiling and address."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from backends import (
    BACKENDS,
    DTYPES,
    assert_same_bits,
    contents,
    memory_before_an_unmapped_page,
    output_of,
    running_on,
    same_on_every_backend,
    store,
)
from delta_merge_cases import Case, case_of, check, mask_of, run, terms_of
from hypothesis import given, settings
from hypothesis import strategies as st

from peta_fast.buffers import Buffer
from peta_fast.ops.delta_merge import (
    Above,
    All,
    Band,
    DeltaMerge,
    Inputs,
    Job,
    MaskBuffer,
    Nothing,
    Random,
    RankedRandom,
    Term,
    Top,
    merge,
    prepare,
    ranks_wanted,
    sign_total,
    with_majority,
)
from peta_fast.ops.order_statistics import MagnitudeHistogram

# ---------------------------------------------------------------- worked on paper


def test_a_ties_merge_worked_on_paper():
    """Top 2 of 4, sign of the sum, mean of the agreeing; the last column cancels and leaves the base."""
    base = np.float32([10, 20, 30, 40])
    deltas = np.float32([[4, -1, 0, 2], [3, 1, 2, -1], [-1, 8, 0, -2]])
    case = Case((4,), base, tuple(base + deltas), ("F32",) * 4)
    spec = DeltaMerge(terms_of_weight_one(3, Top(2)), elect="weighted", divide="agreeing-weight")
    assert check(spec, case).tolist() == [10 + (4 + 3) / 2, 20 + 8, 30 + 2, 40]


def terms_of_weight_one(num_tasks: int, keep) -> tuple[Term, ...]:
    return tuple(Term(1.0, keep) for _ in range(num_tasks))


def test_above_means_strictly_above_even_at_the_first_element():
    case = Case((4,), np.zeros(4, np.float32), (np.float32([0.5, -0.5, 0.75, -1]),), ("F32",) * 2)
    assert check(DeltaMerge((Term(1.0, Above(0.5)),)), case).tolist() == [0, 0, 0.75, -1]


@pytest.mark.parametrize(
    "zero, expected",
    [("drop", 5.0), ("plus", 7.0), ("minus", 3.0), ("majority-minus", 3.0), ("majority-plus", 7.0)],
)
def test_a_column_that_cancels_follows_the_zero_rule(zero, expected):
    case = Case((1,), np.float32([5]), (np.float32([7]), np.float32([3])), ("F32",) * 3)
    spec = DeltaMerge(terms_of_weight_one(2, All()), elect="weighted", zero=zero)
    assert check(spec, case).tolist() == [expected]


@pytest.mark.parametrize("majority, expected", [(1, 7.0), (-1, 3.0)])
@pytest.mark.parametrize("zero", ["majority-minus", "majority-plus"])
def test_a_majority_of_the_model_decides_where_a_column_cancels(zero, majority, expected):
    case = Case((1,), np.float32([5]), (np.float32([7]), np.float32([3])), ("F32",) * 3)
    spec = DeltaMerge(terms_of_weight_one(2, All()), elect="weighted", zero=zero)
    assert check(spec, case, majority=majority).tolist() == [expected]
    (prepared,) = prepare([(spec, case.inputs())])
    out = output_of(1, "F32")
    merge([Job(with_majority(prepared, majority), 0, 1, out)])
    assert contents(out).tolist() == [expected]


# ---------------------------------------------------------------- every rule

KEEPS = {
    "all": All(),
    "nothing": Nothing(),
    "top-all": Top(300),
    "top-first": Top(300, "first"),
    "top-none": Top(0),
    "top-everything": Top(10**9, "first"),
    "band-all": Band(40, 500),
    "band-first": Band(40, 500, "first"),
    "band-without-skip": Band(0, 500, "first"),
    "band-to-the-end": Band(700, 10**9),
    "band-past-the-end": Band(10**9, 5),
    "above": Above(0.0625),
    "random": Random(0.3),
    "ranked-random": RankedRandom(0.2, 0.7),
}
RULES = {
    "sum": {},
    "mean": {"divide": 3.0},
    "ties": {"elect": "weighted", "divide": "agreeing-weight"},
    "ties-count": {"elect": "unweighted", "divide": "agreeing-count", "zero": "plus"},
    "majority-vote": {"elect": "count", "zero": "minus", "divide": "agreeing-count"},
    "elected-sum": {"elect": "weighted", "zero": "majority-minus"},
    "elected-max": {"elect": "unweighted", "aggregate": "max"},
    "largest": {"aggregate": "largest"},
    "largest-last": {"aggregate": "largest-last"},
    "median": {"aggregate": "median"},
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("keep", KEEPS)
def test_every_keep_rule_under_every_election_and_aggregate(keep, rule):
    """Coarse values, so that thresholds, signs and extremes are full of ties; dtypes mixed."""
    case = case_of(3, dtypes=("BF16", "F32", "F16"), steps=64)
    check(DeltaMerge(terms_of(3, KEEPS[keep]), scaling=0.7, **RULES[rule]), case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("zero", ["drop", "plus", "minus", None], ids=["drop", "plus", "minus", "sum"])
def test_the_common_merges_of_one_dtype(dtype, num_tasks, zero):
    """Those that have loops of their own: TIES and task arithmetic without masks. Weights have either sign."""
    weights = [0.5, -0.25, 0.75, 0.25, -0.5, 1.0, 0.125, -1.0, 0.3][:num_tasks]
    rule = {"elect": "weighted", "divide": "agreeing-weight", "zero": zero} if zero else {"divide": 2.0}
    for steps in (None, 16):
        case = case_of(num_tasks, (3001,), (dtype,), steps=steps)
        for keep in (All(), Top(700), Top(701, "first"), Top(1700, "first")):
            check(DeltaMerge(tuple(Term(w, keep) for w in weights), **rule), case, dtype, threads=(1,))


@pytest.mark.parametrize("base", ["tensor", "zero", "one"])
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_every_base_and_output_dtype(base, out_dtype):
    for dtypes in (("BF16",), ("F16",), ("F32",), DTYPES):
        spec = DeltaMerge(terms_of(3, Top(900)), base=base, elect="weighted", divide="agreeing-weight")
        check(spec, case_of(3, dtypes=dtypes), out_dtype)


@pytest.mark.parametrize("prescale", [0.5, "l1"])
@pytest.mark.parametrize("keep", ["top-all", "top-none", "random", "ranked-random"])
def test_prescale_multiplies_the_survivors(keep, prescale):
    check(DeltaMerge(terms_of(3, KEEPS[keep], prescale), elect="weighted"), case_of(3), seed=11)


def test_one_over_p_is_of_each_survivors_own_probability():
    check(DeltaMerge(terms_of(2, RankedRandom(0.1, 0.9), "1/p")), case_of(2, (7, 301)))
    check(DeltaMerge(terms_of(2, RankedRandom(0.1, 0.9), "1/p")), case_of(2, (301, 1)))


def test_l1_prescale_restores_the_norm_over_many_blocks():
    case = case_of(1, (70_001,), ("F32",))
    kept = run(DeltaMerge((Term(1.0, Random(0.25), "l1"),), base="zero"), case)
    assert np.abs(kept).sum(dtype=np.float64) == pytest.approx(np.abs(case.models[0]).sum(dtype=np.float64), rel=1e-6)
    check(DeltaMerge((Term(1.0, Random(0.25), "l1"),)), case, "BF16")


@pytest.mark.parametrize("form", ["BITS", "BYTES", *DTYPES])
@pytest.mark.parametrize("rescale", ["none", "mean"])
def test_masks_multiply_before_the_election(form, rescale):
    case = case_of(3, (3, 1111), masks=(form,))
    spec = DeltaMerge(terms_of(3, Top(1500)), elect="weighted", divide="agreeing-weight", masked=True,
                      mask_rescale=rescale)  # fmt: skip
    check(spec, case)
    cut = run(spec, case, cuts=(1, 13, 1030, 1031, 3000))
    assert_same_bits(cut, run(spec, case), "cut where no byte of the mask begins")


def test_a_mask_that_all_tasks_share_and_one_that_keeps_nothing():
    case = case_of(3, (999,))
    shared, nothing = mask_of("BITS", 999, np.random.default_rng(3)), np.zeros(999, np.uint8)
    spec = DeltaMerge(terms_of(3), masked=True, mask_rescale="mean")
    check(spec, replace(case, masks=((shared, "BITS"),) * 3))
    check(spec, replace(case, masks=((shared, "BITS"), (nothing, "BYTES"), (shared, "BITS"))))
    only_nothing = check(spec, replace(case, masks=((nothing, "BYTES"),) * 3), "BF16")
    assert_same_bits(store(only_nothing, "BF16"), case.base)


@pytest.mark.parametrize("prescale", ["l1", 0.5])
def test_the_mean_of_a_mask_and_another_prescale_multiply_each_other(prescale):
    spec = DeltaMerge(terms_of(2, Random(0.5), prescale), masked=True, mask_rescale="mean")
    check(spec, case_of(2, (2003,), masks=("BYTES",)))


@pytest.mark.parametrize("keep", [Top(150), Top(150, "first"), Band(20, 100, "first")])
def test_a_trim_scope_of_row_blocks_ranks_within_each_index_of_the_first_dimension(keep):
    case = case_of(2, (5, 30, 41), steps=32)
    spec = DeltaMerge(terms_of(2, keep), scope="row-block")
    check(spec, case, "BF16")
    assert_same_bits(run(spec, case, cuts=(3, 1229, 1230, 1231, 4000)), run(spec, case))


def test_a_trim_scope_of_the_model_takes_the_ranks_of_all_its_tensors():
    """Both tensors as one, ranked together by a histogram, then merged each alone."""
    both, keep = case_of(2, (9000,), ("BF16",)), Top(1800)
    spec = DeltaMerge(terms_of(2, keep), elect="weighted", scope="model")
    assert spec.needs_model_thresholds
    cases = [
        replace(both, shape=(b - a,), base=both.base[a:b], models=tuple(m[a:b] for m in both.models))
        for a, b in [(0, 2000), (2000, 9000)]
    ]

    def merged(_, threads):
        ranks = []
        for t in range(2):
            histogram = MagnitudeHistogram()
            for _ in range(2):
                for case in cases:
                    inputs = case.inputs()
                    histogram.add(inputs.base, inputs.models[t], threads=threads)
                if not histogram.narrowed:
                    histogram.narrow(ranks_wanted(keep))
            ranks.append(histogram.thresholds(ranks_wanted(keep)))
        outs = [output_of(c.base.size, "F32") for c in cases]
        prepared = prepare([(spec, c.inputs()) for c in cases], model_ranks=ranks)
        merge([Job(p, 0, o.size, o) for p, o in zip(prepared, outs, strict=True)], threads=threads)
        return np.concatenate([contents(o) for o in outs])

    assert_same_bits(same_on_every_backend(merged), run(replace(spec, scope="tensor"), both))


@pytest.mark.parametrize("num_tasks", [1, 2, 8, 33])
@pytest.mark.parametrize("rule", ["ties", "ties-count", "median", "largest"])
def test_any_number_of_tasks(num_tasks, rule):
    check(DeltaMerge(terms_of(num_tasks, Top(900)), **RULES[rule]), case_of(num_tasks, (2500,)))


@pytest.mark.parametrize("size", [1, 3, 4, 5, 15, 16, 17, 511, 512, 513, 4095, 4096, 4097])
def test_any_size_at_any_address(size):
    for offset in (0, 1, 2, 7):
        case = case_of(2, (size,), DTYPES, masks=("BF16", "BITS"), offset=offset)
        check(DeltaMerge(terms_of(2, Random(0.6)), elect="weighted", masked=True), case, "F16", threads=(1,))
        plain_loop = DeltaMerge(terms_of(2, Top(max(size // 2, 1))), elect="weighted", divide="agreeing-weight")
        check(plain_loop, case_of(2, (size,), ("BF16",), offset=offset), "BF16", threads=(1,))


def test_an_empty_tensor_is_no_work():
    for shape in [(0,), (0, 3), (0, 4, 5), (3, 0)]:
        spec = DeltaMerge(terms_of(2, Top(3), "l1"), masked=True, mask_rescale="mean")
        assert same_on_every_backend(lambda _, t, s=shape, m=spec: run(m, case_of(2, s, masks=("F32",)))).size == 0


# ---------------------------------------------------------------- invariance


@pytest.mark.parametrize("rule", ["ties", "mean", "elected-max"])
def test_threads_and_tiles_do_not_matter_over_many_grains(rule):
    """300,000 elements: five grains of work, the last one short, in one job and in twelve."""
    case = case_of(3, (300, 1001), ("BF16",))
    spec = DeltaMerge(terms_of(3, Top(90_000)), **RULES[rule])
    whole = check(spec, case, "BF16", threads=(1, 2, 4))
    cuts = np.random.default_rng(1).integers(0, case.base.size, 11).tolist()
    assert_same_bits(run(spec, case, "BF16", threads=4, cuts=cuts), store(whole, "BF16"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [None, np.nan, np.inf])
@pytest.mark.parametrize("target", ["base", "model"])
def test_merging_in_place(backend, target, bad):
    """With a value that is not finite, too, where some are gone over twice."""
    case = case_of(3, (20_001,), ("BF16",))
    if bad is not None:
        case.models[2][777] = store(np.float32([bad]), "BF16")[0]
    spec = DeltaMerge(terms_of(3, Top(5000)), elect="weighted", divide="agreeing-weight")
    inputs = case.inputs()
    with running_on(backend):
        (prepared,) = prepare([(spec, inputs)])
        apart = output_of(case.base.size, "BF16")
        merge([Job(prepared, 0, case.base.size, apart)], threads=2, allow_nonfinite=True)
        expected = contents(apart)
        out = inputs.base if target == "base" else inputs.models[1]
        merge([Job(prepared, 0, case.base.size, out)], threads=2, allow_nonfinite=True)
    assert_same_bits(contents(out), expected)


def test_many_tensors_in_one_call_are_merged_as_each_alone():
    cases = [case_of(2, (n,), DTYPES, seed=n, offset=n % 3) for n in (1, 5000, 70_000, 17)]
    specs = [DeltaMerge(terms_of(2, keep), elect="weighted") for keep in (All(), Top(100), Band(9, 9000), Random(0.5))]
    expected = [run(s, c) for s, c in zip(specs, cases, strict=True)]
    prepared = prepare([(s, c.inputs()) for s, c in zip(specs, cases, strict=True)], threads=2)
    outs = [output_of(c.base.size, "F32") for c in cases]
    merge([Job(p, 0, o.size, o) for p, o in zip(prepared, outs, strict=True)], threads=2)
    for out, one in zip(outs, expected, strict=True):
        assert_same_bits(contents(out), one)


@pytest.mark.parametrize("elect", ["weighted", "unweighted", "count"])
def test_the_sign_total_counts_the_elected_signs_of_all_tensors(elect):
    spec = DeltaMerge(terms_of(3, Top(30_000)), elect=elect)
    cases = [case_of(3, (70_003,), DTYPES), case_of(3, (333,), ("F16",), seed=4)]
    expected = 0
    for case in cases:
        base, models = case.wide()
        deltas = [x - base for x in models]
        cut = [np.sort(np.abs(d))[::-1][min(30_000, d.size) - 1] for d in deltas]
        votes = [np.where(np.abs(d) >= c, d, 0) for d, c in zip(deltas, cut, strict=True)]
        if elect == "weighted":
            votes = [v * np.float32(t.weight) for v, t in zip(votes, spec.terms, strict=True)]
        signs = [np.sign(v) if elect == "count" else v for v in votes]
        expected += int(np.sign(signs[0] + signs[1] + signs[2]).sum(dtype=np.float64))

    def total(_, threads):
        return np.array([sign_total(prepare([(spec, c.inputs()) for c in cases], threads=threads), threads=threads)])

    assert same_on_every_backend(total).tolist() == [expected]
    assert expected != 0


# ---------------------------------------------------------------- everything at once


@st.composite
def specs(draw, size: int, num_tasks: int) -> DeltaMerge:
    count = st.integers(0, size + 2)
    ties = st.sampled_from(["all", "first"])
    p = st.floats(0.01, 1)
    keep = st.one_of(
        st.just(All()), st.just(Nothing()), st.builds(Top, count, ties), st.builds(Band, count, count, ties),
        st.builds(Above, st.floats(0, 0.3)), st.builds(Random, p), st.builds(RankedRandom, p, p),
    )  # fmt: skip
    weight = st.sampled_from([0.3, 0.5, 1.0, 1.7])
    terms = [Term(draw(weight), k := draw(keep), draw(prescales(k))) for _ in range(num_tasks)]
    elect = draw(st.sampled_from([None, "weighted", "unweighted", "count"]))
    chosen = {"terms": tuple(terms), "elect": elect, "base": draw(st.sampled_from(["tensor", "zero", "one"]))}
    chosen["scaling"] = draw(st.sampled_from([1.0, 0.3]))
    if elect is None:
        chosen["aggregate"] = draw(st.sampled_from(["sum", "largest", "largest-last", "median"]))
        return DeltaMerge(divide=draw(st.sampled_from([1.0, 3.0])), **chosen)
    chosen["zero"] = draw(st.sampled_from(["drop", "plus", "minus", "majority-minus", "majority-plus"]))
    if draw(st.booleans()):
        return DeltaMerge(aggregate="max", **chosen)
    return DeltaMerge(divide=draw(st.sampled_from([1.0, 2.0, "agreeing-weight", "agreeing-count"])), **chosen)


def prescales(keep):
    return st.sampled_from([1.0, 0.8, "l1", "1/p"] if isinstance(keep, RankedRandom) else [1.0, 0.8, "l1"])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_merge_at_all(data):
    shape = data.draw(st.one_of(st.tuples(st.integers(1, 1100)), st.tuples(st.integers(1, 9), st.integers(1, 120))))
    num_tasks, seed = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 2**40))
    dtypes = tuple(data.draw(st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3)))
    forms = data.draw(st.sampled_from([(), ("BITS",), ("BYTES", "F32"), ("F16", "BF16")]))
    case = case_of(num_tasks, shape, dtypes, seed=seed, steps=data.draw(st.sampled_from([None, 16])), masks=forms,
                   offset=data.draw(st.integers(0, 9)))  # fmt: skip
    spec = replace(data.draw(specs(case.base.size, num_tasks)), masked=bool(forms))
    out_dtype, majority = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from([-1, 0, 1]))
    values = check(spec, case, out_dtype, seed=seed, majority=majority, threads=(1,))
    cuts = data.draw(st.lists(st.integers(0, case.base.size), max_size=3))
    again = run(spec, case, out_dtype, seed=seed, majority=majority, cuts=cuts, threads=2)
    assert_same_bits(again, store(values, out_dtype), f"cut at {cuts}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1, 9, 500, 4099])
def test_nothing_beyond_the_last_element_is_touched(backend, size):
    case = case_of(2, (size,), ("BF16",), masks=("BITS", "F16"))
    spec = DeltaMerge(terms_of(2, Top(max(size // 2, 1))), elect="weighted", masked=True)
    base, a, b = (at_the_end(x, "BF16") for x in (case.base, *case.models))
    masks = (
        MaskBuffer(at_the_end(case.masks[0][0], "U8"), "BITS"),
        MaskBuffer(at_the_end(case.masks[1][0], "F16"), "F16"),
    )
    with running_on(backend):
        (prepared,) = prepare([(spec, Inputs("w", (size,), base, (a, b), masks))])
        out = at_the_end(np.zeros(size, np.float32), "F32")
        merge([Job(prepared, 0, size, out)])
        assert_same_bits(out.owner, run(spec, case))


def at_the_end(array: np.ndarray, dtype: str) -> Buffer:
    return Buffer.from_array(memory_before_an_unmapped_page(array), dtype)
