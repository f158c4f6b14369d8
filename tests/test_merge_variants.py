"""Several merges in one pass: each has the bits of its own merge, on every backend, whatever they share."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from backends import BACKENDS, NATIVE, SIMD, assert_same_bits, buffer_of, contents, output_of, running_on
from delta_merge_cases import Case, case_of
from hypothesis import given, settings
from hypothesis import strategies as st

from peta_fast.buffers import Buffer
from peta_fast.ops import records as r
from peta_fast.ops.delta_merge import (
    All,
    Band,
    DeltaMerge,
    Inputs,
    Job,
    Nothing,
    Random,
    RankedRandom,
    Term,
    Top,
    merge,
    prepare,
)
from peta_fast.ops.merge_variants import VariantJob, merge_variants, share

SIZE = 50 * 103


def variants_of(keeps, factors=(0.25, 1.0, 3.5), *, tasks=3, prescale=1.0, **rule) -> list[DeltaMerge]:
    """Every keep rule with every weight; the tasks of one merge differ in weight alone."""
    return [
        DeltaMerge(tuple(Term(f * (0.4 + 0.3 * t), keep, prescale) for t in range(tasks)), **rule)
        for keep, f in itertools.product(keeps, factors)
    ]


def singly(spec, inputs, out_dtype, *, seed=0, majority=0) -> np.ndarray:
    (prepared,) = prepare([(spec, inputs)], seed=seed, majority=majority)
    out = output_of(inputs.size, out_dtype)
    merge([Job(prepared, 0, inputs.size, out)], allow_nonfinite=True)
    return contents(out)


def together(specs, inputs, out_dtypes, *, seeds, majorities=(), cuts=(), threads=1, patterns=None):
    """What all come to, and the flags, made in pieces between the cuts."""
    shared = share(specs, patterns or [range(len(s.terms)) for s in specs], seeds, majorities)
    (prepared,) = prepare([(shared.union, shared.inputs([inputs] * len(specs), seeds))], threads=threads)
    outs = [output_of(inputs.size, d) for d in out_dtypes]
    ends = [0, *cuts, inputs.size]
    everyone = range(len(specs))
    jobs = [
        VariantJob(shared, prepared, a, b, everyone, [o.slice(a, b) for o in outs])
        for a, b in zip(ends, ends[1:], strict=False)
    ]
    flags = merge_variants(jobs, threads=threads)
    return [contents(o) for o in outs], np.bitwise_or.reduce(np.array(flags))


def assert_each_is_its_own_merge(specs, case: Case, out_dtype="BF16", *, seeds=None, majorities=None, cuts=()):
    seeds, majorities = seeds or [0] * len(specs), majorities or [0] * len(specs)
    inputs = case.inputs()
    with running_on("plain"):
        expected = [
            singly(s, inputs, out_dtype, seed=k, majority=m) for s, k, m in zip(specs, seeds, majorities, strict=True)
        ]
    for name in BACKENDS:
        with running_on(name):
            found, flags = together(
                specs, inputs, [out_dtype] * len(specs), seeds=seeds, majorities=majorities, cuts=cuts, threads=2
            )
        for k, (actual, wanted) in enumerate(zip(found, expected, strict=True)):
            assert_same_bits(actual, wanted, f"variant {k} on {name}")
        assert not flags.any()


TIES = {"elect": "weighted", "divide": "agreeing-weight"}
RULES = {
    "ties": ([Top(700), Top(2600), All()], TIES),
    "ties, zero as plus, exact counts": ([Top(700, "first"), Top(2600, "first")], {**TIES, "zero": "plus"}),
    "ties, zero as minus": ([Top(700)], {**TIES, "zero": "minus"}),
    "ties without a mean": ([Top(700), Top(2600)], {"elect": "weighted", "scaling": 0.7}),
    "ties as PEFT": ([Top(900, "first")], {"elect": "unweighted", "zero": "plus", "divide": "agreeing-count"}),
    "the largest of those that agree": ([Top(900)], {"elect": "unweighted", "aggregate": "max"}),
    "election by count": ([Top(900), Nothing()], {"elect": "count", "divide": "agreeing-weight"}),
    "task arithmetic": ([All()], {"divide": 2.1, "scaling": 1.3}),
    "weighted average": ([All()], {"base": "zero", "divide": 1.5}),
    "from one": ([All()], {"base": "one"}),
    "breadcrumbs": ([Band(50, 600), Band(50, 900, "first")], {"divide": 0.9}),
    "dare": ([Random(0.3), Random(0.8)], {}),
    "largest overall": ([All(), Top(1500)], {"aggregate": "largest"}),
    "median": ([All(), Top(1500)], {"aggregate": "median"}),
}  # fmt: skip


@pytest.mark.parametrize("steps", [None, 64], ids=["", "with equals and zero sums"])
@pytest.mark.parametrize("name", RULES)
def test_every_rule_has_the_bits_of_a_single_merge(name, steps):
    keeps, rule = RULES[name]
    case = case_of(3, seed=3, steps=steps)
    assert_each_is_its_own_merge(variants_of(keeps, (0.25, 2.0), **rule), case)


@pytest.mark.parametrize("tasks", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtypes, out", [(("BF16",), "BF16"), (("F32", "BF16"), "F16"), (("F16",), "F32")])
def test_tasks_and_dtypes(tasks, dtypes, out):
    case = case_of(tasks, dtypes=dtypes, seed=tasks, steps=256)
    assert_each_is_its_own_merge(variants_of([Top(500), Top(2000)], tasks=tasks, **TIES), case, out)
    assert_each_is_its_own_merge(variants_of([All()], tasks=tasks), case, out)


def test_scalings_share_one_mean_and_seeds_share_nothing():
    case = case_of(3)
    scaled = [DeltaMerge(variants_of([Top(800)])[0].terms, scaling=s, **TIES) for s in (0.3, 1.0, -2.0, 0.0)]
    assert_each_is_its_own_merge(scaled, case)
    drawn = variants_of([Random(0.5)], (1.0,)) * 3
    assert_each_is_its_own_merge(drawn, case, seeds=[0, 7, 0])


def test_negative_weights_and_weights_that_cancel():
    case = case_of(2, steps=32)
    specs = [
        DeltaMerge((Term(a, Top(2000)), Term(b, Top(2000))), **TIES) for a, b in [(1, -1), (-0.5, 0.25), (0, 1), (2, 1)]
    ]
    assert_each_is_its_own_merge(specs, case)


def test_ranked_probabilities_norms_masks_and_rows():
    rowwise = variants_of([RankedRandom(0.2, 0.6), RankedRandom(0.4, 0.8)], prescale="1/p")
    assert_each_is_its_own_merge(rowwise, case_of(3))
    assert_each_is_its_own_merge(variants_of([Random(0.3), Random(0.6)], prescale="l1"), case_of(3))
    masked = variants_of([All(), Top(900)], masked=True, mask_rescale="mean")
    assert_each_is_its_own_merge(masked, case_of(3, masks=("BITS", "BYTES", "F16")), cuts=(1111,))
    blocks = variants_of([Top(100), Top(300, "first")], scope="row-block", **TIES)
    assert_each_is_its_own_merge(blocks, case_of(3, (5, 20, 40), steps=64), cuts=(1500,))


def test_majority_signs_are_each_variants_own():
    specs = (
        variants_of([All()], (1.0,), tasks=2, elect="unweighted", zero="majority-minus", divide="agreeing-count") * 3
    )
    assert_each_is_its_own_merge(specs, case_of(2, steps=8), majorities=[1, -1, 0])


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_mixture_of_variants_sizes_and_cuts(data):
    size = data.draw(st.sampled_from([1, 31, 64, 511, 513, 4097, 9000]))
    kinds = {"all": All(), "top": Top(max(1, size // 3)), "first": Top(max(1, size // 5), "first"),
             "random": Random(0.5), "none": Nothing()}  # fmt: skip
    tasks = data.draw(st.integers(1, 5))
    weight = st.sampled_from([0.0, 0.3, 1.0, -0.7, 1e30, 1e-30])
    term = st.builds(Term, weight, st.sampled_from(list(kinds.values())))
    rule = st.sampled_from([TIES, {}, {"elect": "weighted", "zero": "plus", "divide": "agreeing-weight"},
                            {"aggregate": "median"}, {**TIES, "scaling": 1e-3}])  # fmt: skip
    specs = [
        DeltaMerge(tuple(data.draw(term) for _ in range(tasks)), **data.draw(rule))
        for _ in range(data.draw(st.integers(1, 6)))
    ]
    case = case_of(tasks, (size,), data.draw(st.sampled_from([("BF16",), ("F32",), ("F16", "BF16")])), steps=64)
    cuts = (size // 2,) if size > 2 else ()
    assert_each_is_its_own_merge(specs, case, data.draw(st.sampled_from(["BF16", "F32"])), cuts=cuts)


def test_by_hand():
    """Base 1; deltas (1, -1, 4) and (3, 2, -4), keeping all. Weighted sums at weights (1, 1) and (2, 1)."""
    base, one, other = np.ones(3, np.float32), np.array([2, 0, 5], np.float32), np.array([4, 3, -3], np.float32)
    inputs = Inputs("w", (3,), buffer_of(base, "F32"), (buffer_of(one, "F32"), buffer_of(other, "F32")))
    specs = [DeltaMerge((Term(a), Term(1.0)), **TIES) for a in (1.0, 2.0)]
    (equal, double), _ = together(specs, inputs, ["F32", "F32"], seeds=[0, 0])
    assert equal.tolist() == [1 + 2, 1 + 2, 1]  # means of 1 and 3; of 2 alone; a zero sum leaves the base
    assert double.tolist() == pytest.approx([1 + 5 / 3, 1, 1 + 4])  # (2 + 3) / 3; -2 + 2 = 0; 4 alone


def test_variants_of_other_models_share_the_base():
    """A batch: the second merge has another second model; only the first model's term is shared."""
    case = case_of(3)
    whole = case.inputs()
    specs = variants_of([Top(900)], (1.0,), tasks=2, **TIES) * 2
    each = [Inputs("w", whole.shape, whole.base, (whole.models[0], whole.models[k])) for k in (1, 2)]
    shared = share(specs, [(0, 1), (0, 2)], [0, 0])
    assert len(shared.origins) == 3
    (prepared,) = prepare([(shared.union, shared.inputs(each, [0, 0]))])
    outs = [output_of(SIZE, "BF16") for _ in specs]
    merge_variants([VariantJob(shared, prepared, 0, SIZE, [0, 1], outs)])
    for spec, inputs, out in zip(specs, each, outs, strict=True):
        assert_same_bits(contents(out), singly(spec, inputs, "BF16"))


@pytest.mark.parametrize("name", BACKENDS)
def test_a_fault_is_told_of_the_variants_that_have_it(name):
    case = case_of(3, dtypes=("F16",))
    broken = case.models[2].copy()
    broken[2000] = np.inf
    case = Case(case.shape, case.base, (*case.models[:2], broken), case.dtypes)
    inputs = case.inputs()
    without = DeltaMerge((Term(1.0), Term(1.0)))
    specs = [without, DeltaMerge((Term(), Term(), Term())), DeltaMerge((Term(1e7), Term(1.0)))]
    with running_on(name):
        found, flags = together(specs, inputs, ["F16"] * 3, seeds=[0] * 3)
        assert flags.tolist() == [0, 3, 2]
        assert np.isfinite(found[0]).all()
        for spec, actual in zip(specs, found, strict=True):
            own = Inputs("w", inputs.shape, inputs.base, inputs.models[: len(spec.terms)])
            assert_same_bits(actual, singly(spec, own, "F16"))


def test_nan_has_one_pattern_in_every_variant():
    case = case_of(2, dtypes=("BF16",))
    broken = case.models[0].copy()
    broken[::97] = 0xFFC1
    case = Case(case.shape, case.base, (broken, case.models[1]), case.dtypes)
    specs = variants_of([Top(900), All()], tasks=2, **TIES) + variants_of([All()], tasks=2)
    inputs = case.inputs()
    with running_on("plain"):
        expected = [singly(s, inputs, "BF16") for s in specs]
    for name in SIMD:
        with running_on(name):
            found, _ = together(specs, inputs, ["BF16"] * len(specs), seeds=[0] * len(specs))
        for actual, wanted in zip(found, expected, strict=True):
            assert_same_bits(actual, wanted, name)


@pytest.mark.skipif(NATIVE is None, reason="the native module is not built")
@pytest.mark.parametrize(
    "table, changed, message",
    [
        ("groups", {"size": -1}, r"group\[0\]: size or start is negative"),
        ("groups", {"terms": 2}, "terms out of range"),
        ("groups", {"first_variant": 1}, "variants out of range"),
        ("groups", {"base": 0}, "no base"),
        ("groups", {"base_kind": 7}, "unknown base kind"),
        ("terms", {"x": 0}, "has no input"),
        ("terms", {"dtype": 3}, "unknown dtype code 3"),
        ("terms", {"weights": 64}, "which only delta_merge takes"),
        ("variants", {"uses": 2}, r"variant\[0\]: uses out of range"),
        ("variants", {"rule": 1}, "rule out of range"),
        ("variants", {"out": 0}, "no output"),
        ("variants", {"out_dtype": 5}, "unknown dtype code 5"),
        ("uses", {"term": 1}, r"use\[0\]: term out of range"),
        ("uses", {"term": -1}, "term out of range"),
        ("rules", {"base_kind": 1}, "another base kind than its group"),
        ("rules", {"elect": r.ELECT_GIVEN}, "a given sign, which only delta_merge takes"),
    ],
)
def test_records_that_do_not_fit_are_refused(table, changed, message):
    memory = np.ones(8, np.float32)
    at = memory.ctypes.data
    tables = {
        "groups": np.zeros(1, r.GROUP), "terms": np.zeros(1, r.TASK), "variants": np.zeros(1, r.VARIANT),
        "uses": np.zeros(1, r.USE), "rules": np.zeros(1, r.RULE),
    }  # fmt: skip
    valid = {"groups": {"base": at, "size": 8, "terms": 1, "variants": 1}, "terms": {"x": at, "prescale": 1},
             "variants": {"out": at, "uses": 1}, "uses": {"weight": 1}}  # fmt: skip
    for name, fields in [*valid.items(), (table, changed)]:
        for field, value in fields.items():
            tables[name][field] = value
    with pytest.raises(ValueError, match=message):
        NATIVE.merge_variants(*tables.values(), 1)


def test_nothing_to_do():
    case = case_of(2, (0,))
    specs = variants_of([All()], tasks=2)
    found, flags = together(specs, case.inputs(), ["BF16"] * 3, seeds=[0] * 3)
    assert [f.size for f in found] == [0, 0, 0] and not flags.size
    assert merge_variants([]) == [] and Buffer(0, "F32", 0).nbytes == 0
