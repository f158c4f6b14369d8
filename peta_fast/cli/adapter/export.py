"""`peta-fast adapter export`: a linearized adapter as plain PEFT."""

from __future__ import annotations

from typing import Annotated

from peta_fast.cli._adapters import Base, Force, Out
from peta_fast.cli._options import All, AsJson, Limit
from peta_fast.cli._parser import Argument
from peta_fast.cli._text import ROWS


def export(
    adapter: Annotated[str, Argument("ADAPTER", "a folder with linearization.safetensors")],
    out: Out = None,
    base: Base = None,
    force: Force = False,
    as_json: AsJson = False,
    limit: Limit = ROWS,
    show_all: All = False,
) -> int:
    """Export a linearized adapter to plain PEFT: the same function, exactly."""
    from peta_fast.adapters import export_adapter
    from peta_fast.cli._adapters import print_report, required_out

    report = export_adapter(adapter, required_out(out), base=base, force=force)
    print_report(report, as_json, None if show_all else limit)
    return 0
