"""What a recipe means: values, precedence, models, semantics, mergekit's keys. Expected values are worked by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from interpreter import run_code
from recipe_stand_ins import FILTERED, LEVELS, SLICES, TIES, faults, resolve, stand_in_methods, with_weight

from peta_fast import methods
from peta_fast.errors import RecipeError
from peta_fast.recipe import COMPAT_NAMES, ModelRef, load_recipe


@pytest.fixture(scope="module", autouse=True)
def methods_folder(tmp_path_factory):
    with stand_in_methods(tmp_path_factory.mktemp("methods")):
        yield


# Values, gradients, filters


@pytest.mark.parametrize(
    ("t", "expected"),
    [(None, 0.0), (0.0, 0.0), (0.25, 0.25), (0.5, 0.5), (0.75, 0.75), (1.0, 1.0)],
)
def test_three_numbers_are_two_equal_segments(t, expected):
    assert resolve(with_weight("[0, 0.5, 1]"), t=t)["weight"] == (expected, 2.0)


@pytest.mark.parametrize(("t", "expected"), [(0.25, 0.5), (0.375, 0.4), (0.5, 0.3), (0.625, 0.5), (0.875, 0.85)])
def test_five_numbers_are_four_equal_segments(t, expected):
    assert resolve(with_weight("[0, 0.5, 0.3, 0.7, 1]"), t=t)["weight"][0] == pytest.approx(expected, abs=1e-15)


def test_one_number_in_a_list_holds_everywhere():
    recipe = load_recipe(with_weight("[0.4]"))
    assert [resolve(recipe, t=t)["weight"][0] for t in (None, 0.0, 0.3, 1.0)] == [0.4] * 4


@pytest.mark.parametrize(
    ("t", "expected"), [(None, True), (0.0, True), (0.49, True), (0.5, False), (0.99, False), (1.0, True)]
)
def test_a_list_that_is_not_of_numbers_is_indexed(t, expected):
    assert resolve(TIES + "parameters: {normalize: [true, false, true]}", t=t)["normalize"] is expected


def test_a_list_of_choices_is_indexed():
    recipe = load_recipe(TIES + "parameters: {order: [first, all]}")
    assert [resolve(recipe, t=t)["order"] for t in (0.0, 0.5, 1.0)] == ["first", "first", "all"]


def test_integers_are_interpolated_and_truncated():
    assert resolve(TIES + "parameters: {rounds: [1, 8]}", t=0.5)["rounds"] == 4


@pytest.mark.parametrize(
    ("tensor", "t", "expected"),
    [
        ("model.layers.3.self_attn.q_proj.weight", 0.75, 0.75),
        ("model.layers.3.mlp.up_proj.weight", 0.75, 7.0),
        ("model.layers.3.input_layernorm.weight", 0.75, 0.25),
        ("lm_head.weight", None, 0.25),
        ("transformer.attn.q", None, 5.0),
    ],
)
def test_the_first_filter_that_is_part_of_the_name_wins(tensor, t, expected):
    assert resolve(FILTERED, tensor, t)["weight"] == (expected,)


@pytest.mark.parametrize(
    "everything", ['{filter: "*", value: 3}', "{value: 3}", '{filter: "", value: 3}', "{filter: , value: 3}"]
)
def test_a_filter_that_is_a_star_or_absent_matches_all(everything):
    assert resolve(with_weight(f"[{{filter: nothing, value: 9}}, {everything}, {{value: 4}}]"))["weight"] == (3.0, 2.0)


def test_a_filter_need_not_stand_in_a_list():
    assert resolve(with_weight("{filter: mlp, value: [3, 5]}"), t=0.5)["weight"] == (4.0, 2.0)


def test_a_star_is_no_wildcard_inside_a_filter():
    source = with_weight("[{filter: 'm*p', value: 9}, {value: 1}]")
    assert resolve(source)["weight"] == (1.0, 2.0)


def test_results_of_one_tensor_do_not_leak_into_another():
    recipe = load_recipe(FILTERED)
    first = resolve(recipe, "a.mlp.b")
    first["weight"] = "changed by the caller"
    assert resolve(recipe, "c.mlp.d")["weight"] == (7.0,)


def test_absent_keys_take_the_defaults_and_aliases_the_canonical_name():
    values = resolve(TIES + "parameters: {lambda: 0.3, density: 0.5}")
    assert values == {
        "weight": (1.0, 2.0), "density": (0.5, 0.5), "normalize": True, "scaling": 0.3, "rounds": 3, "order": "first",
        "mask": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("written", "value"), [("1e-3", 0.001), ("1.5e2", 150.0), ("-2E1", -20.0), (".5", 0.5), ("3", 3.0)]
)
def test_numbers_may_have_any_usual_form(written, value):
    assert resolve(with_weight(written))["weight"][0] == value


@pytest.mark.parametrize(("written", "value"), [("1", True), ("0.0", False), ("yes", True), ("off", False)])
def test_a_switch_takes_one_and_zero_for_true_and_false(written, value):
    assert resolve(TIES + f"parameters: {{normalize: {written}}}")["normalize"] is value


# Precedence


@pytest.mark.parametrize(
    ("tensor", "weight"),
    [("0.mlp", (4.0, 2.0)), ("0.attn", (3.0, 3.0)), ("norm", (2.0, 2.0))],
    ids=["source-level", "slice-level", "module-level"],
)
def test_source_goes_before_slice_before_module(tensor, weight):
    assert resolve(LEVELS, tensor)["weight"] == weight


def test_levels_without_a_matching_filter_give_way_to_the_global_level():
    values = resolve(LEVELS, module=1, t=0.5)
    assert (values["weight"], values["density"], values["scaling"], values["normalize"]) == ((1.0,), (0.1,), 1.5, False)


def test_module_level_goes_before_global_level_for_shared_keys():
    values = resolve(LEVELS, module=0, t=0.5)
    assert (values["scaling"], values["normalize"], values["density"]) == (5.0, False, (0.2, 0.2))


def test_no_matching_filter_and_no_default_names_tensor_and_model():
    recipe = load_recipe(with_weight("[{filter: mlp, value: 1}]"))
    with pytest.raises(RecipeError, match="'weight' of model 'a' has no value for tensor 'lm_head.weight'"):
        resolve(recipe, "lm_head.weight")


# Models, bases, slices


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("org/model", ("org/model", None, [])),
        ("org/model@main", ("org/model", "main", [])),
        ("./local+org/lora", ("./local", None, [("org/lora", None, 1)])),
        ("org/model@v1+org/lora@refs/pr/2", ("org/model", "v1", [("org/lora", "refs/pr/2", 1)])),
        ("m+a*0.25+b@v2*-2.0", ("m", None, [("a", None, 0.25), ("b", "v2", -2)])),
    ],
)
def test_references_are_taken_apart_and_put_together(text, parts):
    model = ModelRef.parse(text)
    adapters = [(a.path, a.revision, a.weight) for a in model.adapters]
    assert (model.path, model.revision, adapters) == parts
    assert str(model) == text


@pytest.mark.parametrize("text", ["a+b@c@d", "a@b@c", "a@", "+b", "@b", "a+", "a +b", "a+b*x", "a+b*inf"])
def test_references_that_make_no_sense_are_refused(text):
    (fault,) = faults(TIES.replace("model: a\n", f"model: '{text}'\n"))
    assert fault.startswith(
        f"recipe:4: 'model' is '{text}', expected model[@revision][+adapter[@revision][*weight]]..., got "
    )


def models_of(recipe, piece=0):
    return [str(source.model) for source in recipe.terms(recipe.modules[0].slices[piece])]


def test_a_listed_base_is_no_term_of_a_method_that_merges_differences():
    recipe = load_recipe(TIES.replace("models:\n", "models:\n  - model: base\n"))
    assert models_of(recipe) == ["a", "b"]
    assert resolve(recipe)["weight"] == (1.0, 2.0)


@pytest.mark.parametrize(
    "models", ["[{model: base}, {model: other}]", "[{model: other}, {model: base}]", "[{model: other}]"]
)
def test_slerp_goes_from_the_base_to_the_other_model(models):
    recipe = load_recipe(f"merge_method: stand_in_slerp\nbase_model: base\nmodels: {models}\nparameters: {{t: 0.25}}")
    assert models_of(recipe) == ["base", "other"]
    assert resolve(recipe) == {"t": 0.25}


def test_without_a_base_all_models_are_terms_in_their_order():
    recipe = load_recipe("merge_method: stand_in_linear\nmodels: [{model: b}, {model: a}]\nparameters: {weight: 1}")
    assert models_of(recipe) == ["b", "a"]


def test_slices_leave_out_an_unlisted_base_of_a_method_that_merges_no_differences():
    recipe = load_recipe(
        "merge_method: stand_in_linear\nbase_model: base\nparameters: {weight: 1}\n"
        "slices: [{sources: [{model: a, layer_range: [0, 2]}]}]"
    )
    assert models_of(recipe) == ["a"]


def test_an_unlisted_base_that_is_a_term_needs_a_weight_too():
    recipe = "merge_method: stand_in_linear\nbase_model: base\nmodels: [{model: a, parameters: {weight: 1}}]"
    assert faults(recipe) == ["recipe:2: model 'base' has no 'weight', which stand_in_linear needs"]


def test_slices_keep_their_layers_and_bases():
    recipe = load_recipe(SLICES)
    first, second = recipe.modules[0].slices
    assert [source.layer_range for source in first.sources] == [(0, 24), (8, 32)]
    assert (str(first.base), str(second.base)) == ("base", "other")
    assert recipe.base_source(first).layer_range == (8, 32)
    assert recipe.base_source(second).layer_range == (20, 40)
    assert (models_of(recipe, 0), models_of(recipe, 1)) == (["a"], ["b"])
    assert [str(model) for model in recipe.references()] == ["base", "other", "a", "b"]


def test_models_are_one_slice_without_layers():
    recipe = load_recipe(TIES)
    (module,) = recipe.modules
    (piece,) = module.slices
    assert module.name == ""
    assert [source.layer_range for source in piece.sources] == [None, None]
    assert recipe.base_source(piece).layer_range is None


@pytest.mark.parametrize(
    "layers", ["[4, 4]", "[5, 2]", "[-1, 3]", "[0]", "[0, 1, 2]", "[0.5, 2]", "[true, 2]", "12", "[a, b]"]
)
def test_layer_ranges_are_two_ascending_integers(layers):
    (fault,) = faults(SLICES.replace("[20, 40]", layers))
    assert fault.startswith("recipe:10: 'layer_range' is ")
    assert fault.endswith(", expected [first, end] with 0 <= first < end")


def test_sources_of_a_slice_need_a_layer_range():
    (fault,) = faults(SLICES.replace(", layer_range: [0, 24]", ""))
    assert fault == "recipe:6: this source has no 'layer_range', which every source of a slice needs"


def test_sources_of_a_slice_need_equally_many_layers():
    (fault,) = faults(SLICES.replace("[0, 24]", "[0, 20]"))
    assert fault == "recipe:5: its sources have 20 and 24 layers, expected the same number"


def test_a_base_outside_a_slice_with_different_layers_is_refused():
    (fault,) = faults(SLICES.replace("model: base, ", "model: c, "))
    assert fault.startswith("recipe:5: its sources have different layers, and base_model 'base' is not among them")


# Files, text, mappings


def test_a_path_a_text_and_a_mapping_say_the_same(tmp_path):
    path = tmp_path / "recipe.yml"
    path.write_text("﻿" + TIES, encoding="utf-8")
    mapping = yaml.safe_load(TIES)
    recipes = [load_recipe(source, compat="native") for source in (path, str(path), TIES, mapping)]
    assert len({(recipe.method, recipe.base, recipe.compat) for recipe in recipes}) == 1
    assert all(recipe.modules == recipes[0].modules for recipe in recipes)
    assert load_recipe(recipes[3].text, compat="native").modules == recipes[0].modules
    assert load_recipe(recipes[0]) is recipes[0]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "No such file or directory"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"#" * (8 * 2**20 + 1), "is larger than 8 MB"),
    ],
    ids=["missing", "binary", "huge"],
)
def test_files_that_are_no_recipes(tmp_path, content, problem):
    path = tmp_path / "model.safetensors"
    if content is not None:
        path.write_bytes(content)
    (fault,) = faults(path)
    assert fault.startswith(f"{path}: ")
    assert problem in fault


def test_a_folder_is_no_recipe(tmp_path):
    assert faults(tmp_path) == [f"{tmp_path}: cannot be read as a recipe: Is a directory"]


@pytest.mark.parametrize("source", [3, None, ["merge_method"], b"merge_method: x"])
def test_other_objects_are_refused(source):
    (fault,) = faults(source)
    assert fault.endswith("expected a path, YAML text or a mapping")


def test_faults_of_a_mapping_name_the_path_to_the_value():
    mapping = {
        "method": "stand_in_ties",
        "base_model": Path("base"),
        "models": [{"model": "a", "parameters": {"weight": 1, "densty": 2}}, {"model": "b"}],
        "seed": "7",
        8: 1,
    }
    assert faults(mapping) == [
        "recipe: a key must be text, got a key of type int",
        "models[0].parameters.densty: 'densty' is not a key of stand_in_ties; did you mean 'density'?",
        "models[1]: model 'b' has no 'weight', which stand_in_ties needs",
        "seed: 'seed' is '7', expected an integer from 0 to 2^64 - 1",
    ]


def test_a_mapping_may_hold_numpy_scalars_paths_and_tuples():
    numpy = pytest.importorskip("numpy")
    mapping = {
        "method": "stand_in_ties",
        "base_model": Path("base"),
        "models": ({"model": Path("a"), "parameters": {"weight": numpy.float32(0.5)}},),
        "parameters": {"density": (0, numpy.float64(1)), "normalize": numpy.bool_(False), "mask": None},
        "seed": numpy.int64(4),
    }
    recipe = load_recipe(mapping)
    assert (recipe.seed, str(recipe.base)) == (4, "base")
    values = resolve(recipe, t=0.5)
    assert (values["weight"], values["density"], values["normalize"]) == ((0.5,), (0.5,), False)


# Whose semantics


@pytest.mark.parametrize(
    ("source", "compat"),
    [
        (TIES, "mergekit"),
        (TIES.replace("merge_method", "method"), "native"),
        (yaml.safe_load(TIES), "native"),
        (TIES + "compat: native\n", "native"),
        (TIES.replace("merge_method", "method") + "compat: mergekit\n", "mergekit"),
        ("merge_method: stand_in_masked\nbase_model: a\nmodels: [{model: b}]\n", "peta"),
        ("method: stand_in_masked\nbase_model: a\nmodels: [{model: b}]\n", "native"),
    ],
    ids=["mergekit", "own", "mapping", "own-by-key", "mergekit-by-key", "first-of-method", "own-masked"],
)
def test_semantics_are_those_given_or_implied(source, compat):
    assert load_recipe(source).compat == compat


def test_a_keyword_goes_before_the_recipe():
    assert load_recipe(TIES + "compat: native\n", compat="mergekit").compat == "mergekit"
    assert faults(TIES, compat="peta") == ["compat: stand_in_ties does not implement 'peta', only native and mergekit"]
    assert faults(TIES, compat="x")[0].startswith(f"compat: 'x' names no semantics; expected {COMPAT_NAMES[0]}")


def test_semantics_may_imply_the_scope_of_trimming():
    masked = "merge_method: stand_in_masked\nbase_model: a\nmodels: [{model: b}]\n"
    added = ["compat: peta", "compat: native", "compat: peta\ntrim_scope: row-block"]
    assert [load_recipe(masked + line).trim_scope for line in added] == ["model", "tensor", "row-block"]


# mergekit's keys


def test_keys_that_change_no_result_are_accepted():
    plain = load_recipe(TIES)
    masked = load_recipe(TIES.replace("weight: 1", "weight: 1, int8_mask: true") + "parameters: {int8_mask: true}\n")
    assert masked.modules == plain.modules and masked.parameters == plain.parameters


@pytest.mark.parametrize(
    ("written", "kept"), [("float16", "float16"), ("bfloat16", "bfloat16"), ("auto", None), ("null", None)]
)
def test_dtypes_have_long_names(written, kept):
    recipe = load_recipe(TIES + f"dtype: {written}\nout_dtype: float32\n")
    assert (recipe.dtype, recipe.out_dtype) == (kept, "float32")


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("tokenizer_source: base", "base"),
        ("tokenizer: {source: org/x@v1}", "org/x@v1"),
        ("tokenizer: {tokens: }", None),
    ],
)
def test_tokenizers_without_embedding_surgery_are_kept(written, kept):
    assert load_recipe(TIES + written).tokenizer_source == kept


def test_the_other_keys_are_kept():
    recipe = load_recipe(TIES + "chat_template: auto\nname: n\nseed: 3\ntrim_scope: row-block\nx-note: [anything, 1]\n")
    kept = recipe.chat_template, recipe.name, recipe.seed, recipe.trim_scope
    assert kept == ("auto", "n", 3, "row-block")


def test_empty_optional_keys_are_as_if_absent():
    recipe = load_recipe(TIES + "parameters:\ndtype:\ntokenizer:\nseed:\nchat_template: ~\n")
    assert (recipe.dtype, recipe.seed, recipe.parameters) == (None, 0, {})


MERGEKIT_SHAPES = {
    "ties": """
models:
  - model: org/base-7b
    # no parameters necessary for the base
  - model: org/math-7b@v2
    parameters:
      density: [1, 0.7, 0.1]
      weight: 1.0
  - model: org/code-7b+org/code-lora
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: org/base-7b
parameters:
  normalize: true
  int8_mask: true
dtype: float16
""",
    "linear": """
models:
  - model: org/a
    parameters: {weight: 1.0}
  - model: org/b
    parameters: {weight: 0.3}
merge_method: linear
dtype: float16
""",
    "slerp": """
slices:
  - sources:
      - model: org/a
        layer_range: [0, 32]
      - model: org/b
        layer_range: [0, 32]
merge_method: slerp
base_model: org/a
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: bfloat16
tokenizer_source: base
""",
    "passthrough": """
slices:
  - sources:
    - model: org/a
      layer_range: [0, 24]
  - sources:
    - model: org/b
      layer_range: [20, 40]
merge_method: passthrough
dtype: float16
""",
    "dare_ties": """
models:
  - model: org/base
  - model: org/a
    parameters: {density: 0.53, weight: 0.4}
  - model: org/b
    parameters: {density: 0.53, weight: 0.3}
merge_method: dare_ties
base_model: org/base
parameters: {int8_mask: true}
dtype: bfloat16
""",
}


@pytest.mark.parametrize("method", MERGEKIT_SHAPES)
def test_recipes_of_mergekit_are_read_unchanged(method):
    recipe = load_recipe(MERGEKIT_SHAPES[method])
    assert (recipe.method, recipe.compat) == (method, "mergekit")
    for module in recipe.modules:
        for piece in module.slices:
            values = recipe.resolve("model.layers.0.mlp.up_proj.weight", module, piece, 0.0)
            assert values.keys() == {key.name for key in methods.keys(methods.get(method)).values()}


def test_reading_recipes_loads_neither_torch_nor_numpy():
    code = "import sys, peta_fast.recipe; print(*({'torch', 'numpy', 'yaml', 'pydantic'} & set(sys.modules)))"
    done = run_code(code)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr
