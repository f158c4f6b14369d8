"""Programs timed from start to exit, start-up included, and their memory."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

OWN_MEMORY = ("RssAnon:", "RssShmem:")
"""Lines of /proc/<pid>/status that add up to the resident memory without file-backed pages."""


@dataclass(frozen=True)
class Finished:
    """seconds of wall time; peak_memory in bytes without file-backed pages, 0 when it was not sampled; its stdout."""

    seconds: float
    peak_memory: int
    stdout: str


def run_timed(
    command: Sequence[str | Path],
    *,
    cwd: Path,
    environment: Mapping[str, str] | None = None,
    sample_every: float | None = None,
) -> Finished:
    """Runs a command to its end.

    sample_every  seconds between two looks at its memory; None for no look, which disturbs the time least

    Raises RuntimeError with the end of its stderr when it fails.
    """
    words = [str(word) for word in command]
    began = time.perf_counter()
    with subprocess.Popen(
        words,
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        watch = _Watch(process.pid, sample_every)
        stdout, stderr = process.communicate()
        taken = time.perf_counter() - began
        watch.stop()
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {process.returncode}:\n{stderr[-2000:]}")
    return Finished(taken, watch.peak, stdout)


class _Watch:
    """Looks at a process's memory from a thread."""

    def __init__(self, pid: int, every: float | None):
        self.status, self.every, self.peak = Path(f"/proc/{pid}/status"), every, 0
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)
        if every is not None:
            self.thread.start()

    def _look(self) -> None:
        while not self.stopped.wait(self.every):
            try:
                self.peak = max(self.peak, own_memory(self.status.read_text()))
            except OSError:
                return

    def stop(self) -> None:
        self.stopped.set()
        if self.every is not None:
            self.thread.join()


def own_memory(status: str) -> int:
    """Bytes of resident memory without file-backed pages, from the text of /proc/<pid>/status."""
    lines = (line.split() for line in status.splitlines())
    return sum(int(words[1]) << 10 for words in lines if words and words[0] in OWN_MEMORY)


def settle() -> None:
    """Waits until what earlier programs wrote is on the disk, so that the next one does not pay for it."""
    os.sync()
