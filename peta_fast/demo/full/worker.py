"""One process that does what it is told: a unit of work a line on its input, what has happened on its output.

    in   {"seed": 0, "track": "text", "kind": "full"}
    out  {"stage": "average", "seconds": 1.5, "outcome": "..."} for every stage, then {"done": true} or {"error": "..."}

It ends when its input does, and so does not outlive the run that has started it by more than a stage.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from peta_fast.demo.full.chain import BASE, Chain, Tell
from peta_fast.demo.full.settings import REGIMES, Regime
from peta_fast.demo.train import reproducible


def work(out: Path, regime: Regime, seed: int, track: str, kind: str, tell: Tell) -> None:
    """A unit: what all kinds of a track need, or one kind. On one thread: any number of cores gives one result."""
    chain = Chain(out, regime, seed, track, kind, tell)
    with reproducible(), unfilled(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries announce their future here
        chain.run_base() if kind == BASE else chain.run()


@contextlib.contextmanager
def unfilled() -> Iterator[None]:
    """New memory as it comes: nothing here reads it before it is written, and filling all of it takes time."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = before


def main(out: str, regime: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run that has started this one ends it
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print does not get between the replies

    def reply(**message: object) -> None:
        replies.write(json.dumps(message) + "\n")

    def tell(stage: str, seconds: float, outcome: str) -> None:
        reply(stage=stage, seconds=seconds, outcome=outcome)

    for line in sys.stdin:
        unit = json.loads(line)
        try:
            work(Path(out), REGIMES[regime], unit["seed"], unit["track"], unit["kind"], tell)
            reply(done=True)
        except BrokenPipeError:
            return
        except Exception:
            reply(error=traceback.format_exc())


if __name__ == "__main__":
    main(*sys.argv[1:])
