"""Faults of recipes: reported all at once, with line and nearest valid name, and never as anything but RecipeError."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recipe_stand_ins import ANCHORS, FILTERED, LEVELS, SLICES, TIES, faults, resolve, stand_in_methods, with_weight

from peta_fast.errors import RecipeError
from peta_fast.recipe import load_recipe, load_recipes


@pytest.fixture(scope="module", autouse=True)
def methods_folder(tmp_path_factory):
    with stand_in_methods(tmp_path_factory.mktemp("methods")):
        yield


# Faults, each with its line


def test_every_fault_is_reported_at_once_in_the_order_of_lines(tmp_path):
    path = tmp_path / "recipe.yml"
    path.write_text(
        "merge_method: stand_in_ties\n"
        "base_model: base\n"
        "models:\n"
        "  - model: a\n"
        "    parameters:\n"
        "      weight: true\n"
        "      densty: 0.5\n"
        "  - model: b\n"
        "  - model: c\n"
        "    parameters: {weight: '0.5', density: [0.5, 1.5]}\n"
        "dtype: bf16\n"
        "seeed: 3\n"
    )
    assert faults(path) == [
        f"{path}:6: 'weight' is true, expected a finite number",
        f"{path}:7: 'densty' is not a key of stand_in_ties; did you mean 'density'?",
        f"{path}:8: model 'b' has no 'weight', which stand_in_ties needs",
        f"{path}:10: 'weight' is '0.5', expected a finite number; remove the quotes",
        f"{path}:10: 'density' is 1.5, expected a finite number from 0 to 1",
        f"{path}:11: 'dtype' is 'bf16', expected float32, float16 or bfloat16; did you mean 'bfloat16'?",
        f"{path}:12: 'seeed' is not a key of a recipe; did you mean 'seed'?",
    ]


def test_one_mistyped_key_is_one_fault():
    (fault,) = faults(TIES.replace("weight: 1", "weigth: 1"))
    assert fault == "recipe:5: 'weigth' is not a key of stand_in_ties; did you mean 'weight'?"


@pytest.mark.parametrize(
    ("setting", "got"),
    [
        (".inf", "inf"), ("-.INF", "-inf"), (".nan", "nan"), ("[0, .inf]", "inf"), ("{value: .nan}", "nan"),
        ("false", "false"), ("[1, true]", "true"), ("text", "'text'"), ("", "nothing"), ("~", "nothing"),
        ("[[1]]", "a list"), ("[1, null]", "nothing"), ("2024-01-01", "'2024-01-01'"),
    ],
)  # fmt: skip
def test_a_number_is_a_finite_number(setting, got):
    assert faults(with_weight(setting)) == [f"recipe:5: 'weight' is {got}, expected a finite number"]


@pytest.mark.parametrize(
    ("parameters", "problem"),
    [
        ("density: -0.1", "'density' is -0.1, expected a finite number from 0 to 1"),
        ("rounds: 0", "'rounds' is 0, expected an integer of at least 1"),
        ("rounds: 1.5", "'rounds' is 1.5, expected an integer of at least 1"),
        ("normalize: 2", "'normalize' is 2, expected true or false"),
        ("normalize: 'true'", "'normalize' is 'true', expected true or false; remove the quotes"),
        ("order: frist", "'order' is 'frist', expected first or all; did you mean 'first'?"),
        ("lambda: x", "'lambda' is 'x', expected a finite number"),
        ("mask: 3", "'mask' is 3, expected text"),
        ("density: []", "'density' is an empty list, expected a finite number from 0 to 1 or a list of them"),
        ("density: [{value: 1, filtre: x}]", "'filtre' is not a key of a filtered value; did you mean 'filter'?"),
        ("density: [{filter: x}]", "this entry of 'density' has no 'value'"),
        ("density: [{filter: 3, value: 1}]", "'filter' is 3, expected text that is part of tensor names"),
        ("density: [0.5, {value: 1}]", "'density' mixes plain values and filters; give 0.5 as '- value: ...'"),
        ("density: [{value: [{value: 1}]}]", "'density' is a mapping, expected a finite number from 0 to 1"),
        ("scaling: 1, lambda: 2", "'lambda' and 'scaling' are two names of one key; remove one"),
        ("t: 0.5", "'t' is not a key of stand_in_ties; expected weight, density, normalize, scaling, lambda, rounds, "
                   "order or mask"),
    ],
)  # fmt: skip
def test_values_are_checked_against_the_keys_of_the_method(parameters, problem):
    assert faults(TIES + f"parameters: {{{parameters}}}") == [f"recipe:8: {problem}"]


@pytest.mark.parametrize("key", ["normalize", "lambda", "scaling", "rounds"])
def test_a_key_for_all_models_under_one_model_says_where_it_belongs(key):
    (fault,) = faults(TIES.replace("weight: 1", f"weight: 1, {key}: 1"))
    assert fault == f"recipe:5: '{key}' holds for all models: it belongs under the top-level 'parameters'"


def test_a_parameter_outside_parameters_says_where_it_belongs():
    (fault,) = faults(TIES + "    weight: 1\n")
    assert fault == "recipe:8: 'weight' is not a key of an entry of 'models'; it belongs under 'parameters'"


@pytest.mark.parametrize(
    ("addition", "problem"),
    [
        ("slices: []", "expected exactly one of models, slices and modules, got models and slices"),
        ("method: stand_in_ties", "'method' and 'merge_method' are two names of one key; remove one"),
        ("seed: -1", "'seed' is -1, expected an integer from 0 to 2^64 - 1"),
        ("seed: 1.5", "'seed' is 1.5, expected an integer from 0 to 2^64 - 1"),
        ("seed: true", "'seed' is true, expected an integer from 0 to 2^64 - 1"),
        ("seed: 0x1ffffffffffffffff", "an integer must be smaller than 2^64"),
        ("trim_scope: row", "'trim_scope' is 'row', expected tensor, row-block or model"),
        ("out_dtype: int8", "'out_dtype' is 'int8', expected float32, float16 or bfloat16"),
        ("name: 2024", "'name' is 2024, expected text; put it in quotes"),
        ("chat_template: [x]", "'chat_template' is a list, expected text"),
        ("parameters: [x]", "'parameters' is a list, expected a mapping"),
        ("compat: mergkit", "'mergkit' names no semantics; did you mean 'mergekit'?"),
        ("compat: peft", "stand_in_ties does not implement 'peft', only native and mergekit"),
        ("tokenizer_source: union", "'tokenizer_source: union' needs embedding surgery, which is not available yet; "
                                    "remove it to keep the base model's tokenizer and embeddings"),
        ("tokenizer: {source: union}", "'tokenizer.source: union' needs embedding surgery, which is not available yet; "
                                       "remove it to keep the base model's tokenizer and embeddings"),
        ("tokenizer: {source: base, tokens: {x: {}}}", "'tokenizer.tokens' needs embedding surgery, which is not "
         "available yet; remove it to keep the base model's tokenizer and embeddings"),
        ("tokenizer: {pad_to_multiple_of: 64}", "'tokenizer.pad_to_multiple_of' needs embedding surgery, which is not "
         "available yet; remove it to keep the base model's tokenizer and embeddings"),
        ("tokenizer: base", "'tokenizer' is 'base', expected a mapping with source, tokens or pad_to_multiple_of"),
        ("on: 1", "'on' cannot be a key: YAML does not read it as text; put it in quotes"),
        ("1: 1", "'1' cannot be a key: YAML does not read it as text; put it in quotes"),
        ("[x]: 1", "a list or mapping cannot be a key: YAML does not read it as text; put it in quotes"),
    ],
)  # fmt: skip
def test_top_level_faults(addition, problem):
    assert faults(TIES + addition) == [f"recipe:8: {problem}"]


def test_tokenizer_and_tokenizer_source_exclude_each_other():
    (fault,) = faults(TIES + "tokenizer_source: base\ntokenizer: {source: base}\n")
    assert fault == "recipe:9: 'tokenizer' and 'tokenizer_source' exclude each other; remove one"


SLERP = "merge_method: stand_in_slerp\nmodels: "
MASKED = "merge_method: stand_in_masked\nbase_model: a\n"


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("models: [{model: a}]\n", "recipe:1: has no 'merge_method'"),
        ("merge_method: stand_in_ti\n", "recipe:1: 'stand_in_ti' is not a merge method; did you mean 'stand_in_ties'?"),
        ("merge_method: stand_in_masked\nmodels: [{model: a}]", "recipe:1: stand_in_masked needs a 'base_model'"),
        (SLERP + "[{model: a}, {model: b}]", "recipe:1: stand_in_slerp needs 't' under 'parameters'"),
        (SLERP + "[{model: a}]\nparameters: {t: 1}", "recipe:2: stand_in_slerp merges exactly 2 models, got 1"),
        (MASKED, "recipe:1: expected exactly one of models, slices and modules, got none"),
        (MASKED + "models: []", "recipe:3: 'models' is an empty list, expected a list of at least one entry"),
        (MASKED + "models: {b: c}", "recipe:3: 'models' is a mapping, expected a list of at least one entry"),
        (MASKED + "models: [b]", "recipe:3: an entry of 'models' is 'b', expected a mapping with model or parameters"),
        (MASKED + "models: [{parameters: {}}]", "recipe:3: this entry of 'models' has no 'model'"),
        (MASKED + "models:\n- model: a", "recipe:3: lists the base model 'a' alone; there is nothing to merge into it"),
        (
            MASKED + "models:\n- model: b\n- model: b",
            "recipe:5: model 'b' is listed twice; list it once, with the sum of its weights",
        ),
        (MASKED + "modules: {}", "recipe:3: 'modules' is a mapping, expected a mapping of names to modules"),
        (MASKED + "modules: {x: {}}", "recipe:3: expected exactly one of models and slices, got none"),
        (MASKED + "slices: [{base_model: b}]", "recipe:3: this slice has no 'sources'"),
        ("# nothing\n", "recipe: is empty, expected a recipe in YAML"),
    ],
)
def test_structural_faults(source, fault):
    assert faults(source)[0] == fault


def test_an_unknown_method_is_the_only_fault_of_a_sound_recipe():
    (fault,) = faults(TIES.replace("stand_in_ties", "karcher_of_tomorrow"))
    assert fault.startswith("recipe:1: 'karcher_of_tomorrow' is not a merge method; expected ")


# YAML


def test_a_duplicate_key_is_a_fault():
    assert faults(TIES + "dtype: float16\ndtype: float32\n") == [
        "recipe:9: 'dtype' is given twice; it stands in line 8 too"
    ]


def test_a_syntax_error_has_its_line():
    (fault,) = faults(TIES + "parameters: {weight: 1\ndtype: x\n")
    assert fault.startswith("recipe:9: is not valid YAML: ")


@pytest.mark.parametrize("character", ["\x00", "\x07"])
def test_control_characters_have_their_line(character):
    (fault,) = faults(f"# é€\nmerge_method: {character}\n")
    assert fault == "recipe:2: is not valid YAML: control characters are not allowed"


def test_anchors_aliases_and_merge_keys():
    values = resolve(ANCHORS)
    assert values["weight"] == (0.5, 0.5, 0.5, 0.5)
    assert values["density"] == (0.25, 0.75, 0.75, 0.125)


def test_a_merge_key_takes_mappings_only():
    assert faults(TIES + "<<: 3\n") == ["recipe:8: '<<' takes a mapping or a list of mappings, got 3"]


def test_aliases_that_multiply_are_refused():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    assert faults("\n".join(lines))[-1].endswith("holds more than 200,000 values once its aliases are expanded")


@pytest.mark.parametrize("text", ["x-a: " + "[" * 100_000, "x-a: &a [*a]\n", "x-a: &a {b: *a}\n"])
def test_bottomless_nesting_is_refused(text):
    assert faults(text) == ["recipe:1: is nested more than 50 deep, or an alias holds itself"]


@pytest.mark.parametrize(
    "value", ["!!python/object/apply:os.getcwd []", "!!python/name:os.getcwd x", "!custom {a: 1}", "!!set {a}"]
)
def test_tags_build_no_objects(value):
    assert "has no meaning in a recipe" in faults(TIES + f"name: {value}\n")[0]


def test_scalars_that_contradict_their_tag_are_faults():
    assert faults(TIES + "seed: !!int seven\n") == ["recipe:8: 'seven' is no int"]


def test_endless_base_60_numbers_are_no_numbers():
    (fault,) = faults(TIES + "seed: 1" + ":00" * 1_000_000)
    assert fault.startswith("recipe:8: '1:00:00:")
    assert fault.endswith("is no int")


def test_thousands_of_faults_end_after_some():
    found = faults(TIES + "".join(f"unknown{i}: 1\n" for i in range(5000)))
    assert 200 <= len(found) <= 202
    assert "is where reading stopped, after 200 faults" in found[-1]


def test_a_stream_of_recipes_is_read_by_name(tmp_path):
    path = tmp_path / "stream.yml"
    path.write_text(f"name: one\n{TIES}---\n# two\n{TIES}seed: 7\n")
    (first, one), (second, two) = load_recipes(path)
    assert (first, second, one.seed, two.seed) == ("one", "1", 0, 7)
    assert two.text == TIES + "seed: 7\n"
    (fault,) = faults(path)
    assert fault == f"{path}:11: begins the second of 2 documents, expected one recipe"


def test_faults_of_all_recipes_of_a_stream_are_reported_at_once():
    with pytest.raises(RecipeError) as caught:
        load_recipes(f"name: x\nseed: a\n{TIES}---\nname: x\nseed: b\n{TIES}")
    assert str(caught.value).split("\n") == [
        "recipe:2: 'seed' is 'a', expected an integer from 0 to 2^64 - 1",
        "recipe:11: is a second recipe with the name 'x'",
        "recipe:12: 'seed' is 'b', expected an integer from 0 to 2^64 - 1",
    ]


# Nothing but RecipeError, whatever the text

PIECES = [
    "\n", "  ", "- ", ": ", "[", "]", "{", "}", "&a ", "*a", "<<: ", "!!int ", "'", '"', "| \n", "#", "---\n", "\t",
    "%", "~", "\x00", "\ud800", "\u2028", "é", "1e999", "0x" + "f" * 40, ".nan", "true", "models: ", "weight",
    "filter: x", "value: ", "=",
]  # fmt: skip
SEEDS = [TIES, LEVELS, SLICES, FILTERED, ANCHORS]


@st.composite
def mutated_recipes(draw):
    text = draw(st.sampled_from(SEEDS))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(text)))
        end = draw(st.integers(start, min(len(text), start + 12)))
        text = text[:start] + draw(st.sampled_from(PIECES) | st.text(max_size=4)) + text[end:]
    return text


def only_recipe_errors(source):
    try:
        load_recipe(source)
    except RecipeError as error:
        assert str(error).strip()


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(mutated_recipes())
def test_mutated_text_raises_nothing_but_recipe_errors(text):
    only_recipe_errors(text)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=3)
SCALARS |= st.sampled_from(["stand_in_ties", "stand_in_slerp", "base", "a+b", "union"])
NAMES = st.sampled_from(
    "merge_method base_model models slices modules parameters model sources layer_range weight density filter value "
    "tokenizer source tokens t lambda seed".split()
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.text(max_size=3), inner),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(NAMES, TREES))
def test_odd_mappings_raise_nothing_but_recipe_errors(mapping):
    only_recipe_errors(mapping)
