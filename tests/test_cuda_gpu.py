"""Merging on a GPU, bit for bit what the CPU makes: every method, streams, devices, sizes past 2^31, no memory left."""

from __future__ import annotations

import functools
import gc
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import solved_families
import torch
from families import SHAPES, assert_same_bits, coarse_family, family, inputs_of
from test_methods import CASES, DENSITIES, DTYPES, ONE_OF_EACH, WEIGHTS
from worked_examples import EXAMPLES

import peta_fast
from peta_fast import _cuda
from peta_fast.errors import CheckpointError, CompatibilityError, ResourceError

HAS_GPU = torch.cuda.is_available()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_GPU, reason="no CUDA device"),
]
LARGE = {"large": (1501, 1203), "rows": (70, 5001), "narrow": (3001, 3), "small": (17,)}
TIES = {"method": "ties", "weight": WEIGHTS, "density": DENSITIES}


def moved(value, device="cuda"):
    """Tensors and dicts of them on a device; everything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return {k: moved(v, device) for k, v in value.items()} if isinstance(value, dict) else value


def on_both(base, models, **keywords):
    """What the CPU makes, and what the GPU makes, brought home."""
    expected = peta_fast.merge_state_dicts(base, models, **keywords)
    keywords = {key: moved(value) for key, value in keywords.items()}
    found = peta_fast.merge_state_dicts(moved(base), [moved(m) for m in models], **keywords)
    assert all(t.is_cuda for t in found.values())
    return expected, moved(found, "cpu")


def assert_same_on_both(base, models, **keywords):
    expected, found = on_both(base, models, **keywords)
    if keywords["method"] == "slerp":  # a reduction in torch: a stated error, not bits
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor)
    else:
        assert_same_bits(found, expected)


def test_the_library_is_there():
    assert _cuda.require().kind == "cuda"


# ---------------------------------------------------------------- the bits of the CPU


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("method, compat, parameters", CASES)
def test_every_method_has_the_bits_of_the_cpu(method, compat, parameters, dtypes):
    base, models = inputs_of(method, *family(3, *DTYPES[dtypes]))
    assert_same_on_both(base, models, method=method, compat=compat, **parameters)


@functools.cache
def large(make):
    return make(3, shapes=LARGE)


@pytest.mark.parametrize("make", [family, coarse_family], ids=["distinct", "equal-magnitudes"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("method, compat, parameters", [c for c in CASES if "mask" not in c.values[2]])
def test_every_method_over_many_tiles(method, compat, parameters, dtype, make):
    base, models = inputs_of(method, *large(make))
    base = base and {n: t.to(dtype) for n, t in base.items()}
    models = [{n: t.to(dtype) for n, t in m.items()} for m in models]
    assert_same_on_both(base, models, method=method, compat=compat, **parameters)


@pytest.mark.parametrize("num_tasks", [1, 2, 4, 5, 8, 9, 33])
@pytest.mark.parametrize("method, compat, parameters", ONE_OF_EACH)
def test_any_number_of_tasks(method, compat, parameters, num_tasks):
    shapes = SHAPES | {"large": (300, 401)}
    base, models = inputs_of(method, *family(num_tasks, torch.bfloat16, [torch.bfloat16], shapes=shapes))
    assert_same_on_both(base, models, method=method, compat=compat, **parameters)


@pytest.mark.parametrize("example", EXAMPLES, ids=[e.name for e in EXAMPLES])
def test_worked_example(example):
    weight = {} if example.keywords["method"] in ("slerp", "passthrough") else {"weight": 1.0}
    base, models = example.state_dicts()
    result = peta_fast.merge_state_dicts(moved(base), [moved(m) for m in models], **(weight | example.keywords))["w"]
    expected = torch.tensor(example.expected, dtype=torch.float32)
    torch.testing.assert_close(result.cpu(), expected, rtol=0, atol=example.tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("out", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_16_bit_pattern_passes_as_on_the_cpu(dtype, out):
    """NaN, infinities, denormals and zeros of either sign: as weights, and as differences from a base of ones."""
    x = torch.arange(65536).to(torch.uint16).view(dtype)
    base = torch.ones(65536, dtype=dtype)
    for method, start in (("linear", None), ("task_arithmetic", {"w": base}), ("ties", {"w": base})):
        density = {"density": 0.7} if method == "ties" else {}
        assert_same_on_both(start, [{"w": x}, {"w": x.flip(0)}], method=method, weight=0.5, dtype=out,
                            allow_nonfinite=True, **density)  # fmt: skip


def test_every_float_that_ties_between_two_roundings():
    upper, lower = np.arange(65536, dtype=np.uint32), np.array([0, 1, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001])
    x = torch.from_numpy((upper[:, None] << 16 | lower.astype(np.uint32)).reshape(-1).view(np.float32))
    for out in (torch.bfloat16, torch.float16, torch.float32):
        assert_same_on_both(None, [{"w": x}], method="linear", weight=1.0, dtype=out, allow_nonfinite=True)


@pytest.mark.parametrize("offset", [1, 3, 4])
def test_views_at_any_element(offset):
    base, models = family(3, torch.bfloat16, [torch.bfloat16, torch.float32], shapes={"w": (70_001 + offset,)})
    cut = [{"w": s["w"][offset:]} for s in (base, *models)]
    gpu = [{"w": moved(s["w"])[offset:]} for s in (base, *models)]
    expected = peta_fast.merge_state_dicts(cut[0], cut[1:], **TIES)
    assert_same_bits(moved(peta_fast.merge_state_dicts(gpu[0], gpu[1:], **TIES), "cpu"), expected)


def test_the_same_bits_every_time():
    base, models = coarse_family(3, shapes=LARGE, levels=40)
    base, models = moved(base), [moved(m) for m in models]
    keywords = {"method": "ties", "compat": "mergekit", "weight": 0.5, "density": 0.35}
    once = peta_fast.merge_state_dicts(base, models, **keywords)
    for _ in range(5):
        assert_same_bits(peta_fast.merge_state_dicts(base, models, **keywords), once)


# ---------------------------------------------------------------- in place, into a live model


def test_into_a_live_model():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(130, 257), torch.nn.BatchNorm1d(257), torch.nn.Linear(257, 64)).cuda()
    base = {n: t.detach().clone() for n, t in model.state_dict().items()}
    tuned = [{n: t + 0.01 * torch.randn_like(t) if t.is_floating_point() else t for n, t in base.items()} for _ in "ab"]
    addresses = [p.data_ptr() for p in model.parameters()]
    merged = peta_fast.merge_state_dicts(base, tuned, method="ties", weight=0.5, density=0.3, out=model.state_dict())
    assert addresses == [p.data_ptr() for p in model.parameters()]
    expected = peta_fast.merge_state_dicts(moved(base, "cpu"), [moved(t, "cpu") for t in tuned], method="ties",
                                           weight=0.5, density=0.3)  # fmt: skip
    assert_same_bits(moved(dict(model.state_dict()), "cpu"), expected)
    assert_same_bits(moved(merged, "cpu"), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "linear"])
def test_what_is_not_finite_is_refused_with_its_name(method, value):
    base, models = inputs_of(method, *family(2, torch.bfloat16, [torch.bfloat16], shapes=LARGE))
    models[1]["rows"][3, 77] = value
    with pytest.raises(CheckpointError, match="model 1: 'rows': expected finite values, got 1 NaN or inf"):
        peta_fast.merge_state_dicts(moved(base), [moved(m) for m in models], method=method, weight=1.0)


def test_tensors_on_the_cpu_and_on_the_gpu_are_refused():
    base, models = family(2)
    with pytest.raises(CompatibilityError, match="expected all on one device"):
        peta_fast.merge_state_dicts(moved(base), models, method="task_arithmetic", weight=1.0)


# ---------------------------------------------------------------- streams, threads, devices


def test_on_the_streams_of_several_threads():
    """Each thread makes its inputs on a stream of its own, merges there, and waits for nobody else."""
    base, models = family(3, torch.bfloat16, [torch.bfloat16], shapes=LARGE)
    expected = peta_fast.merge_state_dicts(base, models, **TIES)
    found, errors = {}, []

    def work(i):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(4):
                    torch.cuda._sleep(2_000_000)
                    mine = moved(base), [moved(m) for m in models]
                    found[i] = moved(peta_fast.merge_state_dicts(*mine, **TIES), "cpu")
                    assert_same_bits(found[i], expected)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(found) == 4


@pytest.mark.skipif(HAS_GPU and torch.cuda.device_count() < 2, reason="one GPU")
def test_on_a_device_that_is_not_the_current_one():
    base, models = family(3)
    expected = peta_fast.merge_state_dicts(base, models, **TIES)
    found = peta_fast.merge_state_dicts(moved(base, "cuda:1"), [moved(m, "cuda:1") for m in models], **TIES)
    assert all(t.device.index == 1 for t in found.values()) and torch.cuda.current_device() == 0
    assert_same_bits(moved(found, "cpu"), expected)


def test_the_current_device_and_stream_are_left_as_they_were():
    base, models = family(2)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        peta_fast.merge_state_dicts(moved(base), [moved(m) for m in models], method="ties", weight=1.0, density=0.5)
        assert torch.cuda.current_stream() == stream
    assert torch.cuda.current_device() == 0
    torch.cuda.synchronize()


# ---------------------------------------------------------------- sizes, memory


def test_a_tensor_of_more_than_2_to_the_31_elements():
    """Its second half repeats its first, so exact ranks and merged values of both are those of the half."""
    half = (1 << 30) + 4104
    if torch.cuda.mem_get_info()[0] < 2 * half * 2 * 5 * 1.1:
        pytest.skip("too little GPU memory")
    draw = torch.Generator("cuda").manual_seed(0)

    def twice():
        x = torch.empty(2 * half, dtype=torch.bfloat16, device="cuda")
        x[:half].normal_(generator=draw)
        x[half:] = x[:half]
        return x

    base, models = {"w": twice()}, [{"w": twice()} for _ in range(2)]
    keywords = {"method": "ties", "weight": 0.5}
    whole = peta_fast.merge_state_dicts(base, models, density=0.25, **keywords)["w"]
    assert torch.equal(whole[:half].view(torch.int16), whole[half:].view(torch.int16))
    halves = [{"w": s["w"][:half]} for s in (base, *models)]
    count = max(1, int(0.25 * 2 * half))
    alone = peta_fast.merge_state_dicts(halves[0], halves[1:], density=(count / 2 + 0.25) / half, **keywords)["w"]
    assert torch.equal(alone.view(torch.int16), whole[:half].view(torch.int16))


def test_no_memory_left_halfway_is_said_and_leaks_nothing():
    base, models = family(2, torch.bfloat16, [torch.bfloat16], shapes={"a": (4000, 4000), "b": (4000, 4001)})
    base, models = moved(base), [moved(m) for m in models]
    gc.collect(), torch.cuda.synchronize(), torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (40 << 20)) / total)
    try:
        with pytest.raises(ResourceError, match="cuda:0: expected .* more bytes of GPU memory"):
            peta_fast.merge_state_dicts(base, models, method="ties", weight=0.5, density=0.5)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    gc.collect()
    assert torch.cuda.memory_allocated() == before
    merged = peta_fast.merge_state_dicts(base, models, method="ties", weight=0.5, density=0.5)
    assert all(t.isfinite().all() for t in merged.values())


def test_scratch_is_a_few_percent_of_the_inputs():
    base, models = family(3, torch.bfloat16, [torch.bfloat16], shapes={"w": (6000, 8001)})
    base, models = moved(base), [moved(m) for m in models]
    out = {"w": torch.empty_like(base["w"])}
    peta_fast.merge_state_dicts(base, models, out=out, **TIES)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    peta_fast.merge_state_dicts(base, models, out=out, **TIES)
    torch.cuda.synchronize()
    inputs = sum(t.nbytes for s in (base, *models) for t in s.values())
    assert torch.cuda.max_memory_allocated() - before <= 0.05 * inputs


@pytest.mark.parametrize("saved", [False, True], ids=["memory", "files"])
@pytest.mark.parametrize("options", [
    {"method": "fisher"}, {"method": "regmean"}, {"method": "mats"}, {"method": "mats", "init": "zero"},
    {"method": "mats", "operator": "identity", "solver": "cg"},
], ids=str)  # fmt: skip
def test_what_is_solved_with_statistics_is_near_the_cpus(options, saved, tmp_path):
    """Solved by torch there and here: a stated error, not bits."""
    collected = solved_families.statistics()
    if saved:
        files = solved_families.save_all(tmp_path, solved_families.models(), collected)["models"]
        collected = [model["parameters"]["statistics"] for model in files]
    expected, found = on_both(None, solved_families.models(), statistics=collected, **options)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


def test_under_another_default_device():
    base, models = family(2)
    with torch.device("cuda"):
        expected, found = on_both(base, models, **TIES | {"weight": 0.5, "density": 0.5})
    assert_same_bits(found, expected)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["ties", "task_arithmetic"])
def test_files_by_way_of_the_gpu_have_the_bytes_of_the_cpus(name, tmp_path):
    """bf16 in torch's zip files, which need nothing but torch."""
    shapes = {f"layers.{i}.w": (1001 + i, 2003) for i in range(12)} | {"norm": (77,)}
    base, models = coarse_family(3, shapes=shapes, levels=30, dtype=torch.bfloat16)
    for i, state in enumerate((base, *models)):
        (tmp_path / str(i)).mkdir()
        torch.save(state, tmp_path / str(i) / "pytorch_model.bin")
    found = []
    for device in ("cpu", "cuda"):
        keywords = {"density": 0.3} if name == "ties" else {}
        peta_fast.merge(out=tmp_path / device, method=name, base=tmp_path / "0", weight=0.5, device=device,
                        models=[tmp_path / str(i) for i in (1, 2, 3)], **keywords)  # fmt: skip
        found.append(b"".join(f.read_bytes() for f in sorted((tmp_path / device).glob("*.safetensors"))))
    assert found[0] == found[1] and len(found[0]) > 40_000_000


# ---------------------------------------------------------------- compute-sanitizer

REDUCED = """
import sys
sys.path.insert(0, {tests!r})
import torch, peta_fast
from families import coarse_family, family, inputs_of
from test_cuda_gpu import assert_same_on_both
shapes = {{"w": (301, 257), "large": (257, 601), "v": (41,)}}
for method, compat, parameters in [
    ("linear", "native", {{"weight": 0.5}}),
    ("task_arithmetic", "native", {{"weight": 0.4}}),
    ("ties", "native", {{"weight": 0.5, "density": 0.2}}),
    ("ties", "mergekit", {{"weight": 0.5, "density": 0.3}}),
    ("ties", "peta", {{"density": 0.3}}),
    ("dare_ties", "mergekit", {{"weight": 0.5, "density": 0.4}}),
    ("della", "native", {{"weight": 0.5, "density": 0.5, "epsilon": 0.2}}),
    ("breadcrumbs", "mergekit", {{"weight": 0.5, "density": 0.8, "gamma": 0.1}}),
]:
    for make in (coarse_family,):
        base, models = inputs_of(method, *make(3, shapes=shapes))
        models = [{{n: t.bfloat16() for n, t in m.items()}} for m in models]
        base = base and {{n: t.bfloat16() for n, t in base.items()}}
        assert_same_on_both(base, models, method=method, compat=compat, **parameters)
print("merged")
"""
SANITIZER = shutil.which("compute-sanitizer") or next(
    (p for p in ("/usr/local/cuda/bin/compute-sanitizer",) if os.path.exists(p)), None
)


@pytest.mark.skipif(SANITIZER is None, reason="no compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_nothing_for_the_sanitizer_to_find(tool):
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    code = REDUCED.format(tests=str(Path(__file__).parent))
    only = ["--kernel-regex", "kns=peta", "--report-api-errors", "no"]  # others' kernels and calls are not ours to mend
    command = [SANITIZER, "--tool", tool, *only, "--error-exitcode", "99", sys.executable, "-c", code]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    if "Device not supported" in ran.stdout + ran.stderr:
        pytest.skip("compute-sanitizer does not serve this machine")
    assert ran.returncode == 0 and "merged" in ran.stdout, (ran.stdout + ran.stderr)[-3000:]
