"""Task vectors of a base and three fine-tunes on disk, bf16: reads 2 (T + 1) n bytes once, whatever is drawn of them.

Floor: two threads that read the files once, the fastest way found. The measurement alone in this process, and
`peta-fast report` as a program, from start to exit: start-up, the pass, five tables, four pictures, the page.
"""

from __future__ import annotations

import sys

import numpy as np
from family_files import StoredTensors, one_of_each_shape, tensors_of
from floors import READ_WAYS, seconds
from processes import run_timed

from peta_fast.analysis import measure as measure_task_vectors


def _floor(family):
    files = family.weight_files()
    return lambda: min(seconds(lambda way=way: way(files)) for way in READ_WAYS.values())


def bench_task_vectors(measure, family):
    found = []
    measure(
        lambda: found.append(measure_task_vectors(family.folder / "base", family.models)),
        floor=_floor(family),
        floor_name="reading the files once",
        error=lambda: _error(found[-1], family),
        error_unit="of the norms",
        shape=family.shape,
        nbytes=family.input_bytes,
        goal="one streaming pass",
    )


def bench_report(measure, family, tmp_path):
    out = tmp_path / "report"
    command = [sys.executable, "-m", "peta_fast", "report", family.folder / "base", *family.models, "--out", out]
    measure(
        lambda: run_timed([*command, "--force", "-q"], cwd=tmp_path),
        floor=_floor(family),
        floor_name="reading the files once",
        shape=family.shape,
        nbytes=family.input_bytes,
        goal="one streaming pass, start-up and drawing besides",
    )
    assert (out / "index.html").stat().st_size > 100_000


def _error(found, family) -> float:
    """Largest |gram - exact| / (|tau_s| |tau_t|) over one tensor of every shape, sums in extended precision."""
    opened = [StoredTensors(folder) for folder in family.checkpoints]
    worst = 0.0
    for name in one_of_each_shape(opened[0]):
        tensors = tensors_of(family, name, opened)
        deltas = [tensors.delta(t).astype(np.longdouble) for t in (0, 2)]
        exact = deltas[0] @ deltas[1]
        norms = [float(np.sqrt(d @ d)) for d in deltas]
        worst = max(worst, float(abs(found.tensors[name].gram[0, 2] - exact)) / (norms[0] * norms[1]))
    return worst
