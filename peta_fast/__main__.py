"""`peta-fast`, and `python -m peta_fast`: the command line as a process of its own."""

import gc
import os
import sys


def run() -> None:
    """Runs the command of sys.argv and ends the process with its exit code."""
    # numpy's OpenBLAS threads spin for 2^26 cycles after they were made, on cores that have to merge
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
    from peta_fast.cli import main

    code = main()
    gc.disable(), gc.freeze()  # the end of the process frees everything anyway
    sys.exit(code)


if __name__ == "__main__":
    run()
