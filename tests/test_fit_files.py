"""Statistics on the disk: whole or not at all, resumed after a kill; and data that cannot be collected from."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from fit_models import Perceptron, case, draw, numbers, seeded
from interpreter import run_code
from torch import nn

import peta_fast as pf

ALL = ("input_gram", "output_gram", "fisher")


def batches(count: int = 9, seed: int = 0) -> list:
    return [(draw(4, 6, seed=seed + i), numbers(4, 4, seed=seed + 50 + i)) for i in range(count)]


class Broken(Exception):
    pass


def interrupted(data: list, after: int):
    yield from data[:after]
    raise Broken


def collect(out, data=None, model=None, **options):
    options = {"kinds": ALL, "save_every": 2, **options}
    return pf.collect_statistics(model or seeded(Perceptron), batches() if data is None else data, out, **options)


def files(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_what_is_written_is_what_is_returned(tmp_path):
    found = collect(tmp_path / "task" / "a.safetensors")
    read = pf.load_statistics(tmp_path / "task" / "a.safetensors")
    assert files(tmp_path / "task") == ["a.safetensors"]
    assert set(read) == set(found) and all(torch.equal(read[k], found[k]) for k in found)
    assert read.examples == 36 and read.counts == found.counts
    opened = pf.open_checkpoint(tmp_path / "task" / "a.safetensors")
    assert opened.tensors["fc1.input_gram"].shape == (21,)


@pytest.mark.parametrize("labels", ["data", "sampled"])
@pytest.mark.parametrize("after", [3, 6, 8])
def test_a_run_that_broke_off_goes_on_to_the_same_file(tmp_path, after, labels):
    collect(tmp_path / "whole.safetensors", labels=labels)
    with pytest.raises(Broken):
        collect(tmp_path / "part.safetensors", interrupted(batches(), after), labels=labels)
    assert files(tmp_path) == ["part.safetensors.unfinished", "whole.safetensors"]
    seen = []
    model = seeded(Perceptron)
    model.register_forward_hook(lambda *_: seen.append(1))
    collect(tmp_path / "part.safetensors", labels=labels, model=model)
    assert (tmp_path / "part.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert files(tmp_path) == ["part.safetensors", "whole.safetensors"] and len(seen) == 2 * (9 - after // 2 * 2)


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from test_fit_files import batches, collect

def dying():
    yield from batches()[:7]
    os.kill(os.getpid(), signal.SIGKILL)

collect({out!r}, dying())
"""


def test_a_killed_process_loses_nothing(tmp_path):
    tests = os.path.dirname(os.path.abspath(__file__))
    ran = run_code(KILLED.format(tests=tests, out=str(tmp_path / "part.safetensors")))
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    assert files(tmp_path) == ["part.safetensors.unfinished"]
    whole, resumed = collect(tmp_path / "whole.safetensors"), collect(tmp_path / "part.safetensors")
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    assert (tmp_path / "part.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_a_run_is_not_resumed_with_other_data(tmp_path):
    with pytest.raises(Broken):
        collect(tmp_path / "part.safetensors", interrupted(batches(), 5))
    with pytest.raises(pf.CompatibilityError, match="begun with other data, or the same in another order"):
        collect(tmp_path / "part.safetensors", batches()[::-1])
    with pytest.raises(pf.CompatibilityError, match="expected at least 4, got 3"):
        collect(tmp_path / "part.safetensors", batches()[:3])
    assert files(tmp_path) == ["part.safetensors.unfinished"]


def test_a_run_of_another_model_or_other_settings_begins_anew(tmp_path):
    with pytest.raises(Broken):
        collect(tmp_path / "part.safetensors", interrupted(batches(), 5))
    model = seeded(Perceptron)
    with torch.no_grad():
        model.fc1.weight.add_(1)
    assert torch.equal(
        collect(tmp_path / "part.safetensors", model=model)["fc2.input_gram"],
        collect(None, model=model)["fc2.input_gram"],
    )


def test_a_finished_file_is_read_and_that_of_another_model_is_not_replaced(tmp_path):
    found = collect(tmp_path / "a.safetensors")
    again = collect(tmp_path / "a.safetensors", data=[])
    assert all(torch.equal(again[k], found[k]) for k in found)
    with pytest.raises(pf.ResourceError, match="is there already, collected from another model or with other settings"):
        collect(tmp_path / "a.safetensors", kinds=("fisher",))
    assert set(collect(tmp_path / "a.safetensors", kinds=("fisher",), force=True)) < set(found)


def test_damaged_and_missing_files(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(pf.CheckpointError, match="cannot be read as safetensors"):
        collect(tmp_path / "a.safetensors")
    with pytest.raises(pf.CheckpointError, match="found none"):
        pf.load_statistics(tmp_path / "nothing")


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(pf.ResourceError, match="cannot be"):
        collect(tmp_path / "file" / "a.safetensors")


@pytest.mark.parametrize("kinds", [("output_gram",), ("fisher",), ("fisher_gram",)])
def test_labels_are_needed_for_gradients(tmp_path, kinds):
    inputs = [x for x, _ in batches()]
    options = {"only": lambda n: "norm" in n} if kinds == ("fisher_gram",) else {}
    with pytest.raises(pf.CompatibilityError, match="expected labels, found none"):
        collect(tmp_path / "a.safetensors", inputs, kinds=kinds, **options)
    mappings = [{"x": x} for x in inputs]
    with pytest.raises(pf.CompatibilityError, match="expected labels, found none"):
        collect(tmp_path / "a.safetensors", mappings, kinds=kinds, **options)
    assert files(tmp_path) == []
    assert len(collect(tmp_path / "a.safetensors", inputs, kinds=kinds, labels="sampled", **options))


@pytest.mark.parametrize(
    "labels, message",
    [
        (torch.tensor([0, 1, 2, 9]), "go from 0 to 9, the model has 4 classes"),
        (torch.tensor([0, -1, 2, 3]), "go from -1 to 3, the model has 4 classes"),
        (torch.zeros(4), "expected integers, got float32"),
        (torch.zeros(4, 2).long(), r"expected \[4\] for logits of \[4, 4\], got \[4, 2\]"),
    ],
)
def test_labels_that_do_not_fit_the_head(tmp_path, labels, message):
    with pytest.raises(pf.CompatibilityError, match=message):
        collect(tmp_path / "a.safetensors", [(draw(4, 6), labels)])
    assert files(tmp_path) == []


@pytest.mark.parametrize("kinds", [("output_gram",), ("fisher",)])
def test_a_loss_that_is_not_finite_names_its_example(tmp_path, kinds):
    data = batches()
    data[4][0][2] = float("nan")
    with pytest.raises(pf.CheckpointError, match="example 18: expected a finite loss, got nan"):
        collect(tmp_path / "a.safetensors", data, kinds=kinds, save_every=100)
    assert files(tmp_path) == []


def test_activations_that_are_not_finite_are_never_written(tmp_path):
    data = batches()
    data[4][0][2] = float("inf")
    with pytest.raises(pf.CheckpointError, match="fc1.input_gram: expected finite values"):
        collect(tmp_path / "a.safetensors", data, kinds=("input_gram",))
    assert files(tmp_path) == ["a.safetensors.unfinished"]  # of the batches before
    fresh = collect(tmp_path / "b.safetensors", data[:4], kinds=("input_gram",))
    resumed = pf.load_statistics(tmp_path / "a.safetensors.unfinished")
    torch.testing.assert_close(resumed["fc1.input_gram"] / 16, fresh["fc1.input_gram"])


def test_a_loss_of_one_s_own_is_one_an_example():
    with pytest.raises(pf.CompatibilityError, match=r"expected one value an example, \[4\], got \[\]"):
        collect(None, loss=lambda model, batch: model(batch[0]).sum())
    found = collect(None, loss=lambda model, batch: model(batch[0]).square().sum(-1), kinds=("fisher",))
    x, squares = torch.cat([x for x, _ in batches()]), 0.0
    for row in x:
        model = seeded(Perceptron)
        model(row[None]).square().sum().backward()
        squares = squares + model.fc2.bias.grad.square() / len(x)
    torch.testing.assert_close(found["fc2.bias.fisher"], squares, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "data, message",
    [
        ([], "expected at least 1, got 0"),
        (["text"], "a str without tensors"),
        ([(draw(4, 6), numbers(4, 3))], r"first dimensions \[3, 4\]"),
    ],
)
def test_batches_that_are_none(data, message):
    with pytest.raises(pf.CompatibilityError, match=message):
        collect(None, data)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kinds": ("gram",)}, "expected some of input_gram, output_gram, fisher, fisher_gram, got gram"),
        ({"kinds": ()}, "got none"),
        ({"labels": "guessed"}, "expected one of data, sampled, got 'guessed'"),
        ({"compat": "mergekit"}, "expected one of native, fusion_bench"),
        ({"compat": "fusion_bench"}, "a way to estimate 'fisher' alone"),
        ({"kinds": ("fisher_gram",)}, "expected a choice of tensors"),
        ({"labels": "sampled", "loss": len}, "a loss of your own has labels of its own"),
        ({"examples": 0}, "expected at least 1, got 0"),
    ],
)
def test_arguments_that_mean_nothing(options, message):
    with pytest.raises(pf.RecipeError, match=message):
        collect(None, **options)


def test_a_whole_fisher_of_a_large_tensor_is_refused():
    with pytest.raises(pf.RecipeError, match="'weight' has 10,000 elements, expected at most 8,192"):
        pf.collect_statistics(nn.Linear(100, 100), [], kinds=("fisher_gram",), only=lambda n: n == "weight")


def test_a_name_that_a_recipe_could_not_open(tmp_path):
    with pytest.raises(pf.RecipeError, match="ends in .safetensors, got 'a.bin'"):
        collect(tmp_path / "a.bin")


def test_a_model_without_layers_has_no_grams():
    with pytest.raises(pf.CompatibilityError, match="has nothing to collect input_gram of"):
        pf.collect_statistics(nn.LayerNorm(4), [draw(2, 4)])


def test_a_model_that_returns_no_logits():
    class Model(Perceptron):
        def forward(self, x):
            return {"scores": super().forward(x)}

    with pytest.raises(pf.CompatibilityError, match="expected logits, got dict"):
        collect(None, model=seeded(Model))
    grams = collect(None, model=seeded(Model), kinds=("input_gram",))  # which need none
    assert torch.equal(grams["fc2.input_gram"], collect(None, kinds=("input_gram",))["fc2.input_gram"])
    found = collect(None, model=seeded(Model), logits=lambda model, batch: model(batch[0])["scores"])
    plain = collect(None)
    assert all(torch.equal(found[k], plain[k]) for k in plain)


def test_a_mask_that_does_not_fit():
    model, _ = case("tied")
    tokens = numbers(9, 2, 4)
    with pytest.raises(pf.CompatibilityError, match=r"fc: expected a mask for rows of \[2, 4\], got one of \[2, 3\]"):
        pf.collect_statistics(model, [tokens], mask=lambda name, batch: torch.ones(2, 3))
