"""`peta-fast adapter extract`: a full fine-tune minus its base, as an adapter."""

from __future__ import annotations

from typing import Annotated

from peta_fast.cli._adapters import Dtype, Force, Out
from peta_fast.cli._options import All, AsJson, Limit, MaxMemory
from peta_fast.cli._parser import Argument, Option
from peta_fast.cli._text import ROWS


def extract(
    model: Annotated[str, Argument("MODEL", "the fine-tuned model's folder or hub id")],
    base: Annotated[str, Argument("BASE", "what it was fine-tuned from")],
    out: Out = None,
    rank: Annotated[int, Option("--rank", help="Of every module, at most.")] = 16,
    energy: Annotated[
        float | None, Option("--energy", help="Fewest ranks that keep this share of the squared norm: 0.9.", low=0)
    ] = None,
    targets: Annotated[
        str | None, Option("--targets", help="Tails of modules, or regular expressions: q_proj,v_proj. All in layers.")
    ] = None,
    rest: Annotated[str, Option("--rest", help="Changes outside: drop (and say so), save whole, or refuse.")] = "drop",
    seed: Annotated[int, Option("--seed", help="Of the sketch.", low=0)] = 0,
    dtype: Dtype = "float32",
    max_memory: MaxMemory = "768MB",
    force: Force = False,
    as_json: AsJson = False,
    limit: Limit = ROWS,
    show_all: All = False,
) -> int:
    """Extract a LoRA adapter from a full fine-tune, with the error measured."""
    from peta_fast.adapters import extract_adapter
    from peta_fast.cli._adapters import print_report, required_out

    chosen = None if targets is None else targets.split(",")
    report = extract_adapter(
        model, base, required_out(out), rank=rank, energy=energy, targets=chosen, rest=rest, seed=seed, dtype=dtype,
        max_memory=max_memory, force=force,
    )  # fmt: skip
    print_report(report, as_json, None if show_all else limit)
    return 0
