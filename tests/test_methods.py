"""peta_fast.merge_state_dicts against the fp64 references, for every method, compat mode and mix of dtypes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import SHAPES, assert_matches_reference, assert_same_bits, coarse_family, family, inputs_of
from references import assert_close_to_reference, merge_reference, merge_with_terms
from torch import Tensor
from worked_examples import EXAMPLES

import peta_fast
from peta_fast.errors import CheckpointError, CompatibilityError, RecipeError

RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
WEIGHTS = [0.7, 0.5, -0.3]
DENSITIES = [0.2, 0.5, 0.85]
DTYPES = {
    "bf16": (torch.bfloat16, [torch.bfloat16]),
    "fp16": (torch.float16, [torch.float16]),
    "fp32": (torch.float32, [torch.float32]),
    "fp32-base-mixed-models": (torch.float32, [torch.bfloat16, torch.float16, torch.float32]),
    "bf16-base-mixed-models": (torch.bfloat16, [torch.float32, torch.bfloat16, torch.float16]),
}


def case(method, compat="native", **parameters):
    described = [f"{k}-{v}" for k, v in parameters.items() if isinstance(v, (bool, str))]
    return pytest.param(method, compat, parameters, id="-".join([method, compat, *described]))


def soft_masks() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(5)
    return {name: torch.rand(shape, generator=draw) for name, shape in SHAPES.items()}


def masks_of_each_task() -> dict[str, Tensor]:
    masks = {}
    for task, mask in [(0, torch.bool), (1, torch.uint8), (2, torch.bool)]:
        draw = torch.Generator().manual_seed(task)
        masks |= {f"{task}/{n}": (torch.rand(s, generator=draw) < 0.4).to(mask) for n, s in SHAPES.items()}
    return masks


ELECTED = [("native", True), ("native", False), ("mergekit", True), ("mergekit", False)]
CASES = [
    case("linear", weight=[0.5, 0.3, 0.9]),
    case("linear", "mergekit", weight=WEIGHTS, normalize=False),
    case("passthrough", scale=-0.7),
    case("slerp", t=0.3),
    case("slerp", "mergekit", t=0.8),
    case("task_arithmetic", weight=WEIGHTS, scaling=0.3),
    case("task_arithmetic", "mergekit", weight=WEIGHTS, normalize=True),
    *[case("ties", c, weight=WEIGHTS, density=DENSITIES, normalize=n, scaling=1.5) for c, n in ELECTED],
    *[case("ties", c, density=0.3, merge_func=f) for c in ("ties-authors", "peta") for f in ("mean", "sum", "max")],
    case("ties", "peta", density=1.0, scaling=0.3),
    case("ties", "peft", weight=WEIGHTS, density=0.4),
    *[case("dare_linear", c, weight=WEIGHTS, density=DENSITIES, seed=3) for c in ("native", "mergekit", "peft")],
    case("dare_ties", "peft", weight=WEIGHTS, density=DENSITIES),
    *[case("magnitude_prune", c, weight=WEIGHTS, density=DENSITIES) for c in ("native", "peft")],
    case("dare_linear", weight=WEIGHTS, density=DENSITIES, normalize=True, rescale=False),
    *[case("dare_ties", c, weight=WEIGHTS, density=DENSITIES, normalize=n) for c, n in ELECTED],
    *[case("della", c, weight=WEIGHTS, density=0.4, epsilon=0.2, normalize=n, seed=2**40) for c, n in ELECTED],
    *[case("della_linear", c, weight=WEIGHTS, density=0.7, epsilon=0.2, scaling=2) for c in ("native", "mergekit")],
    case("della_linear", weight=WEIGHTS, density=0.7, epsilon=0.2, rescale=False),
    *[
        case(method, c, weight=WEIGHTS, density=[0.6, 0.9, 0.97], gamma=0.05)
        for method in ("breadcrumbs", "breadcrumbs_ties")
        for c in ("native", "mergekit", "mergekit-0.1.4")
    ],
    case("breadcrumbs_ties", weight=WEIGHTS, density=0.6, normalize=True),
    case("masked_task_arithmetic", weight=WEIGHTS, mask=soft_masks()),
    case("masked_task_arithmetic", weight=WEIGHTS, mask=soft_masks(), mask_rescale="mean"),
    case("masked_task_arithmetic", weight=WEIGHTS, mask=masks_of_each_task(), mask_rescale="mean", scaling=0.3),
]
ONE_OF_EACH = [
    case("linear", weight=1.0),
    case("task_arithmetic", weight=1.0),
    *[case("ties", c, density=0.5) for c in ("native", "mergekit", "ties-authors", "peta", "peft")],
    *[case(m, c, weight=0.5, density=0.5) for m in ("dare_linear", "dare_ties") for c in ("native", "mergekit")],
    case("della", weight=1.0, density=0.5, normalize=True),
    *[case("breadcrumbs_ties", c, weight=1.0, density=0.5, gamma=0.1) for c in ("native", "mergekit")],
]
MAY_KEEP_NOTHING = [c for c in ONE_OF_EACH if "density" in c.values[2] and c.values[1] not in ("ties-authors", "peta")]


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("method, compat, parameters", CASES)
def test_every_method_matches_its_reference(method, compat, parameters, dtypes):
    base, models = inputs_of(method, *family(3, *DTYPES[dtypes]))
    assert_matches_reference(base, models, method=method, compat=compat, **parameters)


@pytest.mark.parametrize("example", EXAMPLES, ids=[e.name for e in EXAMPLES])
def test_worked_example(example):
    weight = {} if example.keywords["method"] in ("slerp", "passthrough") else {"weight": 1.0}
    result = peta_fast.merge_state_dicts(*example.state_dicts(), **(weight | example.keywords))["w"]
    expected = torch.tensor(example.expected, dtype=torch.float32)
    torch.testing.assert_close(result, expected, rtol=0, atol=example.tolerance)


@pytest.mark.parametrize("num_tasks", [1, 2, 8, 33])
@pytest.mark.parametrize("method, compat, parameters", ONE_OF_EACH)
def test_any_number_of_tasks_matches_the_reference(method, compat, parameters, num_tasks):
    base, models = inputs_of(method, *family(num_tasks, torch.bfloat16, [torch.bfloat16]))
    assert_matches_reference(base, models, method=method, compat=compat, **parameters)


@pytest.mark.parametrize("method, compat, parameters", CASES)
def test_exact_ties_and_zero_sums_match_the_reference(method, compat, parameters):
    base, models = inputs_of(method, *coarse_family())
    assert_matches_reference(base, models, method=method, compat=compat, **parameters)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (5, 1), (0,), (3, 0), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("method, compat, parameters", ONE_OF_EACH)
def test_tensors_of_one_element_or_none_match_the_reference(method, compat, parameters, shape):
    base, models = inputs_of(method, *family(3, shapes={"w": shape, "other": (3, 4)}))
    assert_matches_reference(base, models, method=method, compat=compat, **parameters)


@pytest.mark.parametrize("compat", ["native", "mergekit", "peft", "ties-authors"])
def test_ties_over_many_tiles_keep_the_right_equals(compat):
    base, models = coarse_family(shapes={"w": (100_003, 3)}, levels=40)
    assert_matches_reference(base, models, method="ties", compat=compat, density=0.35, threads=2)


@pytest.mark.parametrize("scope", ["tensor", "row-block", "model"])
@pytest.mark.parametrize("make", [family, coarse_family], ids=["distinct", "equal-magnitudes"])
def test_trim_scope_decides_what_is_ranked_together(scope, make):
    base, models = make()
    assert_matches_reference(base, models, method="ties", density=DENSITIES, weight=WEIGHTS, trim_scope=scope)


def test_breadcrumbs_rank_within_the_blocks_of_stacked_tensors():
    base, models = family()
    keywords = {"method": "breadcrumbs", "weight": 1.0, "density": 0.6, "gamma": 0.1}
    assert_matches_reference(base, models, trim_scope="row-block", **keywords)


@pytest.mark.parametrize("method, compat, parameters", MAY_KEEP_NOTHING)
def test_density_zero_keeps_the_base_bit_for_bit(method, compat, parameters):
    base, models = family(base_dtype=torch.bfloat16)
    base["norm.bias"][::2] = -0.0
    result = peta_fast.merge_state_dicts(base, models, method=method, compat=compat, **(parameters | {"density": 0.0}))
    assert_same_bits(result, base)


@pytest.mark.parametrize("method", ["dare_linear", "della_linear", "breadcrumbs"])
@pytest.mark.parametrize("compat", ["native", "mergekit"])
def test_density_one_is_task_arithmetic_bit_for_bit(method, compat):
    base, models = family(base_dtype=torch.bfloat16)
    result = peta_fast.merge_state_dicts(base, models, method=method, compat=compat, weight=WEIGHTS, density=1.0)
    assert_same_bits(result, peta_fast.merge_state_dicts(base, models, method="task_arithmetic", weight=WEIGHTS))


def test_a_zero_sum_leaves_the_native_base_bit_for_bit():
    base = {"w": torch.tensor([-0.0, -0.0, 1.5, -0.0])}
    models = [
        {"w": base["w"] + torch.tensor([1.0, 2.0, 3.0, 0.0])},
        {"w": base["w"] - torch.tensor([1.0, 2.0, 3.0, 0.0])},
    ]
    result = peta_fast.merge_state_dicts(base, models, method="ties", weight=1.0, density=0.75)
    assert_same_bits(result, base)


def test_task_arithmetic_is_the_fp32_sum_in_task_order_rounded_once():
    base, models = family(8, torch.bfloat16, [torch.float16])
    weights = [0.1 * (t + 1) for t in range(8)]
    result = peta_fast.merge_state_dicts(base, models, method="task_arithmetic", weight=weights, scaling=0.3)
    for name, tensor in result.items():
        total = torch.zeros_like(base[name], dtype=torch.float32)
        for weight, model in zip(weights, models, strict=True):
            total = total + torch.tensor(weight) * (model[name].float() - base[name].float())
        assert torch.equal(tensor, (base[name].float() + torch.tensor(0.3) * total).bfloat16()), name


@pytest.mark.parametrize("exponent", [-20, 7])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scaling_everything_by_a_power_of_two_is_exact(method, dtype, exponent):
    base, models = family(3, dtype, [dtype])
    keywords = {"method": method, "weight": WEIGHTS} | ({"density": DENSITIES} if method == "ties" else {})
    scaled = [{n: v * 2.0**exponent for n, v in d.items()} for d in (base, *models)]
    result = peta_fast.merge_state_dicts(scaled[0], scaled[1:], **keywords)
    plain = peta_fast.merge_state_dicts(base, models, **keywords)
    assert_same_bits(result, {n: v * 2.0**exponent for n, v in plain.items()})


@pytest.mark.parametrize("method, compat, parameters", CASES)
def test_threads_do_not_change_a_bit(method, compat, parameters):
    shapes = SHAPES if "mask" in parameters else SHAPES | {"large": (70_001, 3)}
    base, models = inputs_of(method, *family(base_dtype=torch.bfloat16, shapes=shapes))
    keywords = {"method": method, "compat": compat, **parameters}
    once = peta_fast.merge_state_dicts(base, models, threads=1, **keywords)
    for threads in (2, 3, 4):
        assert_same_bits(peta_fast.merge_state_dicts(base, models, threads=threads, **keywords), once)


@pytest.mark.parametrize("method", RANDOM)
def test_the_order_and_company_of_tensors_do_not_change_random_merges(method):
    base, models = family(base_dtype=torch.bfloat16)
    keywords = {"method": method, "weight": WEIGHTS, "density": 0.5, "seed": 11}
    once = peta_fast.merge_state_dicts(base, models, **keywords)
    backwards = [dict(reversed(d.items())) for d in (base, *models)]
    assert_same_bits(peta_fast.merge_state_dicts(backwards[0], backwards[1:], **keywords), once)
    alone = [{"norm.bias": d["norm.bias"]} for d in (base, *models)]
    assert_same_bits(peta_fast.merge_state_dicts(alone[0], alone[1:], **keywords), {"norm.bias": once["norm.bias"]})


@pytest.mark.parametrize("size", [1e-9, 1e-3], ids=["vanishing", "ordinary"])
def test_mergekit_restores_the_l1_norm_unless_it_vanishes(size):
    base, model = {"w": torch.zeros(50)}, {"w": torch.linspace(-size, size, 50)}
    keywords = {"method": "dare_linear", "compat": "mergekit", "weight": 1.0, "density": 0.5}
    result = assert_matches_reference(base, [model], **keywords)
    restored = result["w"].abs().sum().item() == pytest.approx(model["w"].abs().sum().item(), rel=1e-5)
    assert restored == (size == 1e-3)


def test_fp16_task_vectors_may_exceed_the_range_of_fp16():
    base, model = {"w": torch.tensor([-60000.0, 60000.0]).half()}, {"w": torch.tensor([60000.0, -60000.0]).half()}
    result = peta_fast.merge_state_dicts(base, [model], method="task_arithmetic", weight=0.5)
    assert result["w"].tolist() == [0, 0]


def test_denormal_task_vectors_are_not_flushed():
    tiny = torch.tensor([1e-42, -3e-45, 1e-40])
    for method, parameters in (("task_arithmetic", {}), ("ties", {"density": 1.0})):
        result = peta_fast.merge_state_dicts(
            {"w": torch.zeros(3)}, [{"w": tiny}], method=method, weight=1.0, **parameters
        )
        assert torch.equal(result["w"], tiny), method


def test_halfway_results_round_to_even():
    base, model = {"w": torch.ones(3).bfloat16()}, {"w": torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20])}
    result = peta_fast.merge_state_dicts(base, [model], method="task_arithmetic", weight=1.0)
    assert result["w"].tolist() == [1, 1 + 4 * 2**-8, 1 + 2 * 2**-8]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "linear"])
def test_values_that_are_not_finite_are_refused_with_the_name_of_their_tensor(method, dtype, value):
    for at in (0, 7, 40):
        base, models = inputs_of(method, *family(2, dtype, [dtype]))
        models[1]["norm.bias"][at] = value
        with pytest.raises(CheckpointError, match="norm.bias"):
            peta_fast.merge_state_dicts(base, models, method=method, weight=1.0)


def test_a_base_that_is_not_finite_is_refused_with_the_name_of_its_tensor():
    base, models = family()
    base["embed.weight"][3, 4] = float("nan")
    with pytest.raises(CheckpointError, match="embed.weight"):
        peta_fast.merge_state_dicts(base, models, method="task_arithmetic", weight=1.0)


@pytest.mark.parametrize("method, parameters", [("task_arithmetic", {}), ("ties", {"density": 0.5})])
def test_integer_and_bool_tensors_are_the_base_bit_for_bit(method, parameters):
    counters = {"bn.num_batches_tracked": torch.tensor(5), "ids": torch.arange(6).int(), "causal": torch.eye(3).bool()}
    base, models = family()
    models = [m | {n: torch.zeros_like(v) for n, v in counters.items()} for m in models]
    result = peta_fast.merge_state_dicts(base | counters, models, method=method, weight=1.0, **parameters)
    assert_same_bits({n: result[n] for n in counters}, counters)


@pytest.mark.parametrize("method, parameters", [("task_arithmetic", {}), ("ties", {"density": 0.5})])
def test_running_statistics_of_batch_norm_are_averaged(method, parameters):
    shapes = {"bn.weight": (6,), "bn.running_mean": (6,), "bn.running_var": (6,)}
    base, models = family(4, shapes=shapes)
    result = assert_matches_reference(base, models, method=method, weight=2.0, **parameters)
    for name in ("bn.running_mean", "bn.running_var"):
        torch.testing.assert_close(result[name], torch.stack([m[name] for m in models]).mean(0))


@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
def test_missing_and_extra_tensors_are_refused_by_name(method):
    base, models = inputs_of(method, *family())
    short = {n: v for n, v in models[1].items() if n != "norm.bias"}
    long = models[1] | {"head.bias": torch.zeros(2)}
    for odd, name in ((short, "norm.bias"), (long, "head.bias")):
        with pytest.raises(CompatibilityError, match=name):
            peta_fast.merge_state_dicts(base, [models[0], odd], method=method, weight=1.0)


@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
def test_a_shape_mismatch_names_the_tensor_and_both_shapes(method):
    base, models = inputs_of(method, *family(2, shapes={"w": (3, 4)}))
    with pytest.raises(CompatibilityError) as error:
        peta_fast.merge_state_dicts(base, [models[0], {"w": models[1]["w"].reshape(4, 3)}], method=method, weight=1.0)
    assert all(part in str(error.value) for part in ("w", "3, 4", "4, 3"))


@pytest.mark.parametrize(
    "method, compat, parameters",
    [
        case("no_such_method"),
        case("task_arithmetic", "no-such-compat", weight=1.0),
        case("task_arithmetic", "ties-authors", weight=1.0),
        case("masked_task_arithmetic", "peft", weight=1.0, mask=soft_masks()),
        case("ties", density=0.5, densty=0.5),
        case("ties", density=[0.5, 0.5]),
        case("ties", density="half"),
        case("ties", "ties-authors", density=1.0),
        case("ties", "ties-authors", density=0.5, weight=0.5),
        case("della", weight=1.0, density=0.9, epsilon=0.15),
        case("della", "mergekit", weight=1.0, density=0.85, epsilon=0.15),
    ],
)
def test_what_a_method_does_not_know_is_refused(method, compat, parameters):
    base, models = family()
    with pytest.raises(RecipeError):
        peta_fast.merge_state_dicts(base, models, method=method, compat=compat, **parameters)


def test_strided_inputs_merge_as_their_contiguous_copies_do():
    base, models = family(shapes={"w": (31, 17), "v": (64,)})
    strided = []
    for state in (base, *models):
        spread = torch.full((128,), float("nan"))
        spread[::2] = state["v"]
        strided.append({"w": state["w"].t().contiguous().t(), "v": spread[::2]})
    assert not strided[0]["w"].is_contiguous() and not strided[0]["v"].is_contiguous()
    keywords = {"method": "ties", "weight": WEIGHTS, "density": DENSITIES}
    assert_same_bits(
        peta_fast.merge_state_dicts(strided[0], strided[1:], **keywords),
        peta_fast.merge_state_dicts(base, models, **keywords),
    )


def test_numpy_arrays_merge_as_tensors_do():
    base, models = family()
    keywords = {"method": "ties", "weight": WEIGHTS, "density": DENSITIES}
    arrays = [{n: v.numpy() for n, v in d.items()} for d in (base, *models)]
    merged = peta_fast.merge_state_dicts(arrays[0], arrays[1:], **keywords)
    assert all(isinstance(value, np.ndarray) for value in merged.values())
    assert_same_bits(
        {name: torch.from_numpy(value) for name, value in merged.items()},
        peta_fast.merge_state_dicts(base, models, **keywords),
    )


@pytest.mark.parametrize("method, compat, parameters", ONE_OF_EACH)
def test_out_is_written_in_place_and_the_inputs_are_not(method, compat, parameters):
    base, models = inputs_of(method, *family(base_dtype=torch.bfloat16))
    states = [d for d in (base, *models) if d is not None]
    before = [{n: v.clone() for n, v in d.items()} for d in states]
    out = {n: torch.full_like(v, float("nan")) for n, v in states[0].items()}
    keywords = {"method": method, "compat": compat, **parameters}
    result = peta_fast.merge_state_dicts(base, models, out=out, **keywords)
    assert all(result[n].data_ptr() == out[n].data_ptr() for n in out)
    assert_same_bits(out, peta_fast.merge_state_dicts(base, models, **keywords))
    for state, copy in zip(states, before, strict=True):
        assert_same_bits(state, copy)


def test_dtype_sets_the_type_of_the_output_alone():
    base, models = family(3, torch.bfloat16, [torch.bfloat16])
    keywords = {"method": "ties", "weight": WEIGHTS, "density": DENSITIES}
    result = peta_fast.merge_state_dicts(base, models, dtype="float32", **keywords)
    exact = merge_with_terms(base, models, **keywords)
    for name, tensor in result.items():
        assert tensor.dtype == torch.float32
        assert_close_to_reference(tensor, exact[name], 3)


@pytest.mark.parametrize("compat", ["native", "mergekit"])
@pytest.mark.parametrize("zero", [0, 1])
def test_slerp_of_a_zero_tensor_follows_the_mode(compat, zero):
    pair = [{"w": torch.randn(40)}, {"w": torch.randn(40)}]
    pair[zero] = {"w": torch.zeros(40)}
    keywords = {"method": "slerp", "compat": compat, "t": 0.3}
    expected = merge_reference(None, pair, **keywords)["w"]
    merged = peta_fast.merge_state_dicts(None, pair, **keywords)["w"]
    assert torch.allclose(merged.double(), expected, atol=1e-7, rtol=1e-6)
