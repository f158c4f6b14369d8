"""The JSON schema of recipes follows the methods folder."""

from __future__ import annotations

import json

import pytest
from recipe_stand_ins import stand_in_methods

from peta_fast import methods
from peta_fast.recipe import recipe_schema


@pytest.fixture(scope="module", autouse=True)
def methods_folder(tmp_path_factory):
    with stand_in_methods(tmp_path_factory.mktemp("methods")):
        yield


def test_the_schema_is_json_and_its_references_resolve():
    schema = json.loads(json.dumps(recipe_schema()))
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    references = set()

    def collect(node):
        if isinstance(node, dict):
            references.update([node["$ref"]] if "$ref" in node else [])
            node = list(node.values())
        if isinstance(node, list):
            for member in node:
                collect(member)

    collect(schema)
    assert references == {f"#/$defs/{name}" for name in schema["$defs"]}


def parameters_of(name: str, level: str = "parameters") -> dict:
    return recipe_schema()["$defs"][f"{name}.{level}"]


def test_a_method_in_force_decides_about_the_parameters_of_each_level():
    conditions = [part for part in recipe_schema()["allOf"] if "if" in part]
    assert len(conditions) == len(methods.names())
    (levels,) = [part["then"]["properties"] for part in conditions if "stand_in_ties" in str(part["if"])]
    for_all = {"$ref": "#/$defs/stand_in_ties.parameters"}
    for_one = {"$ref": "#/$defs/stand_in_ties.model_parameters"}
    slices, modules = levels["slices"]["items"]["properties"], levels["modules"]["additionalProperties"]["properties"]
    assert levels["parameters"] == slices["parameters"] == modules["parameters"] == for_all
    for entries in (levels["models"], slices["sources"], modules["models"]):
        assert entries["items"]["properties"]["parameters"] == for_one


def test_the_schema_knows_the_keys_of_every_method():
    for name in methods.names():
        keys = methods.keys(methods.get(name))
        for_one = parameters_of(name, "model_parameters")
        assert parameters_of(name)["properties"].keys() == {*keys, "int8_mask"}
        assert for_one["properties"].keys() == {*(n for n, key in keys.items() if key.per_model), "int8_mask"}
        assert for_one["additionalProperties"] is False


def test_the_schema_gives_ranges_choices_and_defaults():
    keys = parameters_of("stand_in_ties")["properties"]
    assert keys["density"]["anyOf"][0] == {"type": "number", "minimum": 0.0, "maximum": 1.0}
    assert (keys["density"]["default"], keys["density"]["description"]) == (1.0, "fraction kept")
    assert keys["rounds"]["anyOf"][0] == {"type": "integer", "minimum": 1}
    assert keys["order"]["anyOf"][0] == {"enum": ["first", "all"]}
    assert "default" not in keys["weight"]
    assert keys["lambda"] == keys["scaling"]
