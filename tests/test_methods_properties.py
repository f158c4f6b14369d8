"""What holds for every merge, whatever the shapes, dtypes, number of tasks and densities: found by hypothesis.

Task vectors take a few integer values, so equal magnitudes, zeros and columns that cancel are the rule.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from families import assert_matches_reference, assert_same_bits, coarse_family, inputs_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import peta_fast

ELEMENTWISE = [("task_arithmetic", "native"), ("linear", "native")]
TRIMMED = [("ties", "native"), ("breadcrumbs", "native"), ("breadcrumbs_ties", "native")]
COUNTED = [("ties", "mergekit"), ("ties", "peft"), ("breadcrumbs", "mergekit"), ("breadcrumbs_ties", "mergekit-0.1.4")]
GLOBAL = [("ties", "ties-authors"), ("ties", "peta")]
RANDOM = [(m, c) for m in ("dare_linear", "dare_ties", "della", "della_linear") for c in ("native", "mergekit")]
EVERY_METHOD = [*ELEMENTWISE, *TRIMMED, *COUNTED, *GLOBAL, *RANDOM]

properties = settings(max_examples=60, deadline=None, derandomize=True)
shapes = st.lists(st.integers(0, 6), max_size=3).map(tuple)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


class Merge(NamedTuple):
    base: dict[str, Tensor] | None
    models: list[dict[str, Tensor]]
    keywords: dict[str, Any]

    def run(self, **changes) -> dict[str, Tensor]:
        return peta_fast.merge_state_dicts(self.base, self.models, **(self.keywords | changes))

    def mapped(self, change) -> Merge:
        """The same merge of changed state dicts."""
        base = None if self.base is None else change(self.base)
        return self._replace(base=base, models=[change(m) for m in self.models])


@st.composite
def parameters_of(draw, method: str, compat: str, num_tasks: int) -> dict[str, Any]:
    keywords = {"method": method, "compat": compat, "scaling": draw(st.sampled_from([1.0, 0.3, -2.0]))}
    weight = st.sampled_from([0.5, 1.0, 0.3] if method == "linear" else [-1.0, -0.5, 0.0, 0.5, 1.0, 0.3])
    if (method, compat) not in GLOBAL:
        keywords["weight"] = draw(st.lists(weight, min_size=num_tasks, max_size=num_tasks))
    if method == "linear":
        del keywords["scaling"]
    elif method.startswith("della"):
        density = st.sampled_from([(0.0, 0.15), (0.5, 0.1), (0.4, 0.35), (1.0, 0.15)])
        keywords["density"], keywords["epsilon"] = draw(density)
    elif method != "task_arithmetic":
        keywords["density"] = draw(
            st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 0.99 if compat == "ties-authors" else 1.0])
        )
    if method.startswith("breadcrumbs"):
        keywords["gamma"] = draw(st.sampled_from([0.0, 0.01, 0.2, 0.5]))
    if method in ("della", "ties", "breadcrumbs_ties") and compat in ("native", "mergekit"):
        keywords["normalize"] = draw(st.booleans())
    return keywords


@st.composite
def merges(draw, methods=EVERY_METHOD, dtype=dtypes) -> Merge:
    method, compat = draw(st.sampled_from(methods))
    num_tasks = draw(st.integers(1, 5))
    tensors = {f"layer.{i}.weight": shape for i, shape in enumerate(draw(st.lists(shapes, min_size=1, max_size=3)))}
    levels, seed = draw(st.sampled_from([1, 3, 30])), draw(st.integers(0, 2**20))
    family = coarse_family(num_tasks, tensors, levels, draw(dtype), seed)
    keywords = draw(parameters_of(method, compat, num_tasks))
    return Merge(*inputs_of(method, *family), keywords)


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal values; 0.0 and -0.0 are one."""
    assert set(actual) == set(expected)
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


@properties
@given(merges(), st.integers(0, 3))
def test_every_merge_matches_its_reference(merge, seed):
    assert_matches_reference(merge.base, merge.models, **merge.keywords, seed=seed)


@properties
@given(merges(), st.integers(2, 4))
def test_threads_do_not_change_a_bit(merge, threads):
    assert_same_bits(merge.run(threads=threads), merge.run(threads=1))


@properties
@given(merges(EVERY_METHOD, st.just(torch.float32)), st.integers(-10, 30))
def test_scaling_everything_by_a_power_of_two_scales_the_result_exactly(merge, exponent):
    def scale(state):
        return {n: v * 2.0**exponent for n, v in state.items()}

    assert_equal(merge.mapped(scale).run(), scale(merge.run()))


@properties
@given(merges())
def test_models_equal_to_the_base_give_the_base(merge):
    base = merge.base or merge.models[0]
    result = merge._replace(models=[base] * len(merge.models)).run()
    if merge.base is not None:
        assert_same_bits(result, base)
    else:
        for name, tensor in result.items():
            torch.testing.assert_close(tensor, base[name])


@properties
@given(merges([*ELEMENTWISE, *TRIMMED, *GLOBAL]), st.integers(0, 2**20))
def test_permuting_the_entries_of_a_tensor_permutes_the_result(merge, seed):
    def permute(state):
        return {n: v.flatten()[order[n]].reshape(v.shape) for n, v in state.items()}

    draw = torch.Generator().manual_seed(seed)
    order = {n: torch.randperm(v.numel(), generator=draw) for n, v in merge.models[0].items()}
    assert_same_bits(merge.mapped(permute).run(), permute(merge.run()))


@properties
@given(merges([*ELEMENTWISE, *TRIMMED, *GLOBAL]), st.floats(0, 1))
def test_cutting_tensors_in_two_changes_nothing_where_the_model_is_one_scope(merge, fraction):
    def cut(state):
        halves = {}
        for name, tensor in state.items():
            flat, at = tensor.flatten(), int(fraction * tensor.numel())
            halves |= {f"{name}.head": flat[:at], f"{name}.tail": flat[at:]}
        return halves

    scope = {"trim_scope": "model"} if merge.keywords["method"] in ("ties", "breadcrumbs", "breadcrumbs_ties") else {}
    assert_same_bits(merge.mapped(cut).run(**scope), cut(merge.run(**scope)))


@properties
@given(merges([*TRIMMED, ("task_arithmetic", "native")]))
def test_opposite_task_vectors_on_a_base_of_zeros_give_the_opposite_result(merge):
    merge = merge._replace(base={n: torch.zeros_like(v) for n, v in merge.base.items()})
    opposite = merge._replace(models=[{n: -v for n, v in m.items()} for m in merge.models])
    assert_equal(opposite.run(), {n: -v for n, v in merge.run().items()})


@properties
@given(merges([("ties", "native"), ("ties", "mergekit")]), st.sampled_from([2, 4]))
def test_ties_of_copies_of_one_model_is_ties_of_that_model(merge, copies):
    keywords = merge.keywords | {"weight": 1.0, "normalize": True}
    one = Merge(merge.base, merge.models[:1], keywords)
    assert_same_bits(one._replace(models=one.models * copies).run(), one.run())


@properties
@given(merges([("ties", "native"), ("task_arithmetic", "native"), ("linear", "native")]))
def test_two_models_may_change_places(merge):
    keywords = merge.keywords | {"weight": [0.3, 0.7]}
    pair = Merge(merge.base, [merge.models[0], merge.models[-1]], keywords)
    swapped = pair._replace(models=pair.models[::-1], keywords=keywords | {"weight": [0.7, 0.3]})
    assert_same_bits(swapped.run(), pair.run())


@properties
@given(merges(RANDOM))
def test_random_merges_depend_neither_on_the_order_nor_on_the_number_of_tensors(merge):
    result = merge.run(seed=5)
    assert_same_bits(merge.mapped(lambda state: dict(reversed(state.items()))).run(seed=5), result)
    for name in result:
        assert_same_bits(merge.mapped(lambda state, name=name: {name: state[name]}).run(seed=5), {name: result[name]})
