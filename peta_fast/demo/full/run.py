"""`peta-fast demo --full`: the flow. Work in stages on a few processes, then one document, one table, five pictures."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from peta_fast.demo.extras import import_extra
from peta_fast.demo.full import figures, report, text
from peta_fast.demo.full.chain import BASE, Chain
from peta_fast.demo.full.kinds import KINDS
from peta_fast.demo.full.pool import Unit, run_units
from peta_fast.demo.full.progress import Progress
from peta_fast.demo.full.results import TrackResult, available_cores, collect, machine
from peta_fast.demo.full.sentences import TASKS, documentation
from peta_fast.demo.full.settings import FULL, TEXT, TINY, Regime
from peta_fast.demo.full.stages import published
from peta_fast.demo.progress import say
from peta_fast.errors import PetaFastError, ResourceError

ENTRIES = {"stages", "results.json", "results.md", *(f"{name}.png" for name in figures.FIGURES)}
MOST_JOBS = 8
"""Each holds a model, its fine-tunes and their statistics: about 2 GB."""


def run_full(
    out: Path | str = "peta_fast_demo_full", *, seed: int = 0, quick: bool = False, jobs: int | None = None,
    console: Console | None = None,
) -> list[TrackResult]:  # fmt: skip
    """Fine-tunes, merges and scores everything that is not in `out` yet, and writes what came out.

    out    folder, made if needed; stages in it that were made with these settings are not done again
    seed   the first; the others follow it
    quick  a rehearsal of a minute or two: all steps once, tiny, whose numbers mean nothing
    jobs   processes of one thread; one a core by default. Results do not depend on it

    Returns one result a track. The text track is left out, by name, where its packages or Python's sources are missing.
    Raises ResourceError when `out` holds other things, PetaFastError when scikit-learn or matplotlib is missing.
    """
    out, console = Path(out), console or Console()
    check_folder(out)
    import_extra("sklearn.datasets"), import_extra("matplotlib.figure")
    started, regime = time.perf_counter(), TINY if quick else FULL
    jobs = jobs or min(available_cores(), MOST_JOBS)
    absent = missing_tracks()
    for track, why in absent.items():
        say(console, f"The {track} track is left out: {why}")
    seeds, names = range(seed, seed + regime.seeds), [name for name in regime.tracks if name not in absent]
    units = [Unit(s, track, kind) for s in seeds for track, kind in in_order(names)]
    bases = [Unit(s, track, BASE) for s in seeds for track in names]
    progress = Progress(console, [*bases, *units], stage_counts(out, regime, bases, units), jobs)
    run_units(out, regime, bases, jobs, progress.told)
    run_units(out, regime, units, jobs, progress.told)
    tracks = [collect(out, regime, seeds, track) for track in names]
    about = {
        "seeds": list(seeds), "regime": regime.name, "machine": machine(), "jobs": jobs, "left_out": absent,
        "seconds": round(time.perf_counter() - started, 1),
        "work_seconds": round(sum(track.seconds for track in tracks), 1),
    }  # fmt: skip
    write(out, tracks, regime, about, absent)
    report.show(tracks, console, out)
    return tracks


def check_folder(out: Path) -> None:
    """Refuses a folder that holds anything a full demonstration does not write."""
    if out.exists() and not out.is_dir():
        raise ResourceError(str(out), "expected a folder, got a file", "Give another folder with --out.")
    foreign = sorted(entry.name for entry in out.iterdir() if entry.name not in ENTRIES) if out.exists() else []
    if foreign:
        problem = f"expected a new folder or one of an earlier full demo, got one that holds {foreign[0]!r}"
        raise ResourceError(str(out), problem, "Give another folder with --out.")


def missing_tracks() -> dict[str, str]:
    """Track -> why it cannot be run here."""
    if text.missing():
        return {TEXT: f"it needs {' and '.join(text.missing())}: {text.INSTALL}"}
    try:
        for packages in TASKS.values():
            for package in packages:
                next(documentation(package))
    except PetaFastError as error:
        return {TEXT: f"its sentences are Python's own documentation strings; {error.who}: {error.problem}"}
    return {}


def in_order(tracks: Sequence[str]) -> list[tuple[str, str]]:
    """Tracks and kinds, the longest first, so that processes end at about the same time."""
    return sorted(((t, k) for t in tracks for k in KINDS), key=lambda unit: -Progress.cost(*unit))


def stage_counts(out: Path, regime: Regime, bases: Sequence[Unit], units: Sequence[Unit]) -> dict[Unit, int]:
    """Unit -> stages that it will tell of."""

    def chain(unit: Unit) -> Chain:
        return Chain(out, regime, unit.seed, unit.track, unit.kind, lambda *stage: None)

    return dict.fromkeys(bases, 1) | {unit: chain(unit).count() for unit in units}


def write(out: Path, tracks: Sequence[TrackResult], regime: Regime, about, absent) -> None:
    with published(out / "results.json") as partial:
        text_of = json.dumps(report.document(tracks, regime, about), indent=1)
        partial.write_text(text_of + "\n", encoding="utf-8")
    with published(out / "results.md") as partial:
        partial.write_text(report.markdown(tracks, regime, about, absent), encoding="utf-8")
    figures.write(tracks, out)
