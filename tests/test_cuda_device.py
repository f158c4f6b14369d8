"""merge_state_dicts on tensors of a device, whose memory is the host's here: thresholds that stay on the device, one
wait at the end. The engine's own tests, on the host build; test_cuda_gpu.py runs them on a GPU."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from families import SHAPES, assert_same_bits, coarse_family, family, inputs_of
from host_build import HAS_COMPILER, host_library, host_ops

# Collected here again, under the fixture below.
from test_methods import (  # noqa: F401
    CASES,
    DENSITIES,
    WEIGHTS,
    test_a_zero_sum_leaves_the_native_base_bit_for_bit,
    test_breadcrumbs_rank_within_the_blocks_of_stacked_tensors,
    test_exact_ties_and_zero_sums_match_the_reference,
    test_integer_and_bool_tensors_are_the_base_bit_for_bit,
    test_running_statistics_of_batch_norm_are_averaged,
    test_strided_inputs_merge_as_their_contiguous_copies_do,
    test_trim_scope_decides_what_is_ranked_together,
    test_worked_example,
)

import peta_fast
from peta_fast import _cuda, merging
from peta_fast.errors import CheckpointError, CompatibilityError, ResourceError
from peta_fast.ops import device as devices
from peta_fast.ops.records import PIECE

pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason="no g++, or not in a checkout")


@pytest.fixture(autouse=True)
def every_tensor_is_on_a_device(monkeypatch):
    """CPU tensors count as those of the device "host"."""
    monkeypatch.setenv("PETA_FAST_CUDA_LIBRARY", str(host_library()))
    monkeypatch.delenv("PETA_FAST_CUDA", raising=False)
    _cuda.library.cache_clear(), devices.of_device.cache_clear()
    monkeypatch.setattr(merging, "device_of", lambda value: "host")
    yield
    _cuda.library.cache_clear(), devices.of_device.cache_clear()


def on_the_cpu(*arguments, **keywords):
    with mock.patch.object(merging, "device_of", lambda value: ""):
        return peta_fast.merge_state_dicts(*arguments, **keywords)


LARGE = {"large": (350, 201), "narrow": (1001, 3), "small": (17,)}


@pytest.mark.parametrize("make", [family, coarse_family], ids=["distinct", "equal-magnitudes"])
@pytest.mark.parametrize("method, compat, parameters", [c for c in CASES if "mask" not in c.values[2]])
def test_the_bits_of_the_cpu_over_many_tiles(method, compat, parameters, make):
    base, models = inputs_of(method, *make(3, shapes=LARGE))
    base, models = base and halved(base), [halved(m) for m in models]
    keywords = {"method": method, "compat": compat, **parameters}
    assert_same_bits(peta_fast.merge_state_dicts(base, models, **keywords), on_the_cpu(base, models, **keywords))


def halved(state):
    return {name: tensor.bfloat16() for name, tensor in state.items()}


def test_thresholds_do_not_visit_the_host():
    """A merge of many tensors with exact thresholds waits once, for what was not finite."""
    base, models = family(3, shapes={f"w{i}": (300 + i, 301) for i in range(6)})
    ops = devices.of_device("host")
    with mock.patch.object(type(ops.memory), "download", autospec=True, side_effect=HOST_DOWNLOAD) as downloads:
        peta_fast.merge_state_dicts(base, models, method="ties", density=0.2, weight=1.0)
    assert downloads.call_count == 1
    assert downloads.call_args.args[2] == 6 * PIECE.itemsize, "the piece records of six tensors"


HOST_DOWNLOAD = devices.HostMemory.download


def test_what_is_not_finite_in_several_batches_is_found_after_the_last(monkeypatch):
    monkeypatch.setattr(merging, "DEVICE_BATCH", 100)
    base, models = family(2)
    models[1]["norm.bias"][3] = float("nan")
    with pytest.raises(CheckpointError, match="model 1: 'norm.bias': expected finite values, got 1 NaN or inf"):
        peta_fast.merge_state_dicts(base, models, method="ties", density=0.5, weight=1.0)
    merged = peta_fast.merge_state_dicts(base, models, method="ties", density=0.5, weight=1.0, allow_nonfinite=True)
    assert_same_bits(merged, on_the_cpu(base, models, method="ties", density=0.5, weight=1.0, allow_nonfinite=True))


def test_a_call_that_fails_says_what_cuda_said():
    with mock.patch.object(host_ops().library, "raw") as raw:
        raw.peta_copy.return_value = 2
        raw.peta_error.return_value = b"copy: out of memory"
        with pytest.raises(ResourceError, match="host: copy: out of memory"):
            host_ops().copy_bytes(1, 2, 3)


def test_tensors_of_two_devices_are_refused(monkeypatch):
    base, models = family(2)
    monkeypatch.setattr(merging, "device_of", lambda value: "host" if value is models[1]["scale"] else "")
    with pytest.raises(
        CompatibilityError, match="expected all on one device, got .*base: .* on the CPU, .*'scale' on host"
    ):
        peta_fast.merge_state_dicts(base, models, method="task_arithmetic", weight=1.0)


def test_without_a_library_tensors_on_a_gpu_are_refused_with_what_to_do(monkeypatch):
    monkeypatch.setenv("PETA_FAST_CUDA_LIBRARY", "")
    _cuda.library.cache_clear(), devices.of_device.cache_clear()
    base, models = family(2)
    with pytest.raises(ResourceError, match="it is not built\nRun `peta-fast build-cuda`"):
        peta_fast.merge_state_dicts(base, models, method="task_arithmetic", weight=1.0)


def test_a_mask_in_a_file_is_not_read_by_a_device(tmp_path):
    from safetensors.torch import save_file

    save_file({n: torch.ones(s) for n, s in SHAPES.items()}, tmp_path / "mask.safetensors")
    base, models = family(2)
    with pytest.raises(CompatibilityError, match="mask: is a file, the models are on host"):
        peta_fast.merge_state_dicts(
            base, models, method="masked_task_arithmetic", weight=1.0, mask=tmp_path / "mask.safetensors"
        )
