"""Operations over raw buffers: one op, one place. Native code where it is built, else plain numpy of the same bits."""

from __future__ import annotations

import functools
from typing import Any


def backend(device: str = "") -> Any:
    """What runs the operations on memory of the host ("") or of a device ("cuda:0"): the same functions either way."""
    if not device:
        return _on_the_host()
    from peta_fast.ops.device import of_device

    return of_device(device)


@functools.cache
def _on_the_host() -> Any:
    """peta_fast._cpu, or peta_fast.ops.plain."""
    from peta_fast._native import native

    module = native()
    if module is None:
        from peta_fast.ops import plain

        return plain
    return module
