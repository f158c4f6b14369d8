"""The native passes of concrete masks touch their tensors and nothing beside them. Needs no torch."""

from __future__ import annotations

import numpy as np
import pytest
from backends import DTYPES, NATIVE, SIMD, contents, memory_before_an_unmapped_page, output_of, store

from peta_fast.ops import records as r

pytestmark = pytest.mark.skipif(NATIVE is None, reason="the native module is not built")
SAMPLE, MEAN, MERGE, REDUCE, UPDATE = range(5)
TASKS = 3


class Memory:
    """One tensor: what is read ends where a page begins that nobody may touch, what is written has guards."""

    def __init__(self, size: int, dtype: str):
        draw = np.random.default_rng(size)
        self.held: list = []
        self.size, self.dtype = size, dtype
        self.inputs = {name: self.input(draw.standard_normal(size, np.float32), dtype) for name in ("base", "g")}
        self.tasks = np.zeros(TASKS, r.MASK_TASK)
        for task in self.tasks:
            task["x"] = self.input(draw.standard_normal(size, np.float32), dtype)
        self.tasks["dtype"], self.tasks["coefficient"] = r.CODES[dtype], 0.3

    def input(self, values: np.ndarray, dtype: str) -> int:
        self.held.append(memory_before_an_unmapped_page(store(values, dtype)))
        return self.held[-1].ctypes.data

    def run(self, mode: int, **fields) -> np.ndarray:
        tensor, settings = np.zeros(1, r.MASK_TENSOR), np.zeros(1, r.MASK_SETTINGS)
        for name, value in {**self.inputs, "size": self.size, "tasks": TASKS, "mean": 0.5, "key": 7, **fields}.items():
            tensor[name] = value
        for name in ("base_dtype", "out_dtype", "g_dtype"):
            tensor[name] = r.CODES[self.dtype]
        settings["temperature"], settings["rate"], settings["root"], settings["epsilon"] = 0.5, 0.1, 1, 1e-8
        sums = np.zeros({MEAN: 1, REDUCE: TASKS}.get(mode, 0))
        NATIVE.concrete_mask(mode, tensor, self.tasks, settings, sums, 2)
        return sums


@pytest.fixture(params=SIMD)
def simd(request):
    NATIVE.set_simd(request.param)
    yield
    NATIVE.set_simd("")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 5, 31, 4095, 4097, 20_001])
def test_every_pass_stays_within_its_tensors(simd, size, dtype):
    memory = Memory(size, dtype)
    logits = memory.input(np.zeros(size, np.float32), "F32")
    sample, merged, product, gradient = (output_of(size, d) for d in ("F32", dtype, "F32", "F32"))
    memory.run(SAMPLE, logits=logits, out=sample.address)
    mask = contents(sample)
    assert memory.run(MEAN, logits=logits)[0] == pytest.approx(mask.sum(dtype=np.float64), rel=1e-12)
    memory.run(MERGE, logits=logits, out=merged.address)
    sums = memory.run(REDUCE, logits=logits, product=product.address)
    memory.run(UPDATE, logits=logits, gradient=gradient.address)
    for written in (contents(merged).astype(np.float32), contents(product), contents(gradient), mask):
        assert np.isfinite(written).all() and written.any()
    assert np.isfinite(sums).all()
    state = [output_of(size, "F32") for _ in range(3)]
    for buffer in state:
        view = buffer.owner[buffer.address - buffer.owner.ctypes.data :][: 4 * size]
        view[:] = 0
    memory.run(UPDATE, logits=state[0].address, exp_avg=state[1].address, exp_avg_sq=state[2].address)
    assert all(np.isfinite(contents(buffer)).all() and contents(buffer).any() for buffer in state)
