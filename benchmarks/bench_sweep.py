"""A sweep of 20 TIES variants, 4 densities x 5 weights: in memory one by one, into a live model, and to checkpoints.

n parameters, T = 3, bf16, V = 20 variants. In memory the inputs, 2 (T + 1) n bytes, are read once for all thresholds
and once for every 2 or 3 variants; 2 V n bytes are written. Floor: two threads read the inputs once and write V outputs
from the cache into memory that is used again; to checkpoints, two threads read the inputs once and write and fsync V
outputs. Reference: V times mergekit 0.1.5 for one, by its row in results/merge_suite.json (another run, files to
files); for checkpoints, V single merges by peta_fast in one process.

    python benchmarks/bench_sweep.py --families DIR     writes results/sweep.json and sweep.md
    peta-fast bench sweep
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER))

from family_files import WEIGHTS, Family, StoredTensors, get_family, one_of_each_shape, tensors_of  # noqa: E402
from floors import WRITE_WAYS, address, aligned, mapped, read_mapped_memmove, reads  # noqa: E402
from rows import Row, best_and_median, write_json  # noqa: E402
from ties_reference import NOTHING_COMPARED, error_of  # noqa: E402

import peta_fast  # noqa: E402
from peta_fast._native import native  # noqa: E402

GRID = {"weight": [0.2, 0.4, 0.6, 0.8, 1.0], "density": [0.1, 0.2, 0.3, 0.5]}
POINTS = 20
MERGEKIT = "mergekit 0.1.5 for one, times 20"


def mergekit_seconds(size: str) -> float | None:
    """Of one merge of files, as measured for merge_suite.json."""
    for row in json.loads((FOLDER / "results" / "merge_suite.json").read_text()):
        if row["name"] == f"merge_files[{size}]":
            return row["reference"]
    return None


class SweepRounds:
    """The rounds of one family, and whether everything that came out is right."""

    def __init__(self, family: Family, scratch: Path):
        self.family, self.scratch = family, scratch
        self.times: dict[str, list[float]] = {}
        self.live = {n: t.clone() for n, t in self._one().items()}

    def _one(self):
        (variant,) = peta_fast.sweep(self.family.recipe, grid={"density": [0.2]})
        return variant.state

    def time(self, name: str, work: Callable[[], object]) -> float:
        began = time.perf_counter()
        work()
        self.times.setdefault(name, []).append(time.perf_counter() - began)
        return self.times[name][-1]

    def best(self, name: str) -> float:
        return min(self.times[name])

    def twenty(self, **keywords) -> None:
        seen = sum(1 for variant in peta_fast.sweep(self.family.recipe, grid=GRID, **keywords) if variant.state)
        assert seen == POINTS

    def memory_round(self) -> None:
        self.time("one", self._one)
        self.time("twenty", self.twenty)
        self.time("twenty live", lambda: self.twenty(into=self.live))
        self._floor_in_memory()

    def _floor_in_memory(self) -> None:
        source, target = aligned(1 << 20, 7), aligned(self.family.output_bytes)
        pieces = range(0, self.family.output_bytes - len(source), len(source))
        copy = native().copy_bytes
        with mapped(self.family.weight_files()) as runs:
            read = min(reads(runs).values())
        began = time.perf_counter()
        for at in pieces:
            copy(address(target) + at, address(source), len(source), 1)
        one_thread = time.perf_counter() - began
        self.times.setdefault("floor", []).append(read + POINTS * one_thread / 2)

    def disk_round(self) -> None:
        out = self.scratch / "sweep"
        found = peta_fast.sweep(self.family.recipe, grid=GRID)
        self.time("written", lambda: found.write(out))
        shutil.rmtree(out)
        texts = [found.grid.text_of(i) for i in range(POINTS)]

        def singly():
            for k, text in enumerate(texts):
                peta_fast.merge(text, self.scratch / "single" / str(k))

        self.time("singly", singly)
        shutil.rmtree(self.scratch / "single")
        self.time("disk floor", self._floor_on_disk)

    def _floor_on_disk(self) -> None:
        read_mapped_memmove(self.family.weight_files())
        source = aligned(16 << 20, 7)
        for k in range(POINTS):
            WRITE_WAYS["O_DIRECT"](self.scratch / f"floor{k}", self.family.output_bytes, source)
        for k in range(POINTS):
            (self.scratch / f"floor{k}").unlink()

    def error(self) -> float:
        """The largest error over all variants and one tensor of every shape, against TIES in fp64."""
        opened = [StoredTensors(folder) for folder in self.family.checkpoints]
        names = one_of_each_shape(opened[0])
        found = NOTHING_COMPARED
        for variant in peta_fast.sweep(self.family.recipe, grid=GRID):
            if variant.index % 7:  # three of them, fp64 takes its time
                continue
            density, weight = variant.parameters["density"], variant.parameters["weight"]
            for name in names:
                out = _bits(variant.state[name])
                tensors = tensors_of(self.family, name, opened)
                found += error_of(out, tensors, [density] * len(WEIGHTS), [weight] * len(WEIGHTS), "first")
        return found.largest

    def require_single_merges(self) -> None:
        """Every variant must have the bits of its own merge, in memory, in the live model and on disk."""
        found = peta_fast.sweep(self.family.recipe, grid=GRID)
        out = self.scratch / "single"
        states = (found, peta_fast.sweep(self.family.recipe, grid=GRID, into=self.live))
        sums: list[dict[int, int]] = [{v.index: _checksum(v.state) for v in each} for each in states]
        for index in range(POINTS):
            peta_fast.merge(found.grid.text_of(index), out)
            stored = StoredTensors(out)
            single = _checksum({name: stored.tensor(name) for name in stored.files})
            assert {s[index] for s in sums} == {single}, found.grid.name(index)
            shutil.rmtree(out)


def _bits(tensor) -> np.ndarray:
    import torch

    return tensor.flatten().view(torch.int16).numpy().view(np.uint16)


def _checksum(state) -> int:
    total = 0
    for k, name in enumerate(sorted(state)):
        bits = _bits(state[name])
        total ^= native().checksum(address(bits), bits.nbytes, 2) * (2 * k + 1) % (1 << 64)
    return total


def rows_of(rounds: SweepRounds, on_disk: bool) -> list[Row]:
    family, size = rounds.family, rounds.family.size
    rounds.require_single_merges()
    error = {"error": rounds.error(), "error_unit": "of 2^-7"}
    one, mergekit = rounds.best("one"), mergekit_seconds(size)
    shape = f"{family.shape}, {POINTS} variants"

    def in_memory(name: str, key: str, goal: str) -> Row:
        ours = rounds.best(key)
        details = {
            "one_variant": best_and_median(rounds.times["one"]), "times_one_variant": ours / one,
            "seconds_a_variant": ours / POINTS, "ours": best_and_median(rounds.times[key]),
            "floor": best_and_median(rounds.times["floor"]), "mergekit_for_one": mergekit,
            "same_bits_as_single_merges": True,
        }  # fmt: skip
        return Row(
            f"{name}[{size}]", shape, ours, mergekit * POINTS if mergekit else None, rounds.best("floor"), **error,
            reference_name=MERGEKIT, floor_name="inputs read once, 20 outputs written to memory", goal=goal,
            nbytes=family.input_bytes + POINTS * family.output_bytes, details=details,
        )  # fmt: skip

    goal = f"at most 10 times one variant: {rounds.best('twenty') / one:.2f}; 100 times mergekit"
    live = f"at most 10 times one variant: {rounds.best('twenty live') / one:.2f}"
    found = [
        Row(f"sweep_one_point[{size}]", family.shape, one, mergekit, None, **error, reference_name="mergekit 0.1.5",
            details={"ours": best_and_median(rounds.times["one"])}),
        in_memory("sweep_in_memory", "twenty", goal),
        in_memory("sweep_into_live_model", "twenty live", live),
    ]  # fmt: skip
    if on_disk:
        details = {key: best_and_median(rounds.times[key]) for key in ("written", "singly", "disk floor")}
        found.append(
            Row(f"sweep_to_checkpoints[{size}]", shape, rounds.best("written"), rounds.best("singly"),
                rounds.best("disk floor"), **error, reference_name="20 single merges by peta_fast, one process",
                floor_name="read once, write and fsync 20 outputs",
                nbytes=family.input_bytes + POINTS * family.output_bytes, details=details)
        )  # fmt: skip
    return found


def bench_sweep_in_memory(measure, family, tmp_path):
    rounds = SweepRounds(family, tmp_path)

    def floor() -> float:
        rounds._floor_in_memory()
        return rounds.times["floor"][-1]

    measure(
        rounds.twenty, floor=floor, floor_name="inputs read once, 20 outputs written", error=rounds.error,
        error_unit="of 2^-7", shape=family.shape, nbytes=family.input_bytes + POINTS * family.output_bytes,
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--families", type=Path, required=True, help="where families of models are kept")
    parser.add_argument("--sizes", nargs="+", default=["160m"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--disk-rounds", type=int, default=2)
    parser.add_argument("--results", type=Path, default=FOLDER / "results")
    options = parser.parse_args(arguments)
    scratch = options.families / "sweep-scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    rows: list[Row] = []
    for size in options.sizes:
        rounds = SweepRounds(get_family(options.families, size), scratch)
        for _ in range(options.rounds):
            rounds.memory_round()
        for _ in range(options.disk_rounds):
            rounds.disk_round()
        rows += rows_of(rounds, options.disk_rounds > 0)
    shutil.rmtree(scratch)
    from table import markdown, read_rows

    write_json(rows, options.results / "sweep.json")
    (options.results / "sweep.md").write_text(markdown(read_rows(options.results / "sweep.json")), encoding="utf-8")
    print((options.results / "sweep.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
