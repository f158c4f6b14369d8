"""The tables, as Markdown and on the console, and the JSON document."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from peta_fast.demo.full.claims import CLAIMS, judged
from peta_fast.demo.full.figures import FIGURES
from peta_fast.demo.full.kinds import KINDS
from peta_fast.demo.full.merges import LEFT_OUT, METHODS
from peta_fast.demo.full.results import TrackResult, mean_and_spread
from peta_fast.demo.full.sentences import TASKS, WORDS
from peta_fast.demo.full.settings import DIGITS, TEXT, Regime

HEAD = ["", *KINDS.values()]
CAPTIONS = {
    "scores": "Normalized score with all tasks merged, mean and deviation over the seeds.",
    "number_of_tasks": "Against the number of tasks merged; all tasks count, merged or not. 1: the fine-tunes.",
    "pairs": "Pairs merged by task arithmetic: mean normalized score of the two, mean over the seeds.",
    "lambda": "Normalized score on validation over lambda, all tasks merged, mean over the seeds.",
    "cosines": "Cosines of task vectors, mean over the seeds.",
}


def both(values: Sequence[float], percent: bool = False) -> str:
    mean, spread = mean_and_spread(values)
    return f"{100 * mean:.1f} ± {100 * spread:.1f}" if percent else f"{mean:.3f} ± {spread:.3f}"


Score = Callable[[TrackResult, str, str], list[float]]
TABLES: dict[str, tuple[str, Score, bool]] = {
    "all": ("Normalized score, all tasks merged", lambda t, kind, m: t.normalized(kind, m), False),
    "pairs": ("Normalized score, mean over the pairs", lambda t, kind, m: t.pairs(kind, m), False),
    "all_absolute": ("Accuracy in %, all tasks merged", lambda t, kind, m: t.absolute(kind, m), True),
    "pairs_absolute": ("Accuracy in %, mean over the pairs", lambda t, kind, m: t.pairs_absolute(kind, m), True),
}


def rows(track: TrackResult, name: str) -> list[list[str]]:
    """One row a method, and before them the base and the fine-tunes where they have that number."""
    _, score, percent = TABLES[name]
    found = []
    if name == "all":
        found.append(["base, no merge", *(both(track.base_normalized(kind)) for kind in KINDS)])
    if name == "all_absolute":
        found.append(["base, no merge", *(both(track.base_absolute(), True) for _ in KINDS)])
        found.append(["own fine-tunes", *(both(track.own_mean(kind), True) for kind in KINDS)])
    for method, shown in METHODS.items():
        known = [method in track.merges[kind] for kind in KINDS]
        cells = [both(score(track, k, method), percent) if ok else "-" for k, ok in zip(KINDS, known, strict=True)]
        found.append([shown, *cells])
    return found


def markdown(tracks: Sequence[TrackResult], regime: Regime, about: Mapping[str, Any], absent: Mapping[str, str]) -> str:
    parts = ["# Merging on real data", "", *facts(tracks, about, absent), ""]
    parts += ["## Orderings that the papers report", "", *orderings(tracks), ""]
    for track in tracks:
        parts += [f"## {track.name}: {', '.join(track.tasks)}", "", *counts(track), ""]
        for name, (title, _, _) in TABLES.items():
            parts += [f"### {title}", "", *table(HEAD, rows(track, name)), ""]
    parts += ["## Left out", "", *left_out(absent), "", "## Figures", ""]
    for name in FIGURES:
        parts += [CAPTIONS[name], "", f"![{name}]({name}.png)", ""]
    parts += ["## Settings", "", *settings(regime)]
    return "\n".join(parts) + "\n"


def facts(tracks: Sequence[TrackResult], about: Mapping[str, Any], absent: Mapping[str, str]) -> list[str]:
    seeds = about["seeds"]
    made = ", ".join(f"{k} {v}" for k, v in about["machine"].items())
    listed = f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''} ({', '.join(map(str, seeds))})"
    return [
        f"Mean ± standard deviation over {listed}: of splits, initializations, adapters and masks. "
        f"{about['seconds'] / 60:.1f} minutes in this run with {about['jobs']} processes; "
        f"{about['work_seconds'] / 60:.1f} minutes of work on one core in all stages that are kept; {made}.",
        "",
        "- Normalized: accuracy / accuracy of the task's own fine-tune of the same kind, on test examples. Pairs: mean "
        "over the two tasks that were merged.",
        "- lambda (task arithmetic, TIES, DARE) is chosen on validation examples for every subset of tasks, kind and "
        "seed; AdaMerging and Concrete start from task arithmetic's and see validation inputs without labels, where "
        "their papers use the test's.",
        "- Merged are weights (full, attention), the dense changes s B A (LoRA), and steps in the adapter's space "
        "(L-LoRA), those of the whole-model linearization in the tangent model itself. All is B0 = 0: L-LoRA trains B.",
        "- Concrete: Concrete task arithmetic, one soft mask. MaTS: K-FAC. DARE and TIES keep a fifth.",
    ]  # fmt: skip


def counts(track: TrackResult) -> list[str]:
    first = track.base[0]["counts"]
    shown = "; ".join(f"{t} {n['train']}/{n['validation']}/{n['test']}" for t, n in first.items())
    trained = ", ".join(
        f"{KINDS[kind]} {next(iter(found[0].values()))['trained']:,}" for kind, found in track.finetunes.items()
    )
    lines = [f"- Examples for training/validation/test, first seed: {shown}.", f"- Trained numbers a task: {trained}."]
    if track.name == TEXT:
        labels = "; ".join(f"{task}: {', '.join(packages)}" for task, packages in TASKS.items())
        lines.append(
            f"- Which package does a documentation string's sentence come from? {labels}. Sentences of {WORDS[0]} to "
            f"{WORDS[1]} words that name none of the task's packages, split by their hash. The heads are the base's "
            "own embeddings of the labels' names and stay as they are; frozen are token embeddings and the lower "
            f"{track.base[0]['frozen_layers']} of 6 layers, too."
        )
    if track.name == DIGITS:
        lines.append(
            "- scikit-learn's digits rotated, mirrored, inverted, transposed, by a transformer on patches of 2x2 "
            "pixels that has learned upright digits and a few of each domain."
        )
    return lines


def orderings(tracks: Sequence[TrackResult]) -> list[str]:
    """Every claim, judged in every track."""
    head = ["claim", "paper", *(f"{track.name}: difference" for track in tracks), *(track.name for track in tracks)]
    lines = []
    for claim in CLAIMS:
        verdicts = [judged(claim, track) for track in tracks]
        numbers = [f"{v.difference:+.3f} ± {v.spread:.3f}" for v in verdicts]
        lines.append([claim.text, claim.source, *numbers, *(v.word for v in verdicts)])
    return [
        *table(head, lines), "",
        "Differences of normalized scores with all tasks merged, full fine-tuning where no kind is named (of "
        "accuracies for what is said of fine-tunes alone, of 1 - mean |cosine| for angles), paired by seed. Holds: "
        "above zero with every seed; does not: below zero with every seed; unclear: neither.",
    ]  # fmt: skip


def left_out(absent: Mapping[str, str]) -> list[str]:
    lines = [f"- {METHODS[method]} of {KINDS[kind]}: {why}." for (method, kind), why in LEFT_OUT.items()]
    return lines + [f"- The {track} track: {why}" for track, why in absent.items()]


def settings(regime: Regime) -> list[str]:
    lines = []
    for name, track in regime.tracks.items():
        shown = [f"{key} {value}" for key, value in track.document().items() if key != "training"]
        kinds = [f"{KINDS[k]} {how.epochs} epochs at {how.learning_rate:g}" for k, how in track.training.items()]
        lines.append(f"- {name}: {'; '.join(kinds)}; {'; '.join(shown)}.")
    return lines


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    shown = [f"| {' | '.join(head)} |", f"|---{'|---' * (len(head) - 1)}|"]
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return shown + [f"| {' | '.join(line)} |" for line in escaped]


def document(tracks: Sequence[TrackResult], regime: Regime, about: Mapping[str, Any]) -> dict[str, Any]:
    """What results.json holds: every number of every stage, and the means."""
    summaries = {}
    for track in tracks:
        summaries[track.name] = {
            name: {
                kind: {m: mean_and_spread(score(track, kind, m)) for m in track.merges[kind]} for kind in KINDS
            } for name, (_, score, _) in TABLES.items()
        }  # fmt: skip
    verdicts = [{"claim": c.text, "source": c.source, **{t.name: asdict(judged(c, t)) for t in tracks}} for c in CLAIMS]
    return {
        **about,
        "settings": {name: track.document() for name, track in regime.tracks.items()},
        "summary": summaries,
        "orderings": verdicts,
        "tracks": {track.name: asdict(track) for track in tracks},
    }


def show(tracks: Sequence[TrackResult], console: Console, out: Path) -> None:
    """The normalized scores of all tasks and of pairs, and the orderings' verdicts."""
    for track in tracks:
        for name in ("all", "pairs"):
            drawn = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), title_justify="left")
            for number, heading in enumerate([f"{track.name}, {name}", *KINDS]):
                drawn.add_column(heading, justify="right" if number else "left", no_wrap=True)
            for head, *cells in rows(track, name):
                drawn.add_row(Text(head), *(Text(cell.partition(" ")[0]) for cell in cells))
            console.print()
            console.print(drawn)
    console.print()
    for claim in CLAIMS:
        words = ", ".join(f"{track.name} {judged(claim, track).word}" for track in tracks)
        console.print(Text(f"{claim.text}: {words}"))
    console.print(Text(f"\nresults.md, results.json and the pictures are in {out}/"))
