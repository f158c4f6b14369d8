"""A merge that is killed, interrupted or damaged on the way: never half an output, and resuming ends in the same bytes.

PETA_FAST_KILLS  how many times the merge is killed; 50 for a thorough run
"""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
from pathlib import Path

import pytest
from merge_driver import Driver
from model_folders import files_of, load, save_family, save_model

import peta_fast
from peta_fast import _engine, _output
from peta_fast.errors import CheckpointError, ResourceError
from peta_fast.formats import open_checkpoint
from peta_fast.formats.disk import PARTIAL
from peta_fast.journal import JOURNAL, verify

KILLS = int(os.environ.get("PETA_FAST_KILLS", "12"))
NAMES = {f"model.layers.{i}.up.weight": (300, 500) for i in range(6)} | {"model.norm.weight": (500,), "steps": (3,)}
SETTINGS = {"method": "ties", "density": 0.3, "max_memory": 10 << 20, "max_shard_size": 1_300_000}
SLAB, FIRST_SHARD = 256 << 10, 1_200_000
"""Bytes: of a slab with so little memory, and of the tensors in the first of three shards, which takes five slabs."""


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Folders base, a and b; `whole` is their merge, `older` another one, in one file."""
    folder = tmp_path_factory.mktemp("family")
    base, _ = save_family(folder, names=NAMES)
    save_model(folder / "base", base, tokenizer_json="{}", generation_config_json="{}")
    merge(folder, folder / "whole")
    merge(folder, folder / "older", density=0.9, max_shard_size="1GB")
    return folder


def keywords(folder, **changed) -> dict:
    named = {"base": str(folder / "base"), "models": [str(folder / name) for name in "ab"]}
    return {**named, **SETTINGS, **changed}


def merge(folder, out, **changed):
    return peta_fast.merge(out=str(out), **keywords(folder, **changed))


@pytest.fixture
def interrupted(family, tmp_path, monkeypatch):
    """An output folder whose merge was interrupted after five slabs."""
    stop_after(monkeypatch, 5, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        merge(family, tmp_path / "out")
    monkeypatch.undo()
    return tmp_path / "out"


def stop_after(monkeypatch, slabs: int, error) -> None:
    """Making a slab raises, when so many have been made."""
    fill, made = _engine.Engine.fill, []

    def stopping(self, pieces):
        if len(made) == slabs:
            raise error
        made.append(pieces)
        fill(self, pieces)

    monkeypatch.setattr(_engine.Engine, "fill", stopping)


def assert_same_output(out: Path, family: Path) -> None:
    assert files_of(out) == files_of(family / "whole")
    assert verify(out) == []


# Killed


def weights_of(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name.startswith("model")}


def assert_nothing_looks_whole_that_is_not(out: Path, *outputs: Path) -> None:
    """Every file with a final name is a whole one of an output; a model that opens is all of one output."""
    if not out.exists():
        return
    wholes = [files_of(folder) for folder in outputs]
    found = {n: c for n, c in files_of(out).items() if not n.endswith(PARTIAL) and not n.startswith(JOURNAL)}
    for name, content in found.items():
        assert content in [whole.get(name) for whole in wholes], f"{name} is of no output"
    try:
        with open_checkpoint(out) as opened:
            held = {file.name: file.read_bytes() for file in opened.files}
    except CheckpointError:
        return
    of = [whole for whole in wholes if held == {n: c for n, c in weights_of(whole).items() if n in held}]
    of = [whole for whole in of if set(held) == {n for n in weights_of(whole) if n.endswith(".safetensors")}]
    assert of, f"{sorted(held)} open as a model, but are of no output"
    if "config.json" in found:
        assert all(found.get(name) in (content, None) for name, content in of[0].items())


def plan_kills(count: int, calls: int):
    """(in which call of the first run, whether the second is killed too, whether over an older output)"""
    draw = random.Random(7)
    for number in range(count):
        yield draw.randint(1, calls), draw.random() < 0.5, number % 2 == 1


def test_a_merge_killed_at_any_moment_resumes_to_the_same_bytes(family, tmp_path):
    outputs = family / "whole", family / "older"
    killed = 0
    with Driver() as driver:
        undisturbed = driver.merge(**keywords(family, out=str(tmp_path / "counted")))
        assert undisturbed["calls"] > 60 and not undisturbed["killed"]
        for number, (call, again, over_older) in enumerate(plan_kills(KILLS, undisturbed["calls"])):
            out = tmp_path / f"out{number}"
            if over_older:
                shutil.copytree(family / "older", out)
            job = keywords(family, out=str(out))
            told = driver.merge(die_at=call, **job, force=over_older)
            killed += told["killed"]
            assert_nothing_looks_whole_that_is_not(out, *outputs)
            if again:
                driver.merge(kill_after=undisturbed["seconds"] * (call / undisturbed["calls"]) ** 2, **job, resume=True)
                assert_nothing_looks_whole_that_is_not(out, *outputs)
            told = driver.merge(**job, resume=True)
            if told["error"]:  # nothing of the new merge was begun, so the older output is still all there
                assert over_older and "ResourceError" in told["error"] and "--force" in told["error"]
                assert files_of(out).items() >= files_of(family / "older").items()
                told = driver.merge(**job, force=True)
            assert told["error"] == ""
            assert_same_output(out, family)
            shutil.rmtree(out)
    assert killed >= 0.8 * KILLS


def test_killed_while_publishing_an_older_output_is_never_mixed_with_the_new_one(family, tmp_path):
    """The calls that give names, from the first third on, and all of the last ones."""
    outputs, job = (family / "whole", family / "older"), keywords(family, out=str(tmp_path / "out"), force=True)
    resumed = {**job, "force": False, "resume": True}
    with Driver() as driver:
        shutil.copytree(family / "older", tmp_path / "out")
        calls = driver.merge(**job)["calls"]
        for call in sorted({*range(calls // 3, calls, 1 if KILLS >= 50 else 6), *range(calls - 5, calls + 1)}):
            shutil.rmtree(tmp_path / "out")
            shutil.copytree(family / "older", tmp_path / "out")
            assert driver.merge(die_at=call, **job)["killed"]
            assert_nothing_looks_whole_that_is_not(tmp_path / "out", *outputs)
            assert driver.merge(**resumed)["error"] == ""
            assert_same_output(tmp_path / "out", family)


# Interrupted


def test_an_interrupted_merge_goes_on_where_it_stopped(interrupted, family, monkeypatch):
    with pytest.raises(CheckpointError):
        open_checkpoint(interrupted)
    made, fill = [], _engine.Engine.fill
    monkeypatch.setattr(_engine.Engine, "fill", lambda self, pieces: (made.append(pieces), fill(self, pieces)))
    whole = merge(family, interrupted.parent / "whole")
    slabs = len(made)
    made.clear()
    report = merge(family, interrupted, resume=True)
    assert 0 < len(made) == slabs - 5
    assert report.skipped_bytes == FIRST_SHARD
    assert report.bytes_written == whole.bytes_written - report.skipped_bytes and report.bytes_read < whole.bytes_read
    assert_same_output(interrupted, family)


def test_progress_of_a_resumed_merge_counts_what_was_there(interrupted, family):
    seen = []
    merge(family, interrupted, resume=True, progress=seen.append)
    assert seen[0].done_bytes > 0.2 * seen[0].total_bytes and seen[-1].done_bytes > 0.95 * seen[-1].total_bytes


@pytest.mark.parametrize("changed", [{"max_memory": 30 << 20}, {"max_memory": "768MB"}, {"threads": 1}])
def test_memory_and_threads_may_change_before_resuming(interrupted, family, changed):
    assert merge(family, interrupted, resume=True, **changed).skipped_bytes >= 0
    assert_same_output(interrupted, family)


def test_what_larger_slabs_have_left_is_taken_by_smaller_ones(family, tmp_path, monkeypatch):
    stop_after(monkeypatch, 1, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        merge(family, tmp_path / "out", max_memory=12 << 20)
    monkeypatch.undo()
    assert merge(family, tmp_path / "out", resume=True).skipped_bytes == 512 << 10
    assert_same_output(tmp_path / "out", family)


def test_an_unfinished_merge_is_not_touched_unless_told_to(interrupted, family):
    before = files_of(interrupted)
    with pytest.raises(ResourceError, match="unfinished merge"):
        merge(family, interrupted)
    assert files_of(interrupted) == before
    merge(family, interrupted, force=True)
    assert_same_output(interrupted, family)


@pytest.mark.parametrize(
    "changed", [{"density": 0.4}, {"seed": 1}, {"compat": "mergekit"}, {"max_shard_size": 999_999}]
)
def test_another_recipe_is_not_resumed(interrupted, family, changed):
    before = files_of(interrupted)
    with pytest.raises(ResourceError, match="holds another merge: recipe, inputs or options differ"):
        merge(family, interrupted, resume=True, **changed)
    assert files_of(interrupted) == before
    merge(family, interrupted, resume=True, force=True, **changed)
    assert verify(interrupted) == []


def test_changed_inputs_are_not_resumed(family, tmp_path, monkeypatch):
    shutil.copytree(family, tmp_path / "copy")
    stop_after(monkeypatch, 5, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        merge(tmp_path / "copy", tmp_path / "out")
    monkeypatch.undo()
    state = load(tmp_path / "copy" / "a")
    state["model.norm.weight"][0] += 1
    save_model(tmp_path / "copy" / "a", state)
    with pytest.raises(ResourceError, match="inputs or options differ"):
        merge(tmp_path / "copy", tmp_path / "out", resume=True)


def test_resuming_nothing_begins(family, tmp_path):
    merge(family, tmp_path / "absent", resume=True)
    (tmp_path / "empty").mkdir()
    merge(family, tmp_path / "empty", resume=True)
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / JOURNAL).write_text('{"fingerpr')
    merge(family, tmp_path / "torn", resume=True)
    for name in ("absent", "empty", "torn"):
        assert_same_output(tmp_path / name, family)


def test_resuming_does_not_replace_a_model_that_was_there_before(family, tmp_path):
    save_model(tmp_path / "out", load(family / "a"))
    before = files_of(tmp_path / "out")
    with pytest.raises(ResourceError, match="holds a checkpoint already"):
        merge(family, tmp_path / "out", resume=True)
    assert files_of(tmp_path / "out") == before


def test_resuming_a_finished_merge_does_nothing_unless_it_has_changed(family, tmp_path):
    shutil.copytree(family / "whole", tmp_path / "out")
    dates = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    report = merge(family, tmp_path / "out", resume=True)
    assert (report.bytes_read, report.bytes_written) == (0, 0) and report.skipped_bytes > 3_000_000
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == dates
    for spoil in (flip_a_byte, Path.unlink):
        for name in ("model-00002-of-00003.safetensors", "model.safetensors.index.json"):
            if spoil is Path.unlink or name.endswith("safetensors"):
                shutil.rmtree(tmp_path / "out")
                shutil.copytree(family / "whole", tmp_path / "out")
                spoil(tmp_path / "out" / name)
                with pytest.raises(ResourceError, match=f"has changed since: {name}"):
                    merge(family, tmp_path / "out", resume=True)


# Damaged


def flip_a_byte(file: Path, position: int = 500_000) -> None:
    with open(file, "r+b") as stream:
        stream.seek(position)
        byte = stream.read(1)[0]
        stream.seek(position)
        stream.write(bytes([byte ^ 4]))


def test_a_slab_that_a_power_cut_has_damaged_is_made_again(interrupted, family):
    flip_a_byte(interrupted / f"model-00001-of-00003.safetensors{PARTIAL}")
    assert merge(family, interrupted, resume=True).skipped_bytes == FIRST_SHARD - SLAB
    assert_same_output(interrupted, family)


def test_a_lost_shard_is_made_again(interrupted, family):
    (interrupted / f"model-00001-of-00003.safetensors{PARTIAL}").unlink()
    merge(family, interrupted, resume=True)
    assert_same_output(interrupted, family)


def test_an_older_output_is_not_taken_for_what_a_lost_shard_held(family, tmp_path, monkeypatch):
    shutil.copytree(family / "whole", tmp_path / "out")
    stop_after(monkeypatch, 7, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        merge(family, tmp_path / "out", force=True)
    monkeypatch.undo()
    (tmp_path / "out" / f"model-00001-of-00003.safetensors{PARTIAL}").unlink()
    assert weights_of(files_of(tmp_path / "out")).items() >= weights_of(files_of(family / "whole")).items()
    merge(family, tmp_path / "out", resume=True)
    assert_same_output(tmp_path / "out", family)


@pytest.mark.parametrize(
    "damage", [b'{"shard":0,"start"', b"\0" * 300, b'\0\0\n{"shard":7}\n[]\n{"shard":"x","start":1}\n']
)
def test_what_a_power_cut_has_left_of_the_journal_s_end_is_ignored(interrupted, family, damage):
    with open(interrupted / JOURNAL, "ab") as stream:
        stream.write(damage)
    assert merge(family, interrupted, resume=True).skipped_bytes == FIRST_SHARD
    assert_same_output(interrupted, family)


def test_a_damaged_head_of_the_journal_is_refused(interrupted, family):
    lines = (interrupted / JOURNAL).read_bytes().split(b"\n")
    (interrupted / JOURNAL).write_bytes(b"\n".join([b"\0" * len(lines[0]), *lines[1:]]))
    with pytest.raises(CheckpointError, match="expected a journal of a merge"):
        merge(family, interrupted, resume=True)
    merge(family, interrupted, force=True)
    assert_same_output(interrupted, family)


# Two at once


def test_a_second_process_may_not_work_on_the_same_output(family, tmp_path, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()
    write = _output.Output.write

    def waiting(self, slab, buffer):
        begun.set()
        assert go_on.wait(30)
        write(self, slab, buffer)

    monkeypatch.setattr(_output.Output, "write", waiting)
    first = threading.Thread(target=merge, args=(family, tmp_path / "out"))
    first.start()
    assert begun.wait(30)
    try:
        for options in ({"resume": True}, {"force": True}, {"resume": True, "force": True}):
            with pytest.raises(ResourceError, match="another process is merging into this folder"):
                merge(family, tmp_path / "out", **options)
    finally:
        go_on.set()
        first.join()
    assert_same_output(tmp_path / "out", family)


def test_the_journal_holds_every_slab_once_before_what_is_published(family):
    """In the order in which they were on the disk, which is not that of the file: several threads write."""
    lines = [json.loads(line) for line in (family / "whole" / JOURNAL).read_text().splitlines()]
    assert list(lines[0]) == ["fingerprint", "shards"] and lines[-2:] == [{"publishing": True}, {"done": True}]
    slabs = sorted((line["shard"], line["start"], line["stop"]) for line in lines[1:-2])
    sizes = {shard: file.stat().st_size for shard, file in enumerate(sorted((family / "whole").glob("*.safetensors")))}
    for (shard, _, stop), (following, start, _) in zip(slabs, [*slabs[1:], (len(sizes), 0, 0)], strict=True):
        assert start == stop if following == shard else (following == shard + 1 and stop == sizes[shard])
