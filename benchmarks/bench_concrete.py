"""A step of Concrete subspace learning without the network: draw, merge, gradients, Adam.

Bytes an element, fp32: with lambda fixed 64 (the task vectors are summed up once); with a step of T lambdas between two
merges 16 T + 80. Floor: two-thread memcpy that moves as many. Reference: the same step in plain PyTorch, which keeps T
masked task vectors for autograd. `error` is the largest of theta, dL/dlogit and dL/dlambda against fp64, relative to
each one's largest value; it is checked in the same run. bench_memory is the peak above the inputs (base, task vectors,
gradient of the merged model) in a process of its own. bench_whole_step is a step with a network of 34e6 parameters, a
batch of 16 for each of four tasks.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from concrete_steps import KINDS, WAYS, Inputs, largest_error, moved_bytes
from floors import address, aligned, copies, seconds

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
ELEMENTS = 1 << 28 if GPU else 12 << 20
GOAL = "at least 3 times faster"
MOST_ERROR = 1e-5
"""A speed is no figure where the result is wrong."""


@pytest.fixture(params=[4, 8], ids="T{}".format)
def tasks(request) -> int:
    return request.param


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


def bench_step(measure, kind, tasks):
    inputs = Inputs(ELEMENTS, tasks, DEVICE)
    ours, reference = (way(inputs, kind) for way in WAYS.values())
    error = largest_error(ours)
    assert error < MOST_ERROR, f"the result is off by {error}"
    fresh = [g.clone() for g in inputs.g]

    def run(runner):
        for g, kept in zip(inputs.g, fresh, strict=True):
            g.copy_(kept)  # as a backward would, which is not timed
        return seconds(lambda: finished(runner.step))

    run(ours), run(reference)
    nbytes = moved_bytes(kind, ELEMENTS, tasks)
    source, target = (aligned(nbytes // 4, fill=1) for _ in range(2))  # twice: as much read as written
    floor = [(address(target), address(source), nbytes // 4)]
    measure(
        lambda: finished(ours.step),
        reference=lambda: run(reference),
        reference_name="plain PyTorch",
        floor=lambda: 2 * min(copies(floor).values()),
        floor_name="two-thread memcpy",
        error=lambda: error,
        error_unit="relative",
        nbytes=nbytes,
        shape=f"{kind}, T={tasks}, {ELEMENTS / 1e6:.1f}e6 elements, fp32, {DEVICE}",
        goal=GOAL,
    )


@pytest.mark.skipif(GPU, reason="measures the memory of a process")
def bench_memory(benchmark, kind, tasks):
    from machine import surroundings
    from rows import ratios

    found = {}
    for way in WAYS:
        command = [sys.executable, Path(__file__).with_name("concrete_steps.py"), way, kind, ELEMENTS, tasks]
        ran = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True)
        found[way] = int(ran.stdout)
    benchmark.pedantic(lambda: None)  # the figure is not a time
    state = 16 * ELEMENTS  # logit, two moments, the merged model
    benchmark.extra_info.update(
        {
            "ours": found["ours"], "reference": found["reference"], "floor": state, "error": None, "unit": "bytes",
            "nbytes": 0, "shape": f"{kind}, T={tasks}, {ELEMENTS / 1e6:.1f}e6 elements, fp32, {DEVICE}",
            "reference_name": "plain PyTorch", "floor_name": "logits, moments, merged model", "error_unit": "",
            "goal": "at most a third", **ratios(found["ours"], found["reference"], state, 0), **surroundings(),
        }
    )  # fmt: skip


def bench_whole_step(measure):
    from peta_fast.demo.model import DigitsConfig, DigitsMLP
    from peta_fast.fit._merged_model import MergedModel
    from peta_fast.fit._steps import History
    from peta_fast.fit.concrete import MaskLearner
    from peta_fast.fit.tasks import Task, entropy
    from peta_fast.ops.concrete_mask.reference import merge_reference

    torch.manual_seed(0)
    model = DigitsMLP(DigitsConfig(hidden_size=1024, intermediate_size=4096)).to(DEVICE)
    base = {n: t.clone() for n, t in model.state_dict().items()}
    tuned = [{n: t + 0.002 * torch.randn_like(t) for n, t in base.items()} for _ in range(4)]
    batches = [torch.rand(16, 8, 8, device=DEVICE) for _ in range(4)]
    merged = MergedModel(model, tuned, [Task(str(t), [b]) for t, b in enumerate(batches)], base=base, summed=[0.3] * 4)
    learner, history = MaskLearner(merged, 0, 0.5, 0.0, 1e-3), History(merged, None)
    ones = torch.ones(len(merged.names), 1, device=DEVICE)

    def ours():
        learner.draw(len(history.steps) + 1)
        merged.rebuild(ones)
        history.note("masks", 1, 1, merged.backward("entropy"))
        learner.step(history)

    plain = copy.deepcopy(model).requires_grad_(False)
    vectors = {n: [s[n] - b for s in tuned] for n, b in base.items()}
    logits = {n: torch.zeros_like(b, requires_grad=True) for n, b in base.items()}
    optimizer = torch.optim.Adam(logits.values(), lr=1e-3)
    lambdas = torch.full((4,), 0.3, device=DEVICE)

    def reference():
        half = torch.tensor(0.5, device=DEVICE)
        masks = {n: torch.distributions.RelaxedBernoulli(half, logits=x).rsample() for n, x in logits.items()}
        state = {n: merge_reference(b, vectors[n], lambdas, masks[n]) for n, b in base.items()}
        sum(entropy(torch.func.functional_call(plain, state, (b,))) for b in batches).backward()
        optimizer.step()
        optimizer.zero_grad()

    with merged.fitting():
        measure(
            lambda: finished(ours),
            reference=lambda: seconds(lambda: finished(reference)),
            reference_name="plain PyTorch",
            floor=lambda: seconds(lambda: finished(lambda: merged.backward("entropy"))),
            floor_name="the network alone",
            shape=f"task_arithmetic, T=4, {sum(b.numel() for b in base.values()) / 1e6:.1f}e6 parameters, {DEVICE}",
            goal="",
        )


def finished(work) -> None:
    work()
    if GPU:
        torch.cuda.synchronize()
