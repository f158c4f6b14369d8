"""Writing safetensors by position: the layout, what the safetensors library reads back, and how writing can fail."""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from checkpoint_files import raw, tensor_bytes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interpreter import run_code
from safetensors import safe_open
from safetensors.torch import load_file

from peta_fast.buffers import ITEMSIZE, SHORT_NAMES
from peta_fast.errors import CheckpointError, ResourceError
from peta_fast.formats import (
    ShardWriter,
    _libc,
    disk,
    free_bytes,
    index_json,
    layout_shards,
    model_card,
    open_checkpoint,
    safetensors_writer,
)

PAGE = 4096


def described(state: dict[str, torch.Tensor]) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(name, SHORT_NAMES[str(t.dtype).removeprefix("torch.")], tuple(t.shape)) for name, t in state.items()]


def write_state(state: dict[str, torch.Tensor], directory: Path, max_shard_size=10**9, metadata=None) -> list[str]:
    """Writes each tensor by itself, in no particular order; returns the file names."""
    layouts = layout_shards(described(state), max_shard_size=max_shard_size, metadata=metadata or {})
    for layout in layouts:
        with ShardWriter(layout, directory) as writer:
            for name in random.Random(0).sample(list(layout.offsets), len(layout.offsets)):
                writer.write(layout.offsets[name], memoryview(raw(state[name])))
            writer.publish()
    if len(layouts) > 1:
        (directory / "model.safetensors.index.json").write_text(index_json(layouts))
    return [layout.filename for layout in layouts]


def pages(count: int, fill: int = 7) -> memoryview:
    """Page-aligned memory, as the engine's slabs are."""
    memory = mmap.mmap(-1, count * PAGE)
    memory[:] = bytes([fill]) * (count * PAGE)
    return memoryview(memory)


def one_tensor(nbytes: int):
    (layout,) = layout_shards([("w", "U8", (nbytes,))], max_shard_size=10**12, metadata={})
    return layout


@pytest.fixture
def state():
    torch.manual_seed(0)
    return {
        "embed.weight": torch.randn(50, 8).bfloat16(),
        "scalar": torch.tensor(3.5, dtype=torch.bfloat16),
        "norm": torch.randn(8),
        "empty": torch.empty(0, 4),
        "flags": torch.tensor([True, False, True]),
        "ids": torch.arange(5),
        "größe": torch.randn(3, 3).half(),
        'quote"\\': torch.randn(2, dtype=torch.float64),
    }


# --- layout


def test_the_safetensors_library_reads_what_we_write(tmp_path, state):
    assert write_state(state, tmp_path, metadata={"note": "x"}) == ["model.safetensors"]
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "x"}


def test_we_read_what_we_write(tmp_path, state):
    write_state(state, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.metadata == {"format": "pt"}
    assert all(tensor_bytes(checkpoint, name) == raw(state[name]) for name in state)


def test_shards_are_read_back_whole(tmp_path, state):
    names = write_state(state, tmp_path, max_shard_size=64)
    assert names == [f"model-{i:05d}-of-{len(names):05d}.safetensors" for i in range(1, len(names) + 1)]
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.tensors.keys() == state.keys()
    assert all(tensor_bytes(checkpoint, name) == raw(state[name]) for name in state)
    loaded = {k: v for name in names for k, v in load_file(tmp_path / name).items()}
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_data_starts_on_a_page():
    for count in (0, 1, 40, 41, 42, 43, 500):
        (layout,) = layout_shards([(f"t{i}", "F32", (3,)) for i in range(count)], max_shard_size=10**9, metadata={})
        assert len(layout.header) % PAGE == 0
        assert int.from_bytes(layout.header[:8], "little") == len(layout.header) - 8
        assert layout.size == len(layout.header) + 12 * count
        assert list(layout.offsets.values()) == [len(layout.header) + 12 * i for i in range(count)]


def test_header_is_padded_by_less_than_a_page():
    (layout,) = layout_shards([("w", "F32", (3,))], max_shard_size=10**9, metadata={})
    assert len(layout.header) - len(layout.header.rstrip(b" ")) < PAGE


def test_a_shard_is_cut_before_it_grows_too_large():
    tensors = [("a", "F32", (2,)), ("b", "F32", (2,)), ("large", "F32", (9,)), ("c", "F32", (2,)), ("e", "F32", (0,))]
    layouts = layout_shards(tensors, max_shard_size=16, metadata={})
    assert [list(layout.offsets) for layout in layouts] == [["a", "b"], ["large"], ["c", "e"]]


def test_order_is_kept_while_tensors_stay_aligned():
    tensors = [("half", "F16", (4,)), ("byte", "U8", (8,)), ("double", "F64", (1,))]
    (layout,) = layout_shards(tensors, max_shard_size=10**9, metadata={})
    assert list(layout.offsets) == ["half", "byte", "double"]


def test_large_dtypes_come_first_where_a_tensor_would_be_unaligned():
    tensors = [("byte", "U8", (3,)), ("half", "F16", (3,)), ("double", "F64", (1,)), ("byte2", "U8", (1,))]
    (layout,) = layout_shards(tensors, max_shard_size=10**9, metadata={})
    assert list(layout.offsets) == ["double", "half", "byte", "byte2"]


def test_index_json_is_what_the_hub_expects():
    layouts = layout_shards([("a", "F32", (2,)), ("b", "BF16", (3,))], max_shard_size=8, metadata={})
    assert json.loads(index_json(layouts)) == {
        "metadata": {"total_size": 14},
        "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
    }
    assert index_json(layouts[:1]) is None


def test_stem_names_the_files():
    tensors = [("a", "F32", (2,)), ("b", "F32", (2,))]
    assert layout_shards(tensors, max_shard_size=99, metadata={}, stem="adapter_model")[0].filename == (
        "adapter_model.safetensors"
    )


def test_aliases_go_to_the_shard_of_their_tensor(tmp_path):
    state = {"a": torch.ones(2), "pt": torch.zeros(2)}
    write_state(state, tmp_path, max_shard_size=8, metadata={"head": "pt", "note": "x"})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.aliases == {"head": "pt"}
    assert checkpoint.metadata == {"format": "pt", "note": "x"}
    with safe_open(tmp_path / "model-00001-of-00002.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "x"}


def test_a_name_twice_is_refused():
    with pytest.raises(CheckpointError, match="'a' would be stored twice"):
        layout_shards([("a", "F32", (2,)), ("a", "F32", (2,))], max_shard_size=8, metadata={})


def test_a_header_above_the_limit_is_refused(monkeypatch):
    monkeypatch.setattr(safetensors_writer, "MAX_HEADER_BYTES", 5000)
    with pytest.raises(ResourceError, match="header"):
        layout_shards([(f"t{i}", "F32", (1,)) for i in range(200)], max_shard_size=10**9, metadata={})


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(sorted(ITEMSIZE)), st.lists(st.integers(0, 5), max_size=3).map(tuple)),
        max_size=8,
    ),
    st.integers(1, 200),
)
def test_any_layout_reads_back(tmp_path, tensors, max_shard_size):
    layouts = layout_shards([(n, d, s) for n, (d, s) in tensors.items()], max_shard_size=max_shard_size, metadata={})
    found = {}
    for layout in layouts:
        path = tmp_path / layout.filename
        path.write_bytes(layout.header + bytes(layout.size - len(layout.header)))
        for name, info in open_checkpoint(path).tensors.items():
            assert info.offset == layout.offsets[name] and info.offset % ITEMSIZE[info.dtype] == 0
            found[name] = (info.dtype, info.shape)
        safe_open(path, "np")
    assert found == tensors


# --- writing


def test_nothing_bears_the_final_name_before_publish(tmp_path):
    layout = one_tensor(10)
    with ShardWriter(layout, tmp_path) as writer:
        writer.write(layout.offsets["w"], memoryview(b"0123456789"))
        writer.sync()
        assert os.listdir(tmp_path) == ["model.safetensors.partial"]
        assert (tmp_path / "model.safetensors.partial").read_bytes() == layout.header + b"0123456789"
        writer.publish()
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_publish_replaces_an_older_file(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"old")
    layout = one_tensor(4)
    with ShardWriter(layout, tmp_path) as writer:
        writer.write(layout.offsets["w"], memoryview(b"abcd"))
        writer.publish()
    assert (tmp_path / "model.safetensors").read_bytes() == layout.header + b"abcd"


def test_the_last_slab_may_be_padded_to_its_page(tmp_path):
    layout = one_tensor(PAGE + 10)
    with ShardWriter(layout, tmp_path) as writer:
        writer.write(layout.offsets["w"], pages(2))
        writer.publish()
    assert (tmp_path / "model.safetensors").read_bytes() == layout.header + b"\x07" * (PAGE + 10)


def test_a_write_after_sync_counts(tmp_path):
    layout = one_tensor(10)
    with ShardWriter(layout, tmp_path) as writer:
        writer.sync()
        writer.write(layout.offsets["w"], pages(1))
        writer.publish()
    assert (tmp_path / "model.safetensors").stat().st_size == layout.size


@pytest.mark.parametrize("offset, size", [(0, 8), (PAGE - 1, 1), (2 * PAGE, 1), (PAGE, PAGE + 1), (-PAGE, PAGE)])
def test_writes_outside_the_data_are_refused(tmp_path, offset, size):
    with ShardWriter(one_tensor(10), tmp_path) as writer, pytest.raises(ValueError, match="outside"):
        writer.write(offset, memoryview(bytes(size)))


def test_a_closed_writer_writes_no_more(tmp_path):
    writer = ShardWriter(one_tensor(10), tmp_path)
    writer.close()
    writer.close()
    with pytest.raises(ValueError, match="closed"):
        writer.write(PAGE, memoryview(b"a"))


def test_slabs_from_two_threads(tmp_path):
    layout = one_tensor(64 * PAGE + 100)
    start = layout.offsets["w"]
    with ShardWriter(layout, tmp_path) as writer, ThreadPoolExecutor(2) as threads:
        slabs = [(start + i * 4 * PAGE, pages(4 if i < 16 else 1, i)) for i in range(17)]
        list(threads.map(lambda slab: writer.write(*slab), reversed(slabs)))
        writer.publish()
    expected = b"".join(bytes([i]) * (4 * PAGE) for i in range(16)) + bytes([16]) * 100
    assert (tmp_path / "model.safetensors").read_bytes() == layout.header + expected


@pytest.mark.parametrize("view", [np.arange(6, dtype=np.float32).reshape(2, 3), bytearray(b"abc"), np.empty((0, 3))])
def test_any_contiguous_memory_is_taken(tmp_path, view):
    layout = one_tensor(24)
    with ShardWriter(layout, tmp_path) as writer:
        writer.write(layout.offsets["w"], view)
        writer.publish()
    expected = memoryview(view).tobytes()
    assert (tmp_path / "model.safetensors").read_bytes() == layout.header + expected.ljust(24, b"\0")


def test_resume_keeps_what_is_there(tmp_path):
    layout = one_tensor(3 * PAGE)
    start = layout.offsets["w"]
    with ShardWriter(layout, tmp_path) as writer:
        writer.write(start, pages(1, 1))
    with ShardWriter(layout, tmp_path, resume=True) as writer:
        writer.write(start + 2 * PAGE, pages(1, 3))
        writer.publish()
    data = (tmp_path / "model.safetensors").read_bytes()[start:]
    assert [data[i * PAGE] for i in range(3)] == [1, 0, 3]


def test_without_resume_nothing_is_kept(tmp_path):
    layout = one_tensor(3 * PAGE)
    (tmp_path / "model.safetensors.partial").write_bytes(b"\x05" * 9 * PAGE)
    with ShardWriter(layout, tmp_path) as writer:
        writer.publish()
    assert (tmp_path / "model.safetensors").read_bytes() == layout.header + bytes(3 * PAGE)


# --- direct and buffered writes


class Recorder:
    """Stands in for os.pwrite: records (is direct, offset, size), and may fail or write short.

    A direct write that stops inside a page has put down the whole pages before.
    """

    def __init__(self, monkeypatch, refuse_direct=None, at_most=None):
        self.calls, self.refuse_direct, self.at_most = [], refuse_direct, at_most
        self.pwrite = os.pwrite
        monkeypatch.setattr(os, "pwrite", self)

    def __call__(self, descriptor, data, offset):
        direct = bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)
        self.calls.append((direct, offset, len(data)))
        if direct and self.refuse_direct:
            raise OSError(self.refuse_direct, os.strerror(self.refuse_direct))
        size = len(data) if self.at_most is None else min(self.at_most, len(data))
        written = size - size % PAGE if direct else size
        self.pwrite(descriptor, data[:written], offset)
        return size


needs_direct = pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="no O_DIRECT here")


@pytest.fixture
def writer(tmp_path):
    writer = ShardWriter(one_tensor(8 * PAGE), tmp_path)
    if writer._direct is None:
        pytest.skip("this filesystem takes no direct writes")
    yield writer
    writer.close()


@needs_direct
def test_aligned_writes_are_direct_and_others_buffered(writer, monkeypatch):
    recorder = Recorder(monkeypatch)
    writer.write(PAGE, pages(2))
    writer.write(3 * PAGE, pages(2)[:100])
    writer.write(4 * PAGE + 1, pages(1)[:5])
    writer.write(5 * PAGE, pages(2)[1 : PAGE + 1])
    assert recorder.calls == [
        (True, PAGE, 2 * PAGE), (False, 3 * PAGE, 100), (False, 4 * PAGE + 1, 5), (False, 5 * PAGE, PAGE)
    ]  # fmt: skip


@needs_direct
def test_a_filesystem_that_refuses_direct_writes_gets_buffered_ones(writer, monkeypatch):
    recorder = Recorder(monkeypatch, refuse_direct=errno.EINVAL)
    writer.write(PAGE, pages(1))
    writer.write(2 * PAGE, pages(1))
    assert recorder.calls == [(True, PAGE, PAGE), (False, PAGE, PAGE), (False, 2 * PAGE, PAGE)]
    assert writer.partial.read_bytes()[PAGE : 3 * PAGE] == b"\x07" * 2 * PAGE


def test_a_filesystem_without_direct_descriptors(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_writer, "_open_direct", lambda path: None)
    layout = one_tensor(PAGE)
    with ShardWriter(layout, tmp_path) as writer:
        writer.write(PAGE, pages(1))
        writer.publish()
    assert (tmp_path / "model.safetensors").read_bytes() == layout.header + b"\x07" * PAGE


@needs_direct
def test_short_writes_are_continued(writer, monkeypatch):
    recorder = Recorder(monkeypatch, at_most=PAGE + 100)
    data = memoryview(bytearray(b"".join(bytes([i]) * PAGE for i in range(1, 5))))
    aligned = pages(4)
    aligned[:] = data
    writer.write(PAGE, aligned)
    assert [call for call in recorder.calls if call[0]] == [
        (True, PAGE, 4 * PAGE), (True, 2 * PAGE, 3 * PAGE), (True, 3 * PAGE, 2 * PAGE), (True, 4 * PAGE, PAGE)
    ]  # fmt: skip
    writer.write(5 * PAGE, aligned[: 3 * PAGE - 1])
    writer.sync()
    assert writer.partial.read_bytes()[PAGE:] == bytes(data) + bytes(data[: 3 * PAGE - 1]).ljust(4 * PAGE, b"\0")


@needs_direct
def test_direct_writes_that_stop_inside_a_page_end_buffered(writer, monkeypatch):
    Recorder(monkeypatch, at_most=100)
    writer.write(PAGE, pages(2))
    assert writer.partial.read_bytes()[PAGE : 3 * PAGE] == b"\x07" * 2 * PAGE


def test_a_filesystem_that_cannot_reserve_space(tmp_path, monkeypatch):
    monkeypatch.setattr(_libc, "reserve", lambda descriptor, size: False)
    layout = one_tensor(10)
    with ShardWriter(layout, tmp_path) as writer:
        writer.publish()
    assert (tmp_path / "model.safetensors").read_bytes() == layout.header + bytes(10)


# --- how writing fails


def test_no_such_directory(tmp_path):
    with pytest.raises(ResourceError, match=r"model\.safetensors: cannot be created: No such file .*bytes free"):
        ShardWriter(one_tensor(10), tmp_path / "nowhere")


def failing(number: int):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_no_room_for_the_file_leaves_nothing_behind(tmp_path, monkeypatch, number):
    monkeypatch.setattr(_libc, "reserve", failing(number))
    with pytest.raises(ResourceError, match="8,192 bytes.*bytes free") as caught:
        ShardWriter(one_tensor(10), tmp_path)
    assert os.strerror(number) in str(caught.value) and "\n" in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_no_room_on_resume_keeps_the_partial_file(tmp_path, monkeypatch):
    ShardWriter(one_tensor(10), tmp_path).close()
    monkeypatch.setattr(_libc, "reserve", failing(errno.ENOSPC))
    with pytest.raises(ResourceError):
        ShardWriter(one_tensor(10), tmp_path, resume=True)
    assert os.listdir(tmp_path) == ["model.safetensors.partial"]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_place_that_cannot_be_written(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "open", failing(number))
    with pytest.raises(ResourceError, match="cannot be created"):
        ShardWriter(one_tensor(10), tmp_path)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG])
def test_a_write_that_fails(tmp_path, monkeypatch, number):
    with ShardWriter(one_tensor(PAGE), tmp_path) as writer:
        monkeypatch.setattr(os, "pwrite", failing(number))
        with pytest.raises(ResourceError, match=r"model\.safetensors: cannot be written.*bytes free"):
            writer.write(PAGE, pages(1))


def test_a_sync_that_fails_publishes_nothing(tmp_path, monkeypatch):
    with ShardWriter(one_tensor(PAGE), tmp_path) as writer:
        monkeypatch.setattr(os, "fsync", failing(errno.EIO))
        with pytest.raises(ResourceError, match="cannot be synced"):
            writer.publish()
    assert os.listdir(tmp_path) == ["model.safetensors.partial"]


def test_the_limit_on_file_sizes(tmp_path):
    """A real EFBIG, in a process of its own."""
    code = f"""
import resource
from peta_fast.errors import ResourceError
from peta_fast.formats import ShardWriter, layout_shards
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    ShardWriter(layout_shards([("w", "U8", (10**6,))], max_shard_size=10**9, metadata={{}})[0], {str(tmp_path)!r})
except ResourceError as error:
    assert "ulimit -f" in str(error), error
else:
    raise SystemExit("no error")
"""
    ran = run_code(code)
    assert ran.returncode == 0, ran.stderr
    assert os.listdir(tmp_path) == []


def test_free_bytes_of_a_directory_yet_to_be_made(tmp_path):
    assert 0 < free_bytes(tmp_path / "a" / "b") <= os.statvfs(tmp_path).f_blocks * os.statvfs(tmp_path).f_frsize


def test_a_small_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    disk.write_whole(tmp_path / "config.json", b"{}")
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC))
    with pytest.raises(ResourceError, match="config.json"):
        disk.write_whole(tmp_path / "config.json", b"[]")
    assert (tmp_path / "config.json").read_bytes() == b"{}"
    assert os.listdir(tmp_path) == ["config.json"]


# --- model card


def test_model_card_has_front_matter_that_the_hub_reads():
    card = model_card("org/base", ["org/a", "org/base", "path: with # yaml"], "ties", "merge_method: ties\n")
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": ["org/base", "org/a", "path: with # yaml"],
        "tags": ["peta_fast", "merge"],
    }
    assert "`ties`" in body and "```yaml\nmerge_method: ties\n```\n" in body


def test_model_card_without_a_base():
    front = model_card(None, ["a", "b"], "linear", "x").split("---\n")[1]
    assert yaml.safe_load(front)["base_model"] == ["a", "b"]


def test_a_recipe_with_a_fence_stays_inside_the_models_cards():
    card = model_card(None, ["a"], "linear", "# ```\nmerge_method: linear")
    assert "````yaml\n# ```\nmerge_method: linear\n````\n" in card
