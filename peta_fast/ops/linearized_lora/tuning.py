"""Measures block shapes on the GPU at hand, and writes the best to the user's table.

Each candidate is first checked: its largest error against the closed form in fp64 is at most twice that of plain
PyTorch in the same dtype, and one unit in the last place. What is timed is the layer's whole forward, dual or backward,
so that a kernel is not praised for work that it leaves to the next one.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peta_fast.errors import CompatibilityError, ResourceError
from peta_fast.ops.linearized_lora import blocks as tables
from peta_fast.ops.linearized_lora import closed_form, dispatch, table
from peta_fast.ops.linearized_lora.blocks import Blocks, name_of, padded_rank, place_of
from peta_fast.ops.linearized_lora.reference import backward_reference, dual_reference, forward_reference

SHAPES = ((8192, 4096, 4096, 16), (8192, 4096, 14336, 16), (8192, 14336, 4096, 16), (64, 4096, 4096, 16))
"""M, K, N, r of a Llama's layers."""
CROSSOVER_ROWS = (16, 32, 64, 128, 256, 512, 1024)
SCALING = 2.0
Timer = Callable[[Callable[[], object]], float]


def tune(
    shapes: Iterable[tuple[int, int, int, int]] = SHAPES,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    *,
    dual: bool = False,
    file: str | Path | None = None,
    timer: Timer | None = None,
    report: Callable[[str], object] = print,
) -> dict[str, dict[str, Any]]:
    """Finds the fastest block shapes of linearized LoRA's kernels on this GPU; later calls take them by themselves.

        pf.tune([(8192, 4096, 4096, 16)])

    shapes  (M rows, K in, N out, r rank) of the layers; each stands for its bucket, see blocks.py
    dtype   bf16 or fp16; what is found serves both
    device  None is the current CUDA device
    dual    tune the forward of whole-model linearization as well
    file    None is the user's table: PETA_FAST_TUNING, or peta_fast/tuning.json in the cache folder
    timer   work -> seconds; None times by CUDA events
    report  takes a line for each kernel: what was found, against the rule's blocks

    Returns the entries that it wrote. Takes about a minute a shape, mostly building kernels.
    Raises ResourceError without a GPU that runs the kernels, CompatibilityError for shapes that cannot be.
    """
    device = device_for(device)
    shapes = [checked(shape) for shape in shapes]
    entries: dict[str, dict[str, Any]] = {}
    for shape in shapes:
        for general in (False, True):
            for is_dual in (False, True) if dual else (False,):
                entries |= _Layer(*shape, general, is_dual, dtype, device, timer or seconds_on_gpu, report).tuned()
    written = Path(file) if file is not None else table.user_file()
    table.write(written, entries)
    tables.forget()
    report(f"{len(entries)} entries written to {written}")
    return entries


def device_for(device: torch.device | str | None) -> torch.device:
    if tables.INTERPRETED:
        return torch.device("cpu")
    found = torch.device("cuda" if device is None else device)
    if found.type != "cuda" or not torch.cuda.is_available():
        got = f"expected a CUDA device, got {found}" if found.type != "cuda" else "PyTorch sees no CUDA device here"
        raise ResourceError("tune", got, "Block shapes are measured: run it on the GPU that will train.")
    if not (dispatch.has_triton() and dispatch.builds_kernels(found)):
        problem = f"no kernels run on {torch.cuda.get_device_name(found)}: plain PyTorch does there"
        raise ResourceError("tune", problem, "They want Triton and an NVIDIA GPU of compute capability 8.0 or later.")
    return torch.device("cuda", torch.cuda.current_device()) if found.index is None else found


def checked(shape: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    sound = len(shape) == 4 and all(type(n) is int and n > 0 for n in shape)
    if not sound or shape[3] > dispatch.LARGEST_RANK:
        problem = f"shape {tuple(shape)}, expected (M, K, N, r) of positive integers, r up to {dispatch.LARGEST_RANK}"
        raise CompatibilityError("tune", problem, "M: rows; K: in_features; N: out_features; r: rank.")
    return tuple(shape)


class _Layer:
    """One layer's tensors, its exact results, and the ways to compute them."""

    def __init__(self, M, K, N, r, general, dual, dtype, device, timer: Timer, report):
        self.M, self.K, self.N, self.r, self.general, self.dual = M, K, N, r, general, dual
        self.R, self.place, self.timer, self.report = padded_rank(r), place_of(device), timer, report
        self.device, self.dtype, self.generator = device, dtype, torch.Generator().manual_seed(0)
        self.x, self.dx, self.g = self._normal(M, K, 1.0), self._normal(M, K, 1.0), self._normal(M, N, 1.0)
        self.weight, self.bias = self._normal(N, K, K**-0.5), self._normal(1, N, 0.1)[0]
        self.A0, self.dB = self._normal(r, K, K**-0.5), self._normal(N, r, 0.02)
        self.dA = self._normal(r, K, 0.1 * K**-0.5) if general else None
        self.B0 = self._normal(N, r, 0.1) if general else None

    def _normal(self, rows: int, columns: int, scale: float) -> Tensor:
        made = scale * torch.randn(rows, columns, generator=self.generator)
        return made.to(self.device, self.dtype)

    def tuned(self) -> dict[str, dict[str, Any]]:
        """key -> entry, of every kernel of this layer, and of the rows at which one launch gives way to two."""
        works = {"fused": self.forward(True), "prefill": self.forward(False)}
        names = {kernel: name_of(kernel, self.general, self.dual) for kernel in works}
        exact = self.exact_forward()
        if not self.dual:
            backward = ["partials", "finish"] + ["dA"] * self.general
            works |= {kernel: self.backward for kernel in backward}
            names |= {kernel: kernel if kernel == "dA" else name_of(kernel, self.general) for kernel in backward}
        limits, entries = {"forward": exact}, {}
        if not self.dual:
            limits["backward"] = self.exact_backward()
        best: dict[str, Blocks] = {}
        for kernel, work in works.items():
            name, limit = names[kernel], limits["forward" if kernel in ("fused", "prefill") else "backward"]
            if kernel == "fused" and self.M > CROSSOVER_ROWS[-1]:
                continue
            with tables.forced(**best):  # finish is timed after the parts that partials makes
                found = self.fastest(name, work, limit)
            if found is not None:
                best[name] = found["blocks"]
                entries[tables.key_of(name, self.place, self.M, self.N, self.K, self.R)] = found
        with tables.forced(**{name: found for name, found in best.items() if name == names["prefill"]}):
            return {**entries, **self.crossover()}

    def fastest(self, name: str, work: Callable[[], tuple], limit: list[tuple[Tensor, float]]) -> dict[str, Any] | None:
        times: list[tuple[float, Blocks]] = []
        tried = tables.candidates(name, self.M, self.R)
        for blocks in tried:
            with tables.forced(**{name: blocks}):
                seconds = self.seconds_if_right(work, limit)
            if seconds is not None:
                times.append((seconds, blocks))
        where = f"{self.place.name} {name} M={self.M} K={self.K} N={self.N} r={self.r}"
        if not times:
            self.report(f"{where}: none of {len(tried)} candidates ran and was right; the rule stays")
            return None
        seconds, blocks = min(times, key=lambda pair: pair[0])
        by_rule = next((s for s, b in times if b == tried[0]), None)
        against = "the rule's blocks do not run here" if by_rule is None else f"rule {by_rule * 1e6:.1f} us"
        self.report(f"{where}: {seconds * 1e6:.1f} us, {against}, {len(times)} of {len(tried)} candidates: {blocks}")
        return {"blocks": blocks, "seconds": seconds, "seconds_of_rule": by_rule, **surroundings(self.device)}

    def seconds_if_right(self, work: Callable[[], tuple], limit: list[tuple[Tensor, float]]) -> float | None:
        """None where this GPU has no room for the blocks, cannot build them, or computes something else with them."""
        from triton.errors import TritonError

        try:
            found = [t for t in work() if t is not None]
        except TritonError:
            return None
        right = all(_error(t, exact) <= most for t, (exact, most) in zip(found, limit, strict=True))
        return self.timer(work) if right else None

    def crossover(self) -> dict[str, dict[str, Any]]:
        """Up to which of CROSSOVER_ROWS the fused kernel is the faster way, without a gap."""
        rows, times = 0, []
        for M in CROSSOVER_ROWS:
            layer = self.with_rows(M)
            fused, prefill = (self.timer(layer.forward(way)) for way in (True, False))
            times.append([M, fused, prefill])
            if fused > prefill:
                break
            rows = M
        kind = name_of("crossover", self.general, self.dual)
        self.report(f"{self.place.name} {kind} K={self.K} N={self.N} r={self.r}: one launch up to {rows} rows, "
                    f"the rule says {tables.FUSED_ROWS}")  # fmt: skip
        entry = {"blocks": {"rows": rows}, "rows_fused_prefill": times, **surroundings(self.device)}
        return {tables.crossover_key(kind, self.place, self.N, self.K, self.R): entry}

    def with_rows(self, M: int) -> _Layer:
        """The same layer with another number of rows."""
        other = object.__new__(_Layer)
        vars(other).update(vars(self), M=M, x=self._normal(M, self.K, 1.0), dx=self._normal(M, self.K, 1.0))
        return other

    # what is computed

    def arguments(self) -> tuple:
        return (self.weight, self.bias, self.A0, self.dA, self.B0, self.dB)

    def forward(self, fused: bool) -> Callable[[], tuple]:
        from peta_fast.ops.linearized_lora import launch

        if self.dual:
            return lambda: launch.dual(self.x, self.dx, *self.arguments(), SCALING, fused=fused)
        return lambda: launch.forward(self.x, *self.arguments(), None, SCALING, 0.0, fused=fused)

    def backward(self) -> tuple:
        from peta_fast.ops.linearized_lora import launch

        return self._backward_of(launch)

    def _backward_of(self, code) -> tuple:
        u = self.x @ self.A0.t()
        needs, adapter = (True, self.general, True), (self.A0, self.dA, self.B0, self.dB)
        return code.backward(self.g, self.x, u, self.weight, *adapter, None, SCALING, 0.0, needs)

    def exact_forward(self) -> list[tuple[Tensor, float]]:
        """Each result in fp64 with the most that one in `dtype` may be off."""
        x, dx, *others = _wide(self.x, self.dx, *self.arguments())
        if self.dual:
            exact = dual_reference(x, dx, *others, SCALING)
            plain = dual_reference(self.x, self.dx, *self.arguments(), SCALING)
        else:
            exact = forward_reference(x, *others, SCALING)
            plain = forward_reference(self.x, *self.arguments(), SCALING)
        return list(_limits(plain, exact))

    def exact_backward(self) -> list[tuple[Tensor, float]]:
        u = self.x @ self.A0.t()
        g, x, u, weight, *adapter = _wide(self.g, self.x, u, self.weight, self.A0, self.dA, self.B0, self.dB)
        exact = backward_reference(
            g, None, x, u, weight, *adapter, SCALING, None, (True, False, False, self.general, True)
        )
        plain = self._backward_of(closed_form)
        return list(_limits(plain, (exact[0], *exact[3:])))


def _wide(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


def _error(found: Tensor, exact: Tensor) -> float:
    """The largest; NaN counts as infinite."""
    error = (found.double() - exact).abs().max().item()
    return error if error == error else float("inf")


def _limits(plain: Iterable[Tensor | None], exact: Iterable[Tensor | None]) -> Iterator[tuple[Tensor, float]]:
    for low, true in zip(plain, exact, strict=True):
        if low is not None and true is not None:
            ulp = torch.finfo(low.dtype).eps * true.abs().max().item()
            yield true, 2 * _error(low, true) + ulp


def surroundings(device: torch.device) -> dict[str, str]:
    import triton

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    return {"device": name, "torch": str(torch.__version__), "triton": triton.__version__}


def seconds_on_gpu(work: Callable[[], object], rounds: int = 9, calls: int = 10) -> float:
    """The median of some rounds, each over enough calls to hide the launches."""
    for _ in range(3):
        work()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / calls)
    return statistics.median(times)
