"""`peta-fast verify`: whether a checkpoint is whole."""

from __future__ import annotations

from typing import Annotated

from peta_fast.cli._options import AsJson
from peta_fast.cli._parser import Argument, Option
from peta_fast.cli._text import print_json


def verify(
    path: Annotated[str, Argument("PATH", "model folder, weight file or hub id")],
    allow_nonfinite: Annotated[bool, Option("--allow-nonfinite", help="NaN and infinities are no fault.")] = False,
    as_json: AsJson = False,
) -> int:
    """Check that a checkpoint is whole.

    Headers and sizes, checksums where peta-fast wrote it, finite values, and that the safetensors library opens it.
    Exit code 1 when anything is wrong.
    """
    from peta_fast.cli._soundness import examined

    checks = examined(path, allow_nonfinite)
    sound = not any(check.problems for check in checks)
    if as_json:
        listed = [{"check": c.name, "problems": c.problems, "note": c.note} for c in checks]
        print_json({"path": path, "sound": sound, "checks": listed})
    else:
        for check in checks:
            print("\n".join(check.lines()))
    return 0 if sound else 1
