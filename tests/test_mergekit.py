"""Our merges against mergekit's own, of the same recipes at `dtype: float32`.

Needs mergekit (extra `oracles`). Its example recipes and its own tests of sparsification are run where the environment
variable MERGEKIT_SOURCE names a copy of its repository.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import mergekit_adapter
import pytest
import torch
import yaml
from mergekit_oracle import (
    assert_same_merge,
    merge_by_mergekit,
    merge_by_us,
    placed,
    shapes,
    split_equals,
    state_dict,
    write_family,
    write_model,
)
from mergekit_recipes import LAST_SLICE, LET_PASS, RECIPES, SLICES, three

import peta_fast
from peta_fast import methods
from peta_fast.errors import RecipeError
from peta_fast.recipe import load_recipe

pytest.importorskip("mergekit", reason="mergekit is not installed: pip install 'peta_fast[oracles]'")
pytestmark = pytest.mark.oracle

SOURCE = os.environ.get("MERGEKIT_SOURCE")
needs_source = pytest.mark.skipif(not SOURCE, reason="MERGEKIT_SOURCE names no copy of mergekit's repository")
MERGES = {"ours": merge_by_us, "mergekit": merge_by_mergekit}


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> Path:
    """fp32 models, all changes different."""
    return write_family(tmp_path_factory.mktemp("distinct") / "models", torch.float32, change=0.3)


@pytest.fixture(scope="module")
def coarse_family(tmp_path_factory) -> Path:
    """bf16 models, changes of a few magnitudes."""
    return write_family(tmp_path_factory.mktemp("coarse") / "models", torch.bfloat16, change=0.05)


def both(recipe: str, family: Path, out: Path):
    """What we make of a recipe, and what mergekit makes of it."""
    text = placed(recipe, family)
    return merge_by_us(text, out / "ours"), merge_by_mergekit(text, out / "mergekit")


# ---------------------------------------------------------------- methods whose results are determined

DENSITIES = (0.3, 0.6, 0.85)
TRIMMING = ("ties", "breadcrumbs", "breadcrumbs_ties")
SETTINGS = ["", "normalize: true", "normalize: false", "normalize: true, lambda: -1.3", "lambda: 0.6"]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("method", ["task_arithmetic", *TRIMMING])
def test_sums_of_task_vectors_match_mergekit(method, settings, family, tmp_path):
    densities = DENSITIES if method in TRIMMING else (None, None, None)
    assert_same_merge(*both(three(method, settings, densities=densities), family, tmp_path))


@pytest.mark.parametrize("settings", SETTINGS[:3])
def test_averages_match_mergekit(settings, family, tmp_path):
    assert_same_merge(*both(three("linear", settings), family, tmp_path))


@pytest.mark.parametrize("density", [0, 0.0005, 0.01, 0.5, 0.999, 1])
@pytest.mark.parametrize(
    "method, gamma",
    [("ties", ""), *itertools.product(TRIMMING[1:], [", gamma: 0", ", gamma: 0.01", ", gamma: 0.3", ", gamma: 1.0"])],
)
def test_any_density_matches_mergekit(method, gamma, density, family, tmp_path):
    assert_same_merge(*both(three(method, f"density: {density}{gamma}"), family, tmp_path))


@pytest.mark.parametrize("normalize", ["true", "false"])
@pytest.mark.parametrize("method", TRIMMING)
def test_where_magnitudes_are_equal_the_rest_matches_mergekit(method, normalize, coarse_family, tmp_path):
    parameters = f"normalize: {normalize}" + ("" if method == "ties" else ", gamma: 0.1")
    merged = both(three(method, parameters, densities=DENSITIES), coarse_family, tmp_path)
    left_out = undecided(coarse_family, gamma=None if method == "ties" else 0.1)
    assert_same_merge(*merged, left_out)
    share = torch.cat([left.flatten() for left in left_out.values()]).double().mean().item()
    assert 0.001 < share < 0.5, f"expected some equals at the thresholds, and most elements compared: {share:.4f}"


def undecided(family: Path, gamma: float | None) -> dict[str, torch.Tensor]:
    """The elements of which mergekit's unstable sort decides whether one of the models keeps them."""
    base, *models = (state_dict(family / name) for name in ("base", "a", "b", "c"))
    undecided = {}
    for name, tensor in base.items():
        splits = []
        for model, density in zip(models, DENSITIES, strict=True):
            target = int(density * tensor.numel())
            top = 0 if gamma is None else min(int(gamma * tensor.numel()), tensor.numel() - target)
            splits.append(split_equals(model[name].float() - tensor.float(), (top, top + target)))
        undecided[name] = torch.stack(splits).any(0)
    return undecided


@pytest.mark.parametrize("normalize", ["true", "false"])
def test_changes_that_cancel_count_as_plus_as_in_mergekit(normalize, coarse_family, tmp_path):
    base, model = (state_dict(coarse_family / name) for name in ("base", "a"))
    change = {name: model[name].float() - base[name].float() for name in base}
    write_model(tmp_path / "models" / "base", {name: tensor.float() for name, tensor in base.items()})
    write_model(tmp_path / "models" / "a", {name: base[name].float() + change[name] for name in base})
    write_model(tmp_path / "models" / "b", {name: base[name].float() - change[name] for name in base})
    recipe = (
        "merge_method: ties\nbase_model: base\nmodels: [{model: a}, {model: b}]\ndtype: float32\n"
        f"parameters: {{weight: 1, normalize: {normalize}}}"
    )
    ours, theirs = both(recipe, tmp_path / "models", tmp_path)
    assert_same_merge(ours, theirs)
    assert all((ours[name] >= base[name]).all() for name in base)


@pytest.mark.parametrize("method", ["magnitude", "magnitude_outliers"])
@pytest.mark.parametrize("size", [1, 2, 3, 10, 33, 99, 100, 101, 1000])
def test_the_same_entries_survive_as_in_mergekit(size, method):
    from mergekit import sparsify as theirs

    tensor = torch.randn(size, generator=torch.Generator().manual_seed(size))
    gammas = [0.0] if method == "magnitude" else [0.0, 0.001, 0.01, 0.1, 0.25, 0.5, 0.9, 1.0]
    for density, gamma in itertools.product([0, 1e-4, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999, 1], gammas):
        kept = theirs.sparsify(tensor.clone(), density, theirs.SparsificationMethod[method], gamma=gamma)
        ours = mergekit_adapter.sparsify(tensor, density, mergekit_adapter.SparsificationMethod[method], gamma=gamma)
        assert torch.equal(ours, kept), f"density {density}, gamma {gamma}"


# ---------------------------------------------------------------- recipes as people write them


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_recipe_matches_mergekit(recipe, family, tmp_path):
    assert_same_merge(*both(f"{recipe}\ndtype: float32", family, tmp_path))
    ours, theirs = (json.loads((tmp_path / who / "config.json").read_text()) for who in MERGES)
    assert ours["num_hidden_layers"] == theirs["num_hidden_layers"]
    assert ours.get("dtype", ours.get("torch_dtype")) == theirs.get("dtype", theirs.get("torch_dtype"))


@pytest.mark.parametrize("norm", [0.0, 5e-9, 2e-8, 1e-5], ids="{:g}".format)
def test_slerp_with_short_vectors_matches_mergekit(norm, family, tmp_path):
    base = state_dict(family / "base")
    write_model(tmp_path / "models" / "a", {name: w / w.norm() * norm for name, w in base.items()})
    write_model(tmp_path / "models" / "base", base)
    recipe = "merge_method: slerp\nbase_model: base\nmodels: [{model: a}]\nparameters: {t: 0.3}\ndtype: float32"
    assert_same_merge(*both(recipe, tmp_path / "models", tmp_path))


# ---------------------------------------------------------------- methods that draw

RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
DENSITY = 0.4
SIGMAS = 5


def one(method: str, keys: str) -> str:
    return (
        f"merge_method: {method}\nbase_model: base\nmodels: [{{model: a}}]\n"
        f"parameters: {{weight: 1, density: {DENSITY}, {keys}}}\ndtype: float32"
    )


@pytest.mark.parametrize("who", MERGES)
@pytest.mark.parametrize("rescale", ["true", "false"])
@pytest.mark.parametrize("method", RANDOM)
def test_random_methods_keep_the_density_and_scale_by_the_l1_norm(method, rescale, who, family, tmp_path):
    merged = MERGES[who](placed(one(method, f"rescale: {rescale}"), family), tmp_path / "out", seed=1)
    base, model = state_dict(family / "base"), state_dict(family / "a")
    for name, tensor in merged.items():
        delta, change = model[name].double() - base[name].double(), tensor.double() - base[name].double()
        kept = change != 0
        spread = SIGMAS * (DENSITY * (1 - DENSITY) * kept.numel()) ** 0.5
        assert abs(kept.sum().item() - DENSITY * kept.numel()) <= spread, name
        scale = (delta.abs().sum() / (delta * kept).abs().sum()).item() if rescale == "true" else 1.0
        torch.testing.assert_close(change, delta * kept * scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("who", MERGES)
@pytest.mark.parametrize("epsilon", [0.0, 0.15, 0.39])
def test_della_keeps_the_larger_of_a_row_more_often(epsilon, who, family, tmp_path):
    merged = MERGES[who](placed(one("della_linear", f"epsilon: {epsilon}"), family), tmp_path / "out", seed=2)
    base, model = state_dict(family / "base"), state_dict(family / "a")
    names = [name for name, tensor in base.items() if tensor.shape[-1] == 32]
    delta = torch.cat([(model[n] - base[n]).reshape(-1, 32) for n in names])
    kept = torch.cat([(merged[n] != base[n]).reshape(-1, 32) for n in names])
    by_rank = kept.gather(1, delta.abs().argsort(1)).double().mean(0)  # [32]
    expected = torch.linspace(DENSITY - epsilon, DENSITY + epsilon, 32, dtype=torch.float64)
    assert ((by_rank - expected).abs() <= SIGMAS * (expected * (1 - expected) / len(delta)).sqrt()).all()


@pytest.mark.parametrize("who", MERGES)
@pytest.mark.parametrize("normalize", ["true", "false"])
@pytest.mark.parametrize("method", ["dare_ties", "della"])
def test_an_elected_entry_is_the_merge_of_the_models_that_keep_it(method, normalize, who, family, tmp_path):
    outcomes = [state_dict(family / "base")]
    for chosen in subsets():
        recipe = yaml.safe_load(placed(three("ties", f"density: 1, normalize: {normalize}"), family))
        recipe["models"] = [recipe["models"][t] for t in chosen]
        outcomes.append(merge_by_mergekit(yaml.safe_dump(recipe), tmp_path / "-".join(map(str, chosen))))
    drawn = three(method, f"density: {DENSITY}, normalize: {normalize}, rescale: false")
    merged = MERGES[who](placed(drawn, family), tmp_path / "drawn", seed=3)
    for name, tensor in merged.items():
        distance = torch.stack([(tensor - outcome[name]).abs() for outcome in outcomes]).amin(0)
        assert (distance <= 1e-5).all(), name


def subsets() -> list[tuple[int, ...]]:
    """The ways in which at least one of three models can keep an entry."""
    return [chosen for size in (1, 2, 3) for chosen in itertools.combinations(range(3), size)]


@pytest.mark.parametrize("who", MERGES)
def test_models_drop_entries_independently_of_each_other(who, family, tmp_path):
    drawn = three("dare_linear", f"density: {DENSITY}, rescale: false")
    merged = MERGES[who](placed(drawn, family), tmp_path / "out", seed=4)
    base, *models = (flattened(state_dict(family / name)) for name in ("base", "a", "b", "c"))
    added = [w * (model - base) for w, model in zip((0.7, -0.4, 0.9), models, strict=True)]
    chosen = [(), *subsets()]
    outcomes = torch.stack([base + sum(added[t] for t in kept) for kept in chosen])  # [8, n]
    distance, drawn_subset = (outcomes - flattened(merged)).abs().min(0)
    assert (distance <= 1e-5).all()
    for index, kept in enumerate(chosen):
        probability = DENSITY ** len(kept) * (1 - DENSITY) ** (3 - len(kept))
        spread = SIGMAS * (probability * (1 - probability) / len(base)) ** 0.5
        assert abs((drawn_subset == index).double().mean().item() - probability) <= spread, kept


@pytest.mark.parametrize("method", RANDOM)
def test_random_merges_agree_with_mergekit_in_expectation(method, family, tmp_path):
    """Along the direction of the merge without drops, over 10 seeds: the means differ by no more than chance."""
    text = placed(three(method, f"density: {DENSITY}"), family)
    base = flattened(state_dict(family / "base"))
    drawn = {
        who: torch.stack([flattened(merge(text, tmp_path / f"{who}{seed}", seed)) for seed in range(10)])
        for who, merge in MERGES.items()
    }
    undropped = merge_by_us(text.replace(f"density: {DENSITY}", "density: 1"), tmp_path / "undropped")
    direction = (flattened(undropped) - base).sign()
    means = {who: (direction * (x - base)).mean().item() for who, x in drawn.items()}
    errors = [(x.var(0).mean() / x.numel()).item() for x in drawn.values()]
    assert abs(means["ours"] - means["mergekit"]) <= SIGMAS * sum(errors) ** 0.5
    assert means["mergekit"] > 20 * sum(errors) ** 0.5, "too few draws to tell anything"


def flattened(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """All tensors of a model as one vector in fp64, by name."""
    return torch.cat([tensors[name].double().flatten() for name in shapes()])


# ---------------------------------------------------------------- where we differ, and mean to


@pytest.mark.parametrize("recipe", LET_PASS.values(), ids=LET_PASS)
def test_faults_that_mergekit_lets_pass_are_refused(recipe, family, tmp_path):
    text = placed(recipe, family)
    assert merge_by_mergekit(text, tmp_path / "mergekit")
    with pytest.raises(RecipeError):
        merge_by_us(text, tmp_path / "ours")


def test_slices_need_not_list_the_base(family, tmp_path):
    listed = placed(SLICES.replace("[1, 3]", "[0, 2]", 1).replace("[1, 3]", "[2, 4]"), family)
    unlisted = "\n".join(line for line in listed.split("\n") if "/base, layer_range" not in line)
    with pytest.raises(ValueError, match="Base input is not present"):
        merge_by_mergekit(unlisted, tmp_path / "refused")
    assert_same_merge(merge_by_us(unlisted, tmp_path / "ours"), merge_by_mergekit(listed, tmp_path / "mergekit"))


def test_models_of_ties_need_no_weight(family, tmp_path):
    unweighted = placed(three("ties", "density: 0.5").replace("weight: -0.4", ""), family)
    with pytest.raises(RuntimeError, match="Missing required parameter weight"):
        merge_by_mergekit(unweighted, tmp_path / "refused")
    weighted = unweighted.replace("b, parameters: {}", "b, parameters: {weight: 1}")
    assert_same_merge(merge_by_us(unweighted, tmp_path / "ours"), merge_by_mergekit(weighted, tmp_path / "mergekit"))


def test_what_follows_the_layers_comes_from_all_sources_of_the_last_slice(family, tmp_path):
    """mergekit takes as many of them as the first slice has."""
    ours, theirs = both(LAST_SLICE, family, tmp_path)
    b, c = (state_dict(family / model) for model in "bc")
    for name in ("model.norm.weight", "lm_head.weight"):
        torch.testing.assert_close(ours.pop(name), 0.5 * b[name] + 0.1 * c[name])
        torch.testing.assert_close(theirs.pop(name), 0.5 * b[name])
    assert_same_merge(ours, theirs)


def test_tensors_that_mergekit_does_not_know_are_merged(family, tmp_path):
    for model in ("base", "a", "b", "c"):
        own = {"model.layers.1.self_attn.q_proj.lookup": torch.full((3,), float(ord(model[0])))}
        write_model(tmp_path / "models" / model, state_dict(family / model) | own)
    ours, theirs = both(three("task_arithmetic"), tmp_path / "models", tmp_path)
    extra = ours.pop("model.layers.1.self_attn.q_proj.lookup")
    torch.testing.assert_close(extra, torch.full((3,), 98 + 0.7 * -1 + 0.9 * 1))
    assert_same_merge(ours, theirs)


def test_dtype_rounds_the_result_alone(family, tmp_path):
    """mergekit casts the inputs to `dtype` too, unless that is float32 and `out_dtype` says what to round to."""
    recipe = placed(three("ties", densities=DENSITIES), family)
    ours = merge_by_us(recipe.replace("dtype: float32", "dtype: bfloat16"), tmp_path / "ours")
    assert_same_merge(ours, merge_by_mergekit(f"{recipe}out_dtype: bfloat16", tmp_path / "mergekit"))


# ---------------------------------------------------------------- mergekit's repository


@needs_source
def test_example_recipes_of_mergekit_are_read():
    """Each names the models that mergekit finds in it; those of a method that we lack are refused for that alone."""
    from mergekit.config import MergeConfiguration

    examples = sorted(Path(SOURCE, "examples").glob("*.yml"))
    assert examples
    for path in examples:
        recipe = yaml.safe_load(path.read_text())
        if recipe["merge_method"] not in methods.names():
            with pytest.raises(RecipeError, match=f"'{recipe['merge_method']}' is not a merge method") as caught:
                load_recipe(path)
            assert len(str(caught.value).splitlines()) == 1
            continue
        theirs = MergeConfiguration.model_validate(recipe).referenced_models()
        assert {str(model) for model in load_recipe(path).references()} == {str(model) for model in theirs}


@needs_source
def test_mergekits_own_tests_of_sparsification_pass(tmp_path):
    test = Path(SOURCE, "tests", "test_sparsify.py").resolve()
    paths = [str(Path(mergekit_adapter.__file__).parent), str(Path(peta_fast.__file__).parents[1])]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "mergekit_adapter", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, "-k", "not test_zero_density", str(test)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "8 passed, 1 deselected" in result.stdout
