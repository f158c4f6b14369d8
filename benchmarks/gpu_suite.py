"""Everything that wants a GPU, in one command of less than ten minutes: build, tests marked `gpu`, benchmarks.

usage: gpu_suite.py [--out DIR] [--rounds N] [--minutes N] [--skip-build] [--quick] [--tune]

Builds the package with what is installed here, runs every test marked `gpu`, measures merging (gpu_merges.py) and
linearized LoRA against the jvp, PEFT's LoRA and the bare layer, and both ways of its forward against each other; last,
what time is left goes to compute-sanitizer. Writes tests.json, sanitizer.json, merges.json, merges.md,
linearized_lora.json (rows), linearized_lora.md (their table and what went wrong) and, with matplotlib,
linearized_lora.png to DIR, which is $OUT, or benchmarks/results/gpu. With --tune it first measures block shapes (two
minutes or so), writes them to measured.json and takes them. Needs torch with CUDA, triton, numpy and pytest, nothing
else (with pytest-xdist tests run side by side); for merging, nvcc too, or a CUDA library in peta_fast/ that was built
elsewhere.
Exit code 0 when the tests passed and every result was right, else 1. Rows that miss their goal stay.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
LEAST_SECONDS, SANITIZER_SECONDS = 60.0, 240.0
"""Tests, and those under compute-sanitizer, are not begun with less."""
MOST_WORKERS = 8
STOPPED = (124, 137)
"""What timeout ends with."""


def main(words: list[str]) -> int:
    options = arguments(words)
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * options.minutes
    problems = [] if options.skip_build else build(options.out)
    sys.path.insert(0, str(FOLDER))
    import torch

    if not torch.cuda.is_available():
        print("gpu_suite: torch sees no CUDA device here", file=sys.stderr)
        return 1
    problems += find_library()
    problems += run_tests(options.out, deadline - time.monotonic(), "tests", "not sanitizer")
    if options.tune:
        problems += guarded("tuning", lambda: tune(options.out, options.quick))
    left = deadline - time.monotonic()
    import gpu_merges

    merges, merge_notes = gpu_merges.measure(min(options.rounds, 10), time.monotonic() + 0.5 * left, options.quick)
    write(merges, [*problems, *merge_notes], options.out, "merges")
    rows, notes = measure_all(options.rounds, deadline, options.quick)
    write(rows, [*problems, *notes], options.out, "linearized_lora")
    problems += guarded("picture", lambda: plot(rows, options.out / "linearized_lora.png"))
    problems += [note for note in (*merge_notes, *notes) if "not the CPU's" in note or "Error" in note]
    left = deadline - time.monotonic()
    if left > SANITIZER_SECONDS:
        problems += run_tests(options.out, 2 * left, "sanitizer", "sanitizer")
    else:
        print("sanitizer: not run, the time was up", file=sys.stderr)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


def arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_suite.py", description=__doc__.splitlines()[0])
    default = Path(os.environ.get("OUT") or FOLDER / "results" / "gpu")
    parser.add_argument("--out", type=lambda path: Path(path).resolve(), default=default.resolve(), metavar="DIR")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=9.0, help="no measurement begins after so many")
    parser.add_argument("--skip-build", action="store_true", help="take the package that is installed")
    parser.add_argument("--quick", action="store_true", help="one small shape, to see that it runs")
    parser.add_argument("--tune", action="store_true", help="measure block shapes before all else")
    return parser.parse_args(words)


# ---------------------------------------------------------------- build and tests


def build(out: Path) -> list[str]:
    """Installs the package into this Python without fetching anything; what went wrong, as a list of at most one."""
    os.environ.setdefault("PETA_FAST_CUDA_ARCHS", "90")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", str(ROOT)]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode == 0:
        return []
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return [f"the package was not built, so its sources ran: {ran.stderr.strip()[-600:]}"]


def find_library() -> list[str]:
    """The library that the build has made, or one that was brought along; what is missing, as a list of at most one."""
    from peta_fast import _cuda

    brought = ROOT / "peta_fast" / _cuda.NAME
    if not _cuda.candidates() and not brought.exists():
        from peta_fast import _cuda_build

        brought = ROOT / "build" / "gpu_suite" / _cuda.NAME
        try:
            _cuda_build.build(ROOT / "csrc", brought, _cuda_build.wanted_architectures("auto"))
        except _cuda_build.BuildError as error:
            print(f"the CUDA library was not built: {error}", file=sys.stderr)
    if not _cuda.candidates() and brought.exists():
        os.environ["PETA_FAST_CUDA_LIBRARY"] = str(brought)
    found = _cuda.describe()
    print(f"CUDA library: {found['cuda library']}, {found['cuda reason']}")
    return [] if _cuda.candidates() else [f"merging: no CUDA library, {found['cuda reason']}"]


def gpu_test_files() -> list[Path]:
    """Only these, since others import what may not be installed here."""
    return [file for file in sorted((ROOT / "tests").glob("test_*.py")) if "pytest.mark.gpu" in file.read_text()]


def run_tests(out: Path, seconds_left: float, name: str, chosen: str) -> list[str]:
    """Writes <name>.json; returns the names of what failed. A run in which no test passed or was skipped is a failure.

    Half of the seconds are the limit. Then pytest is interrupted, so that it still reports what it has done. With
    pytest-xdist tests run in several processes, since they wait for Triton's compiler most of the time.
    chosen: pytest's -k
    """
    limit = max(LEAST_SECONDS, seconds_left / 2)
    report = out / f"{name}.xml"
    settings = ["-o", "addopts=", "-o", f"pythonpath={ROOT / 'tests'}", "--import-mode=importlib", "--noconftest"]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-k", chosen, *settings, f"--junitxml={report}"]
    command += ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), *map(str, gpu_test_files())]
    if name == "tests" and importlib.util.find_spec("xdist"):
        command += ["-n", str(min(MOST_WORKERS, os.cpu_count() or 1))]
    if shutil.which("timeout"):
        command = ["timeout", "-s", "INT", "-k", "20", f"{limit:.0f}", *command]
    try:
        ran = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True, timeout=limit + 30)
    except subprocess.TimeoutExpired as late:
        return [f"{name}: not done after {late.timeout:.0f} s"]
    if not report.exists():
        return [f"{name}: pytest ended with {ran.returncode}: {(ran.stdout + ran.stderr)[-1500:]}"]
    cases = [case_of(element) for element in ElementTree.parse(report).iter("testcase")]
    report.unlink()
    (out / f"{name}.json").write_text(json.dumps(cases, indent=1) + "\n", encoding="utf-8")
    failed = [f"test {case['name']}: {case['message']}" for case in cases if case["outcome"] == "failed"]
    if ran.returncode in STOPPED:
        failed.append(f"{name}: stopped after {limit:.0f} s, {len(cases)} were done")
    wanted = ("passed",) if name == "tests" else ("passed", "skipped")
    return failed or ([] if any(case["outcome"] in wanted for case in cases) else [f"{name}: none passed"])


def case_of(element: ElementTree.Element) -> dict[str, object]:
    """name, outcome (passed, skipped or failed), message, seconds"""
    bad = element.find("failure") if element.find("failure") is not None else element.find("error")
    outcome = "failed" if bad is not None else "skipped" if element.find("skipped") is not None else "passed"
    message = "" if bad is None else (bad.get("message") or bad.text or "").strip()[:400]
    return {
        "name": element.get("name"),
        "outcome": outcome,
        "message": message,
        "seconds": float(element.get("time", 0)),
    }


# ---------------------------------------------------------------- measurements


def tune(out: Path, quick: bool) -> None:
    """Block shapes of two layers, for this process as for those who ship the file as the package's measured.json."""
    from peta_fast.ops.linearized_lora import tuning

    os.environ["PETA_FAST_TUNING"] = str(out / "measured.json")
    tuning.tune([(256, 512, 512, 16)] if quick else [(8192, 4096, 4096, 16), (64, 4096, 4096, 16)])


def shapes(quick: bool) -> list:
    """The most telling first: what is left when the time is up is not measured, and said."""
    from lora_layers import Shape

    if quick:
        return [Shape(256, 512, 512, 16)]
    return [
        Shape(8192, 4096, 4096, 16), Shape(8192, 4096, 4096, 16, general=True), Shape(8192, 4096, 14336, 16),
        Shape(8192, 14336, 4096, 16), Shape(8192, 4096, 11008, 16), Shape(8192, 4096, 4096, 64),
        Shape(8192, 4096, 4096, 8), *(Shape(M, 4096, N, 16) for M in (1, 64, 512) for N in (4096, 14336)),
        Shape(64, 4096, 4096, 16, general=True),
    ]  # fmt: skip


def measure_all(rounds: int, deadline: float, quick: bool) -> tuple[list[dict], list[str]]:
    """Rows, and what was not measured or is wrong."""
    import torch

    rows, notes = [], []
    for shape in shapes(quick):
        if time.monotonic() > deadline:
            notes.append(f"{shape}: not measured, the time was up")
            continue
        notes += guarded(str(shape), lambda shape=shape: rows.extend(rows_of_shape(shape, rounds)))
        torch.cuda.empty_cache()
    for shape in group_shapes(quick):
        if time.monotonic() > deadline:
            notes.append(f"{shape}: not measured, the time was up")
            continue
        notes += guarded(str(shape), lambda shape=shape: rows.extend(rows_of_group_shape(shape, rounds)))
        torch.cuda.empty_cache()
    return rows, notes


def guarded(what: str, work: Callable[[], object]) -> list[str]:
    """Does the work; what it raised, as a list of at most one, since the rest is still worth its time."""
    try:
        work()
    except Exception as error:
        return [f"{what}: {type(error).__name__}: {error}"[:600]]
    return []


def rows_of_shape(shape, rounds: int) -> list[dict]:
    """All rows of one layer. Raises AssertionError where the result is wrong."""
    import torch
    from lora_layers import MOST_ERROR, Layers

    layers = Layers(shape, "cuda", torch.bfloat16)
    error = layers.error()
    assert error < MOST_ERROR, f"not measured, the result is off by {error}"
    return [*rows_of_layer(layers, error, rounds), *rows_of_ways(layers, rounds)]


def rows_of_group_shape(shape, rounds: int) -> list[dict]:
    """All rows of one group. Raises AssertionError where the result is wrong."""
    import torch
    from lora_groups import Groups
    from lora_layers import MOST_ERROR

    groups = Groups(shape, "cuda", torch.bfloat16)
    error = groups.error(groups.ours())
    assert error < MOST_ERROR, f"not measured, the result is off by {error}"
    return list(rows_of_group(groups, error, rounds))


def group_shapes(quick: bool) -> list:
    """q, k and v, and gate and up, of Llama 8B."""
    from lora_groups import GroupShape

    if quick:
        return [GroupShape(512, 512, (512, 128, 128), 16)]
    qkv = [GroupShape(8192, 4096, (4096, 1024, 1024), 16, general=general) for general in (False, True)]
    return [*qkv, GroupShape(8192, 4096, (14336, 14336), 16)]


def rows_of_group(groups, error: float, rounds: int) -> Iterator[dict]:
    """Several projections of one x together, as single layers, as PEFT's, and bare, in turns."""
    kinds = {"group": groups.ours(), "single": groups.single(), "peft": groups.peft(), "bare": groups.bare()}
    kinds = {name: function for name, function in kinds.items() if function is not None}
    for passes in ("forward", "forward_backward"):
        works = {name: getattr(groups, passes)(function) for name, function in kinds.items()}
        times = in_turns(works, rounds)
        peaks = {name: peak_bytes(work) for name, work in works.items()}
        for reference in [name for name in ("single", "peft") if name in works]:
            details = {"medians": medians(times), "peak_bytes": peaks}
            yield row(f"group_{passes}", groups.shape, times, "group", reference, "bare", error, details)


def rows_of_layer(layers, error: float, rounds: int) -> Iterator[dict]:
    """Ours, jvp, PEFT and bare in turns, forward and forward with backward, with the memory of each."""
    from lora_layers import kept_bytes, owned_bytes, peak_weight_bytes

    kinds = {"ours": layers.ours(), "jvp": layers.jvp(), "peft": layers.peft(), "bare": layers.bare()}
    kinds = {name: layer for name, layer in kinds.items() if layer is not None}
    kept = {name: kept_bytes(layers, layer) for name, layer in kinds.items()}
    owned = {name: owned_bytes(layers, layer) for name, layer in kinds.items()}
    weights = {name: peak_weight_bytes(layers, layer) for name, layer in kinds.items()}
    for passes in ("forward", "forward_backward"):
        works = {name: getattr(layers, passes)(layer) for name, layer in kinds.items()}
        times = in_turns(works, rounds)
        peaks = {name: peak_bytes(work) for name, work in works.items()}
        for reference in [name for name in ("jvp", "peft") if name in works]:
            details = {"medians": medians(times), "kept_bytes": kept, "owned_bytes": owned, "peak_bytes": peaks,
                       "peak_weight_bytes": weights}  # fmt: skip
            yield row(passes, layers.shape, times, "ours", reference, "bare", error, details)


def rows_of_ways(layers, rounds: int) -> Iterator[dict]:
    """The one launch of the fused kernel against prefill and cuBLAS: where the choice between them should change."""
    from lora_layers import SCALING

    from peta_fast.ops.linearized_lora import launch

    x, adapter = (
        layers.x.detach(),
        [None if t is None else t.detach() for t in (layers.A0, layers.dA, layers.B0, layers.dB)],
    )

    def way(fused: bool):
        return lambda: launch.forward(x, layers.weight, layers.bias, *adapter, None, SCALING, 0.0, fused=fused)

    works = {"fused": way(True), "prefill": way(False), "bare": layers.forward(layers.bare())}
    times = in_turns(works, rounds)
    yield row("way_fused", layers.shape, times, "fused", "prefill", "bare", None, {"medians": medians(times)})


def in_turns(works: dict, rounds: int) -> dict[str, list[float]]:
    """Seconds of every round of every work, after a warm-up of each."""
    from lora_layers import seconds_on_gpu

    for work in works.values():
        seconds_on_gpu(work, 3)
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(seconds_on_gpu(work, 5))
    return times


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(rounds) for name, rounds in times.items()}


def peak_bytes(work) -> int:
    """Allocated at most while it ran, beyond what was there before."""
    import torch

    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def row(name, shape, times, ours, reference, floor, error, details) -> dict:
    """Medians, since a GPU's clock moves in both directions."""
    import torch
    import triton
    from rows import Row

    found = medians(times)
    goal = {"jvp": "3 times faster, within 1.10 of bare", "peft": "1.25 times faster"}.get(reference, "")
    made = Row(
        f"linearized_lora_{name}", f"{shape}, bf16", found[ours], found[reference], found[floor], error, reference,
        floor, "relative", goal=goal, details=details,
    ).to_json()  # fmt: skip
    versions = {**made["versions"], "triton": triton.__version__, "cuda": torch.version.cuda}
    return {**made, "device": torch.cuda.get_device_name(), "versions": versions}


# ---------------------------------------------------------------- what is written


def write(rows: list[dict], notes: list[str], out: Path, name: str) -> None:
    from table import markdown

    (out / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    text = markdown(rows) + "".join(f"\n- {note}" for note in notes) + "\n"
    (out / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)


def plot(rows: list[dict], file: Path) -> None:
    """Forward with backward, in multiples of the bare layer. Without matplotlib there is no picture."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    chosen = [r for r in rows if r["name"] == "linearized_lora_forward_backward" and r["reference_name"] == "jvp"]
    if not chosen:
        return
    figure, axes = pyplot.subplots(figsize=(9, 0.5 * len(chosen) + 1.5), layout="constrained")
    kinds = [kind for kind in ("jvp", "peft", "ours") if kind in chosen[0]["details"]["medians"]]
    for i, kind in enumerate(kinds):
        ratios = [r["details"]["medians"][kind] / r["details"]["medians"]["bare"] for r in chosen]
        axes.barh([y + 0.27 * i for y in range(len(chosen))], ratios, 0.25, label=kind)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks([y + 0.27 for y in range(len(chosen))], [r["shape"] for r in chosen])
    axes.set_xlabel("forward and backward, times the layer without an adapter")
    axes.legend()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
