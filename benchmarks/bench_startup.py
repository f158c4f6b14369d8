"""A whole merge process of four models of 316 kB: little more than start-up, so more than the time to the first byte.

Floor: Python that imports numpy. Reference: mergekit 0.1.5, with --mergekit PYTHON.
"""

from __future__ import annotations

import pytest
from file_merges import MERGEKIT, FileMerges, start_python_with_numpy


@pytest.fixture
def contest(tiny_family, mergekit):
    found = FileMerges(tiny_family, mergekit)
    yield found
    found.clean_up()


def bench_startup(measure, contest):
    def floor() -> float:
        contest.make_room()
        return start_python_with_numpy(contest.family.folder.parent)

    measure(
        contest.merge,
        floor=floor,
        floor_name="Python that imports numpy",
        reference=contest.merge_with_mergekit if contest.mergekit else None,
        reference_name=MERGEKIT,
        error=lambda: contest.error().largest,
        error_unit="of 2^-7",
        shape="whole process, " + contest.family.shape,
        goal="under 0.5 s",
    )
