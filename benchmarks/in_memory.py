"""TIES in memory: the select passes and the merge pass by themselves, against memcpy and plain PyTorch.

n parameters, T models, bf16:
    select  reads base + T models            2 (T + 1) n bytes    floor: reading them once, two threads
    merge   reads the same, writes the result  2 (T + 2) n bytes    floor: memcpy that moves as much, two threads
A memcpy of b bytes reads b and writes b, so b = (T + 2) n here. Plain PyTorch runs one tensor of every shape but the
embeddings', and is scaled by the number of parameters, since it takes minutes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from family_files import DENSITY, WEIGHTS, Family, StoredTensors, one_of_each_shape
from floors import PAGE, THREADS, address, aligned, copies, reads
from rows import Row, best_and_median
from ties_reference import NOTHING_COMPARED, Error, Tensors, error_of, plain_pytorch

from peta_fast.buffers import Buffer
from peta_fast.ops.delta_merge import DeltaMerge, Inputs, Job, Prepared, Term, Top, merge, prepare

LARGEST_FOR_PYTORCH = 16 << 20
NAN_BYTE = 0xFF


class Arena:
    """All tensors of one model in one run of memory, each at a page's start."""

    def __init__(self, sizes: Mapping[str, int]):
        self.sizes, self.offsets, end = dict(sizes), {}, 0
        for name, size in sizes.items():
            self.offsets[name] = end
            end += -(-2 * size // PAGE) * PAGE
        self.memory = aligned(end, NAN_BYTE)

    def array(self, name: str) -> np.ndarray:
        """uint16 [n]"""
        start = self.offsets[name]
        return self.memory[start : start + 2 * self.sizes[name]].view(np.uint16)

    def buffer(self, name: str) -> Buffer:
        return Buffer.from_array(self.array(name), "BF16")

    @property
    def run(self) -> tuple[int, int]:
        return address(self.memory), self.memory.nbytes


def ties(shape_size: int) -> DeltaMerge:
    count = max(1, int(DENSITY * shape_size))
    terms = tuple(Term(weight, Top(count)) for weight in WEIGHTS)
    return DeltaMerge(terms, elect="weighted", divide="agreeing-weight")


class InMemory:
    """The rounds of one family, in memory."""

    def __init__(self, family: Family):
        self.family = family
        opened = [StoredTensors(folder) for folder in family.checkpoints]
        self.shapes = {name: opened[0].shape(name) for name in sorted(opened[0].files)}
        self.sizes = {name: int(np.prod(shape)) for name, shape in self.shapes.items()}
        self.sample = one_of_each_shape(opened[0])
        self.inputs = [_filled(self.sizes, stored) for stored in opened]
        self.out, self.scratch = Arena(self.sizes), Arena(self.sizes)
        self.select_seconds: list[float] = []
        self.merge_seconds: list[float] = []
        self.copy_rounds: list[dict[str, float]] = []
        self.read_rounds: list[dict[str, float]] = []
        self.pytorch_seconds: list[float] = []

    @property
    def parameters(self) -> int:
        return sum(self.sizes.values())

    @property
    def read_bytes(self) -> int:
        return 2 * len(self.inputs) * self.parameters

    @property
    def moved_bytes(self) -> int:
        return self.read_bytes + 2 * self.parameters

    def round(self) -> None:
        self.out.memory.fill(NAN_BYTE)
        began = time.perf_counter()
        prepared = self._select()
        self.select_seconds.append(time.perf_counter() - began)
        jobs = [Job(p, 0, p.inputs.size, self.out.buffer(p.inputs.name)) for p in prepared]
        began = time.perf_counter()
        merge(jobs, threads=THREADS)
        self.merge_seconds.append(time.perf_counter() - began)
        self.copy_rounds.append(copies(self._copy_pairs()))
        self.read_rounds.append(reads([arena.run for arena in self.inputs]))
        self.pytorch_seconds.append(self._plain_pytorch())

    def _select(self) -> list[Prepared]:
        base, *models = self.inputs
        requests = [
            (
                ties(size),
                Inputs(name, self.shapes[name], base.buffer(name), tuple(m.buffer(name) for m in models)),
            )
            for name, size in self.sizes.items()
        ]
        return prepare(requests, threads=THREADS)

    def _copy_pairs(self) -> list[tuple[int, int, int]]:
        """(target, source, bytes) that add up to half of what the merge pass moves."""
        target, whole = self.scratch.run
        left, pairs = self.moved_bytes // 2, []
        for arena in self.inputs:
            pairs.append((target, arena.run[0], min(whole, left)))
            left -= pairs[-1][2]
        return [pair for pair in pairs if pair[2]]

    def _plain_pytorch(self) -> float:
        import torch

        taken, done = 0.0, 0
        for name in self.sample:
            if self.sizes[name] > LARGEST_FOR_PYTORCH:
                continue
            base, *models = (
                torch.from_numpy(arena.array(name).view(np.int16)).view(torch.bfloat16).reshape(self.shapes[name])
                for arena in self.inputs
            )
            began = time.perf_counter()
            plain_pytorch(base, models, [DENSITY] * len(models), WEIGHTS)
            taken += time.perf_counter() - began
            done += self.sizes[name]
        return taken * self.parameters / done

    def error(self) -> Error:
        """Of what the last round left in memory, over one tensor of every shape."""
        found = NOTHING_COMPARED
        for name in self.sample:
            base, *models = (arena.array(name) for arena in self.inputs)
            tensors = Tensors(base, tuple(models))
            found += error_of(self.out.array(name), tensors, [DENSITY] * len(models), WEIGHTS, "all")
        return found

    def rows(self) -> list[Row]:
        both = [s + m for s, m in zip(self.select_seconds, self.merge_seconds, strict=True)]
        error = self.error()
        copy, read = _best(self.copy_rounds), _best(self.read_rounds)
        shape, size = self.family.shape, self.family.size
        correct: dict[str, Any] = {"error": error.largest, "error_unit": "of 2^-7"}
        select = Row(
            f"memory_select[{size}]", shape, min(self.select_seconds), floor=read, **correct,
            floor_name="reading base and models once", nbytes=self.read_bytes,
            goal=f"at most 1.5 times the merge pass, here {1.5 * min(self.merge_seconds):.3f} s",
            details={"select": best_and_median(self.select_seconds), "reads": self.read_rounds},
        )  # fmt: skip
        merge_pass = Row(
            f"memory_merge[{size}]", shape, min(self.merge_seconds), floor=copy, **correct,
            floor_name="memcpy that moves as much", nbytes=self.moved_bytes,
            goal="at least 75 % of memcpy's rate: ours / floor at most 1.33",
            details={"merge": best_and_median(self.merge_seconds), "copies": self.copy_rounds},
        )  # fmt: skip
        whole = Row(
            f"memory_ties[{size}]", shape, min(both), reference=min(self.pytorch_seconds), floor=copy + read, **correct,
            reference_name="plain PyTorch, scaled up from a part",
            nbytes=self.read_bytes + self.moved_bytes, floor_name="read once, then memcpy",
            goal="at least 80 times plain PyTorch",
            details={"both": best_and_median(both), "reference": best_and_median(self.pytorch_seconds),
                     "error": vars(error)},
        )  # fmt: skip
        return [select, merge_pass, whole]


def _filled(sizes: Mapping[str, int], stored: StoredTensors) -> Arena:
    arena = Arena(sizes)
    for name in sizes:
        arena.array(name)[:] = stored.bf16(name)
    return arena


def _best(rounds: list[dict[str, float]]) -> float:
    """The fastest way of the fastest round."""
    return min(min(ways.values()) for ways in rounds)
