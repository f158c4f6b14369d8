"""Every CUDA source compiles for every target with warnings as errors, and the machine code is what it should be.

About two minutes of nvcc; skipped, and said so, where there is none.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from cuda_builds import ARCHITECTURES, CSRC, FLAGS, NVCC, Build, build, disassembler, machine_code, sources

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not here: no CUDA source was compiled")

MOST_REGISTERS = {
    "PlainMerge<0,0,3>": 80, "PlainMerge<1,0,3>": 80, "PlainMerge<2,0,3>": 80,
    "PlainMerge<0,1,3>": 84, "PlainMerge<1,1,3>": 84, "PlainMerge<2,1,3>": 84,
    "GeneralMerge": 128, "PlainMerge": 128, "CountTile": 64, "MedianMerge": 64, "KeptNorm": 64, "SignTotal": 64,
    "SmallSelect": 64, "NarrowAll": 96, "SortRuns": 64,
}  # fmt: skip
"""Registers a thread, by kernel or by family; what is not named may take 64. 65,536 registers of an SM are to hold the
blocks that the kernel's kBlocks promises: 3 of 256 threads at 80, 2 at 128, 4 at 64."""
STREAMING = ("PlainMerge", "GeneralMerge", "CountTile<0>", "CountTile<1>", "CountTile<2>")
"""Kernels that read whole models: they load 16 bytes at once, and those that write models store so."""
SHARED_LIMIT = 48 * 1024
"""Bytes a block may have on every GPU without asking for more."""


@pytest.fixture(scope="module")
def builds(tmp_path_factory) -> dict[str, Build]:
    folder = tmp_path_factory.mktemp("cuda")
    with ThreadPoolExecutor(2) as executor:
        return {b.source.stem: b for b in executor.map(lambda source: build(source, folder), sources())}


def test_every_source_has_kernels_for_every_target(builds):
    for built in builds.values():
        if built.source.stem != "device":
            assert {k.architecture for k in built.kernels} == set(ARCHITECTURES), built.source
    assert sum(len(b.kernels) for b in builds.values()) >= 40 * len(ARCHITECTURES)


def test_no_kernel_spills_or_has_a_stack(builds):
    bad = [k for b in builds.values() for k in b.kernels if k.spills or k.stack]
    assert not bad


def test_registers_and_shared_memory_are_within_the_table(builds):
    for kernel in (k for b in builds.values() for k in b.kernels):
        most = MOST_REGISTERS.get(kernel.name) or MOST_REGISTERS.get(kernel.name.partition("<")[0], 64)
        assert kernel.registers <= most, kernel
        assert kernel.shared <= SHARED_LIMIT, kernel


@pytest.mark.skipif(disassembler() is None, reason="no cuobjdump: the machine code was not read")
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids="sm_{}".format)
def test_what_streams_loads_and_stores_16_bytes_at_once(builds, architecture):
    seen = 0
    for stem in ("delta_merge", "order_statistics"):
        for name, code in machine_code(builds[stem], architecture).items():
            if not name.startswith(STREAMING):
                continue
            seen += 1
            assert re.search(r"LDG\.E(\.\w+)*\.128", code), name
            if "Merge" in name:
                assert re.search(r"STG\.E(\.\w+)*\.128", code), name
            assert not re.search(r"\b(LDL|STL)\b", code), f"{name} uses local memory"
    assert seen >= 24


def test_no_kernel_contracts_what_the_cpu_does_not():
    """Every fused multiply-add is one that is asked for: two of the division, one of the check for infinities."""
    files = [f for f in CSRC.rglob("*") if f.suffix in (".h", ".cu")]
    text = "".join(f.read_text() for f in files)
    assert text.count("__fmaf_rn(") == 3 and "--fmad=false" in FLAGS
    assert not any("fast_math" in flag for flag in FLAGS)
