"""Operations over raw buffers: one op, one place. Native code where it is built, else plain numpy of the same bits."""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def backend() -> Any:
    """The module that runs the operations: peta_fast._cpu, or peta_fast.ops.plain with the same functions."""
    from peta_fast._native import native

    module = native()
    if module is None:
        from peta_fast.ops import plain

        return plain
    return module
