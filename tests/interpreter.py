"""Python in a process of its own, with the installed package and not the sources of a checkout, which hold no
native module: it starts in a folder that has no package of that name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
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


def run_checks(file: str) -> dict[str, str]:
    """Runs a file that ends in print_checks. Name of a check -> what went wrong in it."""
    ran = run_python(file)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def print_checks(checks: Mapping[str, Callable[[], None]]) -> None:
    """Runs all of them, whatever fails, and prints one JSON object: name -> what went wrong, "" for nothing."""
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(1)
    found = {}
    for name, check in checks.items():
        try:
            check()
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
    json.dump(found, sys.stdout)
