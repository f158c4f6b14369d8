"""`merge` of files by way of a device: the bytes of the CPU's output, whatever fits there, and errors of its thread.

The device's memory is the host's here; on a GPU, test_cuda_gpu.py does the same.
"""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from families import coarse_family
from host_build import HAS_COMPILER, host_library
from safetensors.torch import save_file

import peta_fast
from peta_fast import _cuda, _device_engine
from peta_fast.errors import CheckpointError, ResourceError
from peta_fast.ops import device as devices

pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason="no g++, or not in a checkout")
SHAPES = {"embed.weight": (301, 257), "layers.0.w": (257, 64), "layers.1.w": (257, 64), "norm": (257,), "scale": (),
          "experts": (3, 40, 50), "bn.running_mean": (9,), "empty": (0, 3)}  # fmt: skip


@pytest.fixture(autouse=True)
def the_host_is_a_device(monkeypatch):
    monkeypatch.setenv("PETA_FAST_CUDA_LIBRARY", str(host_library()))
    monkeypatch.delenv("PETA_FAST_CUDA", raising=False)
    monkeypatch.setattr(_device_engine, "STAGING", 5000)
    _cuda.library.cache_clear(), devices.of_device.cache_clear()
    yield
    _cuda.library.cache_clear(), devices.of_device.cache_clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    base, models = coarse_family(3, shapes=SHAPES, levels=30, dtype=torch.bfloat16)
    for name, state in zip("base a b c".split(), (base, *models), strict=True):
        (folder / name).mkdir()
        save_file(state | {"steps": torch.arange(5)}, folder / name / "model.safetensors")
    draw = torch.Generator().manual_seed(1)
    save_file({n: torch.rand(s, generator=draw) < 0.5 for n, s in SHAPES.items()}, folder / "mask.safetensors")
    return folder


def merged(folder: Path, out: Path, device: str, **keywords) -> bytes:
    models = [folder / name for name in keywords.pop("models", "a b c").split()]
    base = None if keywords["method"] in ("linear", "slerp") else folder / "base"
    peta_fast.merge(out=out, base=base, models=models, device=device, max_memory="64MB", **keywords)
    return b"".join(f.read_bytes() for f in sorted(out.glob("*.safetensors")))


METHODS = {
    "linear": {"method": "linear", "weight": 0.5},
    "slerp": {"method": "slerp", "t": 0.3, "models": "a b"},
    "task-arithmetic": {"method": "task_arithmetic", "weight": [0.2, 0.3, 0.4]},
    "ties": {"method": "ties", "weight": 0.5, "density": 0.2},
    "ties-mergekit": {"method": "ties", "compat": "mergekit", "weight": 0.5, "density": 0.3},
    "ties-model": {"method": "ties", "weight": 0.5, "density": 0.3, "trim_scope": "model"},
    "ties-row-block": {"method": "ties", "weight": 0.5, "density": 0.3, "trim_scope": "row-block"},
    "peta": {"method": "ties", "compat": "peta", "density": 0.3},
    "dare": {"method": "dare_ties", "compat": "mergekit", "weight": 0.5, "density": 0.4, "seed": 3},
    "della": {"method": "della", "weight": 0.5, "density": 0.5, "epsilon": 0.2},
    "masked": {"method": "masked_task_arithmetic", "weight": 0.5, "mask_rescale": "mean"},
}


@pytest.mark.parametrize("name", METHODS)
def test_the_bytes_are_the_cpus(name, folder, tmp_path):
    keywords = dict(METHODS[name])
    if name == "masked":
        keywords["mask"] = folder / "mask.safetensors"
    expected = merged(folder, tmp_path / "cpu", "cpu", **keywords)
    assert merged(folder, tmp_path / "device", "host", **keywords) == expected


def test_tensors_do_go_by_the_device(folder, tmp_path):
    ops = devices.of_device("host")
    with mock.patch.object(type(ops), "start_merge", autospec=True, side_effect=type(ops).start_merge) as merges:
        merged(folder, tmp_path / "device", "host", **METHODS["ties"])
    assert sum(len(call.args[2]) for call in merges.call_args_list) >= 7


def test_many_batches_some_tensors_too_large_for_the_device(folder, tmp_path, monkeypatch):
    expected = merged(folder, tmp_path / "cpu", "cpu", **METHODS["ties-mergekit"])
    monkeypatch.setattr(devices.HostMemory, "free_bytes", lambda self: 700_000)
    monkeypatch.setattr("peta_fast.run.batch_size", lambda slab: 20_000)
    assert merged(folder, tmp_path / "device", "host", **METHODS["ties-mergekit"]) == expected


def test_what_is_not_finite_is_refused_and_nothing_is_published(folder, tmp_path):
    bad = {n: torch.ones(s, dtype=torch.bfloat16) for n, s in SHAPES.items()} | {"steps": torch.arange(5)}
    bad["layers.1.w"][7, 7] = float("inf")
    (tmp_path / "bad").mkdir()
    save_file(bad, tmp_path / "bad" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"bad/model.safetensors: 'layers.1.w': expected finite values, got 1"):
        peta_fast.merge(out=tmp_path / "out", method="ties", base=folder / "base", density=0.5, weight=1.0,
                        models=[folder / "a", tmp_path / "bad"], device="host")  # fmt: skip
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_an_error_of_the_thread_reaches_the_caller(folder, tmp_path):
    failure = ResourceError("host", "expected 7 more bytes of GPU memory")
    with mock.patch.object(devices.HostMemory, "empty", side_effect=failure):
        with mock.patch.object(devices.HostMemory, "pinned", side_effect=failure):
            with pytest.raises(ResourceError, match="7 more bytes"):
                merged(folder, tmp_path / "out", "host", **METHODS["ties"])
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_tensors_of_one_storage_go_there_each_as_a_whole(tmp_path):
    """Views of one storage, as torch saves them, begin at one address and differ in length."""
    draw = torch.Generator().manual_seed(2)
    for name in "base a b c".split():
        whole = torch.randn(60, 50, generator=draw).to(torch.bfloat16)
        (tmp_path / name).mkdir()
        torch.save({"a": whole[:7], "b": whole, "c": whole[:20]}, tmp_path / name / "pytorch_model.bin")
    expected = merged(tmp_path, tmp_path / "cpu", "cpu", **METHODS["ties"])
    assert merged(tmp_path, tmp_path / "device", "host", **METHODS["ties"]) == expected


def test_a_batch_that_is_too_much_for_the_device_goes_there_in_parts(folder, tmp_path, monkeypatch):
    expected = merged(folder, tmp_path / "cpu", "cpu", **METHODS["ties"])
    sizes: list[int] = []
    real = _device_engine.DeviceEngine._merge_there

    def noted(self, batch, ring):
        sizes.append(sum(t.input_bytes + t.nbytes for t in batch))
        return real(self, batch, ring)

    monkeypatch.setattr(_device_engine.DeviceEngine, "_merge_there", noted)
    assert merged(folder, tmp_path / "whole", "host", **METHODS["ties"]) == expected
    assert len(sizes) == 1
    whole = sizes.pop()
    room = 0.9 * whole
    monkeypatch.setattr(devices.HostMemory, "free_bytes", lambda self: room / _device_engine.SHARE)
    assert merged(folder, tmp_path / "parts", "host", **METHODS["ties"]) == expected
    assert len(sizes) > 1 and sum(sizes) == whole and max(sizes) < room


def test_a_ring_that_cannot_be_waited_for_does_not_hide_the_error(folder, tmp_path):
    def broken():
        raise ResourceError("host", "the GPU failed: an illegal memory access was encountered")

    with mock.patch.object(devices.HostMemory, "mark", return_value=broken):
        with pytest.raises(ResourceError, match="illegal memory access"):
            merged(folder, tmp_path / "out", "host", **METHODS["ties"])
    assert not (tmp_path / "out" / "model.safetensors").exists()
