"""What learned merges do on real images: digits in four domains, mean over seeds, as a Markdown table.

usage: fit_digits.py [SEEDS]

Base and fine-tunes as the demonstration trains them, in half the epochs. Each fit sees the test images unlabelled, 16
of every domain a step. Entropy: of the answers on all test images, in nats, mean over the domains. Two minutes.
"""

from __future__ import annotations

import copy
import sys
from statistics import mean, stdev

import torch

from peta_fast.demo.data import TASKS, load_digits
from peta_fast.demo.train import FULL, accuracy, base_images, new_model, reproducible, trained
from peta_fast.fit.adamerging import adamerging
from peta_fast.fit.concrete import concrete_adamerging, concrete_task_arithmetic
from peta_fast.fit.tasks import Task, entropy

TWO_LEVELS = {"steps": 50, "learning_rate": 0.01, "inner_learning_rate": 0.3, "coefficient_learning_rate": 0.01,
              "coefficient_steps": 100}  # fmt: skip
FITS = {
    "task arithmetic, 0.3": (adamerging, {"steps": 0}),
    "task arithmetic, 0.5": (adamerging, {"steps": 0, "initial": 0.5}),
    "AdaMerging, task-wise": (adamerging, {"steps": 100, "learning_rate": 0.01, "granularity": "task"}),
    "AdaMerging, layer-wise": (adamerging, {"steps": 100, "learning_rate": 0.01}),
    "AdaMerging++, layer-wise": (adamerging, {"steps": 100, "learning_rate": 0.01, "density": 0.2}),
    "a random soft mask": (concrete_task_arithmetic, {"steps": 0}),
    "Concrete task arithmetic, rate 0.01": (concrete_task_arithmetic, {"steps": 100, "learning_rate": 0.01}),
    "Concrete task arithmetic, rate 0.1": (concrete_task_arithmetic, {"steps": 100, "learning_rate": 0.1}),
    "Concrete AdaMerging, task-wise": (concrete_adamerging, TWO_LEVELS | {"granularity": "task"}),
    "Concrete AdaMerging, layer-wise": (concrete_adamerging, TWO_LEVELS),
}


def scores(seed: int) -> dict[str, tuple[float, float]]:
    """Name of a fit -> accuracy and entropy, means over the domains."""
    digits = load_digits(seed)
    images = base_images(digits.train, FULL)
    base = trained(new_model(seed), images, epochs=20, learning_rate=1e-3, seed=seed, advance=int)
    tuned = [
        trained(base, digits.train.seen_as(t), epochs=6, learning_rate=1e-4, seed=seed + 1, advance=int) for t in TASKS
    ]
    test = {t: digits.test.seen_as(t) for t in TASKS}
    found = {}
    for name, (fit, settings) in FITS.items():
        model = copy.deepcopy(base)
        fit(model, tuned, [Task(t, test[t].pixels.split(16)) for t in TASKS], base=base, **settings)
        with torch.no_grad():
            unsure = mean(entropy(model(test[t].pixels)).item() for t in TASKS)
        found[name] = mean(accuracy(model, test[t]) for t in TASKS), unsure
    return found


def main() -> None:
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    with reproducible():
        found = [scores(seed) for seed in range(seeds)]
    print(f"| digits, mean and deviation of {seeds} seeds | accuracy | entropy |\n|---|---|---|")
    for name in FITS:
        right, unsure = ([s[name][which] for s in found] for which in (0, 1))
        spread = f" ± {100 * stdev(right):.1f}" if seeds > 1 else ""
        print(f"| {name} | {100 * mean(right):.1f} %{spread} | {mean(unsure):.3f} |")


if __name__ == "__main__":
    main()
