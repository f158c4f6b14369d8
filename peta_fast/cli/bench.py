"""`peta-fast bench`: the benchmarks of the source tree."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from peta_fast.cli._parser import Argument, Rest

EPILOG = "What stands after `--` goes to pytest: peta-fast bench ties -- -k avx2"
PREFIX = "bench_"


def bench(
    name: Annotated[str | None, Argument("NAME", "one benchmark; without it, all")] = None,
    options: Annotated[list[str] | None, Rest()] = None,
) -> int:
    """Run the benchmarks, or one of them, and print the table."""
    import subprocess
    import tempfile

    folder = benchmarks_folder()
    files = chosen(folder, name)
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch) / "results.json"
        switches = ["--benchmark-enable", "--benchmark-only", f"--benchmark-json={results}", "-q"]
        tested = subprocess.run([*_pytest(), *map(str, files), *switches, *(options or [])], cwd=folder.parent)
        if tested.returncode == 0 and results.exists() and results.stat().st_size:
            _print_results(folder, results)
    return tested.returncode


def benchmarks_folder() -> Path:
    """`benchmarks` here or beside the package. Raises ResourceError when it is in neither place."""
    import peta_fast
    from peta_fast.errors import ResourceError

    places = [Path.cwd() / "benchmarks", Path(peta_fast.__file__).parents[1] / "benchmarks"]
    found = next((place for place in places if any(place.glob(f"{PREFIX}*.py"))), None)
    if found is None:
        raise ResourceError(
            "benchmarks", f"expected {PREFIX}*.py in {places[0]} or {places[1]}, found none",
            "They are part of the source tree, not of the installed package: run this in a checkout.",
        )  # fmt: skip
    return found


def chosen(folder: Path, name: str | None) -> list[Path]:
    """The files to run. Raises UsageError when there is no such benchmark."""
    from peta_fast.cli._errors import UsageError

    known = {file.stem.removeprefix(PREFIX): file for file in sorted(folder.glob(f"{PREFIX}*.py"))}
    if name is None:
        return list(known.values())
    if name not in known:
        raise UsageError("bench", f"expected one of {', '.join(known)}, got {name!r}")
    return [known[name]]


def _pytest() -> list[str]:
    """Its own command, since `python -m pytest` would import the source tree instead of the installed package."""
    import shutil
    import sys
    from importlib.util import find_spec

    from peta_fast.errors import ResourceError

    command = shutil.which("pytest", path=str(Path(sys.executable).parent)) or shutil.which("pytest")
    if command is None or find_spec("pytest_benchmark") is None:
        problem = "expected pytest and pytest-benchmark, at least one is not installed"
        raise ResourceError("bench", problem, "pip install 'peta_fast[test]'")
    return [command]


def _print_results(folder: Path, results: Path) -> None:
    """By the folder's own table.py, where it has one; pytest-benchmark has printed a table of times already."""
    import subprocess
    import sys

    table = folder / "table.py"
    if table.exists():
        sys.stdout.flush()
        subprocess.run([sys.executable, str(table), str(results)], cwd=folder.parent, check=False)
