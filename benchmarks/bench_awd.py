"""AWD over a model in memory, fp32: one pass for the Gram matrix, 300 steps over T numbers, one pass to merge.

Reads base + T models twice and writes one: (2 (T + 1) + 1) 4n bytes. Floor: reading and copying as much.
Reference: plain PyTorch, 300 gradient steps on all n elements and the merge, by a gradient written by hand; STEPS of
the 300 are run and scaled up. By autograd it takes longer; that is in the details.
Checked in the same run at n = 10^6, where all 300 steps of the plain descent are run in fp64.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from awd_reference import ITERATIONS, by_autograd, by_hand
from floors import address, copies, reads, seconds

import peta_fast as pf

STEPS = 3
TASKS = 4
SMALL = 10**6
WEIGHT = 0.4


def family(size: int, tasks: int = TASKS):
    """Base and models [n] fp32; task vectors of length about 1, a third of it common to all."""
    rng = np.random.default_rng(0)

    def normal(scale: float) -> np.ndarray:
        return rng.standard_normal(size, np.float32) * np.float32(scale)

    base, common = normal(0.02), normal(0.33 * size**-0.5)
    return base, [base + common + normal(size**-0.5) for _ in range(tasks)]


def merged(base: np.ndarray, models, out: np.ndarray) -> None:
    pf.merge_state_dicts({"w": base}, [{"w": m} for m in models], method="awd", weight=WEIGHT, out={"w": out})


@pytest.mark.parametrize("size", [10**8], ids=["n1e8"])
def bench_awd(measure, size, benchmark):
    base, models = family(size)
    out = np.empty_like(base)
    tau = torch.from_numpy(np.stack([m - base for m in models]))
    by_autograd(tau, 1)
    one = seconds(lambda: by_autograd(tau, 1))
    autograd = seconds(lambda: by_autograd(tau, 2)) - one
    details = {"autograd_seconds_a_step": autograd, "autograd_seconds_of_300": ITERATIONS * autograd, "steps": STEPS}

    def plain() -> float:
        """Seconds of 300 steps and the merge, from 1 step, 1 + STEPS steps and the merge."""
        one, several = seconds(lambda: by_hand(tau, 1)), seconds(lambda: by_hand(tau, 1 + STEPS))
        delta = by_hand(tau, 1)
        last = seconds(lambda: torch.from_numpy(base) + WEIGHT * (tau - delta).sum(0))
        return ITERATIONS * (several - one) / STEPS + last

    runs = [(address(a), a.nbytes) for a in (base, *models)]
    measure(
        lambda: merged(base, models, out),
        reference=plain,
        reference_name=f"plain PyTorch, {STEPS} of {ITERATIONS} steps scaled up",
        floor=lambda: 2 * min(reads(runs).values()) + min(copies([(address(out), address(base), out.nbytes)]).values()),
        floor_name="reading all twice, writing once",
        error=error,
        error_unit="of the largest change",
        shape=f"n={size:.0e}, T{TASKS}, fp32",
        goal="at least 50 times faster",
        nbytes=(2 * (TASKS + 1) + 1) * 4 * size,
    )
    benchmark.extra_info["details"].update(details)


def error() -> float:
    """Largest difference from the plain descent in fp64, all 300 steps, of the largest change of the base."""
    base, models = family(SMALL)
    out = np.empty_like(base)
    merged(base, models, out)
    start = torch.from_numpy(base).double()
    tau = torch.stack([torch.from_numpy(m - base).double() for m in models])
    exact = start + WEIGHT * (tau - by_autograd(tau)).sum(0)
    plain = start + WEIGHT * tau.sum(0)
    assert (exact - plain).abs().max() > 1e-3 * (exact - start).abs().max(), "nothing was taken away"
    return float((torch.from_numpy(out).double() - exact).abs().max() / (exact - start).abs().max())
