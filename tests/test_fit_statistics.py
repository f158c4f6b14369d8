"""Statistics of models on data: Gram matrices and the Fisher, against their definitions example by example."""

from __future__ import annotations

import pytest
import torch
from fit_models import (
    CASES,
    ONE_PASS,
    Perceptron,
    case,
    draw,
    fisher_by_example,
    mean_gram,
    numbers,
    rows_by_example,
    seeded,
)
from torch import Tensor, nn
from torch.nn import functional

import peta_fast as pf
from peta_fast.fit import statistics as module

ALL = ("input_gram", "output_gram", "fisher")


def split(batch: tuple[Tensor, Tensor], size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(batch[0].split(size), batch[1].split(size), strict=True))


def assert_near(found: Tensor, exact: Tensor) -> None:
    assert found.dtype == torch.float32 and found.shape == exact.shape
    torch.testing.assert_close(found.double(), exact.double(), rtol=1e-4, atol=1e-6 * exact.abs().max().item() + 1e-12)


@pytest.mark.parametrize("size", [1, 3, 10])
@pytest.mark.parametrize("name", CASES)
def test_the_fisher_is_the_mean_of_each_example_s_squares(name, size):
    model, batch = case(name)
    exact = fisher_by_example(model, batch)
    found = pf.collect_statistics(model, split(batch, size), kinds=("fisher",))
    assert set(found) == {f"{n}.fisher" for n in exact}
    for parameter, expected in exact.items():
        assert_near(found[f"{parameter}.fisher"], expected)
    norm = sum(t.square().sum().item() for t in exact.values()) ** 0.5
    assert float(found.metadata["fisher_norm"]) == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_one_backward_pass_serves_where_it_is_exact(name, monkeypatch):
    alone = []
    slow = module.one_by_one
    monkeypatch.setattr(module, "one_by_one", lambda *given: alone.append(1) or slow(*given))
    model, batch = case(name)
    pf.collect_statistics(model, split(batch, 3), kinds=("fisher",))
    assert bool(alone) == (name not in ONE_PASS)


@pytest.mark.parametrize("name", ["perceptron", "tied", "twice", "transformer", "scaled"])
def test_grams_are_of_each_example_s_rows_and_gradients(name):
    model, batch = case(name)
    found = pf.collect_statistics(model, split(batch, 3), kinds=("input_gram", "output_gram"))
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert set(found) == {f"{n}.{kind}" for n in layers for kind in ("input_gram", "output_gram")}
    for layer in layers:
        inputs, gradients = rows_by_example(model, layer, batch)
        assert_near(found[f"{layer}.input_gram"], mean_gram(inputs))
        assert_near(found[f"{layer}.output_gram"], mean_gram(gradients))
        assert found.counts[f"{layer}.input_gram"] == len(inputs)


def test_convolutions_have_grams_of_their_patches():
    model, batch = case("convolutions")
    found = pf.collect_statistics(model, [batch], kinds=("input_gram", "output_gram"))
    patches = functional.unfold(batch[0], 3, padding=1, stride=2).transpose(1, 2).reshape(-1, 18)
    assert_near(found["conv.input_gram"], mean_gram(patches))
    by_place = []
    kept: list[Tensor] = []
    handle = model.conv.register_forward_hook(lambda m, a, out: kept.append(out) or out.retain_grad())
    for x, y in zip(*batch, strict=True):
        functional.cross_entropy(model(x[None]), y[None]).backward()
        by_place.append(kept[-1].grad.flatten(2)[0].T)
    handle.remove()
    assert_near(found["conv.output_gram"], mean_gram(torch.cat(by_place)))
    other = pf.merge_state_dicts(
        None, [model.state_dict(), seeded(type(model)).state_dict()], method="mats", statistics=[found, found]
    )
    assert other["conv.weight"].shape == (5, 2, 3, 3)


def test_conv1d_of_transformers_is_merged_turned_round():
    layer = pytest.importorskip("transformers.pytorch_utils").Conv1D

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.head = layer(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(torch.tanh(self.fc(x)))

    models = [seeded(Model), seeded(Model)]
    with torch.no_grad():
        models[1].fc.weight.add_(draw(6, 6, seed=5))
    batch = draw(40, 6), numbers(3, 40)
    found = [pf.collect_statistics(m, [batch], kinds=ALL) for m in models]
    assert found[0].metadata["transposed"] == '["fc"]'
    for name, expected in fisher_by_example(models[1], batch).items():
        assert_near(found[1][f"{name}.fisher"], expected)
    merged = pf.merge_state_dicts(
        None, [m.state_dict() for m in models], method="regmean", statistics=found, off_diagonal=1.0
    )["fc.weight"]
    # both tasks see the same x, so the average of the weights is the exact solution
    torch.testing.assert_close(merged, (models[0].fc.weight + models[1].fc.weight).detach() / 2, rtol=0, atol=1e-5)


def test_ia3_has_the_whole_fisher_of_its_vectors():
    model, batch = case("scaled")
    found = pf.collect_statistics(model, split(batch, 4), kinds=("fisher_gram",), only=lambda n: n == "ia3")
    gradients = []
    for x, y in zip(*batch, strict=True):
        loss = functional.cross_entropy(model(x[None]), y[None])
        gradients.append(torch.autograd.grad(loss, model.ia3)[0])
    assert list(found) == ["ia3.fisher_gram"]
    assert_near(found["ia3.fisher_gram"], mean_gram(torch.stack(gradients)))


class Toy(nn.Module):
    """logits [w x, 0]"""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.5]))

    def forward(self, x):
        return torch.stack([self.w * x, 0 * x], -1)


def test_fusion_bench_s_fisher_adds_gradients_before_it_squares_them():
    found = pf.collect_statistics(Toy(), [torch.tensor([1.0, -2])], kinds=("fisher",), compat="fusion_bench")
    assert found["w.fisher"].item() == pytest.approx(0.0733, abs=1e-4)


def test_sampled_labels_give_the_true_fisher():
    """mean of x^2 p (1 - p) over x = 1 and -2, here over 2000 draws of each."""
    x = torch.tensor([1.0, -2]).repeat(2000)
    found = pf.collect_statistics(Toy(), x.split(500), kinds=("fisher",), labels="sampled", seed=3)
    assert found["w.fisher"].item() == pytest.approx(0.5107, rel=0.05)
    again = pf.collect_statistics(Toy(), x.split(500), kinds=("fisher",), labels="sampled", seed=3)
    other = pf.collect_statistics(Toy(), x.split(500), kinds=("fisher",), labels="sampled", seed=4)
    assert torch.equal(again["w.fisher"], found["w.fisher"]) and not torch.equal(other["w.fisher"], found["w.fisher"])


class Padded(nn.Module):
    """A mapping's model: input_ids [N, L], attention_mask -> logits [N, L, 5]; no position looks at another."""

    def __init__(self):
        super().__init__()
        self.embed, self.fc, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, input_ids, attention_mask=None):
        return self.head(torch.tanh(self.fc(self.embed(input_ids))))


def test_padding_and_labels_that_do_not_count_leave_no_trace():
    model, tokens, labels = seeded(Padded), numbers(9, 2, 5), numbers(5, 2, 5, seed=4)
    short = [
        {"input_ids": tokens[i : i + 1, :n], "labels": labels[i : i + 1, :n]} for i, n in enumerate((3, 5))
    ]  # no padding
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    padded = {"input_ids": tokens, "attention_mask": mask, "labels": labels.masked_fill(mask == 0, -100)}
    found, expected = (pf.collect_statistics(model, b, kinds=ALL) for b in ([padded], short))
    assert found.counts["fc.input_gram"] == 8
    for key, exact in expected.items():
        assert_near(found[key], exact)


def test_a_mask_of_one_s_own():
    model, tokens = seeded(Padded), numbers(9, 2, 5)
    kept = torch.tensor([[1, 0, 0, 0, 0], [0, 0, 0, 0, 1]]).bool()
    masks = {"fc": kept, "head": None}
    found = pf.collect_statistics(model, [{"input_ids": tokens}], mask=lambda name, batch: masks[name])
    assert (found.counts["fc.input_gram"], found.counts["head.input_gram"]) == (2, 10)
    assert_near(found["fc.input_gram"], mean_gram(model.embed(tokens)[kept].detach()))


class Translator(nn.Module):
    """An encoder-decoder with the names of T5, of one position each."""

    def __init__(self):
        super().__init__()
        self.config = type("Config", (), {"is_encoder_decoder": True})()
        self.shared = nn.Embedding(9, 4)
        self.encoder = nn.ModuleDict({"fc": nn.Linear(4, 4)})
        cross = nn.ModuleDict({"q": nn.Linear(4, 4), "k": nn.Linear(4, 4)})
        self.decoder = nn.ModuleDict({"EncDecAttention": cross})
        self.lm_head = nn.Linear(4, 9)

    def forward(self, input_ids, attention_mask, labels):
        seen, asked = self.encoder["fc"](self.shared(input_ids)), self.shared(labels.clamp_min(0))
        cross = self.decoder["EncDecAttention"]
        weights = (cross["q"](asked) @ cross["k"](seen).transpose(1, 2)).masked_fill(attention_mask[:, None] == 0, -1e9)
        return self.lm_head(asked + weights.softmax(-1) @ seen)


def test_encoders_and_cross_attention_take_the_mask_of_the_input_and_the_rest_that_of_the_labels():
    batch = {
        "input_ids": numbers(9, 2, 4),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]),
        "labels": torch.tensor([[3, 1, 2, 5], [4, 2, -100, -100]]),
    }
    found = pf.collect_statistics(seeded(Translator), [batch], kinds=("input_gram", "output_gram"))
    counts = {key.removesuffix(".input_gram"): n for key, n in found.counts.items() if key.endswith("input_gram")}
    cross = "decoder.EncDecAttention"
    assert counts == {"encoder.fc": 4, f"{cross}.q": 6, f"{cross}.k": 4, "lm_head": 6}


class TinyForCausalLM(Padded):
    """Logits of a position speak of the next."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 9)


def test_causal_models_are_asked_for_the_next_token():
    model, tokens = seeded(TinyForCausalLM), numbers(9, 3, 5)
    found = pf.collect_statistics(model, [{"input_ids": tokens, "labels": tokens}], kinds=("fisher",))
    total = torch.zeros_like(model.head.bias)
    for row in tokens:
        loss = functional.cross_entropy(model(row[None])[0, :-1], row[1:])
        total += torch.autograd.grad(loss, model.head.bias)[0].square() / 3
    assert_near(found["head.bias.fisher"], total)


def test_the_model_is_put_back_as_it_was():
    model, batch = case("perceptron")
    model.train()
    model.norm.eval()
    model.fc1.weight.requires_grad_(False)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    pf.collect_statistics(model, [batch], kinds=ALL)
    assert (model.training, model.norm.training) == (True, False)
    assert not model.fc1.weight.requires_grad and model.fc2.weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_frozen_parameters_have_a_fisher_too():
    model, batch = case("perceptron")
    exact = fisher_by_example(model, batch)
    model.requires_grad_(False)
    found = pf.collect_statistics(model, [batch], kinds=ALL)
    assert_near(found["fc1.weight.fisher"], exact["fc1.weight"])


def test_some_modules_some_examples_and_what_is_said_on_the_way():
    model, batch = case("perceptron")
    told: list = []
    found = pf.collect_statistics(
        model, split(batch, 3), only=lambda name: name == "fc2", progress=lambda *step: told.append(step)
    )
    assert list(found) == ["fc2.input_gram"] and told == [(1, 3), (2, 3), (3, 3)] and found.examples == 7
    few = pf.collect_statistics(model, split(batch, 3), examples=4)
    first = pf.collect_statistics(model, [(batch[0][:4], batch[1][:4])])
    assert few.examples == 4
    torch.testing.assert_close(few["fc1.input_gram"], first["fc1.input_gram"])


def test_bf16_models_have_fp32_statistics():
    model, (x, y) = case("perceptron")
    rounded = seeded(Perceptron).bfloat16()
    found = pf.collect_statistics(rounded, [(x.bfloat16(), y)], kinds=ALL)
    assert {t.dtype for t in found.values()} == {torch.float32}
    assert_near(found["fc1.input_gram"], mean_gram(x.bfloat16()))
    exact = fisher_by_example(model, (x, y))["fc2.bias"]
    torch.testing.assert_close(found["fc2.bias.fisher"], exact.float(), rtol=0.2, atol=1e-3)


def test_inputs_alone_are_enough_for_input_grams():
    model, (x, y) = case("perceptron")
    plain, labelled = pf.collect_statistics(model, x.split(4)), pf.collect_statistics(model, [(x, y)])
    torch.testing.assert_close(plain["fc2.input_gram"], labelled["fc2.input_gram"])
