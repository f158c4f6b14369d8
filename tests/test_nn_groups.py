"""Layers of one x that are computed together: what they give is what each alone gives, whatever is done to them."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from small_models import stepped, tokens, transformer
from torch import nn
from torch.utils.checkpoint import checkpoint

import peta_fast as pf
from peta_fast.errors import RecipeError
from peta_fast.nn import groups as nn_groups

QKV = [["q_proj", "k_proj", "v_proj"]]
NAMES = QKV[0]
GROUPS = pytest.mark.parametrize("groups", [QKV, "auto"], ids=["declared", "auto"])


class Projections(nn.Module):
    """q, k, v of x, or of different tensors, as a model calls them."""

    def __init__(self, width: int = 6):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, n, dtype=torch.float64) for n in (4, 5, 3))

    def forward(self, x, k=None, v=None):
        return self.q_proj(x), self.k_proj(x if k is None else k), self.v_proj(x if v is None else v)


def projections(groups=None, init="gaussian", **options) -> nn.Module:
    """The same numbers at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Projections()
    settings = {"r": 2, "alpha": 4, "init": init, "groups": groups} | options
    return stepped(pf.linearize(model, NAMES, **settings))


def inputs(seed: int = 0, rows: int = 3, requires_grad: bool = False) -> torch.Tensor:
    x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.requires_grad_(requires_grad)


def transformers(groups, **options):
    """With all of q, k, v and out_proj linearized: grouped, and not."""
    settings = {"r": 3, "alpha": 6, "init": "gaussian"} | options
    return [
        stepped(pf.linearize(transformer(), [*NAMES, "out_proj"], groups=g, **settings)) for g in (groups, None)
    ]  # fmt: skip


@pytest.fixture
def together(monkeypatch) -> list[int]:
    """How many projections each call of the grouped operation had."""
    counts, untouched = [], nn_groups.linearized_lora_group

    def counting(x, projections, **options):
        counts.append(len(projections))
        return untouched(x, projections, **options)

    monkeypatch.setattr(nn_groups, "linearized_lora_group", counting)
    return counts


def assert_same(found, expected) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def gradients(model) -> list[torch.Tensor]:
    return [p.grad for p in model.parameters() if p.requires_grad]


def assert_trains_alike(ours, plain, run=lambda model: model(tokens())) -> None:
    for model in (ours, plain):
        model.zero_grad()
        run(model).sin().sum().backward()
    assert_same(gradients(ours), gradients(plain))
    assert all(g.any() for g in gradients(ours))


def kept(model) -> list:
    return [m.group[0].ahead for m in model.modules() if getattr(m, "group", None) and m.group[0].ahead is not None]


@GROUPS
@pytest.mark.parametrize("init", ["lora", "gaussian"])
def test_a_model_trains_as_without_groups(groups, init, together):
    ours, plain = transformers(groups, init=init)
    for _ in range(2):
        assert_trains_alike(ours.train(), plain.train())
        assert_same([ours(tokens())], [plain(tokens())])
    assert set(together) == {3}  # out_proj, of the same size and another x, is not among them
    assert not kept(ours)


def test_declared_groups_are_together_from_the_first_call(together):
    projections(QKV)(inputs())
    assert together == [3]


def test_found_groups_are_together_from_the_second_call(together):
    model = projections("auto")
    model(inputs())
    assert together == []
    model(inputs())
    assert together == [3]


@GROUPS
def test_members_with_another_x_compute_alone_and_it_is_learned(groups, together):
    ours, plain = projections(groups), projections()
    for i in range(6):
        x, k = inputs(2 * i), inputs(2 * i + 1, rows=5)
        together.clear()
        assert_same(ours(x, k, k), plain(x, k, k))
    assert together == [2]  # k and v share theirs
    assert not kept(ours)


def test_an_equal_x_that_is_another_tensor_is_another_x(together):
    ours, plain, x = projections(QKV), projections(), inputs()
    assert_same(ours(x, x.clone(), x.clone()), plain(x))
    together.clear()
    ours.q_proj(x)
    assert together == []


def test_an_x_changed_in_place_is_another_x():
    ours, plain, x = projections(QKV), projections(), inputs()
    ours.q_proj(x)
    x.mul_(2)
    assert_same([ours.k_proj(x)], [plain.k_proj(x)])


def test_an_x_that_now_requires_a_gradient_gets_it():
    ours, x = projections(QKV), inputs()
    ours.q_proj(x)
    x.requires_grad_()
    ours.k_proj(x).sum().backward()
    assert x.grad.any()


@pytest.mark.parametrize("part", ["delta_B", "delta_A", "weight", "bias"])
def test_parameters_that_changed_meanwhile_count(part):
    ours, plain, x = projections(QKV), projections(), inputs()
    ours.q_proj(x)
    for model in (ours, plain):
        with torch.no_grad():
            getattr(model.k_proj, part).mul_(2)
    assert_same([ours.k_proj(x)], [plain.k_proj(x)])


def test_a_weight_that_is_another_parameter_counts():
    ours, plain, x = projections(QKV), projections(), inputs()
    ours.q_proj(x)
    for model in (ours, plain):
        model.k_proj.weight = nn.Parameter(2 * model.k_proj.weight.detach(), requires_grad=False)
    assert_same([ours.k_proj(x)], [plain.k_proj(x)])


def test_grad_mode_and_autocast_count():
    ours, x = projections(QKV), inputs()
    with torch.no_grad():
        ours.q_proj(x)
    assert ours.k_proj(x).requires_grad
    ours = projections(QKV).float()
    ours.q_proj(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert ours.k_proj(x.float()).dtype == torch.bfloat16
        ours = projections(QKV).float()
        assert {y.dtype for y in ours(x.float())} == {torch.bfloat16}


def test_nothing_is_kept_after_the_last_has_taken_its_own():
    model, x = projections(QKV), inputs(requires_grad=True)
    ys = model(x)
    group = model.q_proj.group[0]
    seen = [weakref.ref(y) for y in ys], weakref.ref(x)
    del ys, x
    gc.collect()
    assert group.ahead is None and seen[1]() is None and all(y() is None for y in seen[0])


def test_what_nobody_took_goes_with_the_next_forward_and_is_not_computed_again(together):
    model, x, other = projections(QKV), inputs(), inputs(1)
    model.q_proj(x)
    seen = weakref.ref(model.q_proj.group[0].ahead.members[2][1])
    assert seen() is not None
    model.q_proj(other)
    assert seen() is None and model.q_proj.group[0].ahead is None
    assert together == [3]


@GROUPS
def test_a_disabled_adapter_is_disabled(groups):
    ours, plain, x = projections(groups), projections(), inputs()
    ours(x)
    with pf.disable_adapter(ours), pf.disable_adapter(plain):
        assert_same(ours(x), plain(x))
    with ours.k_proj.disable_adapter(), plain.k_proj.disable_adapter():
        assert_same(ours(x), plain(x))
    ours.q_proj(x)
    with ours.k_proj.disable_adapter(), plain.k_proj.disable_adapter():
        assert_same([ours.k_proj(x)], [plain.k_proj(x)])
    assert_same(ours(x), plain(x))


@GROUPS
def test_merged_layers_are_merged(groups):
    ours, plain, x = projections(groups), projections(), inputs()
    ours(x)
    expected = plain(x)
    ours.k_proj.merge()
    assert_same(ours(x), expected)
    ours.q_proj(x)
    ours.v_proj.merge()
    ours.v_proj.weight.data.zero_()
    assert_same([ours.v_proj(x)], [plain.v_proj.bias.expand(3, 3)])
    ours.v_proj.unmerge()
    ours.k_proj.unmerge()
    assert_same(ours(x), expected)


@GROUPS
def test_other_adapters_and_several_at_once(groups):
    ours, plain, x = projections(groups), projections(), inputs()
    for model in (ours, plain):
        pf.linearize(model, NAMES, r=3, alpha=3, adapter_name="b", seed=7)
    for names in ("b", ["default", "b"], "default"):
        for model in (ours, plain):
            pf.set_adapter(model, names)
            stepped(model)
        for _ in range(2):
            assert_same(ours(x), plain(x))
    ours.q_proj(x)
    for model in (ours, plain):
        model.k_proj.set_adapter("b")
    assert_same([ours.k_proj(x)], [plain.k_proj(x)])


def test_hooks_see_their_layer_and_may_change_what_it_gets(together):
    ours, plain, x = projections(QKV), projections(), inputs()
    for model in (ours, plain):
        model.k_proj.register_forward_pre_hook(lambda module, given: (2 * given[0],))
        model.v_proj.register_forward_hook(lambda module, given, y: 3 * y)
    for _ in range(2):
        assert_same(ours(x), plain(x))
    assert together == [2, 2]


def test_a_pre_hook_that_changes_the_layer_itself_counts():
    ours, plain, x = projections(QKV), projections(), inputs()

    def doubles(module, given):
        with torch.no_grad():
            module.delta_B.mul_(2)

    for model in (ours, plain):
        model.v_proj.register_forward_pre_hook(doubles)
    for _ in range(2):
        assert_same(ours(x), plain(x))


@GROUPS
def test_full_backward_hooks_get_their_gradients(groups):
    seen = {}
    for name, model in (("ours", projections(groups)), ("plain", projections())):
        found = seen.setdefault(name, [])
        model.k_proj.register_full_backward_hook(lambda m, gx, gy, found=found: found.append(gx[0]))
        for _ in range(2):
            sum(y.sin().sum() for y in model(inputs(requires_grad=True))).backward()
    assert len(seen["ours"]) == 2
    assert_same(seen["ours"], seen["plain"])


@GROUPS
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_non_reentrant_checkpointing_is_as_without_groups(groups, dropout):
    def run(model):
        torch.manual_seed(3)
        hidden = model.embed(tokens())
        for layer in model.layers:
            hidden = checkpoint(layer, hidden, use_reentrant=False)
        return hidden

    ours, plain = transformers(groups, dropout=dropout)
    for _ in range(3):
        assert_trains_alike(ours.train(), plain.train(), run)


@GROUPS
def test_reentrant_checkpointing_of_inputs_with_gradients_is_as_without_groups(groups):
    def run(model):
        hidden = model.embed(tokens()).requires_grad_()
        for layer in model.layers:
            hidden = checkpoint(layer, hidden, use_reentrant=True)
        return hidden

    ours, plain = transformers(groups)
    for _ in range(2):
        assert_trains_alike(ours.train(), plain.train(), run)


@GROUPS
def test_dropout_while_training_draws_as_without_groups(groups, together):
    found = []
    for model in transformers(groups, dropout=0.4):
        torch.manual_seed(1)
        model.train()
        found.append([model(tokens()) for _ in range(2)])
    assert_same(*found)
    assert together == []


def test_dropout_does_nothing_to_a_group_in_evaluation(together):
    ours, plain = projections(QKV, dropout=0.4).eval(), projections(dropout=0.4).eval()
    assert_same(ours(inputs()), plain(inputs()))
    ours.q_proj.train()
    assert_same([ours.k_proj(inputs())], [plain.k_proj(inputs())])
    assert together == [3, 2]


@GROUPS
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_groups_of_their_own(groups, copied, together):
    ours, x = projections(groups), inputs()
    for _ in range(2):
        ours(x)
    ours.q_proj(x)  # something is kept while the copy is made
    other = copied(ours)
    stepped(other, seed=9)
    expected = stepped(projections(), seed=9)(x)
    together.clear()
    for _ in range(2):
        assert_same(other(x), expected)
    assert together == [3]
    assert_same(ours(x), projections()(x))
    assert not kept(other)


def test_a_copied_member_takes_no_sibling_along():
    alone = copy.deepcopy(projections(QKV).k_proj)
    x = inputs()
    assert_same([alone(x), alone(x)], [projections().k_proj(x)] * 2)
    assert alone.group[0].ahead is None


@GROUPS
def test_whole_model_linearization_is_as_without_groups(groups, together):
    ours, plain = transformers(groups, scope="model")
    for _ in range(2):
        assert_trains_alike(ours, plain)
    assert together == []


@GROUPS
def test_compiled_into_one_graph(groups, together):
    torch._dynamo.reset()
    ours, plain = transformers(groups)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_trains_alike(ours, plain, lambda model: (compiled if model is ours else model)(tokens()))
    assert together == []
    assert_trains_alike(ours, plain)


@GROUPS
def test_torch_func_goes_through(groups, together):
    ours, plain, x = projections(groups), projections(), inputs()
    ours(x)
    together.clear()

    def gradient(model):
        steps = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

        def loss(s):
            return sum(y.sin().sum() for y in torch.func.functional_call(model, s, (x,)))

        return torch.func.grad(loss)(steps).values()

    assert_same(gradient(ours), gradient(plain))
    steps = {n: 2 * p.detach() for n, p in plain.named_parameters() if p.requires_grad}
    assert_same(*(torch.func.functional_call(m, steps, (x,)) for m in (ours, plain)))
    with torch.inference_mode():
        assert_same(ours(inputs()), plain(inputs()))
    assert together in ([], [3])  # functional_call alone is an ordinary call with other parameters


@contextlib.contextmanager
def four_bit(monkeypatch, layer):
    """Stands in for bitsandbytes: the layer's weight counts as packed, and unpacks to what it is."""
    monkeypatch.setattr(type(layer), "_matrix", lambda self: self.weight * 1)
    layer.quantized = True
    yield


def test_quantized_members_compute_alone(monkeypatch, together):
    ours, plain, x = projections(QKV), projections(), inputs()
    with four_bit(monkeypatch, ours.k_proj):
        assert_same(ours(x), plain(x))
    assert together == [2]


@GROUPS
def test_saved_and_loaded_as_without_groups(groups, tmp_path):
    ours, plain = transformers(groups)
    assert list(ours.state_dict()) == list(plain.state_dict())
    pf.save_adapter(ours, tmp_path)
    loaded = pf.load_adapter(transformer(), tmp_path)
    pf.group_projections(loaded, groups)
    for _ in range(2):
        assert_same([loaded(tokens())], [plain(tokens())])
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    assert_same([torch.load(buffer, weights_only=False)(tokens())], [plain(tokens())])


def test_groups_can_be_taken_back(together):
    model = projections(QKV)
    pf.group_projections(model, None)
    model(inputs())
    assert together == [] and model.q_proj.group is None


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ("all", "is 'all', expected None, 'auto' or lists"),
        ([["q_proj"]], "expected None, 'auto' or lists of two or more names"),
        (["q_proj", "k_proj"], "expected None, 'auto' or lists of two or more names"),
        ([["q_proj", "k_proj"], ["v_proj", "k_proj"]], "names 'k_proj' twice"),
        ([["query", "key"]], r"no module has two of \['query', 'key'\]"),
    ],
)
def test_wrong_groups_are_refused(groups, message):
    with pytest.raises(RecipeError, match=message):
        projections(groups)


def test_members_of_different_sizes_are_refused():
    model = Projections()
    model.v_proj = nn.Linear(7, 3, dtype=torch.float64)
    with pytest.raises(RecipeError, match="the members differ in in_features"):
        pf.linearize(model, NAMES, r=2, groups=QKV)


def test_a_peft_model_is_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(Projections(), peft.LoraConfig(r=2, target_modules=NAMES))
    with pytest.raises(RecipeError, match="got a PeftModel"):
        pf.linearize(model, groups="auto")
