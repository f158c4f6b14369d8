"""peta_fast.merge from folders to a folder: what lies in it, whatever the threads, tiles and shards."""

from __future__ import annotations

import itertools
import json
import os
import threading

import numpy as np
import pytest
import torch
from families import assert_same_bits
from model_folders import CONFIG, config_of, fine_tuned, load, save_family, save_model, shapes, tensors
from references import assert_close_to_reference, merge_with_terms
from safetensors import safe_open
from safetensors.torch import save_file

import peta_fast
from peta_fast import _engine, _output
from peta_fast import run as run_module
from peta_fast.errors import CompatibilityError, RecipeError
from peta_fast.formats import Checkpoint, open_checkpoint
from peta_fast.journal import JOURNAL, verify
from peta_fast.merging import parse_bytes

TILED = {"table": (300, 700), "experts": (3, 40, 500), "bias": (1001,), "scale": (), "spare": (0, 7), "tail": (9, 11)}
"""With 10 MB of memory the larger ones are made in several slabs."""


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Folders base, a and b; `base`, `models` are what they hold."""
    folder = tmp_path_factory.mktemp("family")
    base, models = save_family(folder)
    return folder, base, models


@pytest.fixture(scope="module")
def tiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiled")
    base, models = save_family(folder, names=TILED)
    for name, state in zip(("base", "a", "b"), (base, *models), strict=True):
        save_model(folder / "sharded" / name, state, shards=5)
    return folder, base, models


def merge(folder, out, models=("a", "b"), base="base", **keywords):
    """merge() by keywords, of folders within `folder`."""
    keywords = {"method": "ties", **keywords}
    named = {"base": folder / base} if base else {}
    return peta_fast.merge(out=out, models=[folder / name for name in models], **named, **keywords)


# The result


def test_a_merge_of_folders_is_that_of_their_state_dicts(family, tmp_path):
    folder, base, models = family
    settings = {"method": "ties", "weight": [0.7, -0.2], "density": [0.3, 0.6], "scaling": 1.5}
    report = merge(folder, tmp_path / "out", **settings)
    merged = load(tmp_path / "out")
    assert_same_bits(merged, peta_fast.merge_state_dicts(base, models, **settings))
    for name, exact in merge_with_terms(base, models, **settings).items():
        assert_close_to_reference(merged[name], exact, 2)
    assert report.tensors == len(base) and report.out == tmp_path / "out" and report.skipped_bytes == 0


def test_keywords_and_recipe_say_the_same(family, tmp_path):
    folder, *_ = family
    listed = [{"model": str(folder / m), "parameters": {"weight": w}} for m, w in (("a", 0.7), ("b", 0.2))]
    recipe = {"method": "dare_ties", "base_model": str(folder / "base"), "models": listed, "seed": 3,
              "parameters": {"density": 0.4}}  # fmt: skip
    peta_fast.merge(recipe, tmp_path / "by recipe")
    merge(folder, tmp_path / "by keywords", method="dare_ties", weight=np.array([0.7, 0.2]), density=0.4, seed=3)
    assert_same_bits(load(tmp_path / "by keywords"), load(tmp_path / "by recipe"))


@pytest.mark.parametrize(
    "keywords, word",
    [
        ({}, "got nothing"),
        ({"recipe": "a: b", "method": "ties"}, "got recipe, method"),
        ({"recipe": "a: b", "density": 0.5}, "got recipe, density"),
        ({"method": "ties", "base": "b", "models": "a"}, "a list of models, got 'a'"),
        ({"method": "ties", "base": "b", "models": ["a"], "weight": [1, 2]}, "expected one value or 1"),
    ],
)
def test_what_is_no_recipe_is_refused(tmp_path, keywords, word):
    with pytest.raises(RecipeError, match=word):
        peta_fast.merge(**{"out": tmp_path / "out", **keywords})
    with pytest.raises(RecipeError, match="expected a folder"):
        peta_fast.merge("recipe.yml")
    assert not (tmp_path / "out").exists()


METHODS = {
    "ties": {"density": 0.3, "weight": 0.6},
    "ties by row-block": {"density": 0.3, "trim_scope": "row-block"},
    "ties of the authors": {"density": 0.3, "compat": "peta"},
    "della": {"density": 0.5, "weight": 0.6},
    "dare_linear": {"density": 0.5, "weight": [0.5, 0.3], "compat": "mergekit"},
    "slerp": {"t": 0.3},
}


@pytest.mark.parametrize("name", METHODS)
def test_bits_depend_on_neither_threads_nor_tiles_nor_shards(tiled, tmp_path, name):
    folder, base, models = tiled
    method = name.split(" ")[0]
    given = {**METHODS[name], "method": method}
    without_base = method == "slerp"
    expected = peta_fast.merge_state_dicts(None if without_base else base, models, **given)
    small = {"max_memory": 10 << 20}
    for number, options in enumerate(
        [{"threads": 1}, {"threads": 3}, {"threads": 4, **small}, {"threads": 2, "max_shard_size": 300_000, **small}]
    ):
        for source in (folder, folder / "sharded"):
            out = tmp_path / f"{source.name}{number}"
            merge(source, out, base=None if without_base else "base", **given, **options)
            assert_same_bits(load(out), expected)


def test_gradients_reach_the_tensors_of_each_layer(tmp_path):
    base, (model,) = save_family(tmp_path, num_tasks=1, layers=3)
    recipe = {"method": "linear", "models": [
        {"model": str(tmp_path / "base"), "parameters": {"weight": 1.0}},
        {"model": str(tmp_path / "a"), "parameters": {"weight": [{"filter": "mlp", "value": [1, 3]}, {"value": 0.0}]}},
    ]}  # fmt: skip
    peta_fast.merge(recipe, tmp_path / "out")
    merged = load(tmp_path / "out")
    for layer, weight in enumerate([1.0, 2.0, 3.0]):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        torch.testing.assert_close(merged[name], (base[name] + weight * model[name]) / (1 + weight))
    assert torch.equal(merged["lm_head.weight"], base["lm_head.weight"])


def test_stacked_layers_are_renumbered_and_counted_in_the_config(family, tmp_path):
    folder, _, (a, b) = family
    text = {"num_hidden_layers": 2, "layer_types": ["full", "sliding"]}
    save_model(tmp_path / "a", a, config={"text_config": text, "vision_config": {"depth": 9}})
    sources = [(tmp_path / "a", 0, 2), (folder / "b", 1, 2), (tmp_path / "a", 0, 1)]
    slices = [{"sources": [{"model": str(m), "layer_range": [i, j]}]} for m, i, j in sources]
    peta_fast.merge({"method": "passthrough", "slices": slices}, tmp_path / "out")
    merged, suffix = load(tmp_path / "out"), "self_attn.q_proj.weight"
    assert set(merged) == set(shapes(4))
    for layer, (state, origin) in enumerate([(a, 0), (a, 1), (b, 1), (a, 0)]):
        assert torch.equal(merged[f"model.layers.{layer}.{suffix}"], state[f"model.layers.{origin}.{suffix}"])
    text = config_of(tmp_path / "out")["text_config"]
    assert text == {"num_hidden_layers": 4, "layer_types": ["full", "sliding", "sliding", "full"]}
    assert config_of(tmp_path / "out")["vision_config"] == {"depth": 9}


def test_modules_are_merged_each_in_its_own_way(family, tmp_path):
    folder, base, (a, b) = family

    def module(name, weight):
        return {"models": [{"model": str(folder / name), "parameters": {"weight": weight}}]}

    recipe = {"method": "linear", "parameters": {"normalize": False}, "dtype": "float32",
              "modules": {"model": module("a", 2.0), "lm_head": module("b", 1.0)}}  # fmt: skip
    peta_fast.merge(recipe, tmp_path / "out")
    merged = load(tmp_path / "out")
    assert torch.equal(merged["lm_head.weight"], b["lm_head.weight"])
    assert all(torch.equal(merged[n], 2 * a[n]) for n in a if n.startswith("model."))


@pytest.mark.parametrize("form", ["shared", "per task", "bits"])
def test_masks_come_from_a_file(family, tmp_path, form):
    folder, base, models = family
    draw = torch.Generator().manual_seed(1)
    soft = {n: torch.rand(s, generator=draw) for n, s in shapes().items()}
    masks = soft
    if form != "shared":
        masks = {f"{t}/{n}": m < (0.3, 0.6)[t] for n, m in soft.items() for t in range(2)}
    stored = {n: torch.from_numpy(np.packbits(m.numpy(), bitorder="little")) if form == "bits" else m
              for n, m in masks.items()}  # fmt: skip
    save_file(stored, tmp_path / "masks.safetensors")
    settings = {"method": "masked_task_arithmetic", "weight": [0.5, 0.8], "mask_rescale": "mean"}
    merge(folder, tmp_path / "out", mask=tmp_path / "masks.safetensors", **settings)
    expected = peta_fast.merge_state_dicts(base, models, mask=masks, **settings)
    assert_same_bits(load(tmp_path / "out"), expected)
    from_file = peta_fast.merge_state_dicts(base, models, mask=tmp_path / "masks.safetensors", **settings)
    assert_same_bits(from_file, expected)


@pytest.mark.parametrize("keys", [{"dtype": "bfloat16"}, {"dtype": "float32", "out_dtype": "bfloat16"}])
def test_the_output_has_the_dtype_that_is_asked_for_and_its_config_says_so(family, tmp_path, keys):
    folder, base, models = family
    merge(folder, tmp_path / "out", density=0.5, **keys)
    expected = peta_fast.merge_state_dicts(base, models, method="ties", density=0.5, dtype="bfloat16")
    assert_same_bits(load(tmp_path / "out"), expected)
    assert config_of(tmp_path / "out")["torch_dtype"] == "bfloat16"


def test_integers_are_copied_from_the_base_and_running_statistics_averaged(tmp_path):
    base = {"ids": torch.tensor([1, -(2**40)]), "seen": torch.tensor([True, False]), "w": torch.ones(3),
            "bn.running_mean": torch.full((2,), 9.0)}  # fmt: skip
    models = [{**fine_tuned(base, t), "ids": torch.tensor([t, t]), "bn.running_mean": torch.full((2,), 1.0 + t)}
              for t in range(2)]  # fmt: skip
    for name, state in zip(("base", "a", "b"), (base, *models), strict=True):
        save_model(tmp_path / name, state)
    merge(tmp_path, tmp_path / "out", dtype="bfloat16")
    merged = load(tmp_path / "out")
    assert torch.equal(merged["ids"], base["ids"]) and torch.equal(merged["seen"], base["seen"])
    assert torch.equal(merged["bn.running_mean"], torch.full((2,), 1.5, dtype=torch.bfloat16))


# Ties


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_tied_weights_are_stored_once_and_stay_tied(tmp_path, kind):
    tie = {"lm_head.weight": "embed.weight"}
    states = [tensors(t, names={"embed.weight": (6, 4), "norm": (4,)}) for t in range(2)]
    for name, state in zip(("base", "a"), states, strict=True):
        save_model(tmp_path / name, state, config={**CONFIG, "tie_word_embeddings": True}, metadata=tie)
        if kind == "bin":
            (tmp_path / name / "model.safetensors").unlink()
            shared = {**state, "lm_head.weight": state["embed.weight"]}
            torch.save(shared, tmp_path / name / "pytorch_model.bin")
    merge(tmp_path, tmp_path / "out", models=["a"], density=0.5)
    assert set(load(tmp_path / "out")) == {"embed.weight", "norm"}
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt", **tie}
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert checkpoint.aliases == tie
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is True


def test_a_tie_that_a_model_has_undone_is_merged_apart_and_the_config_says_so(tmp_path):
    base = tensors(0, names={"embed.weight": (6, 4)})
    apart = tensors(1, names={"embed.weight": (6, 4), "lm_head.weight": (6, 4)})
    config = {**CONFIG, "tie_word_embeddings": True}
    save_model(tmp_path / "base", base, config=config, metadata={"lm_head.weight": "embed.weight"})
    save_model(tmp_path / "a", apart, config=config)
    merge(tmp_path, tmp_path / "out", models=["a"])
    merged = load(tmp_path / "out")
    for name in apart:
        torch.testing.assert_close(merged[name], apart[name])
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False


def test_tensors_with_two_names_stay_one_in_memory():
    def tied(seed):
        state = tensors(seed, names={"embed": (5, 3)})
        return {**state, "head": state["embed"]}

    base, model = tied(0), tied(1)
    expected = peta_fast.merge_state_dicts({"embed": base["embed"]}, [{"embed": model["embed"]}], method="ties")
    merged = peta_fast.merge_state_dicts(base, [model], method="ties")
    assert merged["head"] is merged["embed"] and torch.equal(merged["embed"], expected["embed"])
    separate = {name: torch.empty(5, 3) for name in base}
    peta_fast.merge_state_dicts(base, [model], method="ties", out=separate)
    assert all(torch.equal(t, expected["embed"]) for t in separate.values())
    peta_fast.merge_state_dicts(base, [model], method="ties", out=base)
    assert torch.equal(base["head"], expected["embed"])
    with pytest.raises(CompatibilityError, match="share memory, but are merged apart"):
        peta_fast.merge_state_dicts(base, [{n: t.clone() for n, t in model.items()}], method="ties", out=base)


# What lies beside the weights


def test_other_files_are_carried_along(family, tmp_path):
    folder, base, models = family
    save_model(tmp_path / "base", base, generation_config_json="{}", tokenizer_json='{"a": 1}', README_md="old",
               optimizer_pt="state", modeling_py="code")  # fmt: skip
    save_model(tmp_path / "a", models[0], tokenizer_json='{"b": 2}')
    merge(tmp_path, tmp_path / "out", models=["a"])
    found = {p.name for p in (tmp_path / "out").iterdir()}
    carried = {"generation_config.json", "tokenizer.json", "modeling.py", "config.json"}
    assert found == carried | {"README.md", "model.safetensors", JOURNAL}
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"a": 1}'
    assert config_of(tmp_path / "out") == CONFIG


def test_tokenizer_and_chat_template_are_those_that_the_recipe_names(family, tmp_path):
    folder, base, models = family
    save_model(tmp_path / "base", base, tokenizer_model="base", chat_template_jinja="old", vocab_txt="base")
    save_model(tmp_path / "a", models[0], tokenizer_json="{}", tokenizer_config_json='{"b": 1}')
    merge(tmp_path, tmp_path / "out", models=["a"], tokenizer_source=str(tmp_path / "a"), chat_template="{{ x }}")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} < names
    assert names & {"tokenizer.model", "vocab.txt"} == set()
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ x }}"
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config == {"b": 1, "chat_template": "{{ x }}"}


def test_the_model_card_names_base_models_and_recipe(family, tmp_path):
    folder, *_ = family
    merge(folder, tmp_path / "out", density=0.25)
    card = (tmp_path / "out" / "README.md").read_text()
    front = card.split("---")[1]
    assert all(f'- "{folder / name}"' in front for name in ("base", "a", "b")) and "- peta_fast\n- merge" in front
    assert "density: 0.25" in card and "method: ties" in card


def test_a_merge_can_be_merged_again_and_verified(family, tmp_path):
    folder, *_ = family
    merge(folder, tmp_path / "first")
    merge(folder, tmp_path / "second", base=str(tmp_path / "first"))
    assert verify(tmp_path / "first") == verify(tmp_path / "second") == []
    file = tmp_path / "second" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "differ from what was written" in verify(tmp_path / "second")[0]


# How it runs


def test_the_next_slab_is_made_while_one_is_written(tiled, tmp_path, monkeypatch):
    folder, *_ = tiled
    filled, fill = threading.Semaphore(0), _engine.Engine.fill
    write, begun, waited, lock = _output.Output.write, [], [], threading.Lock()

    def write_after_the_next_fill(self, slab, buffer):
        with lock:
            begun.append(slab)
            is_first = len(begun) == 1
        if is_first:
            waited.append(filled.acquire(timeout=20) and filled.acquire(timeout=20))
        write(self, slab, buffer)

    def counted_fill(self, pieces):
        fill(self, pieces)
        filled.release()

    monkeypatch.setattr(_output.Output, "write", write_after_the_next_fill)
    monkeypatch.setattr(_engine.Engine, "fill", counted_fill)
    merge(folder, tmp_path / "out", max_memory=10 << 20)
    assert waited == [True]


def test_two_slabs_are_written_at_once(tiled, tmp_path, monkeypatch):
    folder, *_ = tiled
    write, both, together, turn = _output.Output.write, threading.Barrier(2, timeout=20), [], itertools.count()

    def write_with_another(self, slab, buffer):
        if next(turn) < 2:
            both.wait()
            together.append(slab)
        write(self, slab, buffer)

    monkeypatch.setattr(_output.Output, "write", write_with_another)
    report = merge(folder, tmp_path / "out", max_memory=10 << 20)
    assert len(together) >= 2 and report.bytes_written > 0 and verify(tmp_path / "out") == []


def test_inputs_that_are_not_in_memory_are_asked_for_before_they_are_needed(tiled, tmp_path, monkeypatch):
    folder, *_ = tiled
    events, fill = [], _engine.Engine.fill
    monkeypatch.setattr(run_module, "_is_resident", lambda file: False)
    monkeypatch.setattr(Checkpoint, "prefetch", lambda self, name, start, stop: events.append(name))

    def noted_fill(self, pieces):
        events.append([p.tensor.name for p in pieces])
        fill(self, pieces)

    monkeypatch.setattr(_engine.Engine, "fill", noted_fill)
    merge(folder, tmp_path / "out", max_memory=10 << 20, density=0.3)
    fills = [i for i, event in enumerate(events) if isinstance(event, list)]
    assert len(fills) > 4
    for name in ("experts", "table", "tail"):
        needed = next(i for i in fills if name in events[i])
        assert events[:needed].count(name) == 3, f"{name} of base, a and b"
    assert events.index("tail") < fills[0], "several slabs ahead"


def test_names_are_given_at_the_end_the_config_s_last(tiled, tmp_path, monkeypatch):
    folder, *_ = tiled
    given, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (given.append(os.path.basename(new)), replace(old, new)))
    merge(folder, tmp_path / "out", max_shard_size=400_000)
    shards = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 1 and given == [*shards, "model.safetensors.index.json", "README.md", "config.json"]


def test_progress_rises_to_the_plan_s_total(tiled, tmp_path):
    folder, *_ = tiled
    seen = []
    report = merge(folder, tmp_path / "out", max_memory=10 << 20, density=0.3, compat="peta", progress=seen.append)
    done = [p.done_bytes for p in seen]
    assert done == sorted(done) and len(done) > 3
    assert {p.total_bytes for p in seen} == {report.bytes_read + report.bytes_written}
    assert 0.95 * seen[-1].total_bytes < done[-1] <= seen[-1].total_bytes
    assert [p for p in dict.fromkeys(p.phase for p in seen)] == ["statistics", "merging", "writing"]


@pytest.mark.parametrize("text, number", [("768MB", 768e6), ("1.5 GiB", 1.5 * 2**30), ("5gb", 5e9), (4096, 4096)])
def test_bytes_are_read_as_people_write_them(text, number):
    assert parse_bytes(text, "max_memory") == number


@pytest.mark.parametrize("text", ["", "MB", "-1GB", "5 parsecs", "nan", "inf", 0, True, None])
def test_what_is_no_number_of_bytes_is_refused(text):
    with pytest.raises(RecipeError, match="max_memory: expected a number of bytes"):
        parse_bytes(text, "max_memory")
