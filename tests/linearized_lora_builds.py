"""Builds Triton kernels for a GPU that is not there, as launch.py would launch them; first those of linearized LoRA."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import subprocess
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
MATRIX_INSTRUCTIONS = re.compile(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma")
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64",
            torch.float64: "*fp64"}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """A kernel's name and what it was to be launched with."""

    kernel: str
    arguments: tuple
    options: dict
    op: str = "linearized_lora"


@dataclass(frozen=True)
class Build:
    """Registers, and bytes of stack and of local memory, a thread; bytes of shared memory; matrix instructions."""

    registers: int
    stack: int
    local: int
    shared: int
    matrix_instructions: int


def recorded(work: Callable[[], object]) -> list[Launch]:
    """What `work` launches; nothing runs."""
    from peta_fast.ops.linearized_lora import launch

    found: list[Launch] = []
    untouched = launch.launch
    launch.launch = lambda kernel, grid, *a, **o: found.append(Launch(kernel.fn.__name__, a, o))
    try:
        work()
    finally:
        launch.launch = untouched
    return found


def launches(
    M: int, K: int, N: int, r: int, *, general: bool, dropout: float = 0.0, way: str = "train", adapter=torch.bfloat16
) -> list[Launch]:
    """Of a layer's forward and backward ("train"), of its dual, or of the dual's backward; bf16, without memory."""
    from peta_fast.ops.linearized_lora import launch

    def empty(*size: int, dtype=torch.bfloat16) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device="meta")

    x, weight, bias, g = empty(M, K), empty(N, K), empty(N), empty(M, N)
    A0, dB = empty(r, K, dtype=adapter), empty(N, r, dtype=adapter)
    dA, B0 = (torch.empty_like(A0), torch.empty_like(dB)) if general else (None, None)
    seed = torch.empty((), dtype=torch.int64, device="meta") if dropout else None
    if way == "dual":
        return recorded(lambda: launch.dual(x, empty(M, K), weight, bias, A0, dA, B0, dB, 2.0))
    if way == "dual_backward":
        gradients = (g, empty(M, N), x, empty(M, r), weight, A0, dA, B0, dB, 2.0, (True, True, general, True))
        return recorded(lambda: launch.dual_backward(*gradients))

    def train():
        u = launch.forward(x, weight, bias, A0, dA, B0, dB, seed, 2.0, dropout)[1]
        launch.backward(g, x, u, weight, A0, dA, B0, dB, seed, 2.0, dropout, (True, general, True))

    return recorded(train)


def group_launches(
    M: int, K: int, outs: tuple[int, ...], r: int, *, general: bool, dropout: float = 0.0, adapter=torch.bfloat16
) -> list[Launch]:
    """Of the forward and backward of several projections of one x; bf16, tensors without memory."""
    from peta_fast.ops.linearized_lora import group_launch
    from peta_fast.ops.linearized_lora.group_closed_form import Part

    def empty(*size: int, dtype=torch.bfloat16) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device="meta")

    def part(N: int) -> Part:
        A0, dB = empty(r, K, dtype=adapter), empty(N, r, dtype=adapter)
        dA, B0 = (torch.empty_like(A0), torch.empty_like(dB)) if general else (None, None)
        seed = torch.empty((), dtype=torch.int64, device="meta") if dropout else None
        return Part(empty(N, K), empty(N), A0, dA, B0, dB, seed, 2.0, dropout)

    x, parts, gs = empty(M, K), [part(N) for N in outs], [empty(M, N) for N in outs]

    def train():
        us = group_launch.forward(x, parts)[1]
        group_launch.backward(gs, x, us, parts, True, [general] * len(outs), [True] * len(outs))

    return recorded(train)


def source_of(launched: Launch):
    """The ASTSource that triton.jit would make of these arguments: 1 and None are constants, multiples of 16 known."""
    from triton.compiler import ASTSource

    module = "group_kernels" if launched.kernel.startswith("group_") else "kernels"
    kernel = getattr(importlib.import_module(f"peta_fast.ops.{launched.op}.{module}"), launched.kernel)
    names = kernel.arg_names
    compiler_options = ("num_warps", "num_stages")
    values = dict(zip(names, launched.arguments, strict=False))
    values |= {k: v for k, v in launched.options.items() if k not in compiler_options}
    assert sorted(values) == sorted(names)
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(names):
        value = values[name]
        declared, plain = kernel.params[place].is_constexpr, kernel.params[place].do_not_specialize
        if declared or value is None or (isinstance(value, int) and value == 1 and not plain):
            signature[name], constants[(place,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(place,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32"
            if value % 16 == 0 and not plain:
                attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    options = {k: launched.options[k] for k in compiler_options if k in launched.options}
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes), options


def build(launched: Launch, architecture: int, folder: Path) -> Build:
    """Compiles to machine code, and reads the resources that the code asks for."""
    import triton
    from triton.backends.compiler import GPUTarget

    source, options = source_of(launched)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    cubin = folder / f"{launched.kernel}-{architecture}-{id(compiled)}.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Build(
        numbers["REG"],
        numbers["STACK"],
        numbers["LOCAL"],
        compiled.metadata.shared,
        len(MATRIX_INSTRUCTIONS.findall(compiled.asm["ptx"])),
    )


def builders(folder: Path) -> ProcessPoolExecutor:
    """Two processes that build for GPUs, with Triton's cache in this folder."""
    return ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), build_in, (str(folder),))


def build_in(folder: str) -> None:
    """Makes this process's builds new ones, for GPUs."""
    os.environ["TRITON_CACHE_DIR"] = folder
    os.environ.pop("TRITON_INTERPRET", None)


def build_layer(layer: dict, architecture: int, folder: Path) -> dict[str, Build]:
    """The build of every kernel that the layer launches, by name."""
    return {launched.kernel: build(launched, architecture, folder) for launched in launches(**layer)}


def build_candidate(kernel: str, blocks: dict[str, int], layer: dict, architecture: int, folder: Path) -> Build:
    """Of one kernel of a layer, with these blocks."""
    from peta_fast.ops.linearized_lora.blocks import forced

    with forced(**{kernel: blocks}):
        found = launches(**layer)
    return build(next(f for f in found if f.kernel == kernel.partition("_")[0] + "_kernel"), architecture, folder)


def build_group(group: dict, architecture: int, folder: Path) -> dict[str, Build]:
    """The builds of the kernels that only groups launch, by name."""
    found = [launched for launched in group_launches(**group) if launched.kernel.startswith("group_")]
    return {launched.kernel: build(launched, architecture, folder) for launched in found}
