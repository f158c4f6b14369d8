"""Runs the Triton kernels of several projections of one x on the CPU, in Triton's interpreter, against plain formulas.

usage: linearized_lora_group_interpreted.py

Prints one JSON object: name of the check -> what went wrong, "" for nothing. A process of its own, since Triton must be
told to interpret before it is imported.
"""

from __future__ import annotations

import itertools
import os

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from interpreter import print_checks
from linearized_lora_cases import assert_close, make_case
from linearized_lora_interpreted import count

from peta_fast.ops.linearized_lora.dropout import keep_factors
from peta_fast.ops.linearized_lora.group_closed_form import Part
from peta_fast.ops.linearized_lora.reference import backward_reference, forward_reference

OUTS, SCALINGS, DROPOUTS = (50, 7, 131, 20), (1.75, -0.5, 3.0, 1.0), (0.5, 0.0, 0.25, 0.1)


def parts_of(x: torch.Tensor, ranks=(4, 1, 17), zeros=(False, True, False), dropout=False, outs=OUTS) -> list[Part]:
    """Projections of x [rows, in] that differ in everything they can."""
    made = []
    for i, (r, zero) in enumerate(zip(ranks, zeros, strict=True)):
        case = make_case(*x.shape, out=outs[i], r=r, b0_is_zero=zero, bias=i != 1, seed=i).to(x.dtype)
        seed = torch.tensor(-(2**40) - i) if dropout and DROPOUTS[i] else None
        made.append(Part(*case.arguments()[1:], seed, SCALINGS[i], DROPOUTS[i] if dropout else 0.0))
    return made


def x_of(rows: int = 33, features: int = 70, dtype=torch.float64) -> torch.Tensor:
    return make_case(rows, features, out=3).x.to(dtype)


def factors_of(part: Part, x: torch.Tensor):
    return None if part.seed is None else keep_factors(part.seed, *x.shape, part.dropout, x.dtype)


def exact_forward(x: torch.Tensor, part: Part):
    return forward_reference(x, *part[:6], part.scaling, factors_of(part, x))


def check_forward(x: torch.Tensor, parts, fused: bool = False, tolerance: float = 1e-12) -> None:
    from peta_fast.ops.linearized_lora import group_launch

    for part, y, u in zip(parts, *group_launch.forward(x, parts, fused=fused), strict=True):
        for ours, expected in zip((y, u), exact_forward(x, part), strict=True):
            assert_close(ours, expected, tolerance)


def check_backward(x: torch.Tensor, parts, needs=(True, True, True), absent=(), tolerance=1e-12, turned=False) -> None:
    from peta_fast.ops.linearized_lora import group_launch

    us = [exact_forward(x, part)[1] for part in parts]
    gs = [torch.randn(x.shape[0], part.dB.shape[0], dtype=x.dtype) for part in parts]
    gs = [None if i in absent else g.t().contiguous().t() if turned else g for i, g in enumerate(gs)]
    wanted = (needs[0], [needs[1] and part.general for part in parts], [needs[2]] * len(parts))
    gx, gdAs, gdBs = group_launch.backward(gs, x, us, parts, *wanted)
    total = torch.zeros_like(x)
    for i, (part, g, u) in enumerate(zip(parts, gs, us, strict=True)):
        asked = (needs[0], False, False, wanted[1][i], needs[2])
        tensors = (part.weight, *part[2:6], part.scaling, factors_of(part, x))
        exact = [None] * 5 if g is None else backward_reference(g, None, x, u, *tensors, asked)
        total += 0 if exact[0] is None else exact[0]
        for ours, expected in ((gdAs[i], exact[3]), (gdBs[i], exact[4])):
            assert (ours is None) == (expected is None)
            if expected is not None:
                assert_close(ours, expected, tolerance)
    assert (gx is not None) == needs[0]
    if needs[0]:
        assert_close(gx, total, tolerance)


def check_both(x: torch.Tensor, parts, **options) -> None:
    check_forward(x, parts, **options)
    check_backward(x, parts, **options)


def turned_parts(parts) -> list[Part]:
    """With tensors that are not contiguous."""
    return [Part(*(t.t().contiguous().t() if i != 1 and t is not None else t for i, t in enumerate(p[:6])), *p[6:])
            for p in parts]  # fmt: skip


def check_launches() -> None:
    """Forward 1 + G; backward 2 G + 1, and one more for each dA; the library's products included."""
    for zeros in ((True,) * 3, (False,) * 3, (True, False, True)):
        check_launches_of(x_of(), zeros)


def check_launches_of(x: torch.Tensor, zeros: tuple[bool, ...]) -> None:
    parts = parts_of(x, ranks=(4, 4, 4), zeros=zeros)
    names = launched(lambda group: group.forward(x, parts, fused=False))
    assert names == ["group_prefill_kernel", *["aten::addmm_"] * 3]
    assert launched(lambda group: group.forward(x, parts, fused=True)) == ["fused_kernel"] * 3
    us, gs = [x @ p.A0.t() for p in parts], [torch.randn(33, p.dB.shape[0]).double() for p in parts]
    wanted = (True, [p.general for p in parts], [True] * 3)
    found = launched(lambda group: group.backward(gs, x, us, parts, *wanted))
    expected = (
        ["partials_kernel"] * 3 + ["group_finish_kernel"] + ["aten::addmm_"] * 3 + ["dA_kernel"] * zeros.count(False)
    )
    assert sorted(found) == sorted(expected)


def launched(work) -> list[str]:
    from peta_fast.ops.linearized_lora import group_launch

    return count(lambda launch: work(group_launch))


def check_chosen_by_rows() -> None:
    from peta_fast.ops.linearized_lora import blocks

    for rows, fused in ((blocks.FUSED_ROWS, True), (blocks.FUSED_ROWS + 1, False)):
        x = x_of(rows)
        parts = parts_of(x)
        names = launched(lambda group, x=x, parts=parts: group.forward(x, parts))
        assert names == (["fused_kernel"] * 3 if fused else ["group_prefill_kernel", *["aten::addmm_"] * 3])


def check_same_bits() -> None:
    from peta_fast.ops.linearized_lora import group_launch

    x = x_of(100, dtype=torch.float32)
    parts = parts_of(x, dropout=True, outs=(530, 7, 131))
    us, gs = [x @ p.A0.t() for p in parts], [torch.randn(100, p.dB.shape[0]) for p in parts]

    def run():
        ys, own_us = group_launch.forward(x, parts, fused=False)
        wanted = (True, [p.general for p in parts], [True] * 3)
        gx, gdAs, gdBs = group_launch.backward(gs, x, us, parts, *wanted)
        return [*ys, *own_us, gx, *(g for g in (*gdAs, *gdBs) if g is not None)]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def check_single_bits() -> None:
    """The prefill does for each projection what the single layer's does: the same bits, in fp32."""
    from peta_fast.ops.linearized_lora import group_launch, launch

    x = x_of(100, dtype=torch.float32)
    parts = parts_of(x, ranks=(4, 16, 9), dropout=True)
    for part, y, u in zip(parts, *group_launch.forward(x, parts, fused=False), strict=True):
        single = launch.forward(x, *part, fused=False)
        assert torch.equal(y, single[0]) and torch.equal(u, single[1])


def all_checks() -> dict:
    checks = {"launches": check_launches, "chosen_by_rows": check_chosen_by_rows, "same_bits": check_same_bits,
              "single_bits": check_single_bits}  # fmt: skip

    def add(name, check, *, x=None, needs=None, absent=None, tolerance=None, turned=False, **options):
        x = {} if x is None else x

        def run():
            given = x_of(**x)
            given = given.t().contiguous().t() if turned else given
            parts = parts_of(given, **options)
            extra = {k: v for k, v in (("needs", needs), ("absent", absent), ("tolerance", tolerance)) if v is not None}
            check(given, turned_parts(parts) if turned else parts, **extra)

        checks[name] = run

    for r in (1, 8, 16, 32, 64):
        add(f"rank-{r}", check_both, ranks=(r, r, r), zeros=(False,) * 3)
    for rows in (0, 1, 33):
        add(f"{rows}_rows", check_both, x={"rows": rows, "features": 130})
        add(f"{rows}_rows-fused", lambda x, parts: check_forward(x, parts, fused=True), x={"rows": rows})
    add("many_rows", check_both, x={"rows": 150, "features": 200}, outs=(300, 7, 131))
    for zeros in itertools.product((False, True), repeat=2):
        add(f"two-{''.join('01'[z] for z in zeros)}", check_both, ranks=(4, 8), zeros=zeros)
    add("one", check_both, ranks=(4,), zeros=(False,))
    add("four", check_both, ranks=(4, 8, 1, 3), zeros=(False, True, False, True))
    add("four-dropout", check_both, ranks=(4, 8, 1, 3), zeros=(False, True, False, True), dropout=True)
    add("dropout", check_both, x={"features": 301}, dropout=True)
    add("strides", check_both, turned=True)
    add("strided_g", lambda x, parts: check_backward(x, parts, turned=True))
    add("fp32", check_both, x={"dtype": torch.float32}, tolerance=5e-6)
    for needs in itertools.product((True, False), repeat=3):
        if any(needs):
            add(f"needs_{''.join('01'[n] for n in needs)}", check_backward, needs=needs)
    add("absent_first", check_backward, absent=(0,))
    add("absent_last_two", check_backward, absent=(1, 2))
    return checks


CHECKS = all_checks()


if __name__ == "__main__":
    print_checks(CHECKS)
