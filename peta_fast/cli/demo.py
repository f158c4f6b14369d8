"""`peta-fast demo`: the demonstration on real images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from peta_fast.cli._parser import Option

OUT = Path("peta_fast_demo")


def demo(
    out: Annotated[Path, Option("--out", help="Folder for checkpoints, table and picture.")] = OUT,
    seed: Annotated[int, Option("--seed", help="Of splits, initialization and batches.", low=0)] = 0,
    quick: Annotated[bool, Option("--quick", help="A few seconds, and worse numbers.")] = False,
) -> int:
    """Train, merge and score small models on real images. Needs scikit-learn and matplotlib, and no network."""
    from peta_fast.demo.run import run_demo

    run_demo(out, seed=seed, quick=quick)
    return 0
