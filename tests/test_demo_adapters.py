"""The demonstration's comparison of LoRA with linearized LoRA: one start, merges that add up, true scores."""

from __future__ import annotations

import dataclasses
import io
import statistics
from itertools import combinations

import pytest
import torch
from rich.console import Console

import peta_fast as pf
from peta_fast.demo import adapter_report
from peta_fast.demo.adapters import (
    KINDS,
    METHODS,
    adapter_steps,
    compare,
    merged_steps,
    put_steps,
    steps_of,
    with_adapters,
)
from peta_fast.demo.data import TASKS, load_digits
from peta_fast.demo.model import load_checkpoint, save_checkpoint
from peta_fast.demo.train import BATCH, QUICK, accuracy, new_model, reproducible

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

SCALINGS = (0.5, 1.0)
KIND = {kind.name: kind for kind in KINDS}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "base"
    save_checkpoint(new_model(0), folder)
    return folder


@pytest.fixture(scope="module")
def found(base):
    """A comparison of one epoch, and how often it said that it advances."""
    advanced = []
    regime = dataclasses.replace(QUICK, task_epochs=1)
    with reproducible():
        result = compare(
            base, base.parent / "out", load_digits(0), regime, SCALINGS, seed=0, advance=lambda: advanced.append(1)
        )
    assert len(advanced) == adapter_steps(load_digits(0).train, regime, BATCH)
    return result


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_all_kinds_of_one_init_start_from_the_same_function(kind, base):
    images = load_digits(0).test.pixels
    linearized = next(k for k in KINDS if k.linearized and k.init == kind.init)
    ours, start = (with_adapters(load_checkpoint(base), k, seed=0).eval() for k in (kind, linearized))
    torch.testing.assert_close(ours(images), start(images))
    if kind.init == "lora":
        torch.testing.assert_close(ours(images), load_checkpoint(base).eval()(images))


def test_plain_lora_is_the_product_and_linearized_lora_its_first_order(base):
    models = {}
    for name in ("LoRA B0≠0", "L-LoRA B0≠0"):
        models[name] = with_adapters(load_checkpoint(base), KIND[name], seed=0)
        put_steps(models[name], {n: torch.full_like(s, 0.01) for n, s in steps_of(models[name]).items()})
    plain, linear = (m.layers[0].fc1 for m in models.values())
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    second_order = plain.scaling * (x @ plain.delta_A.t()) @ plain.delta_B.t()
    torch.testing.assert_close(plain(x) - linear(x), second_order, rtol=1e-3, atol=1e-6)


def test_task_arithmetic_of_steps_is_their_sum():
    vectors = [{"a": torch.tensor([1.0, -2.0])}, {"a": torch.tensor([3.0, 0.5])}]
    assert merged_steps(vectors, "task_arithmetic")["a"].tolist() == [4.0, -1.5]


def test_every_subset_is_merged_by_every_method(found):
    subsets = [chosen for count in (2, 3, 4) for chosen in combinations(TASKS, count)]
    expected = {(kind.name, method, chosen) for kind in KINDS for method in METHODS for chosen in subsets}
    assert {(m.kind, m.method, m.tasks) for m in found.merged} == expected and len(found.merged) == len(expected)
    assert all(m.scaling in SCALINGS and 0 < m.mean_accuracy <= 1 for m in found.merged)


@pytest.mark.parametrize(("name", "folder"), [("L-LoRA", "B0_zero"), ("L-LoRA B0≠0", "B0_nonzero")])
def test_saved_adapters_score_what_is_reported_alone_and_added(name, folder, found, base):
    digits, model = load_digits(0), load_checkpoint(base)
    for task in TASKS:
        model = pf.load_adapter(model, base.parent / "out" / folder / task, adapter_name=task)
        assert accuracy(model, digits.test.seen_as(task)) == found.own[name][task]
    merged = found.of(name, "task_arithmetic", 4)[0]
    pf.add_adapters(model, dict.fromkeys(TASKS, merged.scaling), "all")
    pf.set_adapter(model, "all")
    scores = {task: accuracy(model, digits.test.seen_as(task)) for task in TASKS}
    assert statistics.fmean(scores.values()) == pytest.approx(merged.mean_accuracy, abs=1 / len(digits.test))
    normalized = statistics.fmean(scores[task] / found.own[name][task] for task in TASKS)
    assert normalized == pytest.approx(merged.normalized, abs=0.02)


def test_mean_and_spread_are_those_of_the_subsets(found):
    scores = [m.normalized for m in found.merged if (m.kind, m.method, len(m.tasks)) == ("LoRA", "ties", 3)]
    assert len(scores) == 4
    assert found.mean_and_spread("LoRA", "ties", 3) == (
        pytest.approx(sum(scores) / 4),
        pytest.approx(statistics.pstdev(scores)),
    )


def test_the_table_fits_eighty_columns_with_every_row_in_full(found):
    printed = io.StringIO()
    adapter_report.show(found, Console(file=printed, width=80))
    lines = printed.getvalue().splitlines()
    assert all(len(line) <= 80 for line in lines) and "…" not in printed.getvalue()
    assert adapter_report.markdown(found).count("\n| ") == 1 + len(KINDS) * len(METHODS)


def test_the_picture_is_an_image_with_something_on_it(found, tmp_path):
    import numpy as np
    from matplotlib.image import imread

    adapter_report.draw(found, tmp_path / "adapters.png")
    pixels = imread(tmp_path / "adapters.png")
    assert pixels.shape[:2] == (720, 1600)
    assert len(np.unique((pixels[..., :3] * 255).round().reshape(-1, 3), axis=0)) > 50
