"""`peta-fast tune`: measures the block shapes of linearized LoRA's kernels on this machine's GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from peta_fast.cli._parser import Argument, Option

EPILOG = "peta-fast tune 8192,4096,4096,16 64,4096,14336,16"


def tune(
    shapes: Annotated[list[str] | None, Argument("M,K,N,r", "rows, in, out, rank of a layer; none: a Llama's")] = None,
    dual: Annotated[bool, Option("--dual", help="Whole-model linearization as well.")] = False,
    out: Annotated[Path | None, Option("--out", help="Instead of the user's table.")] = None,
) -> int:
    """Measure block shapes of the GPU kernels; what is found is used from then on."""
    sizes = [sizes_of(shape) for shape in shapes or ()]
    from peta_fast.ops.linearized_lora import tuning

    tuning.tune(sizes or tuning.SHAPES, dual=dual, file=out)
    return 0


def sizes_of(shape: str) -> tuple[int, ...]:
    """Raises UsageError for what is not four integers."""
    from peta_fast.cli._errors import UsageError

    words = shape.split(",")
    if len(words) != 4 or not all(word.isdecimal() for word in words):
        raise UsageError("tune", f"expected M,K,N,r such as 8192,4096,4096,16, got {shape!r}")
    return tuple(map(int, words))
