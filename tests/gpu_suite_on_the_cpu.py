"""Runs benchmarks/gpu_suite.py where there is no GPU, at small sizes, to see that every step of it runs.

usage: gpu_suite_on_the_cpu.py OUT LIBRARY

"cuda" is the CPU, the CUDA library its host build, Triton its interpreter, an event the time of day; the tests that the
suite runs are left out. Prints the suite's exit code last.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))


def on_the_cpu(function):
    """The function, where "cuda" means the CPU."""

    @functools.wraps(function)
    def called(*arguments, **options):
        found = ["cpu" if isinstance(a, str) and a == "cuda" else a for a in arguments]
        return function(*found, **options | ({"device": "cpu"} if options.get("device") == "cuda" else {}))

    return called


class Generator(torch.Generator):
    def __new__(cls, device: str = "cpu"):
        return super().__new__(cls, "cpu")


class Event:
    def __init__(self, **_):
        self.at = 0.0

    def record(self, *_) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, later: Event) -> float:
        return 1e3 * (later.at - self.at)


def pretend() -> None:
    """Replaces what is asked of CUDA, and what fixes the sizes."""
    for name, found in {"is_available": True, "synchronize": None, "empty_cache": None, "memory_allocated": 0,
                        "reset_peak_memory_stats": None, "max_memory_allocated": 0, "get_device_name": "no GPU",
                        "mem_get_info": (1 << 40, 1 << 40)}.items():  # fmt: skip
        setattr(torch.cuda, name, lambda *_, found=found: found)
    torch.cuda.Event = Event
    for place, name in [(torch, "empty"), (torch, "rand"), (torch.Tensor, "to")]:
        setattr(place, name, on_the_cpu(getattr(place, name)))
    torch.Generator = Generator

    import gpu_merges
    import gpu_suite
    from lora_groups import GroupShape
    from lora_layers import Shape

    from peta_fast import merging
    from peta_fast._cuda import library
    from peta_fast.ops import device

    ops = device.DeviceOps(library(), device.HostMemory())
    device.of_device = lambda name: ops
    merging.device_of = lambda value: "host"
    files = gpu_merges.rows_from_files
    gpu_merges.LAYER = {"q": (48, 40), "down": (40, 64), "norm": (48,)}
    gpu_merges.sizes = lambda quick: [(1.5e4, 3, True)]
    gpu_merges.copy_rate = lambda: 1e9
    gpu_merges.rows_from_files = lambda parameters, rounds: files(1.5e4, 1)
    gpu_suite.shapes = lambda quick: [Shape(24, 64, 80, 4), Shape(24, 64, 80, 4, general=True)]
    gpu_suite.group_shapes = lambda quick: [GroupShape(24, 64, (64, 16, 16), 4)]
    gpu_suite.run_tests = lambda *_: []
    gpu_suite.tune = lambda out, quick: (out / "measured.json").write_text("{}")


def main(out: str, library: str) -> None:
    os.environ["PETA_FAST_CUDA_LIBRARY"] = library
    torch.set_num_threads(1)
    pretend()
    import gpu_suite

    code = gpu_suite.main(["--skip-build", "--tune", "--rounds", "1", "--minutes", "5", "--out", out])
    print(f"\n{code}")


if __name__ == "__main__":
    main(*sys.argv[1:])
