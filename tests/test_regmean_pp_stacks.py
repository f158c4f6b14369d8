"""RegMean++ through plain stacks: the same merge as block by block from the start, at a cost linear in depth."""

from __future__ import annotations

import sys

import pytest
import torch
from fit_models import draw, numbers, seeded
from small_models import stepped
from torch import Tensor, nn

import peta_fast as pf
from peta_fast.fit import _stacks

DEPTH = 7


class Block(nn.Module):
    """x [N, L, n], mask [N, L, 1] -> [N, L, n]"""

    def __init__(self):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor, mask: Tensor, scale: float = 1.0) -> Tensor:
        return x + scale * mask * self.fc2(torch.tanh(self.fc1(self.norm(x))))


class Plain(nn.Module):
    """tokens [N, L] -> logits [N, 3]"""

    block = Block

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.layers = nn.ModuleList(self.block() for _ in range(DEPTH))
        self.head = nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = (tokens % 5 != 0).float()[..., None]
        return self.head(torch.tanh(self.through(self.embed(tokens), mask)).mean(1))

    def through(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask, scale=0.5)
        return x


class InTuples(Plain):
    """Blocks that hand on a bias which the first of them makes, as T5's do."""

    class block(Block):
        def forward(self, x, mask, bias=None):
            bias = self.fc1.bias.mean() if bias is None else bias
            return super().forward(x, mask) + bias, bias

    def through(self, x, mask):
        bias = None
        for layer in self.layers:
            x, bias = layer(x, mask, bias=bias)
        return x


class Residual(Plain):
    """Sums between the blocks."""

    def through(self, x, mask):
        for layer in self.layers:
            x = x + layer(x, mask)
        return x


class MaskOfTheState(Plain):
    """What later blocks get besides depends on what earlier ones give out."""

    def through(self, x, mask):
        for layer in self.layers:
            x = layer(x, mask * (x.mean(-1, keepdim=True) > 0))
        return x


class Counting(Plain):
    """Blocks with a state of their own: they give something else when they run again."""

    class block(Block):
        def forward(self, x, mask, scale=1.0):
            self.runs = getattr(self, "runs", 0) + 1
            return super().forward(x, mask, scale / self.runs)


class Caching(Plain):
    """A list that blocks append to, as to a cache."""

    class block(Block):
        def forward(self, x, mask, cache=None):
            cache.append(x)
            return super().forward(x, mask) / len(cache)

    def through(self, x, mask):
        cache: list = []
        for layer in self.layers:
            x = layer(x, mask, cache=cache)
        return x


class Shared(Plain):
    """One block that runs twice."""

    def through(self, x, mask):
        for layer in [*self.layers[:4], *self.layers]:
            x = layer(x, mask)
        return x


def tasks(kind: type, count: int = 2):
    models = [stepped(seeded(kind), seed=t + 1, size=0.4) for t in range(count)]
    return models, [[numbers(20, 6, 5, seed=10 * t + i) for i in range(3)] for t in range(count)]


def merged(kind: type, monkeypatch, shortest: int):
    monkeypatch.setattr(_stacks, "SHORTEST", shortest)
    return pf.regmean_pp(*tasks(kind))


def assert_the_same(found, expected):
    for a, b in ((found[0], expected[0]), *zip(found[1], expected[1], strict=True)):
        assert set(a) == set(b) and all(torch.equal(a[n], b[n]) for n in a)
    assert [s.metadata for s in found[1]] == [s.metadata for s in expected[1]]


def count_of(monkeypatch) -> list:
    """Takes a note whenever a stack is entered."""
    entered: list = []
    before = _stacks.Stack.__init__

    def noted(self, model, blocks, *rest):
        before(self, model, blocks, *rest)
        entered.append(list(blocks))

    monkeypatch.setattr(_stacks.Stack, "__init__", noted)
    return entered


@pytest.mark.parametrize("kind", [Plain, InTuples])
def test_a_stack_merges_to_the_bits_of_the_long_way(kind, monkeypatch):
    entered = count_of(monkeypatch)
    found = merged(kind, monkeypatch, 4)
    assert entered == [[f"layers.{i}" for i in range(DEPTH)]] * 2
    assert_the_same(found, merged(kind, monkeypatch, 99))
    assert len(entered) == 2


@pytest.mark.parametrize("kind", [Residual, MaskOfTheState, Counting, Caching])
def test_what_is_no_stack_goes_the_long_way(kind, monkeypatch):
    entered = count_of(monkeypatch)
    pf.regmean_pp(*tasks(kind))
    assert entered == []


@pytest.mark.parametrize("kind", [Residual, MaskOfTheState, Shared])
def test_and_comes_to_the_same(kind, monkeypatch):
    assert_the_same(merged(kind, monkeypatch, 4), merged(kind, monkeypatch, 99))


def test_blocks_run_as_often_however_many_there_are(monkeypatch):
    runs: dict[int, int] = {}
    models, data = tasks(Plain)
    before = Block.forward
    numbered = {}

    def counted(self, *rest, **named):
        number = numbered.get(id(self), -1)
        runs[number] = runs.get(number, 0) + 1
        return before(self, *rest, **named)

    monkeypatch.setattr(Block, "forward", counted)
    made = _stacks.stacks_in

    def noted(model, *rest):
        numbered.update({id(layer): i for i, layer in enumerate(model.layers)})
        return made(model, *rest)

    monkeypatch.setattr(sys.modules["peta_fast.fit.regmean_pp"], "stacks_in", noted)
    pf.regmean_pp(models[:1], data[:1])
    order, looking, trying, noting, gram, advance, head = 1, 1, 3, 3, 3, 3, 3
    assert runs.pop(-1) == order * DEPTH
    for i in range(DEPTH):
        last = i == DEPTH - 1
        assert runs[i] == looking + trying + noting + gram + (0 if last else advance) + head


class Deep8(nn.Sequential):
    def __init__(self):
        super().__init__(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(8)))


def test_blocks_by_name_and_weights(monkeypatch):
    models = [stepped(seeded(Deep8), seed=t, size=0.5) for t in (1, 2, 3)]
    data = [[draw(9, 6, seed=t)] for t in range(3)]
    options = {"blocks": [str(i) for i in range(8)], "weight": [1, 2, 0.5], "off_diagonal": 0.8}
    entered = count_of(monkeypatch)
    found = pf.regmean_pp(models, data, **options)
    assert len(entered) == 3
    monkeypatch.setattr(_stacks, "SHORTEST", 99)
    assert_the_same(found, pf.regmean_pp(models, data, **options))


@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
def test_stacks_of_transformers(kind, monkeypatch):
    """A decoder with a cache and rotary positions; encoder and decoder with a bias that the first block makes."""
    transformers = pytest.importorskip("transformers", reason="pip install 'peta_fast[peft]'")
    if kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=30, hidden_size=12, intermediate_size=16, num_hidden_layers=5, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=16,
        )  # fmt: skip
        build = lambda: transformers.LlamaForCausalLM(config)  # noqa: E731
        stacks = [[f"model.layers.{i}" for i in range(5)]]
    elif kind == "bert":
        config = transformers.BertConfig(
            vocab_size=30, hidden_size=12, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2,
            max_position_embeddings=16,
        )  # fmt: skip
        build = lambda: transformers.BertForSequenceClassification(config)  # noqa: E731
        stacks = [[f"bert.encoder.layer.{i}" for i in range(4)]]
    else:
        config = transformers.T5Config(
            vocab_size=30, d_model=12, d_kv=6, d_ff=16, num_layers=4, num_heads=2, decoder_start_token_id=0,
        )  # fmt: skip
        build = lambda: transformers.T5ForConditionalGeneration(config)  # noqa: E731
        stacks = [[f"{side}.block.{i}" for i in range(4)] for side in ("encoder", "decoder")]
    models = [stepped(seeded(build), seed=t + 1, size=0.3) for t in range(2)]
    mask = torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    data = [
        [{"input_ids": numbers(30, 2, 5, seed=t), "attention_mask": mask, "labels": numbers(30, 2, 4, seed=t)}]
        for t in range(2)
    ]
    entered = count_of(monkeypatch)
    found = pf.regmean_pp(models, data)
    assert kind == "bert" or all(m.config.use_cache for m in models)
    assert entered == [s for stack in stacks for s in (stack, stack)]
    monkeypatch.setattr(_stacks, "SHORTEST", 99)
    assert_the_same(found, pf.regmean_pp(models, data))
