"""The native module as such: what it refuses, how it is chosen, and that neither threads nor forks disturb it."""

from __future__ import annotations

import ast
import os
import shutil
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from backends import DTYPES, LEVELS, NATIVE, SIMD, assert_same_bits, buffer_of, contents, output_of, running_on
from delta_merge_cases import case_of, run, terms_of
from interpreter import run_code

from peta_fast.buffers import FACTORS
from peta_fast.ops import plain
from peta_fast.ops import records as r
from peta_fast.ops.delta_merge import DeltaMerge, Top

needs_native = pytest.mark.skipif(NATIVE is None, reason="the native module is not built")
CHECKOUT = Path(__file__).resolve().parents[1]
SIZE = 8
MEMORY = np.ones(64, np.float32)
ADDRESS = MEMORY.ctypes.data
TIES = DeltaMerge(terms_of(3, Top(5000)), elect="weighted", divide="agreeing-weight")


# ---------------------------------------------------------------- records


@needs_native
def test_records_have_the_layout_of_the_native_structs():
    ours = {"piece": r.PIECE, "task": r.TASK, "rule": r.RULE, "delta": r.DELTA, "select_task": r.SELECT_TASK,
            "select_query": r.SELECT_QUERY, "group": r.GROUP, "variant": r.VARIANT, "use": r.USE, "factors": FACTORS,
            "mask_tensor": r.MASK_TENSOR, "mask_task": r.MASK_TASK, "mask_settings": r.MASK_SETTINGS}  # fmt: skip
    assert {name: layout.itemsize for name, layout in ours.items()} == dict(NATIVE.RECORD_BYTES)
    assert plain.RECORD_BYTES.items() <= dict(NATIVE.RECORD_BYTES).items()


def merge_with(mode=r.MERGE, piece=(), task=(), rule=()):
    """Runs one valid piece with fields replaced."""
    tables = np.zeros(1, r.PIECE), np.zeros(1, r.TASK), np.zeros(1, r.RULE)
    valid = {"base": ADDRESS, "out": ADDRESS, "size": SIZE, "tasks": 1}, {"x": ADDRESS, "weight": 1, "prescale": 1}, {}
    for table, fields, changed in zip(tables, valid, (piece, task, rule), strict=True):
        for field, value in {**fields, **dict(changed)}.items():
            table[field] = value
    NATIVE.delta_merge(mode, *tables, 1)


@needs_native
@pytest.mark.parametrize(
    "changed, message",
    [
        ({"mode": 3}, "unknown mode"),
        ({"mode": -1}, "unknown mode"),
        ({"mode": r.KEPT_NORM}, r"piece\[0\]: no place for partial sums"),
        ({"piece": {"size": -1}}, r"piece\[0\]: size or start is negative"),
        ({"piece": {"start": -1}}, "size or start is negative"),
        ({"piece": {"tasks": 2}}, "tasks out of range"),
        ({"piece": {"tasks": -1}}, "tasks out of range"),
        ({"piece": {"first_task": 1}}, "tasks out of range"),
        ({"piece": {"first_task": -1}}, "tasks out of range"),
        ({"piece": {"rule": 1}}, "rule out of range"),
        ({"piece": {"rule": -1}}, "rule out of range"),
        ({"piece": {"base": 0}}, "no base"),
        ({"piece": {"out": 0}}, "no output"),
        ({"piece": {"base_dtype": 3}}, "unknown dtype code 3"),
        ({"piece": {"out_dtype": -1}}, "unknown dtype code -1"),
        ({"piece": {"sign": ADDRESS, "sign_dtype": 4}}, "unknown dtype code 4"),
        ({"rule": {"elect": r.ELECT_GIVEN}}, "no given sign"),
        ({"task": {"x": 0}}, "a task has no input"),
        ({"task": {"dtype": 3}}, r"task\[0\]: unknown dtype code 3"),
        ({"task": {"mask": ADDRESS, "mask_dtype": 5}}, "unknown dtype code 5"),
        ({"task": {"weights": ADDRESS, "weights_dtype": 3}}, "unknown dtype code 3"),
        ({"task": {"keep": 6}}, "unknown keep rule"),
        ({"task": {"keep": -1}}, "unknown keep rule"),
        ({"task": {"keep": r.KEEP_RANDOM_PER_ELEMENT}}, "no probabilities"),
        ({"task": {"by_probability": 1}}, "has no probabilities to divide by"),
        ({"task": {"low": 2**31}}, "a threshold is negative"),
        ({"task": {"high": 2**32 - 1}}, "a threshold is negative"),
        ({"rule": {"base_kind": 3}}, r"rule\[0\]: unknown base kind"),
        ({"rule": {"elect": 5}}, "unknown election"),
        ({"rule": {"aggregate": 5}}, "unknown aggregate"),
        ({"rule": {"divide": 3}}, "unknown divisor"),
        ({"rule": {"divide": r.DIVIDE_AGREEING_COUNT}}, "needs an elected sign"),
        ({"rule": {"aggregate": r.MAX}}, "needs an elected sign"),
        ({"rule": {"aggregate": r.MEDIAN, "elect": r.ELECT_COUNT}}, "takes no elected sign"),
        ({"rule": {"aggregate": r.MEDIAN}, "piece": {"tasks": 0}}, "a median needs a task"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_a_merge_refuses(changed, message):
    with pytest.raises(ValueError, match=message):
        merge_with(**changed)


def delta(**changed) -> np.ndarray:
    one = np.zeros(1, r.DELTA)
    for field, value in {"base": ADDRESS, "x": ADDRESS, **changed}.items():
        one[field] = value
    return one


def select_with(count=3, tasks=1, queries=1, **changed):
    table, query = np.zeros(tasks, r.SELECT_TASK), np.zeros(queries, r.SELECT_QUERY)
    table["delta"], table["size"], table["queries"], query["count"] = delta(), SIZE, 1, count
    for field, value in changed.items():
        table[field] = value
    NATIVE.select_magnitudes(table, query, 1)


@needs_native
@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: select_with(count=0), "count is outside 1..size"),
        (lambda: select_with(count=SIZE + 1), "count is outside 1..size"),
        (lambda: select_with(queries=0), "queries out of range"),
        (lambda: select_with(first_query=-1), "queries out of range"),
        (lambda: select_with(size=-1), "size is negative"),
        (lambda: select_with(tasks=2, queries=2, size=[SIZE, SIZE - 1]), "sizes differ in a group"),
        (lambda: select_with(delta=delta(x=0)), "no input"),
        (lambda: select_with(delta=delta(base=0)), "no base"),
        (lambda: select_with(delta=delta(dtype=3)), "unknown dtype code 3"),
        (lambda: select_with(delta=delta(base_kind=3)), "unknown base kind"),
        (lambda: NATIVE.magnitude_histogram(delta(), SIZE, np.zeros(5, np.uint64), -1, 1), "expected 65536 of them"),
        (lambda: NATIVE.magnitude_histogram(delta(), SIZE, np.zeros(65536, np.uint64), 7, 1), "expected 32768 of them"),
        (lambda: NATIVE.magnitude_histogram(delta(), -1, np.zeros(65536, np.uint64), -1, 1), "size is negative"),
        (lambda: NATIVE.magnitude_histogram(delta().repeat(2), 1, np.zeros(65536, np.uint64), -1, 1), "one record"),
        (lambda: NATIVE.ranked_probability(delta(), 0, 2, 4, 0, 1, np.zeros(7, np.float32), 1), "rows \\* columns"),
        (lambda: NATIVE.ranked_probability(delta(), 0, 2, 0, 0, 1, np.zeros(0, np.float32), 1), "out of range"),
        (lambda: NATIVE.ranked_probability(delta(), -1, 2, 4, 0, 1, np.zeros(8, np.float32), 1), "out of range"),
        (lambda: NATIVE.task_statistics(delta(x=0), SIZE, 1), "no input"),
        (lambda: NATIVE.task_statistics(delta(), -1, 1), "size is negative"),
        (lambda: NATIVE.copy_bytes(0, ADDRESS, 4, 1), "no address"),
        (lambda: NATIVE.copy_bytes(ADDRESS, ADDRESS, -4, 1), "negative size"),
        (lambda: NATIVE.checksum(0, 4, 1), "no address"),
        (lambda: NATIVE.checksum(ADDRESS, -1, 1), "negative size"),
        (lambda: NATIVE.philox_words(0, 2, 4), "multiple of 4"),
        (lambda: NATIVE.philox_words(0, 0, -4), "multiple of 4"),
        (lambda: NATIVE.delta_merge(0, np.zeros(1), np.zeros(1), np.zeros(1), 1), "expected a contiguous vector of"),
        (lambda: NATIVE.task_statistics(delta().repeat(4)[::2], SIZE, 1), "expected a contiguous vector of"),
        (lambda: NATIVE.task_statistics(delta().reshape(1, 1), SIZE, 1), "expected a contiguous vector of"),
    ],
)
def test_the_other_operations_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call()


HUGE = """
import numpy as np
from peta_fast import _cpu
from peta_fast.ops import records as r
x = np.ones(8, np.float32)
address = x.ctypes.data
delta = np.array([(address, address, 0, 0, 0, 0)], r.DELTA)
try:
    {call}
except (ValueError, MemoryError) as error:
    print("refused")
"""


@needs_native
@pytest.mark.parametrize(
    "call",
    [
        "_cpu.delta_merge(0, np.array([(address, address, 0, 0, 8, 0, 2**63 - 1, 0, 1, 0, 0, 0, 0, 0)], r.PIECE), "
        "np.zeros(1, r.TASK), np.zeros(1, r.RULE), 1)",
        "_cpu.select_magnitudes(np.array([(delta[0], 8, 2**63 - 1, 0, 1, 0)], r.SELECT_TASK), "
        "np.zeros(1, r.SELECT_QUERY), 1)",
        "_cpu.ranked_probability(delta, 0, 2**62, 4, 0.0, 1.0, np.empty(0, np.float32), 1)",
        "_cpu.philox_words(0, 0, 2**31 - 1)",
    ],
    ids=["first_task", "first_query", "rows", "words"],
)
def test_numbers_whose_sum_or_product_overflows_are_refused(call):
    """In a process of its own: what is not refused crashes."""
    done = run_code(HUGE.format(call=call))
    assert (done.returncode, done.stdout) == (0, "refused\n"), done.stderr


@pytest.mark.parametrize("size", [0, 1, 4095, (4 << 20) - 1, (8 << 20) + 3])
def test_copying_bytes_between_odd_addresses(size):
    data = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    source = buffer_of(data, "U8", 3)
    for module in (plain, NATIVE) if NATIVE else (plain,):
        target = buffer_of(np.zeros(size, np.uint8), "U8", 1)
        module.copy_bytes(target.address, source.address, size, 3)
        assert bytes(target.as_bytes()) == data.tobytes()


# ---------------------------------------------------------------- which module runs, and on what

MERGES = """
import hashlib, sys
import numpy as np
import peta_fast
draw = np.random.default_rng(0)
def state(dtype):
    coarse = np.round(draw.standard_normal(999) * 8)
    return {"a.weight": draw.standard_normal((40, 120)).astype(dtype), "b": coarse.astype(dtype)}
base, models = state("float16"), [state("float32"), state("float16"), state("float16")]
mask = {name: draw.random(x.shape) < 0.5 for name, x in base.items()}
for method, compat, parameters in [
    ("linear", "native", {"weight": 0.5}),
    ("task_arithmetic", "native", {"weight": [0.2, 0.3, 0.4]}),
    ("ties", "native", {"weight": 0.5, "density": 0.2}),
    ("ties", "mergekit", {"weight": 0.5, "density": [0.1, 0.5, 0.9]}),
    ("ties", "peta", {"density": 0.3}),
    ("dare_ties", "mergekit", {"weight": 0.5, "density": 0.4, "seed": 9}),
    ("della", "native", {"weight": 0.5, "density": 0.5, "epsilon": 0.2}),
    ("breadcrumbs", "native", {"weight": 0.5, "density": 0.8, "gamma": 0.1}),
    ("ties", "native", {"weight": 0.5, "density": 0.3, "trim_scope": "model"}),
    ("masked_task_arithmetic", "native", {"weight": 0.5, "mask": mask, "mask_rescale": "mean"}),
]:
    tensors = [None if method == "linear" else base, models]
    merged = peta_fast.merge_state_dicts(*tensors, method=method, compat=compat, **parameters)
    print(method, compat, *(hashlib.sha256(x.tobytes()).hexdigest()[:16] for x in merged.values()))
from peta_fast._native import describe
print(describe()["operations"], describe().get("simd"), file=sys.stderr)
"""


@needs_native
def test_merges_are_the_same_bits_without_the_native_module_and_on_every_instruction_set():
    off = run_code(MERGES, PETA_FAST_NATIVE="off")
    assert off.returncode == 0 and off.stderr.startswith("plain"), off.stderr
    assert len(off.stdout.splitlines()) == 10
    for name in SIMD:
        native = run_code(MERGES, PETA_FAST_NATIVE="require", PETA_FAST_SIMD=name)
        assert native.stderr == f"native {name}\n" and native.stdout == off.stdout, name


DESCRIBE = "from peta_fast._native import describe; print(describe())"
WITHOUT = "import sys; sys.modules['peta_fast._cpu'] = None; "


def test_a_module_that_is_required_but_missing_is_an_error():
    done = run_code(WITHOUT + DESCRIBE, PETA_FAST_NATIVE="require")
    assert "peta_fast._cpu: expected the native module, got" in done.stderr and "reinstall peta_fast" in done.stderr


def test_a_module_that_is_missing_is_done_without_and_said_so():
    done = run_code(WITHOUT + DESCRIBE)
    assert done.returncode == 0 and "the module peta_fast._cpu is not built" in done.stdout
    done = run_code(WITHOUT + "from peta_fast.ops import backend; print(backend().__name__)")
    assert done.stdout == "peta_fast.ops.plain\n"


@pytest.mark.parametrize("mode", ["on", "", "OFF"])
def test_an_unknown_mode_is_an_error(mode):
    done = run_code(DESCRIBE, PETA_FAST_NATIVE=mode)
    assert f"PETA_FAST_NATIVE: expected auto, require or off, got {mode!r}" in done.stderr


@needs_native
@pytest.mark.parametrize("name", [*LEVELS, "sse9", "AVX2"])
def test_an_instruction_set_is_forced_or_refused(name):
    done = run_code(DESCRIBE, PETA_FAST_SIMD=name)
    if name in SIMD:
        assert f"'simd': '{name}', 'best simd': '{SIMD[-1]}'" in done.stdout
    else:
        assert f"PETA_FAST_SIMD: expected one this CPU has, up to '{SIMD[-1]}', got '{name}'" in done.stderr


@needs_native
def test_choosing_instruction_sets_by_name():
    before = NATIVE.simd()
    assert not NATIVE.set_simd("sse9") and NATIVE.simd() == before
    with running_on("baseline"):
        assert NATIVE.simd() == "baseline"
        assert NATIVE.set_simd("") and NATIVE.simd() == NATIVE.best_simd() == SIMD[-1]
    assert NATIVE.simd() == before


# ---------------------------------------------------------------- threads and forks


@needs_native
def test_default_threads_are_the_cpus_this_process_may_use():
    assert NATIVE.default_threads() == len(os.sched_getaffinity(0))


@needs_native
def test_calls_from_several_python_threads_at_once():
    """One of them has the pool, the others work alone; all are right."""
    cases = [case_of(3, (n,), DTYPES, seed=n) for n in (70_000, 200_001, 300_000, 140_000)]
    expected = [run(TIES, case) for case in cases]
    with ThreadPoolExecutor(4) as executor:
        jobs = [(i, executor.submit(run, TIES, cases[i], threads=1 + i)) for _ in range(6) for i in range(4)]
        for i, job in jobs:
            assert_same_bits(job.result(timeout=60), expected[i])


@needs_native
def test_a_forked_child_makes_threads_of_its_own():
    case = case_of(3, (300_000,), ("BF16",))
    expected = run(TIES, case, threads=4)
    child = os.fork()
    if not child:
        signal.alarm(60)
        same = np.array_equal(run(TIES, case, threads=4), expected)
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert_same_bits(run(TIES, case, threads=4), expected)


@needs_native
@pytest.mark.parametrize("threads", [-1, 0, 1, 64, 2**31 - 1])
def test_any_number_of_threads_will_do(threads):
    case = case_of(3, (140_000,), ("BF16",))
    assert_same_bits(run(TIES, case, threads=threads), run(TIES, case, threads=2))


@needs_native
def test_a_caller_that_flushes_denormals_to_zero_changes_no_bit():
    """The pool's threads and the caller's must compute alike, whatever mode the caller's CPU is in."""
    torch = pytest.importorskip("torch")
    size = 300_000
    table, x = np.zeros(1, r.PIECE), np.full(size, 1e-40, np.float32)
    out = output_of(size, "F32")
    task = np.zeros(1, r.TASK)
    task["x"], task["weight"], task["prescale"] = x.ctypes.data, 1, 1
    rule = np.array([(r.BASE_ZERO, 0, 0, 0, 0, 1.0, 0.0, 1.0)], r.RULE)
    table["out"], table["size"], table["tasks"] = out.address, size, 1
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    try:
        outs = []
        for threads in (1, 4):
            NATIVE.delta_merge(r.MERGE, table, task, rule, threads)
            outs.append(contents(out))
    finally:
        torch.set_flush_denormal(False)
    assert all((found == x).all() for found in outs)


# ---------------------------------------------------------------- symbols


@needs_native
@pytest.mark.skipif(not (shutil.which("g++") and shutil.which("nm")), reason="no g++ or nm")
@pytest.mark.skipif(not (CHECKOUT / "csrc").is_dir(), reason="not in a checkout")
def test_files_of_one_instruction_set_define_their_entry_points_and_nothing_else(tmp_path):
    """A weak symbol out of an AVX file may be the one that the linker keeps for all: SIGILL on older CPUs."""
    flags = constants_of(CHECKOUT / "setup.py", "FLAGS", "VARIANT_FLAGS")
    sources = [s for end in flags["VARIANT_FLAGS"] for s in sorted((CHECKOUT / "csrc").glob(f"*/*{end}"))]
    assert len(sources) >= 6

    def symbols_of(source: Path) -> list[str]:
        target = tmp_path / f"{source.stem}.o"
        own = next(f for end, f in flags["VARIANT_FLAGS"].items() if source.name.endswith(end))
        fewer_inlined = ["-O1", f"-I{CHECKOUT / 'csrc'}"]  # than in the build, so that nothing hides
        command = ["g++", "-c", "-fPIC", *flags["FLAGS"], *own, *fewer_inlined, source, "-o", target]
        subprocess.run(command, check=True)
        listed = subprocess.run(["nm", "--defined-only", "--extern-only", target], check=True, capture_output=True)
        return [line.split(maxsplit=1)[1] for line in listed.stdout.decode().splitlines()]

    with ThreadPoolExecutor(2) as executor:
        for source, symbols in zip(sources, executor.map(symbols_of, sources), strict=True):
            level = source.stem.rpartition("_")[2]
            assert symbols and all(s.startswith("T peta_") and s.endswith(f"_{level}") for s in symbols), symbols


def constants_of(file: Path, *names: str) -> dict[str, object]:
    """Literal assignments of a Python file, without running it."""
    assigned = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.Assign)]
    return {node.targets[0].id: ast.literal_eval(node.value) for node in assigned if node.targets[0].id in names}
