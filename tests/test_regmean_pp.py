"""RegMean++: Grams of what the merged blocks before a block let through."""

from __future__ import annotations

import pytest
import torch
from fit_models import draw, numbers, seeded
from small_models import stepped, transformer
from solved_families import dense
from torch import Tensor, nn

import peta_fast as pf


class Deep(nn.Module):
    """x [N, 6] -> logits [N, 4]: blocks with a norm, then a head."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6)) for _ in range(3))
        self.head = nn.Linear(6, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x)


def tasks(count: int = 2, size: float = 0.5) -> tuple[list[nn.Module], list]:
    models = [stepped(seeded(Deep), seed=t + 1, size=size) for t in range(count)]
    return models, [[(draw(30, 6, seed=9 + t), numbers(4, 30)) for _ in range(2)] for t in range(count)]


def mean(models: list[nn.Module], name: str) -> Tensor:
    return torch.stack([m.state_dict()[name] for m in models]).mean(0)


def solved(models, name: str, rows: list[Tensor]) -> Tensor:
    """RegMean of one layer in fp64, from its rows in each task."""
    grams = [(r.double().T @ r.double() / len(r))[torch.triu_indices(6, 6).unbind()] for r in rows]
    return dense([m.state_dict()[f"{name}.weight"] for m in models], grams).float()


def by_hand(models, data) -> dict[str, Tensor]:
    """Block by block, with the network written out."""
    merged: dict[str, Tensor] = {}
    hidden = [torch.cat([x for x, _ in batches]) for batches in data]
    for i in range(3):
        rows = [
            nn.functional.layer_norm(h, (6,), *(m.state_dict()[f"blocks.{i}.0.{k}"] for k in ("weight", "bias")))
            for m, h in zip(models, hidden, strict=True)
        ]
        weight = merged[f"blocks.{i}.1.weight"] = solved(models, f"blocks.{i}.1", rows)
        norm = [mean(models, f"blocks.{i}.0.{k}") for k in ("weight", "bias")]
        merged |= {f"blocks.{i}.0.{k}": t for k, t in zip(("weight", "bias"), norm, strict=True)}
        bias = merged[f"blocks.{i}.1.bias"] = mean(models, f"blocks.{i}.1.bias")
        hidden = [h + torch.tanh(nn.functional.layer_norm(h, (6,), *norm) @ weight.T + bias) for h in hidden]
    merged["head.weight"] = solved(models, "head", hidden)
    return merged


def test_a_network_written_out():
    models, data = tasks()
    merged, _ = pf.regmean_pp(models, data, off_diagonal=1.0)
    expected = by_hand(models, data)
    assert set(merged) == set(expected)
    for name, exact in expected.items():
        torch.testing.assert_close(merged[name], exact, rtol=0, atol=1e-5)


def test_only_the_first_block_is_regmean_s():
    models, data = tasks()
    merged, found = pf.regmean_pp(models, data)
    own = [pf.collect_statistics(m, b) for m, b in zip(models, data, strict=True)]
    plain = pf.merge_state_dicts(None, [m.state_dict() for m in models], method="regmean", statistics=own)
    torch.testing.assert_close(found[1]["blocks.0.1.input_gram"], own[1]["blocks.0.1.input_gram"])
    torch.testing.assert_close(merged["blocks.0.1.weight"], plain["blocks.0.1.weight"], rtol=0, atol=1e-5)
    assert (merged["blocks.1.1.weight"] - plain["blocks.1.1.weight"]).abs().max() > 0.01


def test_its_statistics_make_the_same_merge_of_files(tmp_path):
    models, data = tasks(3)
    files = [tmp_path / f"{t}.safetensors" for t in range(3)]
    merged, found = pf.regmean_pp(models, data, weight=[1, 2, 0.5], off_diagonal=0.7, out=files)
    states = [m.state_dict() for m in models]
    again = pf.merge_state_dicts(
        None, states, method="regmean_pp", statistics=files, weight=[1, 2, 0.5], off_diagonal=0.7
    )
    assert all(torch.equal(again[n], merged[n]) for n in merged)
    assert found[0].examples == 60 and found[0].counts["head.input_gram"] == 60
    with pytest.raises(pf.ResourceError, match="is there already"):
        pf.regmean_pp(models, data, out=files)


def test_models_are_left_as_they_are_and_equal_ones_stay():
    models, data = tasks(1)
    before = {n: t.clone() for n, t in models[0].state_dict().items()}
    models[0].train()
    merged, _ = pf.regmean_pp([models[0], models[0]], [data[0], data[0]])
    assert models[0].training and not any(m._forward_hooks for m in models[0].modules())
    for name, tensor in before.items():
        assert torch.equal(models[0].state_dict()[name], tensor)
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=1e-5)


def test_what_comes_after_a_block_is_not_run():
    models, data = tasks()
    runs = dict.fromkeys(("blocks.0", "blocks.2"), 0)

    class Counting(nn.Sequential):
        def forward(self, x):
            runs[self.name] += 1
            return super().forward(x)

    for name in runs:
        module = models[0].get_submodule(name)
        module.__class__, module.name = Counting, name
    told: list = []
    pf.regmean_pp(models, data, progress=lambda *step: told.append(step))
    # one batch to find the order, one to find no stack, then two batches for every block that is not before it
    assert runs == {"blocks.0": 2 + 4 * 2, "blocks.2": 2 + 2 * 2}
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_blocks_of_one_s_own_order_and_a_transformer():
    models = [stepped(transformer(torch.float32), seed=t, size=0.3) for t in (1, 2)]
    data = [[numbers(20, 6, 5, seed=t) for _ in range(2)] for t in (1, 2)]
    merged, found = pf.regmean_pp(models, data)
    named, _ = pf.regmean_pp(models, data, blocks=["layers.0", "layers.1", "classifier"])
    assert set(merged) == set(models[0].state_dict()) and all(torch.equal(merged[n], named[n]) for n in merged)
    assert found[0].counts["layers.1.q_proj.input_gram"] == 60
    torch.testing.assert_close(merged["embed.weight"], mean(models, "embed.weight"))
    other, _ = pf.regmean_pp(models, data, blocks=["layers"])
    assert not torch.equal(other["layers.1.q_proj.weight"], merged["layers.1.q_proj.weight"])
    torch.testing.assert_close(other["classifier.weight"], mean(models, "classifier.weight"))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.fc, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.fc(self.embed(tokens))))


def test_tied_weights_stay_tied():
    models = [stepped(seeded(Tied), seed=t) for t in (1, 2)]
    merged, found = pf.regmean_pp(models, [[numbers(9, 4, 3)]] * 2)
    assert torch.equal(merged["head.weight"], merged["embed.weight"]) and "head.input_gram" not in found[0]
    torch.testing.assert_close(merged["embed.weight"], mean(models, "embed.weight"))
    assert not torch.equal(merged["fc.weight"], mean(models, "fc.weight"))


def test_arguments_and_data_that_do_not_fit(tmp_path):
    models, data = tasks()
    with pytest.raises(pf.RecipeError, match="batches: expected one a model, got 1 for 2 models"):
        pf.regmean_pp(models, data[:1])
    with pytest.raises(pf.RecipeError, match="out: expected one a model, got 1 for 2"):
        pf.regmean_pp(models, data, out=[tmp_path / "a.safetensors"])
    with pytest.raises(pf.RecipeError, match="got 0 for 0 models"):
        pf.regmean_pp([], [])
    with pytest.raises(pf.CompatibilityError, match="batches of model 1: expected at least one batch"):
        pf.regmean_pp(models, [data[0], []])
    with pytest.raises(pf.CompatibilityError, match="expected a module of the model, got 'blocks.9'"):
        pf.regmean_pp(models, data, blocks=["blocks.9"])
    data[1][1][0][3] = float("nan")
    files = [tmp_path / f"{t}.safetensors" for t in range(2)]
    with pytest.raises(pf.CheckpointError, match="model 1: blocks.0.1.input_gram: expected finite values"):
        pf.regmean_pp(models, data, out=files)
    assert list(tmp_path.iterdir()) == []
