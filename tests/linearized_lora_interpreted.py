"""Runs the Triton kernels of linearized LoRA on the CPU, in Triton's interpreter, against the plain formulas.

usage: linearized_lora_interpreted.py

Prints one JSON object: name of the check -> what went wrong, "" for nothing. A process of its own, since Triton must be
told to interpret before it is imported.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import replace

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from interpreter import print_checks
from linearized_lora_cases import SCALING, Case, assert_close, make_case

from peta_fast.ops.linearized_lora.dropout import keep_factors
from peta_fast.ops.linearized_lora.reference import (
    backward_reference,
    dual_backward_reference,
    dual_reference,
    forward_reference,
)

RANKS = (1, 4, 8, 16, 64, 128)
ROWS = (0, 1, 33, 100)
SEED = torch.tensor(-(2**40) - 7)


def case_of(rows: int = 33, features: int = 70, out: int = 50, r: int = 4, general: bool = True) -> Case:
    """By default more than one block of everything that is summed over, and no size a multiple of a block."""
    return make_case(rows, features, out=out, r=r, b0_is_zero=not general)


def check_forward(case: Case, fused: bool, dropout: float = 0.0, tolerance: float = 1e-12) -> None:
    from peta_fast.ops.linearized_lora import launch

    seed = SEED if dropout else None
    x = case.x
    factors = None if seed is None else keep_factors(seed, *x.shape, dropout, x.dtype)
    found = launch.forward(*case.arguments(), seed, SCALING, dropout, fused=fused)
    for ours, expected in zip(found, forward_reference(*case.arguments(), SCALING, factors), strict=True):
        assert_close(ours, expected, tolerance)


def check_dual(case: Case, fused: bool, moving: bool = True) -> None:
    from peta_fast.ops.linearized_lora import launch

    dx = torch.randn_like(case.x) if moving else None
    arguments = (case.x, dx, *case.arguments()[1:], SCALING)
    for ours, expected in zip(launch.dual(*arguments, fused=fused), dual_reference(*arguments), strict=True):
        assert_close(ours, expected)


def check_backward(
    case: Case, dropout: float = 0.0, needs=(True, True, True), tolerance: float = 1e-12, g=None
) -> None:
    from peta_fast.ops.linearized_lora import launch

    c, seed = case, SEED if dropout else None
    factors = None if seed is None else keep_factors(seed, *c.x.shape, dropout, c.x.dtype)
    u = forward_reference(*c.arguments(), SCALING, factors)[1]
    g = torch.randn(c.x.shape[0], c.dB.shape[0], dtype=c.x.dtype) if g is None else g
    needs = (needs[0], needs[1] and c.dA is not None, needs[2])
    found = launch.backward(g, c.x, u, c.weight, c.A0, c.dA, c.B0, c.dB, seed, SCALING, dropout, needs)
    wanted = (needs[0], False, False, *needs[1:])
    exact = backward_reference(g, None, c.x, u, c.weight, c.A0, c.dA, c.B0, c.dB, SCALING, factors, wanted)
    for ours, expected in zip(found, (exact[0], *exact[3:]), strict=True):
        assert (ours is None) == (expected is None)
        if expected is not None:
            assert_close(ours, expected, tolerance)


def check_dual_backward(case: Case, with_value: bool = True, needs=(True,) * 4, tolerance: float = 1e-12) -> None:
    from peta_fast.ops.linearized_lora import launch

    c, u = case, case.x @ case.A0.t()
    gdy = torch.randn(c.x.shape[0], c.dB.shape[0], dtype=c.x.dtype)
    gy0 = gdy.cos() if with_value else None
    needs = (*needs[:2], needs[2] and c.dA is not None, needs[3])
    adapter = (c.weight, c.A0, c.dA, c.B0, c.dB, SCALING)
    found = launch.dual_backward(gy0, gdy, c.x, u, *adapter, needs)
    wanted = (*needs[:2], False, False, *needs[2:])
    exact = dual_backward_reference(gy0, gdy, None, c.x, None, u, *adapter, wanted)
    for ours, expected in zip(found, (*exact[:2], *exact[4:]), strict=True):
        assert (ours is None) == (expected is None)
        if expected is not None:
            assert_close(ours, expected, tolerance)


def transposed(case: Case) -> Case:
    turned = {n: t.t().contiguous().t() for n, t in case.tensors().items() if t.dim() == 2}
    assert not any(t.is_contiguous() for t in turned.values())
    return replace(case, **turned)


def count(work) -> list[str]:
    """Names of the kernels that were launched, and addmm_ for each product that was left to the library."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from peta_fast.ops.linearized_lora import launch

    names, untouched = [], launch.launch
    free = ("aten::view", "aten::t", "aten::transpose", "aten::new_empty", "aten::empty_like", "aten::_reshape_alias",
            "aten::_unsafe_view", "aten::detach")  # fmt: skip

    def counting(kernel, *arguments, **options):
        names.append(kernel.fn.__name__)
        with torch.utils._python_dispatch._disable_current_modes():  # the interpreter itself copies
            untouched(kernel, *arguments, **options)

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            if function.name().split(".")[0] not in free:
                names.append(function.name())
            return function(*arguments, **(options or {}))

    launch.launch = counting
    try:
        with Count():
            work(launch)
    finally:
        launch.launch = untouched
    return names


def launches_of_forward(general: bool, fused: bool, rows: int = 33) -> list[str]:
    case = case_of(rows=rows, general=general)
    return count(lambda launch: launch.forward(*case.arguments(), None, SCALING, 0.0, fused=fused))


def launches_of_backward(general: bool) -> list[str]:
    c = case_of(general=general)
    u, g = c.x @ c.A0.t(), torch.randn(33, 50).double()
    needs = (True, general, True)
    return count(lambda launch: launch.backward(g, c.x, u, c.weight, c.A0, c.dA, c.B0, c.dB, None, SCALING, 0.0, needs))


def launches_of_dual(general: bool) -> list[str]:
    c = case_of(general=general)
    dx = c.x.cos()
    return count(lambda launch: launch.dual(c.x, dx, *c.arguments()[1:], SCALING, fused=True))


def launches_of_dual_backward(general: bool, with_value: bool, needs=(True,) * 4) -> list[str]:
    c = case_of(general=general)
    u, gdy = c.x @ c.A0.t(), torch.randn(33, 50).double()
    gy0 = gdy.cos() if with_value else None
    arguments = (gy0, gdy, c.x, u, c.weight, c.A0, c.dA, c.B0, c.dB, SCALING)
    return count(lambda launch: launch.dual_backward(*arguments, (*needs[:2], needs[2] and general, needs[3])))


def check_launches() -> None:
    for general in (True, False):
        assert launches_of_forward(general, fused=True) == ["fused_kernel"]
        assert launches_of_forward(general, fused=False) == ["prefill_kernel", "aten::addmm_"]
        assert launches_of_dual(general) == ["fused_kernel"]
    first = ["partials_kernel", "finish_kernel", "aten::addmm_"]
    assert launches_of_backward(False) == first
    assert launches_of_backward(True) == [*first, "dA_kernel"]
    partials, finish, product = first
    assert launches_of_dual_backward(True, True) == [partials, partials, finish, "dA_kernel", product, product]
    assert launches_of_dual_backward(True, False, (False, True, True, True)) == [partials, finish, "dA_kernel", product]
    assert launches_of_dual_backward(False, False) == [partials, finish, "aten::mm.out"]
    assert launches_of_dual_backward(False, False, (False, False, False, True)) == [partials, finish]


def check_chosen_by_rows() -> None:
    from peta_fast.ops.linearized_lora import blocks

    for rows, fused in ((blocks.FUSED_ROWS, True), (blocks.FUSED_ROWS + 1, False)):
        names = launches_of_forward(True, fused=None, rows=rows)
        assert names == (["fused_kernel"] if fused else ["prefill_kernel", "aten::addmm_"])


def check_same_bits() -> None:
    from peta_fast.ops.linearized_lora import launch

    c = case_of(rows=100, out=530).to(torch.float32)
    u, g = c.x @ c.A0.t(), torch.randn(100, 530)

    def run():
        arguments = (c.A0, c.dA, c.B0, c.dB, SEED, SCALING, 0.5)
        forwards = [launch.forward(c.x, c.weight, c.bias, *arguments, fused=f) for f in (True, False)]
        return [*forwards[0], *forwards[1], *launch.backward(g, c.x, u, c.weight, *arguments, (True,) * 3)]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def all_checks() -> dict:
    checks = {"launches": check_launches, "chosen_by_rows": check_chosen_by_rows, "same_bits": check_same_bits}
    ways = tuple(itertools.product(("general", "b0_is_zero"), ("fused", "prefill")))
    for kind, way in ways:
        general, fused = kind == "general", way == "fused"
        for r in RANKS:
            checks[f"forward-{kind}-{way}-r{r}"] = lambda g=general, f=fused, r=r: check_forward(
                case_of(r=r, general=g), f
            )
        for rows in ROWS:
            checks[f"forward-{kind}-{way}-{rows}_rows"] = lambda g=general, f=fused, m=rows: check_forward(
                case_of(rows=m, features=130, out=140, general=g), f
            )
        checks[f"forward-{kind}-{way}-dropout"] = lambda g=general, f=fused: check_forward(case_of(general=g), f, 0.5)
        checks[f"forward-{kind}-{way}-strides"] = lambda g=general, f=fused: check_forward(
            transposed(case_of(general=g)), f
        )
        checks[f"forward-{kind}-{way}-no_bias"] = lambda g=general, f=fused: check_forward(
            replace(case_of(general=g), bias=None), f
        )
        checks[f"forward-{kind}-{way}-fp32"] = lambda g=general, f=fused: check_forward(
            case_of(general=g).to(torch.float32), f, tolerance=2e-6
        )
        checks[f"dual-{kind}-{way}"] = lambda g=general, f=fused: check_dual(case_of(rows=70, general=g), f)
        checks[f"dual-{kind}-{way}-one_row"] = lambda g=general, f=fused: check_dual(case_of(rows=1, general=g), f)
        checks[f"dual-{kind}-{way}-strides"] = lambda g=general, f=fused: check_dual(transposed(case_of(general=g)), f)
    for kind in ("general", "b0_is_zero"):
        general = kind == "general"
        checks[f"dual-{kind}-no_dx"] = lambda g=general: check_dual(case_of(general=g), False, moving=False)
        for r in RANKS:
            checks[f"backward-{kind}-r{r}"] = lambda g=general, r=r: check_backward(case_of(r=r, general=g))
        for rows in ROWS:
            checks[f"backward-{kind}-{rows}_rows"] = lambda g=general, m=rows: check_backward(
                case_of(rows=m, features=300, out=530, general=g)
            )
        checks[f"backward-{kind}-dropout"] = lambda g=general: check_backward(case_of(features=301, general=g), 0.5)
        checks[f"backward-{kind}-strides"] = lambda g=general: check_backward(
            transposed(case_of(general=g)), g=torch.randn(50, 33).double().t()
        )
        checks[f"backward-{kind}-expanded_g"] = lambda g=general: check_backward(
            case_of(general=g), g=torch.ones(()).double().expand(33, 50)
        )
        checks[f"backward-{kind}-fp32"] = lambda g=general: check_backward(
            case_of(general=g).to(torch.float32), tolerance=5e-6
        )
        for value in (True, False):
            way = f"dual_backward-{kind}-{'gy0' if value else 'no_gy0'}"
            checks[way] = lambda g=general, v=value: check_dual_backward(case_of(rows=70, r=5, general=g), v)
            checks[f"{way}-wide"] = lambda g=general, v=value: check_dual_backward(
                case_of(rows=5, features=300, out=530, r=16, general=g), v
            )
            for needs in itertools.product((True, False), repeat=4):
                if any(needs) and (general or needs != (False, False, True, False)):
                    name = "".join("01"[n] for n in needs)
                    checks[f"{way}-needs_{name}"] = lambda g=general, v=value, n=needs: check_dual_backward(
                        case_of(general=g), v, n
                    )
        checks[f"dual_backward-{kind}-0_rows"] = lambda g=general: check_dual_backward(case_of(rows=0, general=g))
        checks[f"dual_backward-{kind}-strides"] = lambda g=general: check_dual_backward(transposed(case_of(general=g)))
        checks[f"dual_backward-{kind}-fp32"] = lambda g=general: check_dual_backward(
            case_of(general=g).to(torch.float32), tolerance=5e-6
        )
        for needs in itertools.product((True, False), repeat=3):
            if any(needs) and (general or needs[0] or needs[2]):
                name = "".join("01"[n] for n in needs)
                checks[f"backward-{kind}-needs_{name}"] = lambda g=general, n=needs: check_backward(
                    case_of(general=g), needs=n
                )
    return checks


CHECKS = all_checks()


if __name__ == "__main__":
    print_checks(CHECKS)
