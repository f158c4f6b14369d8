"""All figures of merging, in one run: files, start-up, planning, memory; as JSON rows and as a Markdown table.

usage: merge_suite.py --families DIR (--mergekit PYTHON | --skip-mergekit) [--sizes 160m,1b] [--rounds 5]
       [--parts files,startup,plan,memory] [--results DIR]
       merge_suite.py --families DIR --in-memory [--sizes 160m,1b] [--rounds 5] [--results DIR]

Families are made in DIR where they are missing (1b: 6.8 GB, and 4 GB more while it runs). Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from family_files import SIZES, get_family
from file_merges import (
    MERGEKIT,
    FileMerges,
    imports_torch,
    interleaved,
    mergekit_command,
    start_python_with_numpy,
)
from floors import seconds
from rows import Row, best_and_median, write_json
from sparse_checkpoints import expert_recipe, parse_headers
from table import markdown

PARTS = ("files", "startup", "plan", "memory")
RESULTS = Path(__file__).resolve().parent / "results"


def tell(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def files_rows(given: argparse.Namespace) -> list[Row]:
    contests = [FileMerges(get_family(given.families, size), given.mergekit) for size in given.sizes]
    interleaved(contests, given.rounds, tell)
    rows = [row for contest in contests for row in contest.rows()]
    for contest in contests:
        contest.clean_up()
    return rows


def startup_rows(given: argparse.Namespace) -> list[Row]:
    """A whole merge of 316 kB: more than the time from the process's start to the first byte read."""
    contest = FileMerges(get_family(given.families, "tiny"), given.mergekit)
    floor, folder = [], contest.family.folder.parent
    for number in range(1, given.rounds + 1):
        contest.make_room()
        contest.merge()
        floor.append(start_python_with_numpy(folder))
        if contest.mergekit:
            contest.merge_with_mergekit()
        tell(f"startup round {number}: {contest.wall[-1]:.3f} s, Python with numpy {floor[-1]:.3f} s")
    row = Row(
        "startup[tiny]",
        "whole process, " + contest.family.shape,
        min(contest.wall),
        reference=min(contest.mergekit_wall, default=None),
        reference_name=MERGEKIT,
        floor=min(floor),
        floor_name="Python that imports numpy",
        error=contest.error().largest,
        error_unit="of 2^-7",
        goal="under 0.5 s to the first byte read, no torch",
        details={
            "wall": best_and_median(contest.wall),
            "without_the_merge": min(w - i for w, i in zip(contest.wall, contest.inside, strict=True)),
            "floor": best_and_median(floor),
            "imports_torch": imports_torch(contest.family.recipe, contest.out),
        },
    )
    contest.clean_up()
    return [row]


def plan_rows(given: argparse.Namespace) -> list[Row]:
    from peta_fast.plan import make_plan
    from peta_fast.recipe import load_recipe

    with tempfile.TemporaryDirectory(dir=given.families) as scratch:
        folder = Path(scratch)
        recipe = load_recipe(expert_recipe(folder))
        ours, floor = [], []
        for number in range(1, given.rounds + 1):
            ours.append(seconds(lambda: make_plan(recipe)))
            floor.append(seconds(lambda: parse_headers(folder)))
            tell(f"plan round {number}: {ours[-1]:.2f} s, headers {floor[-1]:.2f} s")
        planned = len(make_plan(recipe).tensors)
    row = Row(
        "plan[experts]",
        f"{planned} tensors, base + 3",
        min(ours),
        floor=min(floor),
        floor_name="parsing the headers as JSON",
        goal="under 5 s",
        details={"plan": best_and_median(ours), "floor": best_and_median(floor)},
    )
    return [row]


def memory_rows(given: argparse.Namespace) -> list[Row]:
    from in_memory import InMemory

    rows = []
    for size in given.sizes:
        contest = InMemory(get_family(given.families, size))
        for number in range(1, given.rounds + 1):
            contest.round()
            tell(
                f"{size} in memory, round {number}: select {contest.select_seconds[-1]:.3f} s, "
                f"merge {contest.merge_seconds[-1]:.3f} s, PyTorch {contest.pytorch_seconds[-1]:.1f} s"
            )
        rows += contest.rows()
    return rows


MEASURE: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "files": files_rows,
    "startup": startup_rows,
    "plan": plan_rows,
    "memory": memory_rows,
}


def write_results(rows: Sequence[Row], folder: Path) -> Path:
    """merge_suite.json and merge_suite.md; returns the latter."""
    write_json(rows, folder / "merge_suite.json")
    text = folder / "merge_suite.md"
    text.write_text(markdown(row.to_json() for row in rows), encoding="utf-8")
    return text


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", type=Path, required=True, metavar="DIR")
    parser.add_argument("--sizes", type=_listed(SIZES), default=["160m", "1b"])
    parser.add_argument("--rounds", type=int, default=5)
    reference = parser.add_mutually_exclusive_group()
    reference.add_argument("--mergekit", type=Path, metavar="PYTHON", help="a Python with mergekit 0.1.5")
    reference.add_argument("--skip-mergekit", action="store_true")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--parts", type=_listed(PARTS), default=list(PARTS))
    which.add_argument("--in-memory", action="store_const", const=["memory"], dest="parts")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    given = parser.parse_args(words)
    if not (given.mergekit or given.skip_mergekit) and {"files", "startup"} & set(given.parts):
        parser.error("expected --mergekit PYTHON, or --skip-mergekit to measure without it")
    if given.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {given.rounds}")
    return given


def _listed(known: Sequence[str]) -> Callable[[str], list[str]]:
    def words(text: str) -> list[str]:
        found = text.split(",")
        for word in found:
            if word not in known:
                raise argparse.ArgumentTypeError(f"expected some of {','.join(known)}, got {word!r}")
        return found

    return words


def main() -> None:
    given = arguments()
    if given.mergekit:
        mergekit_command(given.mergekit)
    given.families.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for part in given.parts:
        rows += MEASURE[part](given)
        written = write_results(rows, given.results)
    shutil.copyfileobj(written.open(encoding="utf-8"), sys.stdout)


if __name__ == "__main__":
    main()
