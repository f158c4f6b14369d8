"""`peta-fast adapter merge`: adapters in, one adapter out."""

from __future__ import annotations

from typing import Annotated

from peta_fast.cli._adapters import Base, Density, Dtype, Force, Out, Set, Weights
from peta_fast.cli._options import All, AsJson, Compat, Limit, Threads
from peta_fast.cli._parser import Argument, Option
from peta_fast.cli._text import ROWS

EPILOG = """methods: cat (exact), svd, linear (PEFT's, with cross terms), knots; and, over the entries of the changes or
of the factors, task_arithmetic, ties, dare_linear, dare_ties, della, della_linear, breadcrumbs, breadcrumbs_ties,
magnitude_prune"""


def merge(
    adapters: Annotated[list[str], Argument("ADAPTER", "folders or hub ids; or one recipe (.yml)")],
    out: Out = None,
    method: Annotated[str | None, Option("--method", help="How; svd unless given.")] = None,
    rank: Annotated[int | None, Option("--rank", help="Of the result; the inputs' largest unless given.")] = None,
    weights: Weights = None,
    density: Density = None,
    settings: Set = None,
    space: Annotated[
        str | None,
        Option("--space", help="delta: entries of B A; factors: of A and B, as PEFT; phi: linearized steps."),
    ] = None,
    inner: Annotated[str | None, Option("--inner", help="Element-wise method inside knots; ties unless given.")] = None,
    replaced: Annotated[
        str, Option("--replaced", help="Whole tensors that several adapters bring: refuse, mean, first.")
    ] = "refuse",
    base: Base = None,
    dtype: Dtype = "float32",
    compat: Compat = None,
    seed: Annotated[int, Option("--seed", help="Of random methods and of the sketch.", low=0)] = 0,
    force: Force = False,
    threads: Threads = 0,
    as_json: AsJson = False,
    limit: Limit = ROWS,
    show_all: All = False,
) -> int:
    """Merge LoRA adapters into one adapter, without any dense model."""
    from peta_fast.adapters import merge_adapters
    from peta_fast.cli._adapters import keys, numbers, print_report, required_out

    source = adapters[0] if len(adapters) == 1 and adapters[0].endswith((".yml", ".yaml")) else adapters
    report = merge_adapters(
        source, required_out(out), method=method, rank=rank, weights=numbers(weights, "--weights"), space=space,
        inner=inner, base=base, compat=compat, seed=seed, dtype=dtype, replaced=replaced, threads=threads, force=force,
        **keys(settings, density),
    )  # fmt: skip
    print_report(report, as_json, None if show_all else limit)
    return 0
