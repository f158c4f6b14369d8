"""TIES from files to files, whole processes, fsync included.

n parameters, T = 3, bf16: the inputs, 2 (T + 1) n bytes, are read twice, 2 n bytes are written and made durable.
Floor: two threads read the inputs once and write and fsync as many bytes as the output. Reference: mergekit 0.1.5,
start-up included, fsync not; it runs with --mergekit PYTHON.
"""

from __future__ import annotations

import pytest
from file_merges import FLOOR, MERGEKIT, FileMerges


@pytest.fixture
def contest(family, mergekit):
    found = FileMerges(family, mergekit)
    yield found
    found.clean_up()


def bench_merge_files(measure, contest):
    def floor() -> float:
        contest.floor.measure()
        contest.make_room()
        return contest.floor.seconds

    measure(
        contest.merge,
        floor=floor,
        floor_name=FLOOR,
        reference=contest.merge_with_mergekit if contest.mergekit else None,
        reference_name=MERGEKIT,
        error=lambda: contest.error().largest,
        error_unit="of 2^-7",
        shape=contest.family.shape,
        nbytes=contest.family.input_bytes + contest.family.output_bytes,
    )
