"""Orderings that the papers report, and what these runs say of each."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from peta_fast.demo.full.results import TrackResult


@dataclass(frozen=True)
class Claim:
    """`better` lies above `worse`: numbers of one track, one a seed, in the same unit."""

    text: str
    source: str
    better: Callable[[TrackResult], list[float]]
    worse: Callable[[TrackResult], list[float]]


@dataclass(frozen=True)
class Verdict:
    """difference: better - worse, mean over the seeds; spread: its deviation; holds: in all, in none, or None."""

    difference: float
    spread: float
    holds: bool | None

    @property
    def word(self) -> str:
        return {True: "holds", False: "does not", None: "unclear"}[self.holds]


def method(name: str, kind: str = "full") -> Callable[[TrackResult], list[float]]:
    return lambda track: track.normalized(kind, name)


def own(kind: str) -> Callable[[TrackResult], list[float]]:
    return lambda track: track.own_mean(kind)


def apart(kind: str) -> Callable[[TrackResult], list[float]]:
    """How far task vectors are from pointing the same way: 1 - mean |cosine|."""
    return lambda track: [1 - c for c in track.mean_cosine(kind)]


def over(better: str, worse: str, source: str, text: str = "") -> Claim:
    from peta_fast.demo.full.merges import METHODS

    return Claim(text or f"{METHODS[better]} above {METHODS[worse]}", source, method(better), method(worse))


TANG, JIN = "Tang et al., 2310.04742", "Jin et al., 2407.07089"
CLAIMS = (
    Claim("alone, full fine-tuning above LoRA", TANG, own("full"), own("lora")),
    Claim("alone, LoRA above layer-wise L-LoRA", TANG, own("lora"), own("linear_layer")),
    Claim("task vectors of layer-wise L-LoRA nearer to orthogonal than LoRA's", TANG,
          apart("linear_layer"), apart("lora")),
    Claim("task arithmetic: layer-wise L-LoRA keeps more than LoRA", TANG,
          method("task_arithmetic", "linear_layer"), method("task_arithmetic", "lora")),
    Claim("TIES: layer-wise L-LoRA keeps more than LoRA", TANG, method("ties", "linear_layer"), method("ties", "lora")),
    Claim("task arithmetic: whole-model L-LoRA keeps more than LoRA", TANG,
          method("task_arithmetic", "linear_model"), method("task_arithmetic", "lora")),
    Claim("task arithmetic: attention-only keeps more than full fine-tuning", JIN,
          method("task_arithmetic", "attention"), method("task_arithmetic")),
    over("task_arithmetic", "average", "Ilharco et al., 2212.04089"),
    over("ties", "task_arithmetic", "Yadav et al., 2306.01708"),
    over("dare", "task_arithmetic", "Yu et al., 2311.03099"),
    over("fisher", "average", "Matena and Raffel, 2111.09832"),
    over("regmean", "average", "Jin et al., 2212.09849"),
    over("regmean", "fisher", "Jin et al., 2212.09849"),
    over("mats", "regmean", "Tam et al., 2312.04339"),
    over("adamerging", "task_arithmetic", "Yang et al., 2310.02575"),
    over("concrete", "task_arithmetic", "Tang et al., 2312.06173"),
)  # fmt: skip


def judged(claim: Claim, track: TrackResult) -> Verdict:
    """Paired by seed."""
    found = [b - w for b, w in zip(claim.better(track), claim.worse(track), strict=True)]
    holds = True if min(found) > 0 else False if max(found) < 0 else None
    return Verdict(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else 0.0, holds)
