"""Random merges, and their run on every backend against the fp64 reference."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from backends import buffer_of, contents, output_of, same_on_every_backend, store, widen
from delta_merge_reference import assert_close, delta_merge_reference

from peta_fast.ops.delta_merge import All, Inputs, Job, MaskBuffer, Term, merge, prepare


@dataclass(frozen=True)
class Case:
    """A base, T models and masks of one tensor, as stored; `offset` bytes off their natural alignment."""

    shape: tuple[int, ...]
    base: np.ndarray
    models: tuple[np.ndarray, ...]
    dtypes: tuple[str, ...]  # the base's, then the models'
    masks: tuple[tuple[np.ndarray, str], ...] = ()
    offset: int = 0

    def inputs(self, name: str = "w") -> Inputs:
        base = buffer_of(self.base, self.dtypes[0], self.offset)
        models = [buffer_of(m, d, self.offset) for m, d in zip(self.models, self.dtypes[1:], strict=True)]
        masks = [MaskBuffer(buffer_of(m, "U8" if f in ("BITS", "BYTES") else f, self.offset), f) for m, f in self.masks]
        return Inputs(name, self.shape, base, tuple(models), tuple(masks))

    def wide(self) -> tuple[np.ndarray, list[np.ndarray]]:
        return widen(self.base, self.dtypes[0]), [
            widen(m, d) for m, d in zip(self.models, self.dtypes[1:], strict=True)
        ]

    def wide_masks(self) -> list[np.ndarray]:
        size = self.base.size
        unpacked = {
            "BITS": lambda m: np.unpackbits(m, count=size, bitorder="little").astype(np.float32),
            "BYTES": lambda m: (m != 0).astype(np.float32),
        }
        return [unpacked[form](m) if form in unpacked else widen(m, form) for m, form in self.masks]


def case_of(num_tasks, shape=(50, 103), dtypes=("BF16",), *, seed=0, steps=None, masks=(), offset=0) -> Case:
    """Random tensors. dtypes are repeated as needed; steps: values are multiples of 1/steps, so that many are equal."""
    draw, n = np.random.default_rng(seed), int(np.prod(shape))
    dtypes = tuple(dtypes[i % len(dtypes)] for i in range(num_tasks + 1))
    base = draw.standard_normal(n)
    wide = [base] + [base + 0.1 * draw.standard_normal(n) for _ in range(num_tasks)]
    if steps:
        wide = [np.round(x * steps) / steps for x in wide]
    stored = [store(x, d) for x, d in zip(wide, dtypes, strict=True)]
    forms = [masks[t % len(masks)] for t in range(num_tasks)] if masks else []
    return Case(shape, stored[0], tuple(stored[1:]), dtypes, tuple((mask_of(f, n, draw), f) for f in forms), offset)


def mask_of(form: str, n: int, draw: np.random.Generator) -> np.ndarray:
    if form == "BITS":
        return draw.integers(0, 256, -(-n // 8), dtype=np.uint8)
    if form == "BYTES":
        return draw.integers(0, 3, n, dtype=np.uint8)
    return store(draw.random(n), form)


def run(spec, case, out_dtype="F32", *, threads=1, cuts=(), seed=0, majority=0, out=None) -> np.ndarray:
    """The merged tensor as stored, run as one job between every two cuts."""
    (prepared,) = prepare([(spec, case.inputs())], seed=seed, majority=majority, threads=threads)
    out = out or output_of(case.base.size, out_dtype, case.offset)
    ends = [0, *sorted(cuts), case.base.size]
    jobs = [Job(prepared, a, b, out.slice(a, b)) for a, b in zip(ends, ends[1:], strict=False)]
    merge(jobs, threads=threads)
    return contents(out)


def check(spec, case, out_dtype="F32", *, seed=0, majority=0, threads=(1, 3)) -> np.ndarray:
    """The same bits everywhere, and those of the fp64 reference as far as fp32 can know them; returns the values."""
    keywords = {"seed": seed, "majority": majority}
    stored = same_on_every_backend(lambda _, count: run(spec, case, out_dtype, threads=count, **keywords), threads)
    base, models = case.wide()
    exact = delta_merge_reference(spec, base, models, shape=case.shape, masks=case.wide_masks(), **keywords)
    values = widen(stored, out_dtype)
    assert_close(values, exact, len(models), out_dtype)
    return values


def terms_of(num_tasks: int, keep=All(), prescale=1.0) -> tuple[Term, ...]:  # noqa: B008
    return tuple(Term(0.4 + 0.3 * t, keep, prescale) for t in range(num_tasks))
