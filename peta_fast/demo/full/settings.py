"""How large everything is. Every number that changes a result stands here, and so in the fingerprints of the stages."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

DIGITS, TEXT = "digits", "text"


@dataclass(frozen=True)
class Training:
    """One kind of fine-tuning in one track: epochs over the task's training examples, AdamW's learning rate."""

    epochs: int
    learning_rate: float


@dataclass(frozen=True)
class TrackSettings:
    """One track.

    train, validation, test   examples a task (digits) or a label of a task (text) at most
    batch            examples a step of training; score_batch: of scoring
    training         kind -> how it is fine-tuned
    rank, alpha      of adapters, targets: tails of the names of the modules that get one
    scalings         the grid from which validation picks lambda; mats_iterations: the same for MaTS' iterations
    statistics       examples a task behind the Fisher and the Gram matrices
    fit_steps        of AdaMerging and of Concrete; fit_batch: unlabelled validation examples a task and step
    triples          whether merges of three of four tasks are made, besides pairs and all
    frozen_layers    of the BERT, from below, which are frozen with its embeddings
    base_epochs      of the digits' base; few_per_digit: labelled images of each task's domain that it sees
    """

    train: int
    validation: int
    test: int
    batch: int
    score_batch: int
    training: dict[str, Training]
    rank: int
    alpha: int
    targets: tuple[str, ...]
    scalings: tuple[float, ...]
    statistics: int
    fit_steps: int
    fit_batch: int
    adamerging_rate: float
    concrete_rate: float
    mats_iterations: tuple[int, ...]
    density: float = 0.2
    triples: bool = True
    frozen_layers: int = 0
    base_epochs: int = 0
    base_rate: float = 0.0
    few_per_digit: int = 0

    def document(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Regime:
    name: str
    seeds: int
    tracks: dict[str, TrackSettings]


FULL_TRACKS = {
    DIGITS: TrackSettings(
        train=1000, validation=150, test=350, batch=50, score_batch=175,
        training={
            "full": Training(8, 1e-3), "attention": Training(8, 2e-3), "lora": Training(8, 6e-3),
            "linear_layer": Training(8, 1e-2), "linear_model": Training(6, 2e-2),
        },
        rank=8, alpha=16, targets=("query", "key", "value", "dense", "fc1", "fc2"),
        scalings=(0.2, 0.3, 0.45, 0.7, 1.0), statistics=200, fit_steps=15, fit_batch=16, triples=False,
        adamerging_rate=0.02, concrete_rate=0.2, mats_iterations=(3, 10),
        base_epochs=40, base_rate=2e-3, few_per_digit=8,
    ),
    TEXT: TrackSettings(
        train=60, validation=12, test=24, batch=16, score_batch=32,
        training={
            "full": Training(3, 1e-4), "attention": Training(3, 3e-4), "lora": Training(3, 4e-3),
            "linear_layer": Training(3, 8e-3), "linear_model": Training(3, 8e-3),
        },
        rank=16, alpha=32, targets=("query", "value"),
        scalings=(0.3, 0.5, 0.8, 1.2, 1.8, 2.6), statistics=100, fit_steps=10, fit_batch=8,
        adamerging_rate=0.03, concrete_rate=0.1, mats_iterations=(3, 8), frozen_layers=3,
    ),
}  # fmt: skip
FULL = Regime("full", 3, FULL_TRACKS)


def _tiny(track: TrackSettings, **sizes: Any) -> TrackSettings:
    short = {kind: replace(how, epochs=1) for kind, how in track.training.items()}
    small = {"training": short, "scalings": (0.5, 1.0), "fit_steps": 1, "fit_batch": 4, "mats_iterations": (1,)}
    return replace(track, **{**small, "triples": False, **sizes})


TINY = Regime(
    "quick", 1,
    {
        DIGITS: _tiny(FULL_TRACKS[DIGITS], train=100, validation=30, test=40, base_epochs=6, statistics=10),
        TEXT: _tiny(FULL_TRACKS[TEXT], train=4, validation=2, test=4, statistics=4, frozen_layers=5),
    },
)  # fmt: skip
"""A rehearsal: everything runs once, and no number means anything."""
REGIMES = {regime.name: regime for regime in (FULL, TINY)}
