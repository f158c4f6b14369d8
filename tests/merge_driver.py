"""Merges in processes that may be killed at any moment, and by as many system calls as it takes to kill them there.

As a script it reads jobs from stdin, one JSON object a line, and forks a process for each; it never merges itself, so
that no thread is lost by forking. A job: {"merge": keywords of peta_fast.merge, "die_at": n, "kill_after": seconds}.
The child counts its calls that change the disk. It kills itself in call n, a write half done; or is killed from
outside. The answer: {"killed": bool, "calls": how many it made, "error": "" or what it raised, "seconds": ...}
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

CALLS = ("pwrite", "write", "replace", "unlink", "fsync", "ftruncate", "rmdir")


class Driver:
    """The script, running. Use it in a `with`."""

    def __enter__(self) -> Driver:
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def merge(self, die_at: int = 0, kill_after: float = 0.0, **keywords) -> dict:
        self.process.stdin.write(json.dumps({"merge": keywords, "die_at": die_at, "kill_after": kill_after}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


class Calls:
    """Counts the calls in CALLS and dies in one of them."""

    def __init__(self, die_at: int):
        self.die_at, self.count = die_at, 0
        self.lock = threading.Lock()
        for name in CALLS:
            setattr(os, name, self.counted(name, getattr(os, name)))

    def counted(self, name, call):
        def counting(*args, **keywords):
            with self.lock:
                self.count += 1
                dies = self.count == self.die_at
            if dies:
                if name in ("pwrite", "write"):
                    call(args[0], args[1][: len(args[1]) // 2], *args[2:])
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **keywords)

        return counting


def run_child(job: dict, answer: int) -> None:
    import peta_fast

    raw_write = os.write
    calls = Calls(job["die_at"])
    error = ""
    raw_write(answer, b"begun\n")
    began = time.perf_counter()
    try:
        peta_fast.merge(**job["merge"])
    except ValueError as caught:
        error = f"{type(caught).__name__}: {caught}"
    seconds = time.perf_counter() - began
    raw_write(answer, json.dumps({"calls": calls.count, "error": error, "seconds": seconds}).encode() + b"\n")


def run_job(job: dict) -> dict:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            run_child(job, writing)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        answer.readline()
        if job["kill_after"]:
            time.sleep(job["kill_after"])
            os.kill(child, signal.SIGKILL)
        said = answer.readline()
    _, status = os.waitpid(child, 0)
    return {"killed": os.WIFSIGNALED(status), "calls": 0, "error": "", "seconds": 0.0, **json.loads(said or "{}")}


def main() -> None:
    import peta_fast.merging  # noqa: F401  before any fork

    for line in sys.stdin:
        print(json.dumps(run_job(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
