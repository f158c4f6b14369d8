"""Adapters in, one adapter out: against dense fp64 matrices, against PEFT itself, and in plain PEFT's own layers."""

from __future__ import annotations

import json
import math

import pytest
import torch
from adapter_files import (
    change_config,
    change_tensors,
    config_of,
    exact_deltas,
    in_plain_peft,
    largest_difference,
    peft_model,
    randomized,
    save_model,
    save_peft,
    stored,
)
from references import merge_with_terms
from small_models import linearized, stepped, tokens, transformer

import peta_fast as pf
from peta_fast.errors import CheckpointError, CompatibilityError, RecipeError, ResourceError

peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'peta_fast[peft]'")
pytestmark = pytest.mark.filterwarnings("ignore")
WEIGHTS = [0.5, -0.25, 1.0]


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Unequal ranks, different targets, one of them rslora."""
    folder = tmp_path_factory.mktemp("three")
    return [
        save_peft(folder / "a"), save_peft(folder / "b", seed=5, r=5, use_rslora=True),
        save_peft(folder / "c", seed=6, r=4, target_modules=["q_proj", "k_proj"]),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def alike(tmp_path_factory):
    """Three adapters of one rank and one set of targets."""
    folder = tmp_path_factory.mktemp("alike")
    return [save_peft(folder / str(seed), seed=seed) for seed in (1, 2, 3)]


def weighted_sum(folders, weights=WEIGHTS) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for folder, weight in zip(folders, weights, strict=True):
        for name, delta in exact_deltas(folder).items():
            total[name] = total.get(name, 0) + weight * delta
    return total


def best_of_rank(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    U, S, Vh = torch.linalg.svd(matrix)
    return U[:, :rank] * S[:rank] @ Vh[:rank]


def assert_reports_its_error(report, found, exact) -> None:
    for module in report.modules:
        error, norm = (found[module.name] - exact[module.name]).norm().item(), exact[module.name].norm().item()
        assert module.error == pytest.approx(error, rel=1e-3, abs=2e-6 * norm)
        assert module.norm == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("weights", [WEIGHTS, [1.0, 1.0, 1.0]], ids=str)
def test_cat_is_the_weighted_sum(weights, three, tmp_path):
    report = pf.merge_adapters(three, tmp_path, method="cat", weights=weights)
    found, exact = exact_deltas(tmp_path), weighted_sum(three, weights)
    assert {m.name: m.rank for m in report.modules} == {
        "layers.0.q_proj": 12, "layers.0.v_proj": 8, "layers.1.q_proj": 12, "layers.1.v_proj": 8,
        "layers.0.k_proj": 4, "layers.1.k_proj": 4,
    }  # fmt: skip
    for name, delta in exact.items():
        torch.testing.assert_close(found[name], delta, rtol=0, atol=1e-6)
    assert_reports_its_error(report, found, exact)


@pytest.mark.parametrize("rank", [1, 4, 50])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_svd_is_the_best_of_its_rank_and_says_what_is_lost(rank, dtype, three, tmp_path):
    report = pf.merge_adapters(three, tmp_path, method="svd", rank=rank, weights=WEIGHTS, dtype=dtype)
    found, exact = exact_deltas(tmp_path), weighted_sum(three)
    for name, delta in exact.items():
        best = best_of_rank(delta, rank)
        torch.testing.assert_close(found[name], best, rtol=0, atol=1e-6 if dtype == "float32" else 0.05)
    assert_reports_its_error(report, found, exact)
    assert {t.dtype for t in stored(tmp_path).values()} == {getattr(torch, dtype)}


def test_the_logits_of_a_merged_adapter_in_plain_peft_are_those_of_the_merged_dense_model(three, tmp_path):
    pf.merge_adapters(three, tmp_path, method="cat", weights=WEIGHTS)
    dense = transformer(torch.float64)
    with torch.no_grad():
        for name, delta in weighted_sum(three).items():
            dense.get_submodule(name).weight += delta
    plain = in_plain_peft(tmp_path)
    assert largest_difference(plain(tokens()), transformer(torch.float32)(tokens())) > 0.05
    assert largest_difference(plain(tokens()), dense(tokens())) < 2e-6


def in_peft(folders, kind: str, weights, **options) -> dict[str, torch.Tensor]:
    """Module -> what PEFT's add_weighted_adapter makes, as delta in fp64."""
    model = peft.PeftModel.from_pretrained(transformer(torch.float32), str(folders[0]), adapter_name="0")
    for place, folder in enumerate(folders[1:], 1):
        model.load_adapter(str(folder), adapter_name=str(place))
    model.add_weighted_adapter(
        [str(i) for i in range(len(folders))], weights, "merged", combination_type=kind, **options
    )
    layers = {n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A") and "merged" in m.lora_A}
    return {n: m.get_delta_weight("merged").detach().double() for n, m in layers.items()}


PEFT_FORMS = {
    "cat": ({"method": "cat"}, "cat", {}),
    "linear": ({"method": "linear"}, "linear", {}),
    "svd": ({"method": "svd", "rank": 4}, "svd", {"svd_rank": 4}),
    "ties": ({"method": "ties", "space": "factors", "density": 0.4}, "ties", {"density": 0.4}),
    "magnitude_prune": (
        {"method": "magnitude_prune", "space": "factors", "density": 0.4},
        "magnitude_prune",
        {"density": 0.4},
    ),
    "ties_svd": (
        {"method": "ties", "compat": "peft", "density": 0.4, "rank": 12},
        "ties_svd",
        {"density": 0.4, "svd_rank": 12},
    ),
    "magnitude_prune_svd": (
        {"method": "magnitude_prune", "compat": "peft", "density": 0.4, "rank": 12},
        "magnitude_prune_svd",
        {"density": 0.4, "svd_rank": 12},
    ),
}


@pytest.mark.parametrize("name", PEFT_FORMS)
def test_it_is_what_peft_makes(name, alike, tmp_path):
    ours, kind, options = PEFT_FORMS[name]
    pf.merge_adapters(alike, tmp_path, weights=WEIGHTS, **ours)
    expected = in_peft(alike, kind, WEIGHTS, **options)
    found = exact_deltas(tmp_path)
    assert set(found) == set(expected)
    for module, delta in expected.items():
        torch.testing.assert_close(found[module], delta, rtol=0, atol=1e-5)


def test_where_peft_0_21_2_is_wrong_we_are_not(tmp_path):
    """With rslora PEFT's cat comes out sqrt(new rank) too large."""
    from importlib.metadata import version

    folders = [save_peft(tmp_path / str(s), seed=s, use_rslora=True) for s in (1, 2)]
    pf.merge_adapters(folders, tmp_path / "out", method="cat", weights=[1.0, 1.0])
    found, exact = exact_deltas(tmp_path / "out"), weighted_sum(folders, [1.0, 1.0])
    for name, delta in exact.items():
        torch.testing.assert_close(found[name], delta, rtol=0, atol=1e-6)
    if version("peft") == "0.21.2":
        theirs = in_peft(folders, "cat", [1.0, 1.0])
        for name, delta in exact.items():
            torch.testing.assert_close(theirs[name], math.sqrt(6) * delta, rtol=1e-5, atol=1e-5)


def test_linear_names_its_cross_terms_and_measures_them(alike, tmp_path):
    report = pf.merge_adapters(alike, tmp_path, method="linear", weights=WEIGHTS)
    assert "cross terms B_i A_j" in report.notes[0] and report.relative_error > 0.3
    assert_reports_its_error(report, exact_deltas(tmp_path), weighted_sum(alike))


ELEMENT_WISE = {
    "ties": {"density": 0.4},
    "ties of peft": {"density": 0.4, "method": "ties", "compat": "peft"},
    "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "magnitude_prune": {"density": 0.3},
    "breadcrumbs": {"density": 0.5, "gamma": 0.1},
    "breadcrumbs_ties": {"density": 0.5, "gamma": 0.1},
    "della": {"density": 0.5, "normalize": True},
    "della_linear": {"density": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("name", ELEMENT_WISE)
def test_an_element_wise_method_merges_the_entries_of_the_changes(name, alike, tmp_path):
    """Over the changes formed in fp32 one rank after another; refactored at full rank, so that nothing is lost."""
    keys = {"method": name, "compat": "native", **ELEMENT_WISE[name]}
    report = pf.merge_adapters(alike, tmp_path, weights=WEIGHTS, rank=12, seed=3, **keys)
    found = exact_deltas(tmp_path)
    for module in found:
        deltas = [formed_in_order(folder, module) for folder in alike]
        base = {f"{module}": torch.zeros_like(deltas[0])}
        exact = merge_with_terms(base, [{module: d} for d in deltas], weight=WEIGHTS, seed=3, **keys)[module].value
        torch.testing.assert_close(found[module], exact, rtol=0, atol=3e-6)
    assert report.energy > 1 - 1e-9
    small = pf.merge_adapters(alike, tmp_path / "small", weights=WEIGHTS, rank=2, seed=3, **keys)
    assert 0 < small.energy < 1 and all(m.rank == 2 for m in small.modules)
    assert_reports_its_error(small, exact_deltas(tmp_path / "small"), found)


def formed_in_order(folder, module: str) -> torch.Tensor:
    """scaling B A in fp32: scaling folded into B and rounded, ranks added one by one."""
    config, tensors = config_of(folder), stored(folder)
    A, B = (tensors[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
    left = (config["lora_alpha"] / config["r"] * B.double()).float()
    total = torch.zeros(B.shape[0], A.shape[1])
    for k in range(A.shape[0]):
        total = total + left[:, k : k + 1] * A[k]
    return total


def test_large_changes_are_formed_anew_for_every_reading(alike, tmp_path, monkeypatch):
    from peta_fast.adapters import elementwise

    pf.merge_adapters(alike, tmp_path / "kept", method="ties", density=0.4, rank=4)
    monkeypatch.setattr(elementwise, "TILE", 50)
    monkeypatch.setattr(elementwise.merged_changes, "__defaults__", (0,))
    pf.merge_adapters(alike, tmp_path / "anew", method="ties", density=0.4, rank=4)
    a, b = exact_deltas(tmp_path / "kept"), exact_deltas(tmp_path / "anew")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "inner", [{}, {"inner": "dare_linear", "density": 0.5}, {"density": 0.6, "lambda": 0.6}], ids=str
)
def test_knots_is_the_inner_method_on_the_stacked_svd(inner, three, tmp_path):
    """The representations are known up to the sign of each row, which no rule here but the zero sum sees."""
    pf.merge_adapters(three, tmp_path, method="knots", weights=WEIGHTS, seed=2, **inner)
    found = exact_deltas(tmp_path)
    deltas = [{n: w * d for n, d in exact_deltas(f).items()} for w, f in zip(WEIGHTS, three, strict=True)]
    names = list(dict.fromkeys(name for one in deltas for name in one))
    bases, reps = {}, [{} for _ in deltas]
    for name in names:
        parts = [one.get(name, torch.zeros(12, 12, dtype=torch.float64)) for one in deltas]
        U, S, Vh = torch.linalg.svd(torch.cat(parts, 1), full_matrices=False)
        kept = int((S > 1e-5).sum())
        bases[name] = U[:, :kept]
        for t, part in enumerate((S[:kept, None] * Vh[:kept]).split(12, 1)):
            reps[t][name] = part.float()
    if inner.get("inner") == "dare_linear":  # its draws are by row, whose order and sign are those of the SVD
        ours = {
            m.name: m
            for m in pf.merge_adapters(
                three, tmp_path / "again", method="knots", weights=WEIGHTS, seed=2, **inner
            ).modules
        }
        assert set(ours) == set(names) and exact_deltas(tmp_path / "again")[names[0]].equal(found[names[0]])
        return
    keys = {"density": inner.get("density", 0.2), "scaling": inner.get("lambda", 1.0)}
    zeros = {n: torch.zeros_like(r) for n, r in reps[0].items()}
    exact = merge_with_terms(zeros, reps, method="ties", compat="ties-authors", **keys)
    for name in names:
        torch.testing.assert_close(found[name], bases[name] @ exact[name].value, rtol=0, atol=2e-5)


def test_the_worked_example_of_knots(tmp_path):
    """s = 2, A = [.6 -.05], [.3 -.45], B = [.4 -.2], [-.1 .5]; everything is kept."""
    import torch.nn as nn

    model = nn.ModuleDict({"w": nn.Linear(2, 2, bias=False)})
    folders = []
    for place, (A, B) in enumerate([([[0.6, -0.05]], [[0.4], [-0.2]]), ([[0.3, -0.45]], [[-0.1], [0.5]])]):
        folder = save_peft(tmp_path / str(place), model, r=1, lora_alpha=2, target_modules=["w"])
        change_tensors(folder, lambda t, A=A, B=B: {"base_model.model.w.lora_A.weight": torch.tensor(A),
                                                    "base_model.model.w.lora_B.weight": torch.tensor(B)})  # fmt: skip
        folders.append(folder)
    pf.merge_adapters(folders, tmp_path / "knots", method="knots", compat="peta", density=1.0)
    expected = torch.tensor([[0.434587, 0.160347], [-0.273595, -0.397961]], dtype=torch.float64)
    torch.testing.assert_close(exact_deltas(tmp_path / "knots")["w"], expected, rtol=0, atol=1e-5)
    pf.merge_adapters(folders, tmp_path / "ties", method="ties", rank=2)
    torch.testing.assert_close(
        exact_deltas(tmp_path / "ties")["w"], torch.tensor([[0.48, 0.09], [0.3, -0.45]]).double(), rtol=0, atol=1e-5
    )


def test_weights_may_differ_from_layer_to_layer(alike, tmp_path):
    recipe = {
        "method": "cat",
        "adapters": [
            {"adapter": str(alike[0]), "parameters": {"weight": [0.2, 0.8]}},
            {"adapter": str(alike[1]), "parameters": {"weight": [{"filter": "q_proj", "value": 2}, {"value": -1}]}},
            str(alike[2]),
        ],
    }
    pf.merge_adapters(recipe, tmp_path / "out")
    found, deltas = exact_deltas(tmp_path / "out"), [exact_deltas(f) for f in alike]
    for name in found:
        weights = [0.2 if "layers.0" in name else 0.8, 2 if "q_proj" in name else -1, 1]
        torch.testing.assert_close(
            found[name], sum(w * d[name] for w, d in zip(weights, deltas, strict=True)), rtol=0, atol=2e-6
        )


def test_a_recipe_file_says_the_same(alike, tmp_path):
    text = "merge_method: svd\nrank: 4\nmodels:\n" + "".join(
        f"  - model: {f}\n    parameters: {{weight: {w}}}\n" for f, w in zip(alike, WEIGHTS, strict=True)
    )
    (tmp_path / "recipe.yml").write_text(text)
    pf.merge_adapters(tmp_path / "recipe.yml", tmp_path / "a")
    pf.merge_adapters(alike, tmp_path / "b", method="svd", rank=4, weights=WEIGHTS)
    for key, tensor in stored(tmp_path / "a").items():
        assert torch.equal(tensor, stored(tmp_path / "b")[key])


def test_what_one_adapter_replaces_is_carried_along(tmp_path):
    a, b = save_peft(tmp_path / "a", modules_to_save=["classifier"]), save_peft(tmp_path / "b", seed=2)
    report = pf.merge_adapters([a, b], tmp_path / "out", method="cat")
    assert sorted(report.replaced) == [f"base_model.model.classifier.{p}" for p in ("bias", "weight")]
    assert config_of(tmp_path / "out")["modules_to_save"] == ["classifier"]
    plain = in_plain_peft(tmp_path / "out")
    assert torch.equal(plain.base_model.model.classifier.weight, stored(a)["base_model.model.classifier.weight"])


def test_what_several_replace_differently_is_refused_unless_said_how(tmp_path):
    a, b = (save_peft(tmp_path / str(s), seed=s, modules_to_save=["classifier"]) for s in (1, 2))
    with pytest.raises(CompatibilityError, match="replace it as a whole, by different values"):
        pf.merge_adapters([a, b], tmp_path / "out", method="cat")
    assert not (tmp_path / "out").exists()
    key = "base_model.model.classifier.weight"
    first, second = stored(a)[key], stored(b)[key]
    for how, expected in (("first", first), ("mean", (first + second) / 2)):
        pf.merge_adapters([a, b], tmp_path / how, method="cat", replaced=how)
        torch.testing.assert_close(stored(tmp_path / how)[key], expected)


def test_embeddings_are_merged_in_their_own_layout(tmp_path):
    folders = [save_peft(tmp_path / str(s), seed=s, target_modules=["embed", "q_proj"]) for s in (1, 2)]
    for folder in folders:
        change_tensors(
            folder,
            lambda t: {k: v for k, v in t.items() if "embed.base_layer" not in k and not k.endswith("embed.weight")},
        )
    pf.merge_adapters(folders, tmp_path / "out", method="cat", weights=[0.5, 2.0])
    found, exact = exact_deltas(tmp_path / "out"), weighted_sum(folders, [0.5, 2.0])
    assert found["embed"].shape == (20, 12)
    for name, delta in exact.items():
        torch.testing.assert_close(found[name], delta, rtol=0, atol=2e-6)
    dense = transformer(torch.float64)
    with torch.no_grad():
        for name, delta in exact.items():
            dense.get_submodule(name).weight += delta
    assert largest_difference(in_plain_peft(tmp_path / "out")(tokens()), dense(tokens())) < 5e-6


def test_targets_choose_the_merged_modules_and_no_others(three, tmp_path):
    pf.merge_adapters(three, tmp_path / "all", method="cat")
    assert config_of(tmp_path / "all")["target_modules"] == ["k_proj", "q_proj", "v_proj"]
    one = save_peft(tmp_path / "one", target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers")
    pf.merge_adapters([one, three[2]], tmp_path / "some", method="cat")
    names = ["layers.0.k_proj", "layers.0.q_proj", "layers.1.k_proj", "layers.1.q_proj"]
    assert config_of(tmp_path / "some")["target_modules"] == names
    layers = {n for n, m in in_plain_peft(tmp_path / "some").base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert layers == set(names)


# Linearized adapters


def linearized_pair(tmp_path, init="gaussian", **second):
    folders = [tmp_path / "x", tmp_path / "y"]
    for seed, folder in enumerate(folders):
        model = stepped(linearized(init, torch.float32, **(second if seed else {})), seed=seed + 1)
        pf.save_adapter(model, folder)
    return folders


@pytest.mark.parametrize("init", ["lora", "gaussian"])
def test_in_phi_space_the_task_vectors_add_up(init, tmp_path):
    folders = linearized_pair(tmp_path, init)
    report = pf.merge_adapters(folders, tmp_path / "out", method="task_arithmetic", space="phi", weights=[0.5, -0.8])
    steps = [pf.task_vector(pf.load_adapter(transformer(torch.float32), f)) for f in folders]
    merged = pf.load_adapter(transformer(torch.float32), tmp_path / "out")
    for name, step in pf.task_vector(merged).items():
        torch.testing.assert_close(step, 0.5 * steps[0][name] - 0.8 * steps[1][name], rtol=0, atol=1e-6)
    point = merged.layers[0].q_proj
    assert torch.equal(point.A0, pf.load_adapter(transformer(torch.float32), folders[0]).layers[0].q_proj.A0)
    assert largest_difference(in_plain_peft(tmp_path / "out")(tokens()), merged(tokens())) < 2e-6
    if init == "lora":  # with B0 = 0 the sum of steps is the sum of changes
        assert report.relative_error < 1e-6
    found, exact = exact_deltas(tmp_path / "out"), weighted_sum(folders, [0.5, -0.8])
    assert_reports_its_error(report, found, exact)


def test_any_element_wise_method_merges_steps(tmp_path):
    folders = linearized_pair(tmp_path, "lora")
    pf.merge_adapters(folders, tmp_path / "out", method="ties", space="phi", density=0.5)
    steps = [pf.task_vector(pf.load_adapter(transformer(torch.float32), f)) for f in folders]
    merged = pf.task_vector(pf.load_adapter(transformer(torch.float32), tmp_path / "out"))
    for name, step in merged.items():
        zeros = {name: torch.zeros_like(step)}
        exact = merge_with_terms(
            zeros, [{name: s[name].detach()} for s in steps], method="ties", density=0.5, weight=1.0
        )
        torch.testing.assert_close(step.double(), exact[name].value, rtol=0, atol=1e-6)


def test_different_points_are_refused(tmp_path):
    folders = linearized_pair(tmp_path, seed=99)
    with pytest.raises(CompatibilityError, match="linearized around different points"):
        pf.merge_adapters(folders, tmp_path / "out", method="task_arithmetic", space="phi")
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="found no linearization.safetensors"):
        plain = [save_peft(tmp_path / str(s), seed=s) for s in (1, 2)]
        pf.merge_adapters(plain, tmp_path / "out", method="task_arithmetic", space="phi")


@pytest.mark.parametrize("init", ["lora", "gaussian"])
def test_an_export_is_plain_and_the_same_function(init, tmp_path):
    model = linearized(init, torch.float32)
    pf.save_adapter(model, tmp_path / "a")
    for part in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "a" / part).unlink()
    report = pf.export_adapter(tmp_path / "a", tmp_path / "out", base="small-base")
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert largest_difference(in_plain_peft(tmp_path / "out")(tokens()), model(tokens())) < 2e-6
    assert report.relative_error < 1e-6 and {m.rank for m in report.modules} == {3 if init == "lora" else 6}
    assert config_of(tmp_path / "out")["base_model_name_or_path"] == "small-base"


def test_an_export_needs_a_linearization_of_layers(tmp_path):
    with pytest.raises(CheckpointError, match="found no linearization.safetensors"):
        pf.export_adapter(save_peft(tmp_path / "plain"), tmp_path / "out")
    whole = stepped(pf.linearize(transformer(torch.float32), ["q_proj"], r=2, scope="model"))
    pf.save_adapter(whole, tmp_path / "whole", plain=False)
    with pytest.raises(CompatibilityError, match="no equal among plain PEFT adapters"):
        pf.export_adapter(tmp_path / "whole", tmp_path / "out")


# What does not fit


def test_adapters_of_different_bases_are_refused_by_name_unless_said_otherwise(alike, tmp_path):
    other = save_peft(tmp_path / "other", base="another-base")
    with pytest.raises(CompatibilityError, match="different bases: 'small-base' and 'another-base'"):
        pf.merge_adapters([alike[0], other], tmp_path / "out")
    pf.merge_adapters([alike[0], other], tmp_path / "out", base="the-base")
    assert config_of(tmp_path / "out")["base_model_name_or_path"] == "the-base"


def test_adapters_of_different_bases_are_refused_by_shape(alike, tmp_path):
    from small_models import Transformer

    other = save_peft(tmp_path / "other", Transformer(16))
    with pytest.raises(CompatibilityError, match=r"as one of \[16, 16\], .* as one of \[12, 12\]"):
        pf.merge_adapters([alike[0], other], tmp_path / "out")


def test_factors_of_different_ranks_cannot_be_added(three, tmp_path):
    for keys in ({"method": "linear"}, {"method": "ties", "space": "factors", "density": 0.5}):
        with pytest.raises(CompatibilityError, match="needs adapters of one rank, got .*: 3, .*: 5"):
            pf.merge_adapters(three[:2], tmp_path / "out", **keys)


def test_nan_is_named_and_nothing_is_written(alike, tmp_path):
    bad = save_peft(tmp_path / "bad")
    change_tensors(bad, lambda t: t["base_model.model.layers.1.v_proj.lora_B.weight"].fill_(torch.nan))
    for method in ("cat", "svd", "ties", "knots"):
        with pytest.raises(CheckpointError, match="layers.1.v_proj.lora_B.weight': expected finite values"):
            pf.merge_adapters([alike[0], bad], tmp_path / "out", method=method)
        assert not (tmp_path / "out").exists()


WRONG = {
    "method": ({"method": "tise"}, "did you mean 'ties'"),
    "rank 0": ({"method": "svd", "rank": 0}, "expected an integer of at least 1, got 0"),
    "rank of cat": ({"method": "cat", "rank": 4}, "cat decides the rank itself"),
    "space": ({"method": "ties", "space": "moon"}, "expected one of delta, factors, phi"),
    "space of svd": ({"method": "svd", "space": "phi"}, "svd has no space to choose"),
    "weights": ({"weights": [1.0]}, "expected 3, one an adapter, got 1"),
    "key": ({"method": "ties", "densty": 0.5}, "densty"),
    "density": ({"method": "ties", "density": 1.5}, "density"),
    "inner": ({"method": "knots", "inner": "slerp"}, "expected an element-wise method, got 'slerp'"),
    "inner elsewhere": ({"method": "ties", "inner": "ties"}, "belongs to knots"),
    "compat": ({"method": "breadcrumbs", "compat": "peft"}, "does not implement 'peft'"),
    "authors": ({"method": "ties", "compat": "ties-authors", "density": 0.5}, "looks at the whole model"),
    "dtype": ({"dtype": "int8"}, "expected one of float32"),
    "replaced": ({"replaced": "sum"}, "expected one of refuse"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_settings_that_make_no_sense_are_refused(name, alike, tmp_path):
    keys, message = WRONG[name]
    with pytest.raises(RecipeError, match=message):
        pf.merge_adapters(alike, tmp_path / "out", **keys)
    assert not (tmp_path / "out").exists()


def test_an_output_is_never_overwritten_unasked_nor_an_input(alike, tmp_path):
    pf.merge_adapters(alike, tmp_path / "out", method="cat")
    with pytest.raises(ResourceError, match="holds adapter_config.json already"):
        pf.merge_adapters(alike, tmp_path / "out", method="cat")
    (tmp_path / "out" / "linearization.safetensors").write_bytes(b"of an earlier adapter")
    pf.merge_adapters(alike, tmp_path / "out", method="svd", rank=2, force=True)
    assert config_of(tmp_path / "out")["r"] == 2 and not (tmp_path / "out" / "linearization.safetensors").exists()
    for place in (alike[0], alike[0] / "inside", alike[0].parent):
        with pytest.raises(ResourceError, match="lies in, or holds, the input"):
            pf.merge_adapters(alike, place, method="cat", force=True)


def test_the_card_names_base_adapters_and_method(alike, tmp_path):
    pf.merge_adapters(alike, tmp_path / "out", method="ties", density=0.5)
    card = (tmp_path / "out" / "README.md").read_text()
    assert '- "small-base"' in card and str(alike[1]) in card and "- merge" in card and "ties" in card


def test_a_report_is_json(alike, tmp_path):
    report = pf.merge_adapters(alike, tmp_path / "out", method="svd", rank=2)
    found = json.loads(json.dumps(report.to_json()))
    assert found["relative_error"] == pytest.approx(math.sqrt(1 - found["energy"])) and len(found["modules"]) == 4


def test_peft_models_saved_twice_merge_back_to_themselves(tmp_path):
    model = randomized(peft_model(), 4)
    save_model(model, tmp_path / "a")
    pf.merge_adapters([tmp_path / "a"], tmp_path / "out", method="svd", rank=3)
    assert largest_difference(in_plain_peft(tmp_path / "out")(tokens()), model(tokens())) < 2e-6
    change_config(tmp_path / "a", base_model_name_or_path=None)
    pf.merge_adapters([tmp_path / "a"], tmp_path / "none", method="cat")
    assert config_of(tmp_path / "none")["base_model_name_or_path"] is None
