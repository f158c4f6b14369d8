"""What a method says of an element-wise merge: what each task keeps, what that is multiplied by, how it all adds up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Ties = Literal["all", "first"]
"""Which of the elements equal to a threshold belong: all of them, or the lowest indices up to the exact count."""


@dataclass(frozen=True)
class All:
    """Keeps every entry."""


@dataclass(frozen=True)
class Nothing:
    """Keeps no entry."""


@dataclass(frozen=True)
class Top:
    """Keeps the `count` largest |delta| of the trim scope."""

    count: int
    ties: Ties = "all"


@dataclass(frozen=True)
class Band:
    """Skips the `skip` largest |delta|, keeps the `count` after them.

    ties "all": lo <= |delta| < hi with lo the (skip + count)-th and hi the skip-th largest.
    """

    skip: int
    count: int
    ties: Ties = "all"


@dataclass(frozen=True)
class Above:
    """Keeps |delta| > threshold."""

    threshold: float


@dataclass(frozen=True)
class Random:
    """Keeps each entry with this probability, by Philox over (seed, task, tensor name, flat index)."""

    probability: float


@dataclass(frozen=True)
class RankedRandom:
    """Random with a probability that rises with the rank of |delta| in its row: `low` for the smallest, `high` for
    the largest. A row runs along the last dimension; a tensor of one dimension or none is one row."""

    low: float
    high: float


Keep = All | Nothing | Top | Band | Above | Random | RankedRandom


@dataclass(frozen=True)
class Term:
    """One task's part.

    weight    multiplies the task vector
    keep      which entries survive
    prescale  multiplies the survivors; "l1" restores the L1 norm of the whole task vector (1 where a norm < 1e-7);
              "1/p" multiplies each survivor of RankedRandom by 1 / its own probability
    """

    weight: float = 1.0
    keep: Keep = All()
    prescale: float | Literal["l1", "1/p"] = 1.0


@dataclass(frozen=True)
class DeltaMerge:
    """An element-wise merge of T tasks over one tensor, in the algebra of the fused kernel.

    base        what is subtracted and added again: the base tensor, zero (weights merged as they are) or one
    elect       how the sign is elected: by the sum of weighted deltas, of deltas, or of their signs; None for no sign
    zero        what a zero sum elects: nothing (base stays), plus, minus, or the majority sign of the whole model and,
                where that is 0 too, minus or plus
    aggregate   sum, max (of the agreeing), largest (magnitude overall; the first or last of equals), lower median
    divide      by a constant, by the sum of the agreeing weights, or by their number; exactly 0 counts as 1
    scaling     multiplies the merged delta
    scope       trim scope of Top and Band
    masked      every term is multiplied by its mask, then by 1 / mean(mask) when mask_rescale is "mean"
    """

    terms: tuple[Term, ...]
    base: Literal["tensor", "zero", "one"] = "tensor"
    elect: Literal["weighted", "unweighted", "count"] | None = None
    zero: Literal["drop", "plus", "minus", "majority-minus", "majority-plus"] = "drop"
    aggregate: Literal["sum", "max", "largest", "largest-last", "median"] = "sum"
    divide: float | Literal["agreeing-weight", "agreeing-count"] = 1.0
    scaling: float = 1.0
    scope: Literal["tensor", "row-block", "model"] = "tensor"
    masked: bool = False
    mask_rescale: Literal["none", "mean"] = "none"

    @property
    def needs_model_signs(self) -> bool:
        return self.zero.startswith("majority")

    @property
    def needs_model_thresholds(self) -> bool:
        return self.scope == "model" and any(isinstance(t.keep, (Top, Band)) for t in self.terms)
