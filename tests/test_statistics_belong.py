"""Statistics know the weights that they were collected from; a merge refuses them beside another model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from fit_models import Perceptron, draw, numbers, seeded
from hypothesis import given
from hypothesis import strategies as st
from model_folders import load, save_model
from small_models import stepped, transformer

import peta_fast as pf
from peta_fast.formats.weight_marks import is_marked, mark_of, runs_of, sample

METHODS = {"fisher": ("fisher",), "regmean": ("input_gram",), "mats": ("input_gram", "output_gram")}


def batches() -> list:
    return [(draw(8, 6, seed=i), numbers(4, 8, seed=i)) for i in range(3)]


def tuned(seed: int, dtype=torch.float32) -> torch.nn.Module:
    return stepped(seeded(Perceptron), seed=seed, size=0.5).to(dtype)


def collected(model, method: str = "regmean", out=None):
    return pf.collect_statistics(model, batches(), out, kinds=METHODS[method])


def states(*models) -> list[dict]:
    return [m.state_dict() for m in models]


@pytest.mark.parametrize("method", METHODS)
def test_swapped_statistics_are_refused_by_name(method):
    a, b = tuned(1), tuned(2)
    own = [collected(m, method) for m in (a, b)]
    merged = pf.merge_state_dicts(None, states(a, b), method=method, statistics=own)
    message = r"statistics 0: was collected from other weights than those of model 0: 'fc1.weight' and \d more differ"
    with pytest.raises(pf.CompatibilityError, match=message if method == "fisher" else message.replace(r"\d", "1")):
        pf.merge_state_dicts(None, states(a, b), method=method, statistics=own[::-1])
    anyway = pf.merge_state_dicts(
        None, states(a, b), method=method, statistics=own[::-1], check_statistics=False
    )  # fmt: skip
    assert not torch.equal(anyway["fc2.weight"], merged["fc2.weight"])


def test_files_and_the_command_line(tmp_path):
    a, b = tuned(1), tuned(2)
    listed = []
    for name, other, model in (("a", "b", a), ("b", "a", b)):
        save_model(tmp_path / name, model.state_dict())
        collected(model, out=tmp_path / f"{name}.safetensors")
        listed.append(
            {"model": str(tmp_path / name), "parameters": {"statistics": str(tmp_path / f"{other}.safetensors")}}
        )
    recipe = {"method": "regmean", "models": listed}
    with pytest.raises(
        pf.CompatibilityError, match="b.safetensors: was collected from other weights than those of .*/a"
    ):
        pf.merge(recipe, tmp_path / "out")
    with pytest.raises(pf.CompatibilityError, match="peta-fast fit statistics.*check_statistics: false"):
        pf.make_plan(pf.load_recipe(recipe))
    assert not (tmp_path / "out").exists()
    pf.merge({**recipe, "parameters": {"check_statistics": False}}, tmp_path / "out")
    for entry, file in zip(listed, ("a", "b"), strict=True):
        entry["parameters"]["statistics"] = str(tmp_path / f"{file}.safetensors")
    pf.merge(recipe, tmp_path / "out", force=True)
    expected = pf.merge_state_dicts(None, states(a, b), method="regmean", statistics=[collected(a), collected(b)])
    assert all(torch.equal(t, expected[n]) for n, t in load(tmp_path / "out").items())


def test_one_changed_layer_is_enough():
    a, b = tuned(1), tuned(2)
    own = [collected(m) for m in (a, b)]
    with torch.no_grad():
        b.fc2.weight[3, 7] += 1e-6
    with pytest.raises(pf.CompatibilityError, match="of model 1: 'fc2.weight' differ; collect it from that model"):
        pf.merge_state_dicts(None, states(a, b), method="regmean", statistics=own)
    with torch.no_grad():
        b.norm.weight.add_(1)  # no statistics are of it
    b.fc2.weight.data[3, 7] -= 1e-6
    b.fc2.load_state_dict(tuned(2).fc2.state_dict())
    pf.merge_state_dicts(None, states(a, b), method="regmean", statistics=own)


@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_a_network_may_be_wider_or_narrower_than_its_file(held, stored):
    """One was rounded to the other, in either direction; bf16 and fp16 are each a rounding of fp32."""
    models = [tuned(1), tuned(2)]
    files = [{n: t.to(stored) for n, t in m.state_dict().items()} for m in models]
    networks = []
    for file in files:
        network = seeded(Perceptron).to(held)
        network.load_state_dict({n: t.to(held) for n, t in file.items()})
        networks.append(network)
    found = [pf.collect_statistics(n, [(x.to(held), y) for x, y in batches()]) for n in networks]
    pf.merge_state_dicts(None, files, method="regmean", statistics=found)
    with pytest.raises(pf.CompatibilityError, match="other weights"):
        pf.merge_state_dicts(None, files, method="regmean", statistics=found[::-1])
    wide = [collected(m) for m in models]  # before rounding
    pf.merge_state_dicts(None, files, method="regmean", statistics=wide)


def test_statistics_that_do_not_say_are_taken():
    a, b = tuned(1), tuned(2)
    own = [dict(collected(m)) for m in (a, b)]
    pf.merge_state_dicts(None, states(a, b), method="regmean", statistics=own[::-1])


@pytest.mark.parametrize("text", ["fc1", "[1]", '{"fc1.weight": 3}', '{"fc1.weight": "F32 12"}'])
def test_marks_that_are_none(text):
    a, b = tuned(1), tuned(2)
    own = [collected(m) for m in (a, b)]
    own[0].metadata["weights"] = text
    with pytest.raises(pf.CheckpointError, match="metadata 'weights'"):
        pf.merge_state_dicts(None, states(a, b), method="regmean", statistics=own)


def test_regmean_pp_s_statistics_are_of_the_models_not_of_the_merge():
    a, b = tuned(1), tuned(2)
    merged, own = pf.regmean_pp([a, b], [batches()] * 2)
    again = pf.merge_state_dicts(None, states(a, b), method="regmean_pp", statistics=own)
    assert all(torch.equal(again[n], merged[n]) for n in merged)
    assert set(json.loads(own[0].metadata["weights"])) == {"fc1.weight", "fc2.weight"}
    with pytest.raises(pf.CompatibilityError, match="other weights"):
        pf.merge_state_dicts(None, states(a, b), method="regmean_pp", statistics=own[::-1])


@given(st.integers(0, 1 << 34))
def test_runs_lie_in_the_tensor_and_reach_both_ends(size):
    runs = runs_of(size)
    assert sum(stop - start for start, stop in runs) == min(size, 1024)
    assert not size or runs[0][0] == 0 and runs[-1][1] == size
    assert all(a[1] <= b[0] for a, b in zip(runs, runs[1:], strict=False))


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=8))
def test_marks_round_as_torch_does(values):
    exact = np.array(values, np.float32)
    mark = mark_of(exact, "F32")
    for dtype, kind in (("BF16", torch.bfloat16), ("F16", torch.float16), ("F32", torch.float32)):
        rounded = torch.from_numpy(exact).to(kind).float().numpy()
        assert is_marked(mark, rounded, dtype)
        assert is_marked(mark_of(rounded, dtype), exact, "F32")
        assert not is_marked(mark, np.where(rounded == 0, 1, -rounded).astype(np.float32), dtype)


def test_samples_of_a_file_are_its_elements(tmp_path):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        tensor = torch.randn(40, 77, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
        save_model(tmp_path / str(dtype), {"w": tensor})
        found = sample(pf.open_checkpoint(tmp_path / str(dtype)), "w", tensor.numel())
        flat = tensor.reshape(-1).float()
        assert torch.equal(torch.from_numpy(found), torch.cat([flat[a:b] for a, b in runs_of(tensor.numel())]))


def test_adapters_on_a_model_are_rounded_into_a_network_and_no_fault(tmp_path):
    """What an adapter changes cannot be told bit by bit; what it leaves alone still can."""
    pytest.importorskip("peft", reason="pip install 'peta_fast[peft]'")
    from adapter_files import exact_deltas, save_base, save_peft

    base = transformer(torch.float32)
    save_base(tmp_path / "base", base)
    listed, networks = [], []
    for seed, name in ((1, "a"), (2, "b")):
        save_peft(tmp_path / name, base, seed)
        network = transformer(torch.float32)
        with torch.no_grad():
            for module, delta in exact_deltas(tmp_path / name).items():
                network.get_submodule(module).weight += delta.float() * (1 + 1e-6)
        networks.append(network)
        listed.append({"model": f"{tmp_path / 'base'}+{tmp_path / name}"})

    def recipe(folder: str) -> dict:
        (tmp_path / folder).mkdir()
        for entry, network, name in zip(listed, networks, "ab", strict=True):
            file = tmp_path / folder / f"{name}.safetensors"
            pf.collect_statistics(network, [numbers(20, 6, 5)], file)
            entry["parameters"] = {"statistics": str(file)}
        return {"method": "regmean", "models": listed}

    pf.make_plan(pf.load_recipe(recipe("own")))
    with torch.no_grad():
        networks[0].classifier.weight += 1
    with pytest.raises(
        pf.CompatibilityError, match="other weights than those of .*base.*a: 'classifier.weight' differ"
    ):
        pf.make_plan(pf.load_recipe(recipe("other")))
