"""Units of work on a few processes with one thread each: small matrices gain little from a second thread.

With one process the work is done here, without starting another.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import peta_fast
from peta_fast.demo.full.settings import Regime
from peta_fast.errors import PetaFastError


@dataclass(frozen=True)
class Unit:
    """A seed, a track and a kind, or BASE."""

    seed: int
    track: str
    kind: str


Told = Callable[[Unit, str, float, str], None]
"""told(unit, stage, seconds or 0 where it was there, outcome); never called twice at once"""


def run_units(out: Path, regime: Regime, units: Sequence[Unit], jobs: int, told: Told) -> None:
    """Runs all units, in this order as far as processes are free. An error, of a unit or here, ends all of it."""
    if jobs == 1:
        from peta_fast.demo.full.worker import work

        for unit in units:
            work(out, regime, unit.seed, unit.track, unit.kind, lambda *stage, u=unit: told(u, *stage))
        return
    waiting: queue.SimpleQueue[Unit] = queue.SimpleQueue()
    for unit in units:
        waiting.put(unit)
    workers = [start(out, regime) for _ in range(min(jobs, len(units)))]
    failures: list[BaseException] = []
    lock = threading.Lock()

    def serve(worker: subprocess.Popen) -> None:
        try:
            while not failures:
                try:
                    unit = waiting.get_nowait()
                except queue.Empty:
                    return
                ask(worker, unit, told, lock)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=serve, args=(worker,), daemon=True) for worker in workers]
    try:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) and not failures:
            for thread in threads:
                thread.join(0.1)
    finally:
        for worker in workers:
            end(worker, at_once=bool(failures) or any(thread.is_alive() for thread in threads))
    if failures:
        raise failures[0]


def start(out: Path, regime: Regime) -> subprocess.Popen:
    """A process of this very package: `-m` looks in the current folder first, which may hold sources without it."""
    command = [sys.executable, "-m", "peta_fast.demo.full.worker", str(out.resolve()), regime.name]
    single = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")} | {"TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(
        command,
        cwd=Path(peta_fast.__file__).parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | single,
    )


def ask(worker: subprocess.Popen, unit: Unit, told: Told, lock: threading.Lock) -> None:
    """One unit on one process. Raises PetaFastError with what went wrong there."""
    worker.stdin.write(json.dumps(vars(unit)) + "\n")
    worker.stdin.flush()
    for line in worker.stdout:
        message = json.loads(line)
        if "error" in message:
            raise PetaFastError(f"{unit.track}, {unit.kind}, seed {unit.seed}", f"failed\n{message['error']}")
        if "done" in message:
            return
        with lock:
            told(unit, message["stage"], message["seconds"], message["outcome"])
    problem = f"its process has ended with code {worker.wait()}; what it had finished is kept"
    raise PetaFastError(f"{unit.track}, {unit.kind}, seed {unit.seed}", problem, "Run the same command again.")


def end(worker: subprocess.Popen, at_once: bool) -> None:
    """Files appear whole or not at all, so that a process may be ended at any time."""
    worker.stdin.close()
    if at_once:
        worker.terminate()
    worker.wait()
    worker.stdout.close()
