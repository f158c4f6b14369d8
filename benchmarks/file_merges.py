"""File-to-file merges side by side: peta_fast, mergekit, and the floor, one round of each after another.

Moved by TIES over base + T models in bf16, n parameters: 2 (T + 1) n bytes read twice (select, merge), 2 n written and
made durable. Floor: the inputs read once by two threads, and as many bytes as the output written and fsynced.
peta_fast's time holds fsync; mergekit's does not, since it makes nothing durable. Both hold their start-up.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from family_files import Family, merge_error, mergekit_error
from floors import FileFloor, read_mapped_sum
from processes import Finished, run_timed, settle
from rows import Row, best_and_median
from ties_reference import Error

MERGEKIT = "mergekit 0.1.5"
FLOOR = "read once, write and fsync"
GOALS = {
    "160m": "at least 50 times mergekit",
    "1b": "at least 80 times mergekit, aim 150; at most 2.5 times the floor",
}
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
READINGS = 3
"""Of the inputs before a merge that is timed: pages that were read more than once are kept."""
LOOK, RARE_LOOK = 0.005, 0.05
"""Seconds between two looks at a program's memory; rarely where the run is timed."""


class FileMerges:
    """The rounds of one family.

    mergekit  a Python that has mergekit, None to leave it out
    """

    def __init__(self, family: Family, mergekit: Path | None):
        self.family = family
        self.mergekit = mergekit_command(mergekit) if mergekit else None
        self.out = family.folder.parent / f"{family.size}-merged"
        self.mergekit_out = family.folder.parent / f"{family.size}-merged-by-mergekit"
        self.floor = FileFloor(
            family.weight_files(), family.output_bytes, family.folder.parent / f".{family.size}-floor"
        )
        self.wall: list[float] = []
        self.inside: list[float] = []
        self.peak = self.mergekit_peak = 0
        self.mergekit_wall: list[float] = []

    def measure_memory(self) -> None:
        """A merge that is looked at often, and not timed. It also warms what the first round would have to read."""
        self.make_room()
        self.peak = self._merge(sample_every=LOOK).peak_memory

    def round(self) -> None:
        """One merge by each, one floor."""
        if self.mergekit:
            self.merge_with_mergekit()
        self.make_room()
        self.merge()
        self.floor.measure()

    def merge(self) -> None:
        done = self._merge()
        self.wall.append(done.seconds)
        self.inside.append(json.loads(done.stdout)["seconds"])

    def make_room(self) -> None:
        """Removes the last output of peta_fast, waits for what others still write, and reads the inputs, as often as it
        takes to hold them: mergekit's memory pushes them out of the page cache."""
        shutil.rmtree(self.out, ignore_errors=True)
        settle()
        for _ in range(READINGS):
            read_mapped_sum(self.family.weight_files())

    def _merge(self, sample_every: float | None = None) -> Finished:
        command = [sys.executable, "-m", "peta_fast", "merge", self.family.recipe, self.out, "--force", "--json", "-q"]
        return run_timed(command, cwd=self.family.folder.parent, sample_every=sample_every)

    def merge_with_mergekit(self) -> float:
        shutil.rmtree(self.mergekit_out, ignore_errors=True)
        settle()
        command = [*self.mergekit, self.family.recipe, self.mergekit_out, "--quiet"]
        done = run_timed(command, cwd=self.family.folder.parent, environment=OFFLINE, sample_every=RARE_LOOK)
        self.mergekit_wall.append(done.seconds)
        self.mergekit_peak = max(self.mergekit_peak, done.peak_memory)
        return done.seconds

    def error(self) -> Error:
        return merge_error(self.family, self.out)

    def mergekit_error(self) -> Error | None:
        return mergekit_error(self.family, self.mergekit_out) if self.mergekit_wall else None

    def clean_up(self) -> None:
        for folder in (self.out, self.mergekit_out):
            shutil.rmtree(folder, ignore_errors=True)

    def details(self) -> dict:
        """Of all rounds so far, for a row; checks both outputs."""
        found = {
            "wall": best_and_median(self.wall),
            "own_seconds": best_and_median(self.inside),
            "floor": self.floor.details(),
            "input_bytes": self.family.input_bytes,
            "output_bytes": self.family.output_bytes,
            "error": vars(self.error()),
        }
        if self.mergekit_wall:
            found["reference"] = best_and_median(self.mergekit_wall)
            found["reference_error_where_clear"] = vars(self.mergekit_error())
        return found

    def rows(self) -> list[Row]:
        """Time with and without start-up, and memory."""
        details = self.details()
        common = {
            "shape": self.family.shape,
            "reference": min(self.mergekit_wall, default=None),
            "reference_name": MERGEKIT,
            "error": details["error"]["largest"],
            "error_unit": "of 2^-7",
            "nbytes": self.family.input_bytes + self.family.output_bytes,
        }
        floor = {"floor": self.floor.seconds, "floor_name": FLOOR}
        wall = Row(
            f"merge_files[{self.family.size}]",
            ours=min(self.wall),
            goal=GOALS.get(self.family.size, ""),
            details=details,
            **common,
            **floor,
        )
        inside = Row(f"merge_files_without_startup[{self.family.size}]", ours=min(self.inside), **common, **floor)
        return [wall, inside, self._memory_row()]

    def _memory_row(self) -> Row:
        return Row(
            f"peak_memory[{self.family.size}]",
            self.family.shape,
            float(self.peak),
            reference=float(self.mergekit_peak) or None,
            reference_name=MERGEKIT,
            floor=float(memory_of_an_idle_python(self.family.folder.parent)),
            floor_name="Python with numpy and the native module",
            unit="bytes",
            goal="at most 1 GiB, the same at every size",
        )


def mergekit_command(python: Path) -> list[str]:
    """The command line program that was installed beside this Python. Raises FileNotFoundError when there is none."""
    program = Path(python).parent / "mergekit-yaml"
    if not program.exists():
        raise FileNotFoundError(f"{program}: expected mergekit's command beside {python}; pip install mergekit==0.1.5")
    return [str(program)]


def memory_of_an_idle_python(folder: Path) -> int:
    """Bytes without file-backed pages that every merge has, once numpy and the native module are loaded."""
    code = "import time, numpy; from peta_fast._native import native; native(); time.sleep(0.1)"
    return run_timed([sys.executable, "-c", code], cwd=folder, sample_every=LOOK).peak_memory


def start_python_with_numpy(folder: Path) -> float:
    """Seconds from start to exit: the floor of every start-up."""
    return run_timed([sys.executable, "-c", "import numpy"], cwd=folder).seconds


def imports_torch(recipe: Path, out: Path) -> bool:
    """Whether the command line program's merge imports torch."""
    code = (
        "import sys; from peta_fast.cli import main; "
        f"main(['merge', {str(recipe)!r}, {str(out)!r}, '--force', '--quiet']); print('torch' in sys.modules)"
    )
    return run_timed([sys.executable, "-c", code], cwd=recipe.parent).stdout.split()[-1] == "True"


def interleaved(contests: Sequence[FileMerges], rounds: int, tell=lambda text: None) -> None:
    """Rounds of all families, one after another, so that a slow minute of the machine hits all alike."""
    for contest in contests:
        contest.measure_memory()
    for number in range(1, rounds + 1):
        for contest in contests:
            contest.round()
            told = f"{contest.family.size} round {number}: {contest.wall[-1]:.3f} s"
            if contest.mergekit_wall:
                told += f", mergekit {contest.mergekit_wall[-1]:.1f} s"
            tell(f"{told}, floor so far {contest.floor.seconds:.3f} s")
