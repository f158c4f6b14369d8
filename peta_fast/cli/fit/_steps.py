"""Progress of learning on stderr: a bar on a terminal, else a plain line about every two seconds and one at the end."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from peta_fast.cli._progress import LINE_EVERY
from peta_fast.cli._text import seconds_text

Tell = Callable[[str, int, "int | None", str], None]
"""tell(what, done, of, more): masks, 120, 2000, "loss 0.53"; `of` is None where the number is not known."""


@contextlib.contextmanager
def steps(quiet: bool) -> Iterator[Tell]:
    """A function that is told every step."""
    if quiet:
        yield lambda what, done, of, more="": None
        return
    display = _Bar() if sys.stderr.isatty() else _Lines()
    try:
        yield display.tell
    finally:
        display.end()


class _Lines:
    """For logs and pipes."""

    def __init__(self):
        self.said_at = time.monotonic()
        self.what, self.first, self.unsaid = "", (0.0, 0), ""

    def tell(self, what: str, done: int, of: int | None, more: str = "") -> None:
        now = time.monotonic()
        if what != self.what:
            self.end()
            self.what, self.first = what, (now, done)
        self.unsaid = described(what, done, of, more, done - self.first[1], now - self.first[0])
        if now - self.said_at >= LINE_EVERY:
            self.end()

    def end(self) -> None:
        if self.unsaid:
            print(self.unsaid, file=sys.stderr, flush=True)
        self.said_at, self.unsaid = time.monotonic(), ""


def described(what: str, done: int, of: int | None, more: str, recently: int, seconds: float) -> str:
    """masks: 120 of 2,000, loss 0.53, 3.1/s, 10 min 6 s left. The pace is that of `recently` steps in `seconds`."""
    text = f"{what}: {done:,}" + (f" of {of:,}" if of is not None else "") + (f", {more}" if more else "")
    if recently <= 0 or seconds <= 0:
        return text
    text += f", {recently / seconds:.3g}/s"
    left = (of - done) * seconds / recently if of is not None else 0.0
    return text + (f", {seconds_text(left)} left" if left >= 0.5 else "")


class _Bar:
    """For terminals. rich honours NO_COLOR."""

    def __init__(self):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        self.bar: Any = Progress(
            *columns,
            TimeRemainingColumn(),
            TextColumn("{task.fields[more]}", markup=False),
            console=Console(stderr=True),
        )
        self.tasks: dict[str, Any] = {}
        self.bar.start()

    def tell(self, what: str, done: int, of: int | None, more: str = "") -> None:
        if what not in self.tasks:
            self.tasks[what] = self.bar.add_task(what, total=of, more=more)
        self.bar.update(self.tasks[what], completed=done, more=more)

    def end(self) -> None:
        self.bar.stop()
