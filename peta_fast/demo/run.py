"""The demonstration's flow: train a base and four fine-tunes, merge them, score everything on held-out images.

Weights are fitted on the train split and scalings are chosen on the validation split; every number reported comes
from the test split, scored with the checkpoints as they were written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from torch import Tensor

from peta_fast.demo import adapter_report, picture, report
from peta_fast.demo.adapters import KINDS, AdapterResult, adapter_steps, compare
from peta_fast.demo.data import TASKS, UPRIGHT, Digits, Images, load_digits
from peta_fast.demo.extras import import_extra
from peta_fast.demo.model import DigitsMLP, load_checkpoint, load_state, save_checkpoint
from peta_fast.demo.progress import stage
from peta_fast.demo.recipes import MERGES, QUICK_SCALINGS, SCALINGS, Merge, recipe_text
from peta_fast.demo.results import BASE, FINETUNE, MERGE, DemoResult, Row
from peta_fast.demo.train import (
    BATCH,
    FULL,
    QUICK,
    Regime,
    accuracy,
    base_images,
    new_model,
    reproducible,
    steps,
    trained,
)
from peta_fast.errors import ResourceError
from peta_fast.merging import merge, merge_state_dicts

ENTRIES = {
    "base", "tasks", "recipes", "merged", "adapters", "results.json", "results.md", "accuracy.png", "adapters.png",
}  # fmt: skip
"""What the output folder holds."""


@dataclass(frozen=True)
class Setting:
    """What every stage needs to know."""

    out: Path
    seed: int
    regime: Regime
    scalings: tuple[float, ...]
    digits: Digits
    console: Console

    @property
    def base(self) -> Path:
        return self.out / "base"

    @property
    def finetunes(self) -> dict[str, Path]:
        return {task: self.out / "tasks" / task for task in TASKS}


def run_demo(
    out: Path | str = "peta_fast_demo", *, seed: int = 0, quick: bool = False, console: Console | None = None
) -> DemoResult:
    """Trains, merges, scores, prints the table, and writes everything below `out`.

    out      folder, made if needed; an earlier demonstration in it is overwritten
    seed     of splits, initialization and batches; the same seed gives the same checkpoints on the same machine
    quick    a few seconds instead of a minute, and worse numbers
    console  where progress and table go; stdout by default

    Raises ResourceError when `out` holds other things, PetaFastError when scikit-learn or matplotlib is missing.
    """
    started = time.perf_counter()
    out, console = Path(out), console or Console()
    check_folder(out)
    import_extra("matplotlib.figure")
    regime, scalings = (QUICK, QUICK_SCALINGS) if quick else (FULL, SCALINGS)
    setting = Setting(out, seed, regime, scalings, load_digits(seed), console)
    with reproducible():
        train_base(setting)
        for task in TASKS:
            train_finetune(setting, task)
        rows = [*score_trained(setting), *(merge_and_score(setting, choice) for choice in MERGES)]
        adapters = compare_adapters(setting)
    result = DemoResult(out, seed, quick, tuple(TASKS), tuple(rows), time.perf_counter() - started, adapters)
    picture.draw(result, setting.digits.test, out / "accuracy.png")
    adapter_report.draw(adapters, out / "adapters.png")
    report.write(result, setting.digits, regime)
    report.show(result, console)
    return result


def check_folder(out: Path) -> None:
    """Refuses a folder that holds anything a demonstration does not write."""
    if out.exists() and not out.is_dir():
        raise ResourceError(str(out), "expected a folder, got a file", "Give another folder with --out.")
    foreign = sorted(entry.name for entry in out.iterdir() if entry.name not in ENTRIES) if out.exists() else []
    if foreign:
        problem = f"expected a new folder or one of an earlier demo, got one that holds {foreign[0]!r}"
        raise ResourceError(str(out), problem, "Give another folder with --out.")


def train_base(setting: Setting) -> None:
    regime, images = setting.regime, base_images(setting.digits.train, setting.regime)
    with stage(setting.console, "base", steps(images, regime.base_epochs)) as under_way:
        model = trained(
            new_model(setting.seed),
            images,
            epochs=regime.base_epochs,
            learning_rate=regime.base_learning_rate,
            seed=setting.seed,
            advance=under_way.advance,
        )
        save_checkpoint(model, setting.base)
        under_way.outcome = f"{accuracy(model, setting.digits.validation):.1%} of upright validation digits"


def train_finetune(setting: Setting, task: str) -> None:
    regime, images = setting.regime, setting.digits.train.seen_as(task)
    unseen = setting.digits.validation.seen_as(task)
    with stage(setting.console, f"fine-tune {task}", steps(images, regime.task_epochs)) as under_way:
        base = load_checkpoint(setting.base)
        model = trained(
            base,
            images,
            epochs=regime.task_epochs,
            learning_rate=regime.task_learning_rate,
            seed=setting.seed,
            advance=under_way.advance,
        )
        save_checkpoint(model, setting.finetunes[task])
        before, after = accuracy(base, unseen), accuracy(model, unseen)
        under_way.outcome = f"{before:.1%} -> {after:.1%} of {task} validation digits"


def score_trained(setting: Setting) -> list[Row]:
    """The rows of the base and of the fine-tunes."""
    base = Row("base", BASE, setting.base, test_accuracy(setting, setting.base))
    finetunes = setting.finetunes.items()
    return [base, *(Row(task, FINETUNE, folder, test_accuracy(setting, folder)) for task, folder in finetunes)]


def merge_and_score(setting: Setting, choice: Merge) -> Row:
    """Chooses the scaling, writes the recipe, merges the files that it names, scores the checkpoint that comes out."""
    recipe, merged = setting.out / "recipes" / f"{choice.name}.yml", setting.out / "merged" / choice.name
    with stage(setting.console, f"merge {choice.name}", len(setting.scalings)) as under_way:
        curve = validation_curve(setting, choice, under_way.advance) if choice.scaled else {}
        scaling = max(curve, key=curve.__getitem__) if curve else None
        recipe.parent.mkdir(parents=True, exist_ok=True)
        text = recipe_text(choice, setting.base, list(setting.finetunes.values()), scaling)
        recipe.write_text(text, encoding="utf-8")
        merge(recipe, merged, force=True)
        validated = mean_accuracy(load_checkpoint(merged), setting.digits.validation)
        chosen = "" if scaling is None else f" with scaling {scaling}"
        under_way.outcome = f"{validated:.1%} of the validation digits of all tasks{chosen}"
    return Row(choice.name, MERGE, merged, test_accuracy(setting, merged), recipe, scaling, validated, curve)


def compare_adapters(setting: Setting) -> AdapterResult:
    """LoRA and linearized LoRA, fine-tuned on every task and merged in every combination."""
    count = adapter_steps(setting.digits.train, setting.regime, BATCH)
    with stage(setting.console, "adapters", count) as under_way:
        found = compare(
            setting.base, setting.out / "adapters", setting.digits, setting.regime, setting.scalings, setting.seed,
            under_way.advance,
        )  # fmt: skip
        under_way.outcome = f"{len(KINDS)} kinds, {len(found.merged)} merges"
    return found


def validation_curve(setting: Setting, choice: Merge, advance: Callable[[], None]) -> dict[float, float]:
    """Scaling -> mean accuracy over the tasks on the validation split, merged in memory."""
    base, model = load_state(setting.base), load_checkpoint(setting.base)
    finetunes = [load_state(folder) for folder in setting.finetunes.values()]
    curve = {}
    for scaling in setting.scalings:
        merged = merge_state_dicts(
            base, finetunes, method=choice.name, compat="mergekit", scaling=scaling, weight=1.0, **choice.keys
        )
        curve[scaling] = scored(model, merged, setting.digits.validation)
        advance()
    return curve


def scored(model: DigitsMLP, state: Mapping[str, Tensor], images: Images) -> float:
    """Mean accuracy over the tasks of the model with these weights."""
    model.load_state_dict(state)
    return mean_accuracy(model, images)


def mean_accuracy(model: DigitsMLP, images: Images) -> float:
    return sum(accuracy(model, images.seen_as(task)) for task in TASKS) / len(TASKS)


def test_accuracy(setting: Setting, folder: Path) -> dict[str, float]:
    """Domain -> accuracy on the test split of the checkpoint in a folder."""
    model = load_checkpoint(folder)
    return {domain: accuracy(model, setting.digits.test.seen_as(domain)) for domain in (*TASKS, UPRIGHT)}
