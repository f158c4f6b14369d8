"""Adding a merge method is adding one file: element-wise (`lower`), or over whole tensors (`merge`)."""

from __future__ import annotations

import sys

import pytest
import torch
from families import assert_same_bits
from model_folders import load, save_family, save_model, tensors

import peta_fast
from peta_fast import methods
from peta_fast._engine import Engine
from peta_fast._tensor_plan import lowered
from peta_fast.errors import CheckpointError, RecipeError

HEADER = '''
"""A method."""
from dataclasses import dataclass
from peta_fast.methods import MethodParams, per_model, shared

REFERENCE = ""
COMPAT = ("native",)

@dataclass(frozen=True)
class Params(MethodParams):
    share: tuple = per_model(0.5, low=0.0, high=1.0)
    boost: float = shared(1.0)
'''
ELEMENT_WISE = """
from peta_fast.ops.delta_merge import DeltaMerge, Term

def lower(params, tensor):
    return DeltaMerge(tuple(Term(w) for w in params.share), scaling=params.boost)
"""
WHOLE_TENSOR = """
import torch

def merge(base, models, params, tensor):
    assert tensor.models == len(models) and tuple(tensor.shape) == tuple(base.shape)
    deltas = [w * (m.float() - base.float()) for w, m in zip(params.share, models)]
    return base.float() + params.boost * torch.stack(deltas).sum(0)
"""
WRONG_SHAPE = """
def merge(base, models, params, tensor):
    return base.reshape(-1)[:0]
"""
OVERFLOWING = """
def merge(base, models, params, tensor):
    return base.float() * 3e38
"""


@pytest.fixture
def add_method(tmp_path_factory):
    """add_method(name, code): a file in a folder of methods, until the end of the test."""
    folder, added = tmp_path_factory.mktemp("methods"), []

    def add(name: str, code: str) -> str:
        (folder / f"{name}.py").write_text(HEADER + code)
        added.append(name)
        methods.names.cache_clear()
        return name

    methods.__path__.append(str(folder))
    yield add
    methods.__path__.remove(str(folder))
    methods.names.cache_clear()
    lowered.cache_clear()
    for name in added:
        sys.modules.pop(f"peta_fast.methods.{name}", None)


def merge(folder, out, models=("a", "b"), **keywords):
    return peta_fast.merge(out=out, base=folder / "base", models=[folder / m for m in models], **keywords)


@pytest.mark.parametrize("code", [ELEMENT_WISE, WHOLE_TENSOR], ids=["element-wise", "whole tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_is_a_method(add_method, tmp_path, code, dtype):
    method = add_method("added", code)
    names = {"wide": (300, 700), "thin": (41,), "number": ()}
    base, models = save_family(tmp_path, dtype=dtype, names=names)
    settings = {"method": method, "share": [0.25, 0.5], "boost": 2.0}
    merge(tmp_path, tmp_path / "out", max_memory=16 << 20, max_shard_size=100_000, **settings)
    merged = load(tmp_path / "out")
    assert_same_bits(merged, peta_fast.merge_state_dicts(base, models, **settings))
    a, b = models
    for name, t in base.items():
        exact = t.double() + 2 * (0.25 * (a[name].double() - t.double()) + 0.5 * (b[name].double() - t.double()))
        torch.testing.assert_close(merged[name].double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("code", [ELEMENT_WISE, WHOLE_TENSOR], ids=["element-wise", "whole tensor"])
def test_a_file_is_a_method_of_sweeps(add_method, tmp_path, code):
    method = add_method("added", code)
    save_family(tmp_path, names={"wide": (300, 700), "thin": (41,)})
    models = [tmp_path / m for m in ("a", "b")]
    found = peta_fast.sweep(method=method, base=tmp_path / "base", models=models, grid={"share": [0.2, 0.5]}, boost=3.0)
    outcomes = found.write(tmp_path / "out", max_memory=16 << 20)
    for index, (outcome, variant) in enumerate(zip(outcomes, found, strict=True)):
        merge(tmp_path, tmp_path / str(index), method=method, boost=3.0, **variant.parameters)
        assert_same_bits(load(outcome.out), load(tmp_path / str(index)))
        assert_same_bits(variant.state, load(tmp_path / str(index)))


def test_results_over_whole_tensors_are_let_go_when_they_are_written(add_method, tmp_path, monkeypatch):
    method = add_method("added", WHOLE_TENSOR)
    save_family(tmp_path, names={f"w{i}": (300, 900) for i in range(6)})
    held, fill = [], Engine.fill

    def noting_fill(self, pieces):
        fill(self, pieces)
        held.append(len(self.ready))

    monkeypatch.setattr(Engine, "fill", noting_fill)
    merge(tmp_path, tmp_path / "out", method=method, max_memory=16 << 20)
    assert len(held) > 10 and max(held) == 2


def test_the_keys_of_the_file_are_those_of_the_recipe(add_method, tmp_path):
    method = add_method("added", ELEMENT_WISE)
    save_family(tmp_path)
    with pytest.raises(RecipeError, match="'shar' is not a key of added"):
        merge(tmp_path, tmp_path / "out", method=method, shar=0.5)
    with pytest.raises(RecipeError, match="from 0 to 1"):
        merge(tmp_path, tmp_path / "out", method=method, share=1.5)


@pytest.mark.parametrize("code", [ELEMENT_WISE, WHOLE_TENSOR], ids=["element-wise", "whole tensor"])
def test_nan_in_an_input_names_its_file_and_goes_on_only_if_allowed(add_method, tmp_path, code):
    method = add_method("added", code)
    base = tensors(0, names={"a": (50,), "b": (50,)})
    model = {n: t + 1 for n, t in base.items()}
    model["b"].view(torch.int32)[17] = 0x7FABCDEF
    save_model(tmp_path / "base", base)
    save_model(tmp_path / "a", model)
    with pytest.raises(CheckpointError, match="a/model.safetensors: 'b': expected finite values, got 1 NaN or inf"):
        merge(tmp_path, tmp_path / "out", models=["a"], method=method)
    assert not (tmp_path / "out").exists()
    merge(tmp_path, tmp_path / "out", models=["a"], method=method, allow_nonfinite=True)
    merged = load(tmp_path / "out")["b"]
    assert merged.isnan().nonzero().flatten().tolist() == [17] and merged.view(torch.int32)[17] == 0x7FC00000


@pytest.mark.parametrize(
    "code, error, message",
    [(WRONG_SHAPE, ValueError, "came out as"), (OVERFLOWING, CheckpointError, "not finite in float16")],
)
def test_a_method_s_own_faults_publish_nothing(add_method, tmp_path, code, error, message):
    method = add_method("added", code)
    save_family(tmp_path, dtype=torch.float16)
    with pytest.raises(error, match=message):
        merge(tmp_path, tmp_path / "out", method=method)
    assert not list((tmp_path).glob("out/*.safetensors"))
