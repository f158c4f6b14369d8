"""What becomes of an exception: one message on stderr and an exit code, a traceback only for defects and --debug."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from peta_fast.errors import PetaFastError, ResourceError

DEFECT, INTERRUPTED, BROKEN_PIPE = 70, 130, 141
"""Exit codes beside those of the errors. 141 is what a shell reports for a program that a closed pipe ended."""


class UsageError(PetaFastError):
    """An option or argument that cannot be followed."""

    exit_code = 2


class Interrupted(KeyboardInterrupt):
    """Interrupted when the command's work so far can be kept: running it again with --resume continues."""


def guarded(body: Callable[[], int | None], words: list[str], debug: bool) -> int:
    """Exit code of the body; what it raises is reported.

    words  the command line after the program's name, for the command that resumes it
    debug  show tracebacks
    """
    try:
        code = body()
        sys.stdout.flush()
        return code or 0
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 0
    except BrokenPipeError:
        return _leave_stdout()
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            _print_traceback()
        return _report(error, words, debug)


def _report(error: BaseException, words: list[str], debug: bool) -> int:
    """Says what happened; returns the exit code."""
    if isinstance(error, KeyboardInterrupt):
        resumable = isinstance(error, Interrupted)
        _say(f"interrupted. Continue with:\n  {resuming(words)}" if resumable else "interrupted.")
        return INTERRUPTED
    if isinstance(error, PetaFastError):
        _say(f"{type(error).__name__}: {error}")
        return error.exit_code
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        from peta_fast.formats.disk import next_step

        named = ResourceError(os.fsdecode(error.filename), error.strerror, next_step(error))
        _say(f"{type(error).__name__}: {named}")
        return ResourceError.exit_code
    if isinstance(error, OSError | MemoryError):
        _say(f"{type(error).__name__}: {str(error) or 'not enough memory. Lower --max-memory or --threads.'}")
        return ResourceError.exit_code
    if not debug:
        _print_traceback()
    _say("this is a defect of peta_fast: please report it with the lines above.")
    return DEFECT


def resuming(words: list[str]) -> str:
    """The command line that continues an interrupted one."""
    import shlex

    kept = [word for word in words if word not in ("--force", "--resume")]
    return shlex.join(["peta-fast", *kept, "--resume"])


def warn(message: str) -> None:
    """One warning on stderr."""
    _say(f"warning: {message}")


def _print_traceback() -> None:
    import traceback

    traceback.print_exc()


def _leave_stdout() -> int:
    """Nobody reads stdout any more; the interpreter must not try to flush it at its end."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        sys.stdout = None
    return BROKEN_PIPE


def _say(message: str) -> None:
    print(f"peta-fast: {message}", file=sys.stderr, flush=True)
