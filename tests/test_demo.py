"""The demonstration end to end, with few training steps: what it writes holds together and can be used again."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors import safe_open

from peta_fast.demo import run_demo
from peta_fast.demo.data import TASKS, UPRIGHT, Images, load_digits
from peta_fast.demo.model import load_checkpoint
from peta_fast.demo.recipes import MERGES, Merge, recipe_text
from peta_fast.demo.results import BASE, FINETUNE, MERGE
from peta_fast.demo.train import accuracy, new_model, reproducible, trained
from peta_fast.errors import PetaFastError, ResourceError
from peta_fast.merging import merge
from peta_fast.recipe import load_recipe

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

CHANCE = 0.1
METHODS = [choice.name for choice in MERGES]
COLUMNS = [*TASKS, UPRIGHT]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A quick demonstration and what it printed."""
    printed = io.StringIO()
    result = run_demo(tmp_path_factory.mktemp("demo") / "out", seed=3, quick=True, console=Console(file=printed))
    return result, printed.getvalue()


@pytest.fixture(scope="module")
def result(demo):
    return demo[0]


@pytest.fixture(scope="module")
def document(result):
    return json.loads((result.out / "results.json").read_text(encoding="utf-8"))


def stored(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint in fp64, read by the safetensors library."""
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        return {name: file.get_tensor(name).astype(np.float64) for name in file.keys()}  # noqa: SIM118


def test_splits_cover_all_digits_and_share_none():
    digits = load_digits(0)
    splits = [digits.train, digits.validation, digits.test]
    assert [len(split) for split in splits] == [1000, 300, 497]
    from sklearn.datasets import load_digits as original

    together = torch.cat([split.pixels for split in splits]).flatten(1) * 16
    assert sorted(together.int().tolist()) == sorted(original().data.astype(int).tolist())


def test_splits_depend_on_the_seed_alone():
    assert torch.equal(load_digits(5).test.pixels, load_digits(5).test.pixels)
    assert not torch.equal(load_digits(5).test.pixels, load_digits(6).test.pixels)


@pytest.mark.parametrize(
    ("domain", "expected"),
    [
        ("upright", [[0.0, 1.0], [0.25, 0.5]]),
        ("rotated", [[1.0, 0.5], [0.0, 0.25]]),
        ("mirrored", [[1.0, 0.0], [0.5, 0.25]]),
        ("inverted", [[1.0, 0.0], [0.75, 0.5]]),
        ("transposed", [[0.0, 0.25], [1.0, 0.5]]),
    ],
)
def test_a_domain_shows_the_same_pixels_its_own_way(domain, expected):
    images = Images(torch.tensor([[[0.0, 1.0], [0.25, 0.5]]]), torch.tensor([7]))
    assert images.seen_as(domain).pixels.tolist() == [expected]


def test_few_per_digit_takes_as_many_of_each():
    assert torch.bincount(load_digits(1).train.few_per_digit(3).labels).tolist() == [3] * 10


def test_training_twice_gives_the_same_bits_and_leaves_the_start_alone():
    images = load_digits(0).train.pick(torch.arange(150))
    start = new_model(0)
    before = {name: tensor.clone() for name, tensor in start.state_dict().items()}
    with reproducible():
        once, twice = (
            trained(start, images, epochs=2, learning_rate=1e-3, seed=7, advance=lambda: None) for _ in range(2)
        )
    assert all(torch.equal(once.state_dict()[name], twice.state_dict()[name]) for name in before)
    assert all(torch.equal(start.state_dict()[name], before[name]) for name in before)
    assert not torch.equal(once.head.weight, start.head.weight)


def test_reproducible_restores_what_it_sets():
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with reproducible():
        assert torch.get_num_threads() == 1 and torch.are_deterministic_algorithms_enabled()
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before


def test_the_output_folder_is_laid_out_as_promised(result):
    folders = ["base", *(f"tasks/{task}" for task in TASKS), *(f"merged/{method}" for method in METHODS)]
    for folder in folders:
        assert (result.out / folder / "config.json").is_file()
        assert (result.out / folder / "model.safetensors").is_file()
    for file in [*(f"recipes/{method}.yml" for method in METHODS), "results.json", "results.md", "accuracy.png"]:
        assert (result.out / file).is_file()


def test_every_checkpoint_has_the_base_s_tensors_and_config(result):
    base = stored(result.out / "base")
    assert "layers.0.fc1.weight" in base
    for row in result.rows:
        tensors = stored(row.checkpoint)
        assert {name: tensor.shape for name, tensor in tensors.items()} == {n: t.shape for n, t in base.items()}
        assert json.loads((row.checkpoint / "config.json").read_text()) == json.loads(
            (result.out / "base/config.json").read_text()
        )


def test_the_rows_are_the_base_the_finetunes_and_the_merges(result):
    assert [row.name for row in result.of_kind(BASE)] == ["base"]
    assert [row.name for row in result.of_kind(FINETUNE)] == list(TASKS)
    assert [row.name for row in result.of_kind(MERGE)] == METHODS


def test_the_written_checkpoints_score_what_the_table_says(result, document):
    test = load_digits(result.seed).test
    assert [row["name"] for row in document["rows"]] == [row.name for row in result.rows]
    for row in document["rows"]:
        model = load_checkpoint(Path(row["checkpoint"]))
        assert row["test"] == {domain: accuracy(model, test.seen_as(domain)) for domain in COLUMNS}


def test_mean_and_normalized_score_follow_from_the_accuracies(document):
    own = {row["name"]: row["test"][row["name"]] for row in document["rows"] if row["kind"] == FINETUNE}
    for row in document["rows"]:
        assert row["mean"] == pytest.approx(np.mean([row["test"][task] for task in TASKS]))
        assert row["normalized"] == pytest.approx(np.mean([row["test"][task] / own[task] for task in TASKS]))


def test_accuracies_are_fractions_and_finetunes_beat_chance(result):
    for row in result.rows:
        assert all(0 <= row.accuracy[domain] <= 1 for domain in COLUMNS)
    for task in TASKS:
        assert result.own(task) > 2 * CHANCE


def test_the_scaling_is_the_one_that_validation_prefers(result):
    validation = load_digits(result.seed).validation
    for row in result.of_kind(MERGE):
        model = load_checkpoint(row.checkpoint)
        assert row.validated == pytest.approx(np.mean([accuracy(model, validation.seen_as(task)) for task in TASKS]))
        if row.scaling is not None:
            assert row.candidates[row.scaling] == max(row.candidates.values())
            assert row.validated == pytest.approx(row.candidates[row.scaling], abs=1 / len(validation))


def test_task_arithmetic_is_the_base_plus_the_scaled_sum_of_task_vectors(result):
    base, merged = stored(result.out / "base"), stored(result.out / "merged/task_arithmetic")
    finetunes = [stored(result.out / "tasks" / task) for task in TASKS]
    scaling = result.row("task_arithmetic").scaling
    for name, start in base.items():
        expected = start + scaling * sum(finetuned[name] - start for finetuned in finetunes)
        np.testing.assert_allclose(merged[name], expected, rtol=0, atol=1e-6, err_msg=name)
        assert not np.array_equal(merged[name], start)


def test_linear_is_the_average_of_the_finetunes(result):
    finetunes = [stored(result.out / "tasks" / task) for task in TASKS]
    for name, average in stored(result.out / "merged/linear").items():
        expected = sum(finetuned[name] for finetuned in finetunes) / len(finetunes)
        np.testing.assert_allclose(average, expected, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("method", METHODS)
def test_a_recipe_reloads_and_gives_the_same_checkpoint_again(result, method, tmp_path):
    recipe = load_recipe(result.out / "recipes" / f"{method}.yml")
    assert recipe.method == method
    assert recipe.compat == "mergekit"
    models = [str(result.out / "tasks" / task) for task in TASKS]
    assert [reference.path for reference in recipe.references()][-len(models) :] == models
    merge(result.out / "recipes" / f"{method}.yml", tmp_path / "again")
    first, again = stored(result.out / "merged" / method), stored(tmp_path / "again")
    assert all(np.array_equal(first[name], again[name]) for name in first)


def test_recipes_name_relative_folders_from_the_working_directory():
    text = recipe_text(Merge("ties", "Trimmed.", {"density": 0.2}), Path("out/base"), [Path("out/a")], 1.5)
    assert text == (
        "# Trimmed.\n"
        "merge_method: ties\n"
        "base_model: ./out/base\n"
        "models:\n"
        "  - model: ./out/a\n"
        "    parameters:\n"
        "      weight: 1.0\n"
        "parameters:\n"
        "  density: 0.2\n"
        "  lambda: 1.5\n"
        "dtype: float32\n"
    )


def test_recipes_quote_folders_that_yaml_would_misread():
    text = recipe_text(Merge("linear", "Average.", scaled=False), Path("b"), [Path("my demo: #1/a")], None)
    import yaml

    assert yaml.safe_load(text)["models"][0]["model"] == "./my demo: #1/a"


def test_the_picture_is_an_image_with_something_on_it(result):
    from matplotlib.image import imread

    pixels = imread(result.out / "accuracy.png")
    assert pixels.shape[:2] == (960, 1600)
    colours = np.unique((pixels[..., :3] * 255).round().reshape(-1, 3), axis=0)
    assert len(colours) > 100


def test_the_printed_table_fits_eighty_columns_and_names_every_row(demo):
    result, printed = demo
    lines = printed.splitlines()
    for row in result.rows:
        line = next(line for line in lines if f"{100 * result.mean(row):.1f} {result.normalized(row):.3f}" in line)
        assert len(line) <= 80
        assert row.name in line
        assert all(f"{100 * row.accuracy[domain]:.1f}" in line for domain in COLUMNS)


def test_the_last_line_is_a_command_to_try(demo):
    result, printed = demo
    assert printed.splitlines()[-1].split()[-4:] == ["peta-fast", "merge", str(result.best.recipe), "my_merge"]


def test_output_that_is_no_terminal_carries_no_control_codes(demo):
    assert "\x1b" not in demo[1] and "\r" not in demo[1]


def test_no_color_is_honoured_on_a_terminal(result, monkeypatch):
    from peta_fast.demo import report

    def shown() -> str:
        printed = io.StringIO()
        report.show(result, Console(file=printed, force_terminal=True, color_system="truecolor", width=100))
        return printed.getvalue()

    green = "\x1b[1;32m"
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert green in shown()
    monkeypatch.setenv("NO_COLOR", "1")
    assert green not in shown()


def test_a_folder_with_other_things_is_refused_untouched(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ResourceError, match="thesis.tex"):
        run_demo(tmp_path, quick=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_of_an_earlier_demonstration_is_accepted(result, tmp_path):
    from peta_fast.demo.run import check_folder

    shutil.copytree(result.out, tmp_path / "earlier")
    check_folder(tmp_path / "earlier")


@pytest.mark.parametrize("module", ["sklearn.datasets", "matplotlib.figure"])
def test_a_missing_extra_is_named_with_its_install_command_before_any_work(module, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, module.partition(".")[0], None)
    with pytest.raises(PetaFastError, match=r"(?s)not installed.*pip install 'peta_fast\[demo\]'"):
        run_demo(tmp_path / "out", quick=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "started, found, shown",
    [(".venv/bin/peta-fast", None, ".venv/bin/peta-fast"), ("/usr/bin/peta-fast", "/usr/bin/peta-fast", "peta-fast"),
     ("somewhere/pytest", None, "peta-fast")],
)  # fmt: skip
def test_the_next_command_is_one_that_can_be_called(monkeypatch, started, found, shown):
    from peta_fast.demo import report

    monkeypatch.setattr("sys.argv", [started])
    monkeypatch.setattr("shutil.which", lambda name: found)
    assert report.program() == shown
