"""peta_fast.plan: from headers alone, what happens to every tensor and what it takes; all faults at once."""

from __future__ import annotations

import json
import os

import pytest
import torch
from checkpoint_files import safetensors_bytes
from interpreter import run_code
from model_folders import CONFIG, HIDDEN, fine_tuned, save_family, save_model, shapes, tensors
from safetensors.torch import save_file

import peta_fast
from peta_fast.errors import CheckpointError, CompatibilityError, RecipeError, ResourceError
from peta_fast.formats import Checkpoint
from peta_fast.plan import make_plan
from peta_fast.recipe import load_recipe


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Folders base, a and b."""
    folder = tmp_path_factory.mktemp("family")
    save_family(folder)
    return folder


def planned(folder, method="ties", models=("a", "b"), base="base", limits=None, **keys):
    """The plan of a merge of folders within `folder`; keys of the method go under `parameters`."""
    top = {k: keys.pop(k) for k in ("slices", "modules", "compat", "dtype", "out_dtype", "trim_scope") if k in keys}
    recipe = {"method": method, "parameters": keys, **top}
    if base:
        recipe["base_model"] = str(folder / base)
    if "slices" not in top and "modules" not in top:
        recipe["models"] = [{"model": str(folder / name)} for name in models]
    return make_plan(load_recipe(recipe), **(limits or {}))


def refused(error, *words, **keys):
    """Planning must raise `error` with all of `words`, in that exit-code class."""
    with pytest.raises(error) as caught:
        planned(**keys)
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{caught.value} does not say {missing}"
    return str(caught.value)


def elements() -> int:
    return sum(torch.Size(shape).numel() for shape in shapes().values())


def source(folder, name, first, end):
    return {"model": str(folder / name), "layer_range": [first, end]}


# What the plan says


def test_every_tensor_is_listed_with_what_happens_to_it(family):
    plan = planned(family, density=0.3, weight=0.5)
    assert sorted(t.name for t in plan.tensors) == sorted(shapes())
    for tensor in plan.to_json()["tensors"]:
        assert tensor["action"] == "merge" and tensor["dtype"] == "float32"
        assert tuple(tensor["shape"]) == shapes()[tensor["name"]]
        assert tensor["base"] == f"{family / 'base'}:{tensor['name']}"
        assert tensor["models"] == [f"{family / m}:{tensor['name']}" for m in "ab"]
        assert tensor["parameters"]["density"] == (0.3, 0.3) and tensor["parameters"]["scaling"] == 1.0
    assert json.loads(json.dumps(plan.to_json()))["compat"] == "native"


def test_planning_reads_no_tensor_and_writes_nothing(family, monkeypatch):
    def touched(*_):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(Checkpoint, "buffer", touched)
    before = sorted(family.rglob("*"))
    planned(family, density=0.3)
    assert sorted(family.rglob("*")) == before


@pytest.mark.parametrize(
    "method, keys, readings",
    [
        ("task_arithmetic", {"weight": 0.5}, 1),
        ("ties", {"density": 1.0}, 1),
        ("ties", {"density": 0.3}, 2),
        ("ties", {"density": 0.3, "trim_scope": "model"}, 3),
        ("ties", {"density": 0.3, "compat": "peta"}, 4),
        ("dare_linear", {"density": 0.5, "weight": 1.0, "compat": "mergekit"}, 2),
        ("dare_linear", {"density": 0.5, "weight": 1.0}, 1),
    ],
)
def test_bytes_read_count_every_reading(family, method, keys, readings):
    assert planned(family, method, **keys).bytes_read == readings * 3 * elements() * 4


def test_bytes_written_and_disk_are_those_of_the_files(family, tmp_path):
    plan = planned(family, limits={"max_shard_size": 4000})
    report = peta_fast.merge(plan.recipe, tmp_path / "out", max_shard_size=4000)
    on_disk = sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors"))
    assert plan.disk_needed == plan.bytes_written == report.bytes_written == on_disk
    assert report.bytes_read == plan.bytes_read
    assert [(s["file"], s["bytes"]) for s in plan.to_json()["shards"]] == [
        (f.name, f.stat().st_size) for f in sorted((tmp_path / "out").glob("*.safetensors"))
    ]


def test_less_memory_makes_smaller_slabs_until_there_is_too_little(family):
    roomy, tight = planned(family), planned(family, limits={"max_memory": 10 << 20})
    assert tight.slab < roomy.slab and tight.peak_memory <= 10 << 20
    message = refused(ResourceError, "--max-memory", folder=family, limits={"max_memory": 1 << 20})
    needed = int(message.split("at least ")[1].split(" ")[0].replace(",", ""))
    assert planned(family, limits={"max_memory": needed}).peak_memory == needed


def test_the_estimate_of_time_grows_with_the_bytes(family):
    short, long = planned(family, density=1.0), planned(family, density=0.3)
    assert 0 < short.seconds_estimate < long.seconds_estimate
    assert long.to_json()["seconds_estimate"] == round(long.seconds_estimate, 2)


def test_gradients_and_filters_reach_the_tensors_of_their_layers(tmp_path):
    save_family(tmp_path, layers=5)
    weight = [{"filter": "q_proj", "value": 9.0}, {"value": [0.0, 1.0]}]
    plan = planned(tmp_path, "task_arithmetic", weight=weight)
    weights = {t.name: t.parameters["weight"][0] for t in plan.tensors}
    assert [weights[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert {weights[f"model.layers.{i}.self_attn.q_proj.weight"] for i in range(5)} == {9.0}
    assert weights["lm_head.weight"] == 0.0


def test_what_is_not_merged_says_why(tmp_path):
    base = {
        "steps": torch.tensor(3), "bn.running_mean": torch.ones(4), "table": torch.ones(4, dtype=torch.float64),
    }  # fmt: skip
    save_model(tmp_path / "a", base)
    save_model(tmp_path / "base", {n: base[n] for n in ("steps", "bn.running_mean")})
    save_model(tmp_path / "b", {n: base[n] for n in ("steps", "bn.running_mean")})
    taken = {t.name: (t.action, t.reason) for t in planned(tmp_path, "passthrough", ["a"], base=None).tensors}
    assert taken["table"] == ("copy", "taken as it is")
    merged = {t.name: (t.action, t.reason) for t in planned(tmp_path, "ties", ["b"]).tensors}
    assert merged == {"steps": ("copy", "not floating point"), "bn.running_mean": ("average", "batch norm statistics")}


def test_fifty_thousand_tensors_are_planned(tmp_path):
    names = [f"model.layers.{i // 768}.mlp.experts.{i % 768 // 3}.{'gud'[i % 3]}.weight" for i in range(50_000)]
    header = {n: {"dtype": "BF16", "shape": [2], "data_offsets": [4 * i, 4 * i + 4]} for i, n in enumerate(names)}
    for folder in ("base", "a"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model.safetensors").write_bytes(safetensors_bytes(header, bytes(4 * len(names))))
    plan = planned(tmp_path, models=["a"], density=0.2)
    assert [t.name for t in plan.tensors] == names


MEASURED_MERGE = """
import gc, json, re, sys, threading, time
import peta_fast

def unnamed_memory():
    status = open("/proc/self/status").read()
    return 1024 * sum(int(re.search(kind + r":\\s+(\\d+)", status)[1]) for kind in ("RssAnon", "RssShmem"))

def watch():
    while True:
        seen.append(unnamed_memory())
        time.sleep(0.001)

job = json.loads(sys.argv[1])
peta_fast.merge(**job["first"])
gc.collect()
seen = [unnamed_memory()]
threading.Thread(target=watch, daemon=True).start()
time.sleep(0.01)
peta_fast.merge(**job["measured"])
print(max(seen) - seen[0])
"""
"""Prints by how much a merge grows the memory of a process that has merged a small model before."""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="measures memory through Linux's /proc")
@pytest.mark.parametrize("shape, count", [((8192, 4096), 1), ((1024, 1024), 32)], ids=["one tensor", "many tensors"])
def test_working_memory_stays_below_what_is_allowed_whatever_the_model_s_size(family, tmp_path, shape, count):
    names = {f"model.layers.{i}.weight": shape for i in range(count)}
    for seed, name in enumerate(("base", "a", "b")):
        save_model(tmp_path / name, tensors(seed, dtype=torch.bfloat16, names=names))
    assert sum(f.stat().st_size for f in tmp_path.rglob("*.safetensors")) > 200e6

    def job(folder, **keywords):
        models = [str(folder / name) for name in "ab"]
        return {"method": "ties", "density": 0.3, "base": str(folder / "base"), "models": models, **keywords}

    jobs = {"first": job(family, out=str(tmp_path / "o")), "measured": job(tmp_path, out=str(tmp_path / "out"))}
    jobs["measured"]["max_memory"] = allowed = 32_000_000
    ran = run_code(MEASURED_MERGE, json.dumps(jobs))
    assert ran.returncode == 0, ran.stderr
    assert 2_000_000 < int(ran.stdout) < allowed


# Models that do not fit together


def changed(family, tmp_path, change) -> None:
    """Folders base and a as in the family, and b after a change of its tensors."""
    base = tensors(0)
    save_model(tmp_path / "base", base)
    save_model(tmp_path / "a", fine_tuned(base, 1))
    state = fine_tuned(base, 2)
    change(state)
    save_model(tmp_path / "b", state)


def test_all_misfits_of_names_and_shapes_are_told_at_once(family, tmp_path):
    def change(state):
        state["model.norm.weight"] = torch.ones(7)
        state["lm_head.weight"] = torch.ones(3, HIDDEN)
        state["extra.weight"] = torch.ones(1)
        del state["model.layers.1.mlp.up_proj.weight"]

    changed(family, tmp_path, change)
    refused(
        CompatibilityError, "'model.norm.weight' is [7] in", "b, [24] in", "base", "'lm_head.weight' is [3, 24]",
        "lacks 'model.layers.1.mlp.up_proj.weight', which", "has 'extra.weight', which", "base lacks", "peta-fast diff",
        folder=tmp_path,
    )  # fmt: skip


def test_a_long_list_of_misfits_is_cut_and_counted(family, tmp_path):
    changed(family, tmp_path, lambda state: state.update({n: torch.ones(3) for n in state}))
    message = refused(CompatibilityError, f"; {len(shapes()) - 8} more differ", folder=tmp_path)
    assert message.count(" is [3] in ") == 8


def test_kinds_that_cannot_be_merged_are_named(family, tmp_path):
    def change(state):
        state["model.norm.weight"] = state["model.norm.weight"].double()
        state["lm_head.weight"] = state["lm_head.weight"].long()

    changed(family, tmp_path, change)
    refused(
        CompatibilityError, "'model.norm.weight' is F64 in", "expected F32, F16, BF16", "'lm_head.weight' is I64 in",
        folder=tmp_path,
    )  # fmt: skip


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"method": "tries"}, ("'tries' is not a merge method", "ties")),
        ({"densty": 0.5, "density": 2.0}, ("'densty' is not a key of ties", "'density' is 2", "from 0 to 1")),
        ({"method": "slerp", "t": 0.5, "models": ["a"], "base": None}, ("slerp merges exactly 2 models, got 1",)),
        ({"compat": "peta", "weight": 0.5, "density": 0.5}, ("knows no weights but 1",)),
        ({"trim_scope": "model", "density": [0.1, 0.9]}, ("one density must hold for all tensors",)),
    ],
)
def test_what_the_method_refuses_is_a_recipe_error(family, keys, words):
    refused(RecipeError, *words, folder=family, **keys)


# Tied weights


TIED = {"lm_head.weight": "model.embed_tokens.weight"}


def save_tied(folder, seed, tie: dict[str, str] | None):
    """A model whose lm_head is the embedding: by metadata, or left out (tie={})."""
    state = fine_tuned(tensors(0), seed)
    for alias in TIED if tie is None else tie or TIED:
        del state[alias]
    save_model(folder, state, config={**CONFIG, "tie_word_embeddings": True}, metadata=tie)


def actions(plan) -> dict[str, str]:
    return {t.name: t.action for t in plan.tensors}


@pytest.mark.parametrize("other", [TIED, {}], ids=["tied by metadata", "second name left out"])
def test_ties_that_every_model_has_are_kept(tmp_path, other):
    save_tied(tmp_path / "base", 1, TIED)
    save_tied(tmp_path / "a", 2, other)
    plan = planned(tmp_path, models=["a"])
    assert actions(plan)["lm_head.weight"] == "alias" and plan.aliases == TIED
    assert plan.tensors[-1].reason == "tied to model.embed_tokens.weight"
    assert "lm_head.weight" not in plan.layouts[0].offsets


def test_a_tie_stored_under_the_other_name_is_the_same_tie(tmp_path):
    save_tied(tmp_path / "base", 1, TIED)
    state = fine_tuned(tensors(0), 2)
    del state["model.embed_tokens.weight"]
    save_model(tmp_path / "a", state, metadata={"model.embed_tokens.weight": "lm_head.weight"})
    plan = planned(tmp_path, models=["a"])
    assert actions(plan)["lm_head.weight"] == "alias" and actions(plan)["model.embed_tokens.weight"] == "merge"


def test_a_tie_that_one_model_has_undone_is_undone(tmp_path):
    save_tied(tmp_path / "base", 1, TIED)
    save_tied(tmp_path / "a", 2, TIED)
    save_model(tmp_path / "b", fine_tuned(tensors(0), 3))
    plan = planned(tmp_path)
    assert actions(plan)["lm_head.weight"] == "merge" and plan.aliases == {}
    assert "lm_head.weight" in plan.warnings[0] and f"stored apart in {tmp_path / 'b'}" in plan.warnings[0]


def test_a_second_name_that_the_base_leaves_out_is_refused(tmp_path):
    save_tied(tmp_path / "base", 1, {})
    save_model(tmp_path / "a", fine_tuned(tensors(0), 3))
    refused(CompatibilityError, "has 'lm_head.weight', which", "base lacks", folder=tmp_path, models=["a"])


# Slices and modules


def test_slices_number_layers_anew_and_take_the_ends_from_the_ends(family):
    slices = [{"sources": [source(family, "a", 0, 2)]}, {"sources": [source(family, "b", 1, 2)]}]
    plan = planned(family, "passthrough", base=None, slices=slices)
    origins = {t.name: t.models[0] for t in plan.tensors}
    assert str(origins["model.layers.2.mlp.up_proj.weight"][0]).endswith("b")
    assert origins["model.layers.2.mlp.up_proj.weight"][1] == "model.layers.1.mlp.up_proj.weight"
    assert str(origins["model.embed_tokens.weight"][0]).endswith("a")
    assert {str(origins[n][0])[-1] for n in ("model.norm.weight", "lm_head.weight")} == {"b"}
    assert sorted(t.name for t in plan.tensors) == sorted(shapes(3))


def test_layers_that_are_not_there_are_refused(family):
    slices = [{"sources": [source(family, "a", 1, 4)]}]
    refused(CompatibilityError, "a: has no layer 2", "has no layer 3", folder=family, method="passthrough",
            base=None, slices=slices)  # fmt: skip


def test_layers_that_hold_other_tensors_are_refused(family, tmp_path):
    changed(family, tmp_path, lambda state: state.update({"model.layers.1.mlp.gate.weight": torch.ones(2)}))
    sources = [source(tmp_path, name, 0, 2) for name in ("base", "a", "b")]
    refused(CompatibilityError, "b: has 'model.layers.1.mlp.gate.weight'", folder=tmp_path, density=0.5,
            slices=[{"sources": sources}])  # fmt: skip


def test_modules_must_cover_every_tensor(family):
    modules = {name: {"models": [{"model": str(family / "a")}]} for name in ("model", "vision")}
    refused(CompatibilityError, "no tensor's name begins with 'vision.'", "no module covers 'lm_head.weight'",
            folder=family, modules=modules)  # fmt: skip


# Masks


def test_masks_that_are_missing_or_do_not_fit_are_refused(family, tmp_path):
    masks = {n: torch.ones(s) for n, s in shapes().items()}
    masks["lm_head.weight"] = torch.ones(5)
    del masks["model.norm.weight"]
    save_file(masks, tmp_path / "masks.safetensors")
    refused(CompatibilityError, "no mask for 'model.norm.weight' (task 0)", "mask 'lm_head.weight' is F32 [5]",
            folder=family, method="masked_task_arithmetic", mask=str(tmp_path / "masks.safetensors"))  # fmt: skip


def test_a_mask_file_that_is_not_there_is_named(family):
    refused(CheckpointError, "nowhere.safetensors", folder=family, method="masked_task_arithmetic",
            mask="nowhere.safetensors")  # fmt: skip
