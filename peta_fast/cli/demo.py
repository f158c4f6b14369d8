"""`peta-fast demo`: the demonstration on real images, and the full one on images and text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from peta_fast.cli._errors import UsageError
from peta_fast.cli._parser import Option

OUT, FULL_OUT = Path("peta_fast_demo"), Path("peta_fast_demo_full")


def demo(
    out: Annotated[
        Path | None, Option("--out", help=f"Folder for what comes out; {OUT}, or with --full {FULL_OUT}.")
    ] = None,
    seed: Annotated[
        int, Option("--seed", help="Of splits, initialization and batches; with --full, the first.", low=0)
    ] = 0,
    quick: Annotated[
        bool, Option("--quick", help="Fewer steps, and worse numbers; with --full, a mere rehearsal.")
    ] = False,
    full: Annotated[
        bool,
        Option("--full", help="Digits and text, five kinds of fine-tuning, nine merges, three seeds: 15 minutes."),
    ] = False,
    jobs: Annotated[
        int | None, Option("--jobs", help="Processes of one thread, with --full; one a core by default.", low=1)
    ] = None,
) -> int:
    """Train, merge and score small models on real data. Needs scikit-learn and matplotlib, and no network.

    With --full also transformers and a small BERT for the text: pip install 'peta_fast[demo-full]'. What is done stays
    done: the same command again goes on where it was interrupted.
    """
    if jobs is not None and not full:
        raise UsageError("--jobs", "expected --full with it", "The short demonstration runs in one process.")
    if full:
        from peta_fast.demo.full import run_full

        run_full(out or FULL_OUT, seed=seed, quick=quick, jobs=jobs)
    else:
        from peta_fast.demo.run import run_demo

        run_demo(out or OUT, seed=seed, quick=quick)
    return 0
