"""Reading torch.save's files without torch: what torch writes comes back bit for bit; code and damage are refused."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections import OrderedDict

import pytest
import torch
from checkpoint_files import (
    Call,
    Global,
    Stored,
    float_tensor,
    pickled,
    raw,
    refused,
    tensor_bytes,
    torch_zip_bytes,
    write_safetensors,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interpreter import run_code

from peta_fast.buffers import ITEMSIZE, LONG_NAMES
from peta_fast.errors import CheckpointError
from peta_fast.formats import open_checkpoint, torch_zip


def saved(tmp_path, state, **options):
    torch.save(state, tmp_path / "pytorch_model.bin", **options)
    return open_checkpoint(tmp_path)


@pytest.fixture
def damaged(tmp_path):
    """Writes a file that stands for a model, and expects its refusal."""

    def check(content: bytes, *words: str) -> CheckpointError:
        path = tmp_path / "pytorch_model.bin"
        path.write_bytes(content)
        return refused(path, str(path), *words)

    return check


# --- sound files


@pytest.mark.parametrize("dtype", sorted(ITEMSIZE))
def test_every_dtype_comes_back_bit_for_bit(tmp_path, dtype):
    pattern = torch.arange(24 * ITEMSIZE[dtype], dtype=torch.int64) % (2 if dtype == "BOOL" else 251)
    tensor = pattern.to(torch.uint8).view(getattr(torch, LONG_NAMES[dtype])).reshape(2, 3, 4)
    checkpoint = saved(tmp_path, {"t": tensor})
    assert (checkpoint.tensors["t"].dtype, checkpoint.tensors["t"].shape) == (dtype, (2, 3, 4))
    assert tensor_bytes(checkpoint, "t") == raw(tensor)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol(tmp_path, protocol):
    state = {f"layer.{i}.weight": torch.randn(3, i) for i in range(300)}
    checkpoint = saved(tmp_path, state, pickle_protocol=protocol)
    assert list(checkpoint.tensors) == list(state)
    assert all(tensor_bytes(checkpoint, name) == raw(state[name]) for name in state)


def test_state_dict_of_a_module(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    checkpoint = saved(tmp_path, model.state_dict())
    for name, tensor in model.state_dict().items():
        assert checkpoint.tensors[name].shape == tuple(tensor.shape)
        assert tensor_bytes(checkpoint, name) == raw(tensor)


def test_parameters_scalars_and_empty_tensors(tmp_path):
    state = {"p": torch.nn.Parameter(torch.ones(2)), "scalar": torch.tensor(3.5), "empty": torch.empty(0, 7)}
    checkpoint = saved(tmp_path, state)
    assert [checkpoint.tensors[name].shape for name in state] == [(2,), (), (0, 7)]
    assert all(tensor_bytes(checkpoint, name) == raw(state[name]) for name in state)


def test_contiguous_views_of_one_storage(tmp_path):
    fused = torch.arange(24.0).reshape(6, 4)
    state = {"q": fused[:2], "k": fused[2:4], "v": fused[4:], "row": fused[1], "column": fused[:, :1][:1]}
    checkpoint = saved(tmp_path, state)
    assert checkpoint.aliases == {}
    assert all(tensor_bytes(checkpoint, name) == raw(state[name]) for name in state)


def test_tied_tensors_become_aliases(tmp_path):
    embedding = torch.arange(6.0).reshape(2, 3)
    state = {"embed": embedding, "head": embedding, "tied": torch.nn.Parameter(embedding), "flat": embedding.view(6)}
    checkpoint = saved(tmp_path, state)
    assert list(checkpoint.tensors) == ["embed", "flat"]
    assert checkpoint.aliases == {"head": "embed", "tied": "embed"}
    assert tensor_bytes(checkpoint, "tied") == raw(embedding)


def test_empty_tensors_are_never_tied(tmp_path):
    empty = torch.empty(0)
    assert saved(tmp_path, {"a": empty, "b": empty}).aliases == {}


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_the_only_dict_of_tensors_is_taken(tmp_path, key):
    state = {"epoch": 3, "arch": "vit", "lr": 0.1, "hooks": [], key: OrderedDict(w=torch.ones(2), version=1)}
    checkpoint = saved(tmp_path, state)
    assert list(checkpoint.tensors) == ["w"]


def test_sharded_pickles(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model-1.bin")
    torch.save({"b": torch.zeros(2)}, tmp_path / "pytorch_model-2.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(
        '{"weight_map": {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}}'
    )
    assert list(open_checkpoint(tmp_path).tensors) == ["a", "b"]


def test_the_hand_made_files_of_these_tests_load_in_torch(tmp_path):
    content = torch_zip_bytes({"w": float_tensor()}, {"0": struct.pack("<4f", 1, 2, 3, 4)}, [("archive/version", "3")])
    assert torch.load(io.BytesIO(content), weights_only=True)["w"].tolist() == [1, 2, 3, 4]
    (tmp_path / "x.pt").write_bytes(content)
    assert tensor_bytes(open_checkpoint(tmp_path / "x.pt"), "w") == struct.pack("<4f", 1, 2, 3, 4)


def test_torch_is_not_imported(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "x.pt")
    code = (
        "import sys; from peta_fast.formats import open_checkpoint; "
        f"open_checkpoint({str(tmp_path / 'x.pt')!r}).buffer('w'); assert 'torch' not in sys.modules"
    )
    ran = run_code(code)
    assert ran.returncode == 0, ran.stderr


# --- pickles that are more than weights


@pytest.mark.parametrize(
    "module, name",
    [("os", "system"), ("builtins", "eval"), ("builtins", "getattr"), ("torch", "load"), ("torch", "nn"),
     ("numpy.core.multiarray", "_reconstruct"), ("torch._utils", "_rebuild_qtensor"), ("torch", "QInt8Storage"),
     ("torch._utils", "_rebuild_sparse_tensor"), ("collections", "OrderedDict.fromkeys"), ("", "")],
)  # fmt: skip
def test_globals_that_no_state_dict_needs(damaged, module, name):
    damaged(torch_zip_bytes({"w": Global(module, name)}), f"{module}.{name}", "only weights")


def test_code_is_never_run(damaged, tmp_path):
    trap = tmp_path / "trap"
    state = {"w": float_tensor(), "x": Call(Global("os", "mkdir"), str(trap))}
    damaged(torch_zip_bytes(state), "os.mkdir")
    assert not trap.exists()


def test_a_module_saved_whole(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "pytorch_model.bin")
    refused(tmp_path, "torch.nn.modules.linear.Linear")


BUILD_ON_FUNCTION = pickle.PROTO + b"\x02" + b"ctorch._utils\n_rebuild_tensor_v2\n" + b"}" + b"b."
NEWOBJ = pickle.PROTO + b"\x02" + b"ccollections\nOrderedDict\n" + b")" + b"\x81."
INST = pickle.PROTO + b"\x02" + b"(iposix\nsystem\n."
EXTENSION = pickle.PROTO + b"\x02" + b"\x82\x01."
BYTES = pickle.PROTO + b"\x04" + b"\x8e" + b"\xff" * 7 + b"\x3f."


@pytest.mark.parametrize("pickled_code", [BUILD_ON_FUNCTION, NEWOBJ, INST, EXTENSION, BYTES])
def test_opcodes_that_no_state_dict_needs(damaged, pickled_code):
    damaged(torch_zip_bytes(pickled_code), "malformed")


MEMO_BOMB = pickle.PROTO + b"\x02" + b"}" + b"r\xff\xff\xff\xff" + b"."
TEXT_BOMB = pickle.PROTO + b"\x02" + b"X\xff\xff\xff\xff" + b"."
FRAME_BOMB = pickle.PROTO + b"\x04" + b"\x95" + b"\xff" * 7 + b"\x00" + b"}."


@pytest.mark.parametrize("bomb", [MEMO_BOMB, TEXT_BOMB, FRAME_BOMB])
def test_lengths_in_a_pickle_claim_no_memory(tmp_path, bomb):
    (tmp_path / "x.pt").write_bytes(torch_zip_bytes(bomb))
    refused(tmp_path / "x.pt")
    tracemalloc.start()
    try:
        refused(tmp_path / "x.pt")
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_ordered_dict_takes_no_items(damaged):
    """One list, copied again and again into new dicts, would fill any memory."""
    damaged(torch_zip_bytes(Call(Global("collections", "OrderedDict"), [("w", float_tensor())])), "malformed")


def test_dict_that_holds_itself(damaged):
    damaged(torch_zip_bytes(pickle.PROTO + b"\x02" + b"}q\x00X\x01\x00\x00\x00ah\x00s."), "no tensor at all")


@pytest.mark.parametrize(
    "state, word",
    [
        ({"model": {"w": float_tensor()}, "ema": {"w": float_tensor()}}, "'ema', 'model'"),
        ({"w": float_tensor(), "optimizer": {"state": {0: float_tensor()}}}, "'optimizer'"),
        ({"model": {"w": float_tensor()}, "optimizer": {"state": {0: {"m": float_tensor()}}}}, "'optimizer'"),
        ({"model": {"w": float_tensor(), "extra": [1]}}, "'extra'"),
        ({"model": {"w": float_tensor()}, "rng": float_tensor()}, "'model'"),
        ({"learning_rate": 0.1}, "no tensor at all"),
        ({}, "no tensor at all"),
        ([float_tensor()], "a list of 1"),
        (float_tensor(), "a tensor"),
        ({0: float_tensor()}, "must be Unicode text, got 0"),
        ({"w\ud800": float_tensor()}, "Unicode"),
    ],
)
def test_anything_but_one_dict_of_tensors(damaged, state, word):
    damaged(torch_zip_bytes(state), word)


# --- tensors that are not what a state dict holds


def test_transposed_tensor(tmp_path):
    torch.save({"w": torch.ones(2, 3).T}, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "'w'", "contiguous", "(3, 2)", "Re-save with safetensors")


def test_every_other_element(tmp_path):
    torch.save({"w": torch.arange(6.0)[::2]}, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "'w'", "contiguous")


def test_expanded_tensor(tmp_path):
    torch.save({"w": torch.ones(1).expand(5)}, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "'w'", "contiguous")


def test_conjugated_tensor(tmp_path):
    torch.save({"w": torch.ones(2, dtype=torch.complex64).conj()}, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "conj")


def test_sparse_tensor(tmp_path):
    torch.save({"w": torch.eye(2).to_sparse()}, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "sparse")


@pytest.mark.parametrize(
    "tensor",
    [
        float_tensor(shape=(5,)),
        float_tensor(offset=1),
        float_tensor(offset=-1),
        float_tensor(offset=2**62),
        float_tensor(offset=None),
        float_tensor(offset=4, shape=(0, 1), stride=(1, 1), size=3),
        float_tensor(size=3),
        float_tensor(size=-4),
        float_tensor(shape=(2**62, 2**62), stride=(2**62, 1)),
        float_tensor(shape=(-4,)),
        float_tensor(shape=(4.0,)),
        float_tensor(shape=[4]),
        float_tensor(stride=()),
        float_tensor(storage="no storage"),
        float_tensor(storage=Stored("module", Global("torch", "FloatStorage"), "0", "cpu", 4)),
        float_tensor(storage=Stored("storage", Global("torch", "FloatStorage"), 0, "cpu", 4)),
        float_tensor(storage=Stored("storage", Global("torch", "FloatStorage"), "0", "cpu", "4")),
        float_tensor(storage=Stored("storage", "FloatStorage", "0", "cpu", 4)),
        float_tensor(storage=Stored("storage")),
        Call(Global("torch._utils", "_rebuild_parameter"), 5, True, None),
        Call(Global("torch._utils", "_rebuild_tensor_v3"), 5, 0, (4,), (1,), False, None, ["F32"]),
        Call(Global("torch._utils", "_rebuild_tensor_v2")),
    ],
)
def test_malformed_tensor(damaged, tensor):
    damaged(torch_zip_bytes({"w": tensor}))


def test_storage_that_is_not_in_the_archive(damaged):
    damaged(torch_zip_bytes({"w": float_tensor(key="7")}), "'archive/data/7'", "found none")


# --- damaged archives


def test_empty_file(damaged):
    damaged(b"", "empty")


def test_git_lfs_pointer(damaged):
    damaged(b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer", "git lfs pull")


def test_file_from_before_torch_1_6(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    refused(tmp_path, "before torch 1.6", "torch.save(torch.load(")


def test_file_that_is_no_archive(damaged):
    damaged(b"\x80\x04N.", "expected a zip archive")


def test_safetensors_named_bin(tmp_path):
    refused(write_safetensors(tmp_path / "pytorch_model.bin", ["w"]), "expected a zip archive")


def test_truncated_at_every_length(tmp_path):
    content = torch_zip_bytes({"w": float_tensor()})
    path = tmp_path / "x.pt"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        refused(path, str(path))


def test_compressed_archive(damaged):
    content = torch_zip_bytes({"w": float_tensor()}, {"0": bytes(16)}, compression=zipfile.ZIP_DEFLATED)
    damaged(content, "compressed or encrypted")


def test_big_endian_archive(damaged):
    damaged(torch_zip_bytes({"w": float_tensor()}, extra=[("archive/byteorder", "big")]), "little-endian", "big")


def test_zip_of_something_else(damaged):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("notes.txt", "hello")
    damaged(stream.getvalue(), "data.pkl", "got 0")


def test_two_archives_in_one(damaged):
    damaged(torch_zip_bytes({"w": float_tensor()}, extra=[("other/data.pkl", b"N.")]), "got 2")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_entry_twice(damaged):
    damaged(torch_zip_bytes({"w": float_tensor()}, extra=[("archive/data/0", bytes(16))]), "same name")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_program(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "pytorch_model.bin")
    refused(tmp_path, "TorchScript")


def test_entries_that_share_bytes(tmp_path):
    state = {"v": float_tensor("0"), "w": float_tensor("1")}
    content = torch_zip_bytes(state, {"0": bytes(16), "1": bytes(16)})
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        first, second = (archive.getinfo(f"archive/data/{key}").header_offset for key in "01")
    directory = content.rindex(b"PK\x01\x02")
    assert content[directory + 42 : directory + 46] == struct.pack("<I", second)
    path = tmp_path / "x.pt"
    path.write_bytes(content[: directory + 42] + struct.pack("<I", first) + content[directory + 46 :])
    refused(path, "share bytes")


def test_size_claimed_by_the_directory_allocates_nothing(tmp_path):
    content = bytearray(torch_zip_bytes({"w": float_tensor()}))
    directory = content.index(b"PK\x01\x02")
    content[directory + 20 : directory + 28] = struct.pack("<II", 2**31, 2**31)
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        refused(path, "ends at byte")
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


# --- damage at random


SOUND = torch_zip_bytes(
    {"v": float_tensor("0"), "w": float_tensor("1", shape=(2, 2), stride=(2, 1)), "n": 3},
    {"0": bytes(16), "1": bytes(16)},
)
SOUND_PICKLE = pickled({"v": float_tensor("0"), "n": 3})
DAMAGE = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=4)), min_size=1, max_size=4
)


def with_damage(content: bytes, damage) -> bytes:
    content = bytearray(content)
    for place, replacement in damage:
        position = int(place * len(content))
        content[position : position + len(replacement)] = replacement
    return bytes(content)


def open_or_refuse(path) -> None:
    """Nothing but CheckpointError may come; what opens must lie inside the file."""
    size = os.path.getsize(path)
    try:
        index = torch_zip.read_tensors(path)
    except CheckpointError:
        return
    assert all(0 <= info.offset and info.offset + info.nbytes <= size for info in index.tensors.values())


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(DAMAGE)
def test_random_damage_to_the_archive_is_refused_or_harmless(tmp_path, damage):
    (tmp_path / "x.pt").write_bytes(with_damage(SOUND, damage))
    open_or_refuse(tmp_path / "x.pt")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(DAMAGE | st.binary(max_size=60))
def test_random_damage_to_the_pickle_is_refused_or_harmless(tmp_path, damage):
    content = damage if isinstance(damage, bytes) else with_damage(SOUND_PICKLE, damage)
    (tmp_path / "x.pt").write_bytes(torch_zip_bytes(content))
    open_or_refuse(tmp_path / "x.pt")
