"""Python in a process of its own, with the installed package and not the sources of a checkout, which hold no
native module: it starts in a folder that has no package of that name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def run_code(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """Runs the code, with PETA_FAST_* as given and not as here."""
    return run_python("-c", code, *arguments, **environment)


def run_python(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PETA_FAST_")}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, cwd=HERE, env={**inherited, **environment}, capture_output=True, text=True, timeout=300
    )
