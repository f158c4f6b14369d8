"""Merging on one GPU: TIES, its two passes, task arithmetic and masks, resident and from files, against plain PyTorch.

A merge of T models in bf16 reads base + T models and writes one: (T + 2) 2 n bytes; exact selection reads 2 (T + 1) n
more. Floor: the same bytes at the rate of a device-to-device copy of the same run. Checked first: one tensor of every
shape, bit for bit, against the CPU engine.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from peta_fast._native import native

LAYER = {"q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "o": (4096, 4096), "gate": (11008, 4096),
         "up": (11008, 4096), "down": (4096, 11008), "norm": (4096,), "norm2": (4096,)}  # fmt: skip
DENSITY = 0.2


def shapes_of(parameters: float) -> dict[str, tuple[int, ...]]:
    """About so many parameters: layers as Llama's, then one tensor that fills up."""
    found: dict[str, tuple[int, ...]] = {}
    left, i = int(parameters), 0
    each = sum(int(np.prod(s)) for s in LAYER.values())
    while left >= each:
        found |= {f"layers.{i}.{name}": shape for name, shape in LAYER.items()}
        left, i = left - each, i + 1
    if left >= 4096:
        found["embed"] = (left // 4096, 4096)
    return found


@dataclass
class Family:
    """A base and T models on the GPU, and where the result goes."""

    base: dict[str, Any]
    models: list[dict[str, Any]]
    out: dict[str, Any]

    @property
    def size(self) -> int:
        return sum(t.numel() for t in self.base.values())

    @property
    def shape(self) -> str:
        return f"T{len(self.models)}-n{self.size:.2g}-bf16"

    @classmethod
    def random(cls, parameters: float, num_tasks: int) -> Family:
        import torch

        draw, shapes = torch.Generator("cuda").manual_seed(0), shapes_of(parameters)

        def normal(shape, scale):
            return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(generator=draw).mul_(scale)

        base = {n: normal(s, 0.02) for n, s in shapes.items()}
        models = [{n: base[n] + normal(s, 0.002) for n, s in shapes.items()} for _ in range(num_tasks)]
        return cls(base, models, {n: torch.empty_like(t) for n, t in base.items()})


def needed_bytes(parameters: float, num_tasks: int) -> float:
    return parameters * 2 * (num_tasks + 2) * 1.03 + 2e9


# ---------------------------------------------------------------- clocks


def seconds_by_events(work: Callable[[], Any], rounds: int) -> list[float]:
    import torch

    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return times


def seconds_by_wall(work: Callable[[], Any], rounds: int) -> list[float]:
    import torch

    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return times


def copy_rate() -> float:
    """Bytes a second, read and written, of a copy of 4 GB on the device."""
    import torch

    source = torch.ones(2_000_000_000, dtype=torch.int16, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / statistics.median(seconds_by_events(lambda: target.copy_(source), 10))


def peak_beside(work: Callable[[], Any]) -> int:
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


# ---------------------------------------------------------------- what is merged


def methods_of(family: Family) -> dict[str, tuple[dict[str, Any], int]]:
    """Name -> keywords, and bytes an element beside base, models and output."""
    tasks = len(family.models)
    weights = [0.3 + 0.1 * t for t in range(tasks)]
    return {
        "ties": ({"method": "ties", "weight": weights, "density": DENSITY}, 2 * (tasks + 1)),
        "task_arithmetic": ({"method": "task_arithmetic", "weight": weights}, 0),
    }


def merge_into(family: Family, keywords: dict[str, Any]) -> Callable[[], Any]:
    import peta_fast

    return lambda: peta_fast.merge_state_dicts(family.base, family.models, out=family.out, **keywords)


def sample_of(family: Family) -> list[str]:
    """One tensor of every shape that the CPU merges in reasonable time."""
    most = 1 << 26 if native() else 1 << 25
    return list({tuple(t.shape): n for n, t in family.base.items() if t.numel() < most}.values())


def wrong_bits(family: Family, keywords: dict[str, Any]) -> int:
    """Elements, of one tensor of every shape, that differ from the CPU's; masks by name go along."""
    import torch

    import peta_fast

    sample = sample_of(family)
    home = [{n: s[n].cpu() for n in sample} for s in (family.base, *family.models)]
    keywords = {k: {n: v[n].cpu() for n in sample} if isinstance(v, dict) else v for k, v in keywords.items()}
    expected = peta_fast.merge_state_dicts(home[0], home[1:], **keywords)
    return sum(int((expected[n].view(torch.int16) != family.out[n].cpu().view(torch.int16)).sum()) for n in sample)


def plain_pytorch(base, models, weights) -> Any:
    """One tensor, in fp32, as careful PyTorch has it on the same GPU."""
    import torch

    start, kept = base.float(), []
    for model in models:
        delta = model.float() - start
        magnitude = delta.abs().flatten()
        count = max(1, int(DENSITY * delta.numel()))
        kept.append(torch.where(delta.abs() >= magnitude.kthvalue(delta.numel() - count + 1).values, delta, 0.0))
    stacked = torch.stack(kept)
    column = torch.tensor(weights, device=base.device).reshape(-1, *[1] * base.ndim)
    weighted = column * stacked
    sign = weighted.sum(0).sign()
    agrees = (weighted.sign() == sign) & (sign != 0)
    divisor = (column * agrees).sum(0)
    return (start + (weighted * agrees).sum(0) / torch.where(divisor == 0, 1.0, divisor)).to(base.dtype)


def reference_of_ties(family: Family, weights) -> tuple[float, int]:
    """Seconds of plain PyTorch over the whole, scaled up from one layer, and its peak of memory for one tensor."""
    names = [n for n in family.base if n.startswith("layers.0.")] or list(family.base)[:1]

    def run():
        for n in names:
            plain_pytorch(family.base[n], [m[n] for m in family.models], weights)

    run()
    seconds = statistics.median(seconds_by_events(run, 3))
    share = sum(family.base[n].numel() for n in names) / family.size
    return seconds / share, peak_beside(run)


def passes_of_ties(family: Family, weights, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of the selection and of the merge pass alone, by the device's clock."""
    from peta_fast.buffers import Buffer
    from peta_fast.ops.delta_merge import DeltaMerge, Inputs, Job, Term, Top, merge, prepare

    def buffer(tensor):
        return Buffer(tensor.data_ptr(), "BF16", tensor.numel(), tensor, str(tensor.device))

    requests = []
    for name, tensor in family.base.items():
        keep = Top(max(1, int(DENSITY * tensor.numel())))
        spec = DeltaMerge(tuple(Term(w, keep) for w in weights), elect="weighted", divide="agreeing-weight")
        inputs = Inputs(name, tuple(tensor.shape), buffer(tensor), tuple(buffer(m[name]) for m in family.models))
        requests.append((spec, inputs))
    prepared = prepare(requests)
    jobs = [Job(p, 0, p.inputs.size, buffer(family.out[p.inputs.name])) for p in prepared]
    merge(jobs)
    selects = seconds_by_events(lambda: prepare(requests), rounds)
    return selects, seconds_by_events(lambda: merge(jobs, later=[]), rounds)


# ---------------------------------------------------------------- rows


def row(name: str, family: Family, times: list[float], rate: float, nbytes: float, error: int, **more) -> dict:
    import torch
    from rows import Row

    details = {
        "median": statistics.median(times),
        "rounds": times,
        "copy_bytes_a_second": rate,
        **more.pop("details", {}),
    }
    made = Row(
        f"gpu_{name}", family.shape, min(times), floor=nbytes / rate, error=error, error_unit="elements off the CPU's",
        floor_name="a device copy of as many bytes", nbytes=int(nbytes), details=details, **more,
    ).to_json()  # fmt: skip
    return {
        **made,
        "device": torch.cuda.get_device_name(),
        "versions": {**made["versions"], "cuda": torch.version.cuda},
    }


def rows_of(parameters: float, num_tasks: int, rate: float, rounds: int, reference: bool) -> Iterator[dict]:
    family = Family.random(parameters, num_tasks)
    n, T = family.size, num_tasks
    weights = methods_of(family)["ties"][0]["weight"]
    for name, (keywords, beside) in methods_of(family).items():
        work = merge_into(family, keywords)
        work()
        error = wrong_bits(family, keywords)
        times, peak = seconds_by_wall(work, rounds), peak_beside(work)
        details = {"peak_bytes": peak, "peak_of_inputs": peak / (2 * n * (T + 1))}
        more: dict[str, Any] = {"goal": "under 0.1 s at 7e9, T3" if name == "ties" else "1 / 0.90 of the floor"}
        if reference and name == "ties":
            plain, plain_peak = reference_of_ties(family, weights)
            details["plain_pytorch_peak_bytes_of_one_tensor"] = plain_peak
            more |= {
                "reference": plain,
                "reference_name": "plain PyTorch on this GPU",
                "goal": "20 times plain PyTorch",
            }
        yield row(name, family, times, rate, 2 * n * (T + 2) + beside * n, error, details=details, **more)
    selects, merges = passes_of_ties(family, weights, rounds)
    error = wrong_bits(family, methods_of(family)["ties"][0])
    yield row("merge_pass", family, merges, rate, 2 * n * (T + 2), error, goal="1 / 0.85 of the floor")
    both = (statistics.median(selects) + statistics.median(merges)) / statistics.median(merges)
    yield row("select", family, selects, rate, 2 * n * (T + 1), error, goal="with the merge pass at most 2.2 of it",
              details={"both_of_merge_pass": both})  # fmt: skip
    yield from masked_rows(family, rate, rounds)


def masked_rows(family: Family, rate: float, rounds: int) -> Iterator[dict]:
    """Masks of bytes, one a task, where there is room for them."""
    import torch

    n, T = family.size, len(family.models)
    if torch.cuda.mem_get_info()[0] < 1.2 * n * T:
        return
    masks = {f"{t}/{name}": torch.rand(x.shape, device="cuda", dtype=torch.float16) < 0.5
             for t in range(T) for name, x in family.base.items()}  # fmt: skip
    keywords = {"method": "masked_task_arithmetic", "weight": 0.4, "mask": masks}
    work = merge_into(family, keywords)
    work()
    sample = sample_of(family)
    small = Family({k: family.base[k] for k in sample}, [{k: m[k] for k in sample} for m in family.models],
                   {k: family.out[k] for k in sample})  # fmt: skip
    error = masked_error(small, masks, sample)
    times = seconds_by_wall(work, rounds)
    yield row(
        "masked_task_arithmetic", family, times, rate, 2 * n * (T + 2) + n * T, error, goal="1 / 0.90 of the floor"
    )


def masked_error(family: Family, masks, sample) -> int:
    import torch

    import peta_fast

    home = [{n: s[n].cpu() for n in sample} for s in (family.base, *family.models)]
    mine = {k: v.cpu() for k, v in masks.items() if k.partition("/")[2] in sample}
    expected = peta_fast.merge_state_dicts(home[0], home[1:], method="masked_task_arithmetic", weight=0.4, mask=mine)
    return sum(int((expected[n].view(torch.int16) != family.out[n].cpu().view(torch.int16)).sum()) for n in sample)


def rows_from_files(parameters: float, rounds: int) -> Iterator[dict]:
    """File to file, by way of the GPU and on the CPU alone, from torch's zip files in the page cache."""
    import tempfile
    from pathlib import Path

    import torch
    from rows import Row

    import peta_fast

    with tempfile.TemporaryDirectory() as folder:
        family = Family.random(parameters, 3)
        places = []
        for i, state in enumerate((family.base, *family.models)):
            places.append(Path(folder) / str(i))
            places[-1].mkdir()
            torch.save({n: t.cpu() for n, t in state.items()}, places[-1] / "pytorch_model.bin")
        size = family.size
        del family
        torch.cuda.empty_cache()
        buffer = bytearray(64 << 20)

        def read() -> float:
            began = time.perf_counter()
            for place in places:
                with open(place / "pytorch_model.bin", "rb", buffering=0) as stream:
                    while stream.readinto(buffer):
                        pass
            return time.perf_counter() - began

        def run(device: str) -> float:
            report = peta_fast.merge(out=Path(folder) / device, force=True, method="ties", base=places[0], weight=0.5,
                                     models=places[1:], density=DENSITY, device=device)  # fmt: skip
            return report.seconds

        run("cuda")
        reads, cpu, gpu = ([work() for _ in range(rounds)] for work in (read, lambda: run("cpu"), lambda: run("cuda")))
        same = all((Path(folder) / "cpu" / f.name).read_bytes() == f.read_bytes()
                   for f in (Path(folder) / "cuda").glob("*.safetensors"))  # fmt: skip
    made = Row(
        "gpu_ties_from_files", f"T3-n{size:.2g}-bf16", min(gpu), min(cpu), min(reads), 0 if same else 1, "the CPU",
        "reading the inputs", "outputs that differ", goal="1.3 of the floor", nbytes=int(10 * size),
        details={"reads": reads, "cpu": cpu, "gpu": gpu},
    ).to_json()  # fmt: skip
    yield {**made, "device": torch.cuda.get_device_name()}


def sizes(quick: bool) -> list[tuple[float, int, bool]]:
    """(parameters, tasks, whether plain PyTorch runs), the most telling first."""
    if quick:
        return [(2.5e8, 3, True)]
    return [(1e9, 3, True), (7e9, 3, False), (1e9, 8, True), (4e9, 8, False)]


def measure(rounds: int, deadline: float, quick: bool) -> tuple[list[dict], list[str]]:
    """Rows, and what was not measured or is wrong."""
    import torch

    from peta_fast import _cuda

    rows, notes = [], []
    try:
        if _cuda.library() is None:
            return [], ["merging: not measured, there is no CUDA library"]
        rate = copy_rate()
    except Exception as error:  # the layers are still to be measured
        return [], [f"merging: {type(error).__name__}: {error}"[:600]]
    for parameters, tasks, reference in sizes(quick):
        gc.collect(), torch.cuda.empty_cache()
        label = f"T{tasks}, {parameters:.2g} parameters"
        if time.monotonic() > deadline:
            notes.append(f"merging {label}: not measured, the time was up")
        elif torch.cuda.mem_get_info()[0] < needed_bytes(parameters, tasks):
            notes.append(f"merging {label}: not measured, the GPU has too little memory")
        else:
            try:
                rows += rows_of(parameters, tasks, rate, rounds, reference)
            except Exception as error:  # the other sizes, and the tests, are still worth their time
                notes.append(f"merging {label}: {type(error).__name__}: {error}"[:600])
    gc.collect(), torch.cuda.empty_cache()
    if time.monotonic() < deadline:
        try:
            rows += rows_from_files(1e8 if quick or not native() else 1e9, 3)
        except Exception as error:
            notes.append(f"merging files: {type(error).__name__}: {error}"[:600])
    else:
        notes.append("merging files: not measured, the time was up")
    notes += [f"{r['name']} {r['shape']}: {r['error']} elements are not the CPU's" for r in rows if r["error"]]
    return rows, notes
