"""What the benchmarks share: functions named bench_*, side-by-side rounds, and the row in extra_info."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER))

from family_files import SIZES, get_family  # noqa: E402
from floors import seconds  # noqa: E402
from machine import surroundings  # noqa: E402
from rows import best_and_median, ratios  # noqa: E402

from peta_fast._native import native  # noqa: E402
from peta_fast.buffers import Buffer  # noqa: E402

INSTRUCTION_SETS = ("baseline", "avx2", "avx512")


def pytest_addoption(parser):
    group = parser.getgroup("merge benchmarks")
    group.addoption("--families", type=Path, default=FOLDER.parent / ".benchmarks" / "families", metavar="DIR",
                    help="where families of models are kept, and made when missing")  # fmt: skip
    group.addoption("--family-size", choices=SIZES, default="160m")
    group.addoption("--mergekit", type=Path, default=None, metavar="PYTHON", help="a Python with mergekit 0.1.5")
    group.addoption("--rounds", type=int, default=5)


def pytest_configure(config):
    config.addinivalue_line("python_functions", "bench_")
    config.addinivalue_line("python_files", "bench_*.py")


@pytest.fixture
def mergekit(request) -> Path | None:
    """A Python that has mergekit."""
    return request.config.getoption("--mergekit")


@pytest.fixture
def family(request):
    """The family of --family-size."""
    return get_family(request.config.getoption("--families"), request.config.getoption("--family-size"))


@pytest.fixture
def tiny_family(request):
    return get_family(request.config.getoption("--families"), "tiny")


@pytest.fixture
def measure(benchmark, request) -> Callable[..., None]:
    """measure(ours, floor=..., reference=..., error=...): interleaved rounds, then the row.

    ours       () -> anything; what pytest-benchmark times
    reference  () -> seconds of one round of the peer, or None; runs first in every round
    floor      () -> seconds of one round of the least that must happen; runs right before ours
    error      () -> float, after the last round, or None where there is nothing to be wrong
    row        further fields: shape, nbytes, floor_name, reference_name, error_unit, goal
    """
    rounds = request.config.getoption("--rounds")

    def run(ours, *, floor, reference=None, error=None, **row):
        floors, references = [], []

        def the_others():
            if reference is not None:
                references.append(reference())
            floors.append(floor())

        benchmark.pedantic(ours, setup=the_others, rounds=rounds, warmup_rounds=1)
        found = {
            **{"nbytes": 0, "unit": "s", "reference_name": "", "floor_name": "", "error_unit": "", "goal": ""},
            **row,
            "reference": min(references, default=None),
            "floor": min(floors),
            "error": error() if error is not None else None,
            "details": {"floor": best_and_median(floors)},
        }
        if benchmark.stats is not None:  # None under --benchmark-disable
            best = benchmark.stats.stats.min
            found.update(ratios(best, found["reference"], found["floor"], found["nbytes"]))
        benchmark.extra_info.update({**found, **surroundings()})

    return run


@pytest.fixture(params=INSTRUCTION_SETS)
def simd(request):
    """Runs the native operations with one instruction set; skipped where the CPU lacks it."""
    module = native()
    if module is None or not module.set_simd(request.param):
        pytest.skip(f"no {request.param} here")
    yield request.param
    module.set_simd("")


@pytest.fixture
def timed() -> Callable[[Callable[[], object]], Callable[[], float]]:
    """timed(work)() runs work and returns the seconds it took."""
    return lambda work: lambda: seconds(work)


@pytest.fixture(scope="session")
def bf16_family() -> Callable[[int, int], tuple[np.ndarray, list[np.ndarray]]]:
    """(elements, tasks) -> base and models, uint16 arrays of bf16; heavy-tailed deltas as the generator has them."""
    from ties_reference import from_bf16, to_bf16

    bases: dict[int, np.ndarray] = {}
    tuned: dict[int, list[np.ndarray]] = {}

    def make(size: int, tasks: int):
        if size not in bases:
            bases[size] = to_bf16(np.random.default_rng(0).standard_normal(size, np.float32) * np.float32(0.02))
        models = tuned.setdefault(size, [])
        while len(models) < tasks:
            step = np.random.default_rng(len(models) + 1).standard_normal(size, np.float32)
            models.append(to_bf16(from_bf16(bases[size]) + np.float32(0.0015) * step * np.abs(step)))
        return bases[size], models[:tasks]

    return make


@pytest.fixture
def buffer_of() -> Callable[[np.ndarray], Buffer]:
    return lambda array: Buffer.from_array(array, "BF16")
