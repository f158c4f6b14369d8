"""What the streaming pass over checkpoints measures, against plain fp64, and that it reads everything once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import coarse_family, family
from model_folders import save_family, save_model

import peta_fast as pf
from peta_fast.analysis import task_vectors
from peta_fast.analysis.task_vectors import layer_label, measure, measure_state_dicts
from peta_fast.errors import CheckpointError, CompatibilityError, RecipeError


def flat(base, model, names=None) -> torch.Tensor:
    return torch.cat([(model[n].float() - base[n].float()).double().flatten() for n in (names or base)])


def assert_sums(found, base, models, names):
    taus = torch.stack([flat(base, m, names) for m in models])
    gram = taus @ taus.T
    norms = gram.diagonal().sqrt()
    np.testing.assert_allclose(found.gram, gram, rtol=1e-12, atol=1e-12 * float(norms.max()) ** 2)
    np.testing.assert_allclose(found.cosine, gram / torch.outer(norms, norms).clamp(min=1e-8), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.l1, taus.abs().sum(1), rtol=1e-12)
    np.testing.assert_array_equal(found.nonzero, (taus != 0).sum(1))
    np.testing.assert_array_equal(found.largest, taus.abs().amax(1))
    signs = taus.sign()
    against = torch.stack([torch.stack([(a * b < 0).sum() for b in signs]) for a in signs])
    np.testing.assert_array_equal(found.conflicts, against)
    assert found.any_conflict == int(((signs > 0).any(0) & (signs < 0).any(0)).sum())
    assert found.size == taus.shape[1]
    own = torch.cat([base[n].double().flatten() for n in names]).norm()
    np.testing.assert_allclose(found.relative, norms / own, rtol=1e-12)


@pytest.mark.parametrize("tile", [1 << 23, 4096], ids=["one tile", "several tiles"])
@pytest.mark.parametrize("make", [family, coarse_family])
def test_sums_are_those_of_plain_fp64(monkeypatch, make, tile):
    monkeypatch.setattr(task_vectors, "TILE", tile)
    shapes = {"embed.weight": (300, 40), "layers.0.a": (41,), "layers.0.b": (5, 7), "layers.1.a": (41,), "scale": ()}
    base, models = make(3, shapes=shapes)
    found = measure_state_dicts(base, models, names=["x", "y", "z"])
    assert_sums(found.total, base, models, list(base))
    assert list(found.layers) == ["embed", "layers.0", "layers.1", "scale"]
    assert_sums(found.layers["layers.0"], base, models, ["layers.0.a", "layers.0.b"])
    for name in base:
        assert_sums(found.tensors[name], base, models, [name])


def test_orthogonal_equal_and_opposite_task_vectors():
    base = {"w": torch.zeros(4)}
    models = [{"w": torch.tensor(v)} for v in ([3.0, 4, 0, 0], [0, 0, 2.0, 0], [6.0, 8, 0, 0], [-3.0, -4, 0, 0])]
    found = measure_state_dicts(base, models).total
    np.testing.assert_allclose(found.cosine, [[1, 0, 1, -1], [0, 1, 0, 0], [1, 0, 1, -1], [-1, 0, -1, 1]])
    assert found.norms.tolist() == [5, 2, 10, 5] and np.isnan(found.relative).all()
    assert found.conflicts[0].tolist() == [0, 0, 0, 2] and found.conflict_share == 0.5


def test_a_model_that_did_not_move_has_no_angle():
    base = {"w": torch.ones(3)}
    found = measure_state_dicts(base, [{"w": torch.ones(3)}, {"w": torch.tensor([1.0, 2, 3])}]).total
    assert found.cosine.tolist() == [[0, 0], [0, pytest.approx(1)]]


@pytest.fixture
def seen(monkeypatch):
    """Bytes of every native pass, by address, and every mapping of a tensor."""
    passes, plain = [], task_vectors.task_statistics

    def noting(base, models, **options):
        passes.append([(b.address, b.address + b.nbytes) for b in ([base] if base else []) + list(models)])
        return plain(base, models, **options)

    monkeypatch.setattr(task_vectors, "task_statistics", noting)
    return passes


def test_every_byte_of_every_checkpoint_is_read_once(tmp_path, seen, monkeypatch):
    """The base's own norm takes the tile that has just been read: no second pass over the file."""
    monkeypatch.setattr(task_vectors, "TILE", 512)
    base, models = save_family(tmp_path, 3, dtype=torch.bfloat16)
    told = []
    measure(tmp_path / "base", [tmp_path / n for n in "abc"], progress=lambda done, total: told.append((done, total)))
    whole = sum(t.nbytes for t in base.values())
    joint, own = seen[::2], seen[1::2]
    assert all(len(j) == 4 and len(o) == 1 and o[0] == j[0] for j, o in zip(joint, own, strict=True))
    ranges = sorted(r for j in joint for r in j)
    assert sum(stop - start for start, stop in ranges) == 4 * whole
    assert all(a[1] <= b[0] for a, b in zip(ranges, ranges[1:], strict=False)), "a range was read twice"
    assert told[-1] == (4 * whole, 4 * whole)


def test_files_give_what_memory_gives_whatever_the_shards(tmp_path):
    base, models = save_family(tmp_path, 2, dtype=torch.bfloat16)
    save_model(tmp_path / "sharded", models[1], shards=3)
    found = measure(tmp_path / "base", [tmp_path / "a", tmp_path / "sharded"])
    expected = measure_state_dicts(base, models)
    assert found.names == ("a", "sharded")
    for name, sums in expected.tensors.items():
        for part in vars(sums):
            np.testing.assert_array_equal(getattr(found.tensors[name], part), getattr(sums, part))


def test_frozen_and_integer_tensors_are_left_out_by_name(tmp_path):
    base, models = family(2)
    base["ids"] = torch.arange(4)
    part = [pf.TrainedTensors({"norm.bias": m["norm.bias"]}) for m in models]
    found = measure_state_dicts(base, part)
    assert list(found.tensors) == ["norm.bias"]
    assert "frozen" in found.left_out["embed.weight"] and "not floating" in found.left_out["ids"]
    assert_sums(found.total, base, models, ["norm.bias"])


@pytest.mark.parametrize(
    "name, label",
    [
        ("model.layers.3.mlp.up_proj.weight", "layers.3"), ("model.norm.weight", "norm"), ("lm_head.weight", "lm_head"),
        ("visual.transformer.resblocks.11.attn.in_proj_weight", "resblocks.11"), ("scale", "scale"),
    ],
)  # fmt: skip
def test_layers_are_called_by_their_number(name, label):
    assert layer_label(name) == label


def test_layers_stand_in_the_order_that_data_passes_them():
    names = ["lm_head.weight", "model.embed_tokens.weight", *(f"model.layers.{i}.w" for i in (0, 1, 10, 2)), "norm.w"]
    base = {n: torch.zeros(2) for n in names}
    found = measure_state_dicts(base, [{n: torch.ones(2) for n in names}])
    expected = ["embed_tokens", "layers.0", "layers.1", "layers.2", "layers.10", "lm_head", "norm"]
    assert list(found.layers) == expected


def test_what_does_not_fit_is_refused_by_name():
    base, models = family(2)
    with pytest.raises(CompatibilityError, match="lacks 'spare'"):
        measure_state_dicts(base, [{n: t for n, t in models[0].items() if n != "spare"}])
    with pytest.raises(CompatibilityError, match=r"'norm.bias' is \[2\]"):
        measure_state_dicts(base, [{**models[0], "norm.bias": torch.ones(2)}])
    with pytest.raises(RecipeError, match="expected 2 different names"):
        measure_state_dicts(base, models, names=["a", "a"])
    with pytest.raises(RecipeError, match="list of one model or more"):
        measure_state_dicts(base, [])
    models[1]["norm.bias"][3] = float("inf")
    with pytest.raises(CheckpointError, match="model 1: 'norm.bias': expected finite values, got 1 NaN or inf"):
        measure_state_dicts(base, models)
