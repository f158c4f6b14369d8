"""The CUDA kernels' host build: the CPU engine's own tests over it, against the fp64 references and bit for bit.

Once with threads and blocks in rising order, once in falling: what depends on the order would be a race on a GPU.
"""

from __future__ import annotations

import contextlib
from unittest import mock

import backends
import numpy as np
import pytest
import test_order_statistics
from backends import assert_same_bits, buffer_of, contents, memory_before_an_unmapped_page, output_of, running_on, store
from delta_merge_cases import case_of, run, terms_of
from host_build import HAS_COMPILER, backwards, host_ops

# Collected here again, under the fixture below.
from test_delta_merge import (  # noqa: F401
    test_a_mask_that_all_tasks_share_and_one_that_keeps_nothing,
    test_a_ties_merge_worked_on_paper,
    test_a_trim_scope_of_row_blocks_ranks_within_each_index_of_the_first_dimension,
    test_a_trim_scope_of_the_model_takes_the_ranks_of_all_its_tensors,
    test_an_empty_tensor_is_no_work,
    test_any_merge_at_all,
    test_any_number_of_tasks,
    test_any_size_at_any_address,
    test_every_base_and_output_dtype,
    test_every_keep_rule_under_every_election_and_aggregate,
    test_l1_prescale_restores_the_norm_over_many_blocks,
    test_masks_multiply_before_the_election,
    test_one_over_p_is_of_each_survivors_own_probability,
    test_prescale_multiplies_the_survivors,
    test_the_common_merges_of_one_dtype,
    test_the_sign_total_counts_the_elected_signs_of_all_tensors,
    test_threads_and_tiles_do_not_matter_over_many_grains,
)
from test_delta_merge_records import (  # noqa: F401
    test_a_given_sign_chooses_who_is_summed,
    test_agreeing_weights_below_the_floor_become_it,
    test_bits_of_a_mask_begin_anywhere_within_a_byte,
    test_equals_of_the_threshold_are_kept_up_to_an_index_of_the_whole_tensor,
    test_random_keeps_depend_on_the_flat_index_alone,
    test_ready_task_vectors_beside_finetuned_tensors,
    test_the_sign_total_counts_elements_and_no_padding,
    test_the_sign_total_of_a_model_with_nan_in_it,
    test_weights_by_element_multiply_the_tasks_weight,
    test_weights_that_cancel_to_zero_divide_by_one,
)
from test_delta_merge_values import (  # noqa: F401
    test_backends_agree_on_any_special_values_in_the_common_merges,
    test_backends_agree_on_any_special_values_under_any_rule,
    test_denormals_add_up_exactly,
    test_every_16_bit_element_widens_exactly,
    test_every_finite_element_passes_a_merge_of_one_bit_for_bit,
    test_fp32_rounds_to_nearest_even,
    test_the_base_stays_bit_for_bit_where_nothing_is_added,
)
from test_order_statistics import (  # noqa: F401
    test_any_coarse_tensor,
    test_any_dtypes_at_any_address,
    test_any_size,
    test_infinity_ranks_above_finite_values_and_nan_above_infinity,
    test_neighbours_that_are_alike,
    test_ranks_worked_on_paper,
    test_tasks_of_one_tensor_and_of_others_in_one_call,
    test_tensors_in_order,
    test_three_million_elements,
)
from test_task_statistics import (  # noqa: F401
    test_any_size_against_exact_sums,
    test_many_tasks,
    test_statistics_worked_on_paper,
    test_sums_are_taken_in_the_documented_order,
    test_the_tree_adds_adjacent_pairs,
    test_tiny_and_huge_values_neither_vanish_nor_overflow,
    test_values_that_are_not_finite_are_counted_wherever_they_are,
)

from peta_fast.ops import records as r
from peta_fast.ops.delta_merge import All, DeltaMerge, Inputs, Job, Random, Top, merge, prepare
from peta_fast.ops.order_statistics import MagnitudeHistogram, Selection, kth_magnitudes

pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason="no g++, or not in a checkout")
CUDA = ("cuda",)
TIES = {"elect": "weighted", "divide": "agreeing-weight"}


@pytest.fixture(autouse=True, params=["rising", "falling"])
def only_the_host_build(request):
    """What compares all backends compares plain numpy with the host build; what runs on all runs on it alone."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(backends, "SIMD", CUDA))
        for name in ("BACKENDS", "SIMD"):
            stack.enter_context(mock.patch.object(test_order_statistics, name, CUDA))
        if request.param == "falling":
            stack.enter_context(backwards())
        yield


def test_the_tests_above_do_run_on_the_host_build():
    with mock.patch.object(type(host_ops()), "start_merge", side_effect=host_ops().start_merge) as merges:
        test_every_base_and_output_dtype("tensor", "BF16")
    with mock.patch.object(type(host_ops()), "start_select", side_effect=host_ops().start_select) as selections:
        test_ranks_worked_on_paper()
    assert merges.call_count and selections.call_count


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("size", [1, 9, 500, 4099, 16_385])
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_nothing_beyond_the_last_element_is_touched(dtype, size):
    case = case_of(2, (size,), (dtype,))

    def at_the_end(array, dtype):
        return backends.Buffer.from_array(memory_before_an_unmapped_page(array), dtype)

    for keep in (Top(max(size // 2, 1)), Random(0.5)):
        spec = DeltaMerge(terms_of(2, keep), **TIES)
        base, *models = (at_the_end(x, dtype) for x in (case.base, *case.models))
        expected = run(spec, case, dtype)
        with running_on("cuda"):
            (prepared,) = prepare([(spec, Inputs("w", (size,), base, tuple(models)))])
            out = at_the_end(np.zeros_like(case.base), dtype)
            merge([Job(prepared, 0, size, out)])
        assert_same_bits(out.owner, expected)


@pytest.mark.parametrize("bad", [None, np.nan, np.inf])
@pytest.mark.parametrize("target", ["base", "model"])
def test_merging_in_place(bad, target):
    """Where a value is not finite, some elements are gone over twice; their inputs must still be there."""
    case = case_of(3, (40_001,), ("BF16",))
    if bad is not None:
        case.models[2][[777, 16_384, 40_000]] = store(np.float32([bad] * 3), "BF16")
    spec, inputs = DeltaMerge(terms_of(3, Top(5000)), **TIES), case.inputs()
    with running_on("cuda"):
        (prepared,) = prepare([(spec, inputs)])
        apart = output_of(case.base.size, "BF16")
        merge([Job(prepared, 0, case.base.size, apart)], allow_nonfinite=True)
        out = inputs.base if target == "base" else inputs.models[1]
        merge([Job(prepared, 0, case.base.size, out)], allow_nonfinite=True)
    assert_same_bits(contents(out), contents(apart))


# ---------------------------------------------------------------- tiles, kernels, batches


@pytest.mark.parametrize("num_tasks", [1, 3, 4, 5, 8, 9])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_every_kernel_of_the_common_merges(num_tasks, dtype):
    """Up to 4 and up to 8 tasks have kernels of their own; an exact count ends within a tile."""
    case = case_of(num_tasks, (33_001,), (dtype,), steps=16)
    for keep in (All(), Top(9000), Top(20_001, "first")):
        for rule in (TIES, {"divide": 2.0}):
            spec = DeltaMerge(terms_of(num_tasks, keep), scaling=0.5, **rule)
            with running_on("cuda"):
                actual = run(spec, case, dtype)
            with running_on("plain"):
                assert_same_bits(actual, run(spec, case, dtype))


def test_many_tensors_and_kernels_in_one_call():
    sizes, keeps = (1, 5000, 70_000, 17, 16_384, 131_073), (All(), Top(100), Random(0.5))
    cases = [case_of(2 + i % 3, (n,), ("BF16",) if i % 2 else ("BF16", "F32"), seed=n) for i, n in enumerate(sizes)]
    specs = [DeltaMerge(terms_of(2 + i % 3, keeps[i % 3]), **(TIES if i % 2 else {})) for i in range(len(sizes))]
    expected = [run(s, c) for s, c in zip(specs, cases, strict=True)]
    with running_on("cuda"):
        prepared = prepare([(s, c.inputs()) for s, c in zip(specs, cases, strict=True)])
        outs = [output_of(c.base.size, "F32") for c in cases]
        merge([Job(p, 0, o.size, o) for p, o in zip(prepared, outs, strict=True)])
    for out, one in zip(outs, expected, strict=True):
        assert_same_bits(contents(out), one)


# ---------------------------------------------------------------- selection


def sampled_places(size: int) -> np.ndarray:
    """Where TakeSample looks: max(8192, size / 128) elements at most 2^19, in runs of 32."""
    runs = min(max(size // 128, 8192), 1 << 19) // 32
    stride, j = size // runs, np.arange(runs, dtype=np.uint64)
    scattered = ((j + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(20)) % np.uint64(stride - 31)
    return (j[:, None] * np.uint64(stride) + scattered[:, None] + np.arange(32, dtype=np.uint64)).reshape(-1)


@pytest.mark.parametrize("seen", [0.0, 100.0, np.nan])
@pytest.mark.parametrize("size", [65_537, 1_200_000])
def test_a_sample_that_misleads_is_not_believed(size, seen):
    """Zeros, or the largest, wherever it looks: the bracket misses and histograms of the whole tensor decide."""
    x = test_order_statistics.normal(size)
    x[sampled_places(size)] = seen
    for values in (x, np.round(x * 2)):
        test_order_statistics.check(values, [size // 100, size // 3, size // 2, size - size // 50], threads=(1,))


def test_more_values_within_a_bracket_than_there_is_room_for():
    """The sample sees a wide spread, all other elements are within it."""
    size = 300_000
    x = 1 + np.random.default_rng(0).random(size).astype(np.float32) * np.float32(1e-3)
    places = sampled_places(size)
    x[places] = np.linspace(0, 3, places.size, dtype=np.float32)
    test_order_statistics.check(x, [size // 4, size // 2, size * 3 // 4], threads=(1,))


@pytest.mark.parametrize("densities", [(0.2,), (0.1, 0.9), (0.01, 0.2, 0.5, 0.7, 0.99)])
def test_several_densities_of_several_tasks_share_their_readings(densities):
    size = 200_003
    case = case_of(6, (size,), ("BF16",))
    counts = [int(size * d) for d in densities]
    base = buffer_of(case.base, "BF16")
    selections = [Selection(base, buffer_of(m, "BF16"), counts, group=7) for m in case.models]
    with running_on("plain"):
        expected = kth_magnitudes(selections)
    with running_on("cuda"):
        assert kth_magnitudes(selections) == expected


def test_a_query_may_do_without_its_index():
    x = np.round(test_order_statistics.normal(100_000) * 3)
    table, queries = np.zeros(2, r.SELECT_TASK), np.zeros(2, r.SELECT_QUERY)
    table["delta"]["x"], table["delta"]["base_kind"] = x.ctypes.data, r.BASE_ZERO
    table["size"], table["first_query"], table["queries"] = (x.size, 1000), (0, 1), 1
    queries["count"], queries["pad"] = (20_000, 300), 1
    host_ops().select_magnitudes(table, queries)
    assert (queries["last_index"] == r.LAST).all() and (queries["threshold"] > 0).all()


@pytest.mark.parametrize("steps", [None, 8])
def test_a_histogram_of_many_tensors_has_the_ranks_of_all_together(steps):
    sizes = (1, 5000, 300_000, 4097)
    wide = [np.exp(8 * test_order_statistics.normal(n, n)).astype(np.float32) for n in sizes]
    wide = [np.round(x * steps) / np.float32(steps) for x in wide] if steps else wide
    parts = [buffer_of(x, "F32") for x in wide]
    counts = [1, 100, 50_000, 300_000]

    def found():
        histogram = MagnitudeHistogram()
        for _ in range(2):
            for x in parts:
                histogram.add(None, x, base_kind=r.BASE_ZERO)
            if not histogram.narrowed:
                histogram.narrow(counts)
        return histogram.thresholds(counts)

    with running_on("plain"):
        expected = found()
    with running_on("cuda"):
        assert found() == expected


@pytest.mark.parametrize("columns", [1, 7, 64, 65, 1000, 1024, 1025, 5000])
def test_ranks_of_rows_of_any_length(columns):
    """A block sorts 1024 keys; longer rows are sorted in memory."""
    rows = 3
    x = np.round(test_order_statistics.normal(rows * columns, 5) * 50)
    delta = np.array([(0, x.ctypes.data, r.BASE_ZERO, 0, 0, 0)], r.DELTA)
    outs = []
    for name in ("plain", "cuda"):
        outs.append(np.full(rows * columns, np.nan, np.float32))
        with running_on(name) as module:
            module.ranked_probability(delta, 0, rows, columns, 0.1, 0.8, outs[-1], 1)
    assert_same_bits(outs[1], outs[0])
