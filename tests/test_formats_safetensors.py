"""Reading safetensors: what the format's own library writes comes back bit for bit; each damage has its own error."""

from __future__ import annotations

import gc
import json
import os
import tracemalloc

import numpy as np
import pytest
import torch
from checkpoint_files import entry, raw, refused, safetensors_bytes, tensor_bytes, write_safetensors
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file, save_model

from peta_fast.buffers import ITEMSIZE, LONG_NAMES
from peta_fast.errors import CheckpointError
from peta_fast.formats import copy_companions, input_file, open_checkpoint, safetensors


@pytest.fixture
def damaged(tmp_path):
    """Writes a file that stands for a model, and expects its refusal."""

    def check(content: bytes, *words: str) -> CheckpointError:
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)
        return refused(path, str(path), *words)

    return check


# --- sound files


@pytest.mark.parametrize("dtype", sorted(ITEMSIZE))
def test_every_dtype_comes_back_bit_for_bit(tmp_path, dtype):
    pattern = torch.arange(24 * ITEMSIZE[dtype], dtype=torch.int64) % (2 if dtype == "BOOL" else 251)
    tensor = pattern.to(torch.uint8).view(getattr(torch, LONG_NAMES[dtype])).reshape(2, 3, 4)
    save_file({"t": tensor}, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        info = checkpoint.tensors["t"]
        assert (info.dtype, info.shape, info.size, info.nbytes) == (dtype, (2, 3, 4), 24, 24 * ITEMSIZE[dtype])
        assert tensor_bytes(checkpoint, "t") == raw(tensor)


def test_scalar_and_empty_tensors(tmp_path):
    save_file({"scalar": torch.tensor(3.5), "empty": torch.empty(0, 7), "w": torch.ones(2)}, tmp_path / "x.safetensors")
    checkpoint = open_checkpoint(tmp_path / "x.safetensors")
    assert checkpoint.tensors["scalar"].shape == ()
    assert np.frombuffer(tensor_bytes(checkpoint, "scalar"), np.float32) == 3.5
    assert checkpoint.tensors["empty"].shape == (0, 7)
    empty = checkpoint.buffer("empty")
    assert (empty.address, empty.size, bytes(empty.as_bytes())) == (0, 0, b"")


def test_tensors_come_in_the_order_of_their_bytes(tmp_path):
    header = {"b": entry(8, 16), "a": entry(0, 8), "c": entry(16, 24)}
    (tmp_path / "x.safetensors").write_bytes(safetensors_bytes(header, bytes(24)))
    assert list(open_checkpoint(tmp_path / "x.safetensors").tensors) == ["a", "b", "c"]


def test_a_slice_is_a_view_of_the_same_map(tmp_path):
    save_file({"w": torch.arange(100.0)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    whole, part = checkpoint.buffer("w"), checkpoint.buffer("w", 10, 13)
    assert part.address == whole.address + 40 and part.owner is whole.owner
    assert np.frombuffer(part.as_bytes(), np.float32).tolist() == [10, 11, 12]
    with pytest.raises(IndexError):
        checkpoint.buffer("w", 0, 101)
    with pytest.raises(CheckpointError, match="found none"):
        checkpoint.buffer("v")


def test_a_buffer_outlives_its_checkpoint(tmp_path):
    save_file({"w": torch.arange(5000.0)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    buffer = checkpoint.buffer("w")
    checkpoint.close()
    del checkpoint
    gc.collect()
    assert np.frombuffer(buffer.as_bytes(), np.float32).sum() == np.arange(5000.0).sum()


def maps_of(path) -> int:
    with open("/proc/self/maps") as lines:
        return sum(str(path) in line for line in lines)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="counts the maps that Linux lists")
def test_a_map_goes_with_the_last_buffer_and_keeps_no_descriptor(tmp_path):
    save_file({"w": torch.ones(5000)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert maps_of(tmp_path) == 0, "opening must not map"
    descriptors = len(os.listdir("/proc/self/fd"))
    buffer = checkpoint.buffer("w")
    assert maps_of(tmp_path) == 1 and len(os.listdir("/proc/self/fd")) == descriptors
    checkpoint.close()
    assert maps_of(tmp_path) == 1
    del buffer
    gc.collect()
    assert maps_of(tmp_path) == 0


def test_tied_tensors_of_save_model_become_aliases(tmp_path):
    model = torch.nn.Module()
    model.head, model.embedding = torch.nn.Linear(3, 3), None
    model.embedding = model.head
    save_model(model, tmp_path / "model.safetensors", metadata={"format": "pt", "note": "kept"})
    checkpoint = open_checkpoint(tmp_path)
    stored = set(checkpoint.tensors)
    assert len(stored) == 2 and len(checkpoint.aliases) == 2
    assert set(checkpoint.aliases.values()) == stored and not stored & set(checkpoint.aliases)
    assert checkpoint.metadata == {"format": "pt", "note": "kept"}
    for alias, name in checkpoint.aliases.items():
        assert tensor_bytes(checkpoint, alias) == tensor_bytes(checkpoint, name)


def test_metadata_that_only_looks_like_an_alias_is_kept(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", ["pt", "w"], {"format": "pt", "w": "pt", "v": "gone"})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.aliases == {} and checkpoint.metadata == {"format": "pt", "w": "pt", "v": "gone"}


# --- one test for each way a file can be wrong


def test_no_such_file(tmp_path):
    refused(tmp_path / "nowhere.safetensors", "found none")


def test_link_to_nowhere(tmp_path):
    (tmp_path / "model.safetensors").symlink_to("../blobs/abc")
    refused(tmp_path / "model.safetensors", "links to '../blobs/abc'")


def test_empty_file(damaged):
    damaged(b"", "empty")


def test_directory_named_like_a_file(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    refused(tmp_path, "model.safetensors", "got a directory")


def test_pipe(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    refused(tmp_path / "model.safetensors", "pipe")


def test_git_lfs_pointer(damaged):
    damaged(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "git-lfs pointer", "git lfs pull")


def test_unreadable_file(tmp_path, monkeypatch):
    path = write_safetensors(tmp_path / "model.safetensors", ["w"])

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(input_file, "open", denied, raising=False)
    refused(path, "cannot be opened: Permission denied")


def test_read_error(tmp_path, monkeypatch):
    path = write_safetensors(tmp_path / "model.safetensors", ["w"])

    def broken(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", broken)
    refused(path, "cannot be read: Input/output error")


def test_unknown_suffix(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    refused(path, "'.gguf'", "safetensors")


def test_shorter_than_the_header_length(damaged):
    damaged(b"\x02\0\0", "at least 8 bytes", "got 3")


def test_header_length_beyond_the_file(damaged):
    damaged(safetensors_bytes(b"{}", length=3), "length of 3", "2 bytes after it")


@pytest.mark.parametrize("length", [100_000_001, 2**63, 2**64 - 1])
def test_header_length_beyond_the_limit_allocates_nothing(tmp_path, length):
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes(b"{}", length=length))
    tracemalloc.start()
    try:
        refused(path, "at most 100000000 bytes", str(length))
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_file_of_zeros(damaged):
    damaged(bytes(100), "got zeros")


def test_file_of_another_format(damaged):
    damaged(b"PK\x03\x04" + bytes(60), "expected safetensors, got a zip archive")


def test_header_that_is_not_json(damaged):
    damaged(safetensors_bytes(b"{nonsense"), "not valid JSON")


def test_header_that_is_not_an_object(damaged):
    damaged(safetensors_bytes(b"[]"), "starts with '{'")


def test_header_that_is_not_utf8(damaged):
    damaged(safetensors_bytes(b'{"\xff": 1}'), "not UTF-8")


def test_header_with_nan(damaged):
    damaged(safetensors_bytes(b'{"w": NaN}'), "NaN is no number")


def test_header_nested_too_deep(damaged):
    damaged(safetensors_bytes(b'{"w":' + b"[" * 200_000), "nested too deep")


def test_number_too_long_to_parse(damaged):
    damaged(safetensors_bytes(b'{"w": ' + b"9" * 10_000 + b"}"), "not valid JSON")


def test_name_twice(damaged):
    one = json.dumps(entry(0, 4))
    damaged(safetensors_bytes(f'{{"w": {one}, "w": {one}}}'.encode(), bytes(4)), "'w'", "2 times")


def test_field_twice(damaged):
    text = b'{"w": {"dtype": "F32", "dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    damaged(safetensors_bytes(text, bytes(4)), "'dtype'", "2 times")


def test_name_that_is_not_unicode(damaged):
    header = json.dumps({"w\ud800": entry(0, 4)}).encode()
    damaged(safetensors_bytes(header, bytes(4)), "Unicode", "ud800")


@pytest.mark.parametrize("metadata", [[], "text", {"a": 1}, {"a": None}])
def test_metadata_that_is_not_text(damaged, metadata):
    damaged(safetensors_bytes({"__metadata__": metadata}), "__metadata__")


def test_metadata_of_null_is_none(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors_bytes({"__metadata__": None}))
    assert open_checkpoint(path).metadata == {}


@pytest.mark.parametrize("field", ["dtype", "shape", "data_offsets"])
def test_field_missing(damaged, field):
    header = {"w": {k: v for k, v in entry(0, 4).items() if k != field}}
    damaged(safetensors_bytes(header, bytes(4)), "'w'", "expected dtype, shape and data_offsets")


def test_field_unknown(damaged):
    damaged(safetensors_bytes({"w": entry(0, 4) | {"scale": 2}}, bytes(4)), "'w'", "scale")


def test_entry_that_is_not_an_object(damaged):
    damaged(safetensors_bytes({"w": 5}), "'w'", "got 5")


@pytest.mark.parametrize("dtype", ["F4", "float32", "", 7, None, ["F32"]])
def test_dtype_unknown(damaged, dtype):
    damaged(safetensors_bytes({"w": entry(0, 4, [1], dtype)}, bytes(4)), "'w'", "dtype", "not supported", "BF16")


@pytest.mark.parametrize("dimension", [-1, 1.0, True, "1", None, 2**63])
def test_dimension_that_is_no_size(damaged, dimension):
    damaged(safetensors_bytes({"w": entry(0, 4, [dimension])}, bytes(4)), "'w'", "dimension")


def test_shape_that_is_no_list(damaged):
    damaged(safetensors_bytes({"w": entry(0, 4) | {"shape": 1}}, bytes(4)), "'w'", "shape must be a list")


def test_shape_that_overflows(damaged):
    damaged(safetensors_bytes({"w": entry(0, 4, [2**62, 4])}, bytes(4)), "'w'", "more than 2^63 - 1")


def test_shape_that_overflows_before_its_zero(damaged):
    damaged(safetensors_bytes({"w": entry(0, 0, [2**62, 4, 0])}), "'w'", "more than 2^63 - 1")


@pytest.mark.parametrize("offsets", [[4, 0], [-4, 0], [0], [0, 4, 8], [0, 4.0], [0, True], "04", None])
def test_offsets_that_are_no_range(damaged, offsets):
    damaged(safetensors_bytes({"w": entry(0, 4) | {"data_offsets": offsets}}, bytes(4)), "'w'", "[begin, end]")


@pytest.mark.parametrize("shape, dtype", [([2], "F32"), ([1], "F64"), ([3], "U8"), ([], "BF16")])
def test_bytes_that_do_not_match_dtype_and_shape(damaged, shape, dtype):
    damaged(safetensors_bytes({"w": entry(0, 4, shape, dtype)}, bytes(4)), "'w'", dtype, "got 4")


def test_truncated_data(damaged):
    damaged(safetensors_bytes({"w": entry(0, 8)}, bytes(7)), "'w'", "byte 8", "holds 7", "truncated")


def test_offsets_past_the_end(damaged):
    damaged(safetensors_bytes({"v": entry(0, 4), "w": entry(4, 2**40)}, bytes(4)), "'w'", str(2**40))


def test_tensors_that_overlap(damaged):
    damaged(safetensors_bytes({"v": entry(0, 8), "w": entry(4, 12)}, bytes(12)), "'w'", "inside 'v'")


def test_tensors_at_the_same_place(damaged):
    damaged(safetensors_bytes({"v": entry(0, 8), "w": entry(0, 8)}, bytes(8)), "'w'", "inside 'v'")


def test_hole_between_tensors(damaged):
    damaged(safetensors_bytes({"v": entry(0, 4), "w": entry(8, 12)}, bytes(12)), "4 bytes before 'w'")


def test_hole_before_the_first_tensor(damaged):
    damaged(safetensors_bytes({"w": entry(4, 8)}, bytes(8)), "4 bytes before 'w'")


def test_trailing_bytes(damaged):
    damaged(safetensors_bytes({"w": entry(0, 4)}, bytes(9)), "5 bytes after the last tensor")


def test_empty_tensor_inside_another(damaged):
    damaged(safetensors_bytes({"v": entry(0, 8), "e": entry(4, 4)}, bytes(8)), "'e'", "inside 'v'")


def test_a_name_of_a_megabyte_is_cut_in_the_message(damaged):
    error = damaged(safetensors_bytes({"w" * 1_000_000: entry(0, 8)}, bytes(4)), "truncated")
    assert len(str(error)) < 1000


def test_file_that_shrinks_after_it_was_opened(tmp_path):
    path = write_safetensors(tmp_path / "model.safetensors", ["v", "w"])
    checkpoint = open_checkpoint(path)
    os.truncate(path, path.stat().st_size - 1)
    assert checkpoint.buffer("v").size == 2
    with pytest.raises(CheckpointError, match="shorter"):
        checkpoint.buffer("w")


# --- damage at random

SOUND = safetensors_bytes(
    {"__metadata__": {"format": "pt"}, "a": entry(0, 8), "b": entry(8, 16, [2, 1]), "e": entry(16, 16)}, bytes(16)
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, len(SOUND) - 1), st.binary(max_size=4)), min_size=1, max_size=4))
@example([(0, b"\xff")])
def test_random_damage_is_refused_or_harmless(tmp_path, damage):
    content = bytearray(SOUND)
    for position, replacement in damage:
        content[position : position + len(replacement)] = replacement
    path = tmp_path / "fuzzed.safetensors"
    path.write_bytes(content)
    open_or_refuse(path, len(content))


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-1, 9)
    | st.integers()
    | st.floats()
    | st.sampled_from(["F32", "BF16", "x"]),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)
ENTRIES = st.fixed_dictionaries({"dtype": JSON_VALUES, "shape": JSON_VALUES, "data_offsets": JSON_VALUES}) | JSON_VALUES


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.text(max_size=5) | st.just("__metadata__"), ENTRIES, max_size=4), st.binary(max_size=16))
def test_random_headers_are_refused_or_harmless(tmp_path, header, data):
    content = safetensors_bytes(header, data)
    path = tmp_path / "fuzzed.safetensors"
    path.write_bytes(content)
    open_or_refuse(path, len(content))


def open_or_refuse(path, size: int) -> None:
    """Nothing but CheckpointError may come; what opens must lie inside the file."""
    try:
        index = safetensors.read_tensors(path)
    except CheckpointError:
        return
    for info in index.tensors.values():
        assert 8 <= info.offset and info.offset + info.nbytes <= size


# --- model directories


def write_index(path, weight_map: dict, metadata: dict | None = None):
    path.write_text(json.dumps({"metadata": metadata or {}, "weight_map": weight_map}))
    return path


@pytest.fixture
def sharded(tmp_path):
    """A sound checkpoint of two shards: a, b | c."""
    write_safetensors(tmp_path / "model-1.safetensors", ["a", "b"])
    write_safetensors(tmp_path / "model-2.safetensors", ["c"])
    weight_map = {"c": "model-2.safetensors", "a": "model-1.safetensors", "b": "model-1.safetensors"}
    return write_index(tmp_path / "model.safetensors.index.json", weight_map)


def test_shards_make_one_checkpoint(sharded):
    for path in (sharded, sharded.parent):
        checkpoint = open_checkpoint(path)
        assert list(checkpoint.tensors) == ["a", "b", "c"]
        assert [file.name for file in checkpoint.files] == ["model-1.safetensors", "model-2.safetensors"]
        assert checkpoint.tensors["c"].file.name == "model-2.safetensors"
        assert tensor_bytes(checkpoint, "c") == bytes(8)


def test_aliases_that_the_index_notes(tmp_path):
    write_safetensors(tmp_path / "model-1.safetensors", ["a"])
    write_safetensors(tmp_path / "model-2.safetensors", ["b"])
    index = tmp_path / "model.safetensors.index.json"
    write_index(index, {"a": "model-1.safetensors", "b": "model-2.safetensors"}, {"head": "b", "total_size": 16})
    assert open_checkpoint(tmp_path).aliases == {"head": "b"}


def test_shard_missing(sharded):
    (sharded.parent / "model-2.safetensors").unlink()
    refused(sharded, "2 shards", "'model-2.safetensors' cannot be found")


def test_index_naming_an_absent_tensor(sharded):
    write_index(sharded, {"a": "model-1.safetensors", "b": "model-1.safetensors", "gone": "model-2.safetensors"})
    refused(sharded, "'gone'", "model-2.safetensors", "not there")


def test_index_naming_the_wrong_shard(sharded):
    shards = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"}
    write_index(sharded, shards)
    refused(sharded, "'b'")


def test_shard_with_a_tensor_that_is_not_in_the_index(sharded):
    write_safetensors(sharded.parent / "model-2.safetensors", ["c", "extra"])
    refused(sharded, "'extra'", "model-2.safetensors", "does not place")


def test_tensor_in_two_shards(sharded):
    write_safetensors(sharded.parent / "model-2.safetensors", ["c", "a"])
    refused(sharded, "'a'", "model-2.safetensors", "stored in model-1.safetensors as well")


@pytest.mark.parametrize("shard", ["../other.safetensors", "/etc/passwd", "sub/x.safetensors", "a\0b"])
def test_shard_outside_the_folder(sharded, shard):
    refused(write_index(sharded, {"a": shard}), "beside the index")


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}']
)
def test_index_without_a_weight_map(sharded, content):
    sharded.write_text(content)
    refused(sharded, "weight_map")


def test_index_with_a_name_twice(sharded):
    sharded.write_text('{"weight_map": {"a": "model-1.safetensors", "a": "model-2.safetensors"}}')
    refused(sharded, "'a'", "2 times")


def test_index_that_is_not_json(sharded):
    sharded.write_text("<html>")
    refused(sharded, "not valid JSON")


def test_single_file_beside_an_index_of_other_files(sharded):
    write_safetensors(sharded.parent / "model.safetensors", ["a"])
    refused(sharded.parent, "holds both", "model.safetensors.index.json")
    assert list(open_checkpoint(sharded.parent / "model.safetensors").tensors) == ["a"]


def test_safetensors_win_over_pickles(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", ["a"])
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    assert list(open_checkpoint(tmp_path).tensors) == ["a"]


def test_adapter_directory(tmp_path):
    write_safetensors(tmp_path / "adapter_model.safetensors", ["a"])
    write_safetensors(tmp_path / "linearization.safetensors", ["b"])
    assert list(open_checkpoint(tmp_path).tensors) == ["a"]


def test_only_weight_file_of_a_directory(tmp_path):
    write_safetensors(tmp_path / "anything.safetensors", ["a"])
    (tmp_path / "training_args.bin").write_bytes(b"not read")
    assert list(open_checkpoint(tmp_path).tensors) == ["a"]


def test_two_weight_files_without_an_index(tmp_path):
    write_safetensors(tmp_path / "one.safetensors", ["a"])
    write_safetensors(tmp_path / "two.safetensors", ["b"])
    refused(tmp_path, "2 to choose from", "'one.safetensors', 'two.safetensors'")


def test_directory_without_weights(tmp_path):
    refused(tmp_path, "found none")


def test_config_is_read(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", ["a"])
    assert open_checkpoint(tmp_path).config == {}
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": true, "time_step_limit": [0.0, Infinity]}')
    for path in (tmp_path, tmp_path / "model.safetensors"):
        assert open_checkpoint(path).config["time_step_limit"] == [0, float("inf")]


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"a": 1, "a": 2}'])
def test_config_that_is_damaged(tmp_path, text):
    write_safetensors(tmp_path / "model.safetensors", ["a"])
    (tmp_path / "config.json").write_text(text)
    refused(tmp_path, "config.json")


# --- companions

CARRIED = """
config.json generation_config.json tokenizer.json tokenizer.model tokenizer_config.json vocab.txt merges.txt
special_tokens_map.json chat_template.jinja preprocessor_config.json modeling_custom.py LICENSE spiece.model
additional_chat_templates/tool.jinja 1_Pooling/config.json
""".split()
LEFT = """
model.safetensors.index.json model-1.safetensors pytorch_model.bin.index.json pytorch_model.bin tf_model.h5 README.md
flax_model.msgpack model.gguf model.onnx consolidated.00.pth .gitattributes .hidden training_args.bin optimizer.pt
scheduler.pt rng_state_0.pth trainer_state.json onnx/config.json other/notes.json tokenizer.json.partial
mergekit_config.yml 1_Pooling/model.safetensors
""".split()


@pytest.fixture
def model_directory(tmp_path):
    directory = tmp_path / "model"
    for name in [*CARRIED, *LEFT]:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(f"{{}} {name}")
    (directory / "config.json").write_text("{}")
    (directory / "modules.json").write_text('[{"path": ""}, {"path": "1_Pooling"}, {"path": ".."}, {"path": "/etc"}]')
    write_safetensors(directory / "model.safetensors", ["a"])
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        (directory / index).unlink()
    return directory


def test_companions_are_all_but_weights_and_training_state(model_directory):
    checkpoint = open_checkpoint(model_directory)
    carried = [str(path.relative_to(model_directory)) for path in checkpoint.companions()]
    assert set(carried) == {*CARRIED, "modules.json"}
    assert carried[-1] == "config.json"
    assert checkpoint.companions() == open_checkpoint(model_directory / "model.safetensors").companions()


def test_companions_are_copied_whole(model_directory, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "tokenizer.json").write_text("old")
    copies = copy_companions(open_checkpoint(model_directory), out)
    assert {str(path.relative_to(out)) for path in copies} == {*CARRIED, "modules.json"}
    for copy in copies:
        assert copy.read_bytes() == (model_directory / copy.relative_to(out)).read_bytes()
    assert not list(out.rglob("*.partial"))


def test_a_folder_that_is_no_model_has_no_companions(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", ["a"])
    (tmp_path / "diary.txt").write_text("private")
    assert open_checkpoint(tmp_path).companions() == []


def test_a_weight_file_by_itself_has_no_companions(tmp_path):
    write_safetensors(tmp_path / "finetuned.safetensors", ["a"])
    (tmp_path / "config.json").write_text("{}")
    assert open_checkpoint(tmp_path / "finetuned.safetensors").companions() == []
