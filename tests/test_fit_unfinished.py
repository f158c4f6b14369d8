"""Fits that are killed go on from what they left, to the bits that they would have come to."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from fit_cases import batches_of, toy_family
from interpreter import run_code

from peta_fast.errors import CheckpointError, RecipeError, ResourceError
from peta_fast.fit.adamerging import adamerging
from peta_fast.fit.concrete import concrete_adamerging, concrete_task_arithmetic
from peta_fast.fit.tasks import Task

FITS = {
    "adamerging": (adamerging, {"steps": 9}),
    "adamerging by task": (adamerging, {"steps": 9, "granularity": "task"}),
    "plus plus": (adamerging, {"steps": 9, "density": 0.5}),
    "concrete": (concrete_task_arithmetic, {"steps": 9}),
    "concrete, binary": (concrete_task_arithmetic, {"steps": 9, "mask": "binary"}),
    "two levels, in the masks": (concrete_adamerging, {"steps": 9, "coefficient_steps": 3}),
    "two levels, in the coefficients": (concrete_adamerging, {"steps": 3, "coefficient_steps": 9}),
}


class Broken(Exception):
    pass


def fit(name: str, file=None, broken_after: int | None = None, **options):
    function, settings = FITS[name]
    model, base, tuned = toy_family(2)
    told = []

    def progress(step):
        told.append(step)
        if len(told) == broken_after:
            raise Broken

    # four batches, so that a run goes round more than once, and two tasks with different ones
    tasks = [Task("a", batches_of(4)), Task("b", [b + 1 for b in batches_of(3)])]
    options = {"base": base, "unfinished": file, "save_every": 2, "progress": progress, **settings, **options}
    return function(model, tuned, tasks, **options), told


@pytest.mark.parametrize(
    ("name", "broken_after"), [(n, k) for n in FITS for k in (1, 5, 8, *([11] if "two levels" in n else []))]
)
def test_a_fit_that_broke_off_goes_on_to_the_same_bits(name, broken_after, tmp_path):
    whole, everything = fit(name)
    file = tmp_path / "state.safetensors"
    with pytest.raises(Broken):
        fit(name, file, broken_after)
    resumed, told = fit(name, file)
    assert not list(tmp_path.iterdir())
    assert resumed.history == whole.history and len(told) < len(everything) + (broken_after < 5)
    for key, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], tensor), key
    for key, row in whole.coefficients.items():
        assert torch.equal(resumed.coefficients[key], row), key
    if whole.masks:
        assert all(torch.equal(resumed.masks.of(n), whole.masks.of(n)) for n in whole.masks.logits)


def test_a_killed_process_loses_no_more_than_the_last_steps(tmp_path):
    file, tests = tmp_path / "state.safetensors", os.path.dirname(os.path.abspath(__file__))
    code = f"""
import os, signal, sys
sys.path.insert(0, {tests!r})
import test_fit_unfinished as t
t.Broken = type("Broken", (Exception,), {{"__init__": lambda self: os.kill(os.getpid(), signal.SIGKILL)}})
t.fit("concrete", {str(file)!r}, 7)
"""
    ran = run_code(code)
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]
    resumed, told = fit("concrete", file)
    whole, _ = fit("concrete")
    assert [p.step for p in told] == [7, 8, 9]
    assert all(torch.equal(t, resumed.state_dict()[n]) for n, t in whole.state_dict().items())


def test_the_state_of_another_fit_is_refused(tmp_path):
    file = tmp_path / "state.safetensors"
    with pytest.raises(Broken):
        fit("concrete", file, 5)
    kept = file.read_bytes()
    for options in ({"seed": 1}, {"scaling": 0.4}, {"steps": 8}):
        with pytest.raises(ResourceError, match="holds an unfinished fit of other models or with other settings"):
            fit("concrete", file, **options)
    with pytest.raises(ResourceError, match="other settings"):
        fit("adamerging", file)
    assert file.read_bytes() == kept
    file.write_bytes(b"no safetensors")
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        fit("concrete", file)
    with pytest.raises(RecipeError, match="save_every: expected a number of steps above 0, got 0"):
        fit("concrete", None, save_every=0)
