"""What a sweep has found: a journal that a killed one resumes from, and tables and a picture at the end.

The journal is one JSON object a line: what the sweep is, then one line a point that is done: its parameters, its scores
or its error, and how long it took. Points go by their parameters, so a grid may grow between two runs.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peta_fast.errors import CheckpointError, ResourceError
from peta_fast.formats.disk import make_directory, write_whole
from peta_fast.journal import Journal, fingerprint

JOURNAL = "peta_fast_sweep.jsonl"
CSV, JSON, PICTURE = "results.csv", "results.json", "results.png"
SCORE = "score"
"""What a number is called that an evaluator returns by itself."""


@dataclass(frozen=True)
class Point:
    """One point that is done: scores, or the error that its evaluation ended with."""

    parameters: Mapping[str, Any]
    scores: Mapping[str, float] = field(default_factory=dict)
    error: str = ""
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "parameters": dict(self.parameters), "scores": dict(self.scores), "error": self.error,
            "seconds": round(self.seconds, 6),
        }  # fmt: skip


@dataclass(frozen=True)
class Results:
    """All points in the grid's order, those that are not done left out.

    axes    key -> its values
    metric  the score that `best` goes by
    best    the point with the largest or smallest metric, None where it was not asked for or no score is a number
    """

    axes: Mapping[str, tuple]
    points: Sequence[Point]
    metric: str
    best: Point | None

    @property
    def failed(self) -> list[Point]:
        return [p for p in self.points if p.error]

    def to_json(self) -> dict[str, Any]:
        return {
            "axes": {key: list(values) for key, values in self.axes.items()},
            "metric": self.metric,
            "best": self.best.to_json() if self.best else None,
            "points": [p.to_json() for p in self.points],
        }

    def to_csv(self) -> str:
        metrics = list(dict.fromkeys(name for p in self.points for name in p.scores))
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        columns = [f"{SCORE}.{m}" if m in (*self.axes, "seconds", "error") else m for m in metrics]
        table.writerow([*self.axes, *columns, "seconds", "error"])
        for p in self.points:
            scores = [repr(p.scores[m]) if m in p.scores else "" for m in metrics]
            table.writerow([*(p.parameters[key] for key in self.axes), *scores, f"{p.seconds:.6f}", p.error])
        return text.getvalue()

    def write(self, out: Path) -> list[Path]:
        """CSV, JSON and, where matplotlib is there and something has a score, the picture; returns their paths."""
        make_directory(out)
        write_whole(out / CSV, self.to_csv().encode())
        write_whole(out / JSON, (json.dumps(self.to_json(), indent=1, default=str) + "\n").encode())
        picture = draw(self)
        if picture:
            write_whole(out / PICTURE, picture)
        return [out / CSV, out / JSON, *([out / PICTURE] if picture else [])]


def scores_of(returned: Any) -> dict[str, float]:
    """What an evaluator returned as scores by name. Raises TypeError when it is no number and no dict of numbers."""
    named = returned if isinstance(returned, Mapping) else {SCORE: returned}
    scores = {}
    for name, value in named.items():
        if isinstance(value, str | bytes | bool) or not hasattr(value, "__float__"):
            raise TypeError(f"expected a number or a dict of numbers, got {name} = {value!r}")
        scores[str(name)] = float(value)
    if not scores:
        raise TypeError("expected a number or a dict of numbers, got an empty dict")
    return scores


def best_of(points: Sequence[Point], metric: str, which: str) -> Point | None:
    """The first point with the largest ("max") or smallest ("min") metric; NaN is never the best."""
    rated = [p for p in points if not math.isnan(p.scores.get(metric, math.nan))]
    return (max if which == "max" else min)(rated, key=lambda p: p.scores[metric]) if rated else None


class SweepJournal:
    """Points that are done, kept in `out`. Use it in a `with`.

    what    everything that the scores depend on but the point; another sweep's journal is refused
    Raises ResourceError when there is a journal and neither resume nor force, or when it is another sweep's.
    """

    def __init__(self, out: Path, what: Any, *, resume: bool, force: bool):
        mark = fingerprint(what)
        self.done: dict[str, Point] = {}
        found = _read(out / JOURNAL)
        goes_on = bool(found) and resume and found[0].get("sweep") == mark
        if found and not goes_on and not force:
            if resume:
                raise ResourceError(
                    str(out), "holds another sweep: recipe, models or evaluator differ from those it was begun with",
                    "Use --force to start anew, or another output folder.",
                )  # fmt: skip
            raise ResourceError(
                str(out), "holds a sweep already", "Use --resume to go on with it, --force to start anew."
            )
        make_directory(out)
        self.journal = Journal(out, None if goes_on else {"sweep": mark}, name=JOURNAL)
        for entry in found[1:] if goes_on else ():
            point = Point(entry["parameters"], entry["scores"], entry["error"], entry["seconds"])
            self.done[_key(point.parameters)] = point

    def has(self, parameters: Mapping[str, Any]) -> bool:
        """Whether the point has scores; one that failed is tried again."""
        point = self.done.get(_key(parameters))
        return point is not None and not point.error

    def get(self, parameters: Mapping[str, Any]) -> Point | None:
        return self.done.get(_key(parameters))

    def add(self, point: Point) -> None:
        self.done[_key(point.parameters)] = point
        self.journal.append(point.to_json())

    def __enter__(self) -> SweepJournal:
        return self

    def __exit__(self, *_) -> None:
        try:
            self.journal.sync()
        finally:
            self.journal.close()


def _key(parameters: Mapping[str, Any]) -> str:
    return json.dumps(dict(parameters), sort_keys=True)


def _read(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal; a line that a power cut has torn is left out."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(str(path), f"cannot be read: {error.strerror}") from error
    entries = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and (not entries or _is_point(entry)):
            entries.append(entry)
    return entries


def _is_point(entry: dict[str, Any]) -> bool:
    fields = {"parameters": dict, "scores": dict, "error": str, "seconds": int | float}
    scores = entry.get("scores")
    return all(isinstance(entry.get(name), kind) for name, kind in fields.items()) and all(
        type(score) in (int, float) for score in scores.values()
    )


def draw(results: Results) -> bytes | None:
    """A curve over one axis, or a heatmap over the first two, as PNG; further axes at their best.

    None without matplotlib, or where there is nothing to draw.
    """
    rated = [p for p in results.points if math.isfinite(p.scores.get(results.metric, math.nan))]
    if not rated:
        return None
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(6.4, 4.4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    wide = [key for key, values in results.axes.items() if len(values) > 1] or list(results.axes)
    if len(wide) == 1:
        _draw_curve(axes, results, rated, wide[0])
    else:
        figure.colorbar(_draw_heatmap(axes, results, rated, wide[0], wide[1]), label=results.metric)
    if len(wide) > 2:
        axes.set_title(f"best over {', '.join(wide[2:])}", fontsize=9)
    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream)
    return stream.getvalue()


def _best_at(results: Results, rated: Sequence[Point], keys: Sequence[str]) -> dict[tuple, float]:
    """The metric by the values of some keys; of points that differ in other keys alone, the best one's."""
    smaller = results.best is not None and any(
        p.scores[results.metric] > results.best.scores[results.metric] for p in rated
    )
    choose = min if smaller else max
    found: dict[tuple, float] = {}
    for p in rated:
        place = tuple(p.parameters[key] for key in keys)
        score = p.scores[results.metric]
        found[place] = choose(found[place], score) if place in found else score
    return found


def _draw_curve(axes, results: Results, rated, key: str) -> None:
    found = _best_at(results, rated, [key])
    order = [v for v in results.axes[key] if (v,) in found]
    numbers = all(isinstance(v, int | float) for v in order)
    axes.plot(order if numbers else [str(v) for v in order], [found[v,] for v in order], marker="o")
    axes.set_xlabel(key)
    axes.set_ylabel(results.metric)
    axes.grid(alpha=0.3)


def _draw_heatmap(axes, results: Results, rated, row: str, column: str):
    found = _best_at(results, rated, [row, column])
    rows, columns = results.axes[row], results.axes[column]
    image = axes.imshow([[found.get((r, c), math.nan) for c in columns] for r in rows], aspect="auto", origin="lower")
    axes.set_xticks(range(len(columns)), [f"{c:g}" if isinstance(c, float) else str(c) for c in columns])
    axes.set_yticks(range(len(rows)), [f"{r:g}" if isinstance(r, float) else str(r) for r in rows])
    axes.set_xlabel(column)
    axes.set_ylabel(row)
    if len(rows) * len(columns) <= 100:
        for (r, c), score in found.items():
            ink = "k" if image.norm(score) > 0.6 else "w"
            axes.text(columns.index(c), rows.index(r), f"{score:.3g}", ha="center", va="center", fontsize=7, color=ink)
    return image
