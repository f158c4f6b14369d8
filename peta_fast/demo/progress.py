"""Progress of the demonstration: a moving bar on a terminal, one plain line for each finished stage everywhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn


class Stage:
    """One stage under way. The body calls advance() at every step and leaves its result in `outcome`."""

    def __init__(self, bar: Progress | None, title: str, steps: int):
        self.outcome = ""
        self._bar = bar
        self._task = bar.add_task(escape(title), total=steps) if bar else None

    def advance(self) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task)


@contextlib.contextmanager
def stage(console: Console, title: str, steps: int) -> Iterator[Stage]:
    """Shows a bar while the body runs, then prints `title: outcome (seconds)`; the line is left out on failure."""
    started = time.perf_counter()
    with _bar(console) if console.is_terminal else contextlib.nullcontext() as bar:
        current = Stage(bar, title, steps)
        yield current
    seconds = time.perf_counter() - started
    say(console, f"{title}: {current.outcome} ({seconds:.1f} s)")


def say(console: Console, line: str) -> None:
    """One line as it is: no markup, no colouring, no wrapping."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)
