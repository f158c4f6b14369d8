"""Planning a merge of a mixture of experts: 50,048 tensors in each of four models, 16 shards each; headers alone.

Reads 64 headers of about 0.4 MB. Floor: parsing them as JSON.
"""

from __future__ import annotations

import pytest
from sparse_checkpoints import expert_recipe, parse_headers

from peta_fast.plan import make_plan
from peta_fast.recipe import load_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("experts")


@pytest.fixture(scope="module")
def recipe(folder):
    return load_recipe(expert_recipe(folder))


def bench_plan_experts(measure, timed, folder, recipe):
    measure(
        lambda: make_plan(recipe),
        floor=timed(lambda: parse_headers(folder)),
        floor_name="parsing the headers as JSON",
        shape="50,048 tensors, base + 3",
        goal="under 5 s",
    )
