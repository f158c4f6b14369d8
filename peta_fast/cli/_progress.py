"""Progress of a merge on stderr: a bar on a terminal, else a plain line about every two seconds and one at the end."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from peta_fast.cli._text import seconds_text, size_text

LINE_EVERY = 2.0
"""Seconds between plain lines."""
BAR_AFTER = 0.5
"""Seconds before a bar is shown: a merge that is done sooner does not wait for rich to be imported."""


@contextlib.contextmanager
def progress(quiet: bool) -> Iterator[Callable[[Any], None] | None]:
    """A callback for run.Progress objects, or None when nothing is to be said."""
    if quiet:
        yield None
        return
    display = Bar() if sys.stderr.isatty() else Lines()
    try:
        yield display.tell
    finally:
        display.end()


class Lines:
    """For logs and pipes."""

    def __init__(self):
        self.said_at = time.monotonic()
        self.first: tuple[float, int] | None = None
        self.unsaid: Any = None

    def tell(self, state: Any) -> None:
        self.unsaid = state
        now = time.monotonic()
        if self.first is None:
            self.first = now, state.done_bytes
        if now - self.said_at >= LINE_EVERY:
            self._say(now)

    def end(self) -> None:
        if self.unsaid is not None:
            self._say(time.monotonic())

    def _say(self, now: float) -> None:
        began, done_before = self.first or (now, 0)
        line = describe(self.unsaid, self.unsaid.done_bytes - done_before, now - began)
        print(line, file=sys.stderr, flush=True)
        self.said_at, self.unsaid = now, None


def describe(state: Any, recently: int, seconds: float) -> str:
    """merging: 1.2 GB of 14.5 GB (8%), 1.1 GB/s, 12 s left. The pace is that of `recently` bytes in `seconds`."""
    done, total = state.done_bytes, state.total_bytes
    text = f"{state.phase}: {size_text(done)} of {size_text(total)} ({done / max(total, 1):.0%})"
    if recently <= 0 or seconds <= 0:
        return text
    left = (total - done) * seconds / recently
    return f"{text}, {size_text(recently / seconds)}/s" + (f", {seconds_text(left)} left" if left >= 0.5 else "")


class Bar:
    """For terminals. rich honours NO_COLOR."""

    def __init__(self):
        self.started = time.monotonic()
        self.bar: Any = None
        self.task: Any = None

    def tell(self, state: Any) -> None:
        if self.bar is None:
            if time.monotonic() - self.started < BAR_AFTER:
                return
            self._open(state)
        self.bar.update(self.task, completed=state.done_bytes, description=f"{state.phase} {_shortened(state.tensor)}")

    def _open(self, state: Any) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.progress import TransferSpeedColumn as Speed

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), Speed())
        self.bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
        self.task = self.bar.add_task("", total=state.total_bytes, completed=state.done_bytes)
        self.bar.start()

    def end(self) -> None:
        if self.bar is not None:
            self.bar.stop()


def _shortened(name: str, length: int = 36) -> str:
    """The end of a long name, which tells tensors apart."""
    return name if len(name) <= length else "..." + name[3 - length :]
