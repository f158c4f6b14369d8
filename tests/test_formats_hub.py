"""Finding a model: local path, cache, network, in this order; offline means that nothing is called."""

from __future__ import annotations

import socket
import sys
import types

import pytest
from checkpoint_files import write_safetensors

from peta_fast.errors import CheckpointError
from peta_fast.formats.hub import cache_directory, locate

COMMIT, OTHER = "a" * 40, "b" * 40
VARIABLES = (
    "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """Every test starts with an empty home, a cache in HF_HOME, and sockets that fail."""

    def refuse(*_, **__):
        raise AssertionError("a network call was made")

    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)


def cached(cache, commit: str = COMMIT, revision: str = "main", files: tuple[str, ...] = ("model.safetensors",)):
    """A model org/name in a cache, laid out as huggingface_hub does; returns the snapshot."""
    folder = cache / "models--org--name"
    snapshot = folder / "snapshots" / commit
    (folder / "blobs").mkdir(parents=True, exist_ok=True)
    snapshot.mkdir(parents=True)
    for number, name in enumerate(files):
        write_safetensors(folder / "blobs" / f"{commit[0]}{number}", ["w"])
        (snapshot / name).symlink_to(f"../../blobs/{commit[0]}{number}")
    ref = folder / "refs" / revision
    ref.parent.mkdir(parents=True, exist_ok=True)
    ref.write_text(commit)
    return snapshot


@pytest.fixture
def client(monkeypatch):
    """A huggingface_hub that is importable; `client.download` is what snapshot_download does."""
    module = types.ModuleType("huggingface_hub")
    module.calls, module.download = [], None

    def snapshot_download(repo_id, revision=None, ignore_patterns=()):
        module.calls.append((repo_id, revision, "*.bin" in ignore_patterns))
        return module.download(repo_id, revision, ignore_patterns)

    module.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return module


def not_found(*arguments, **keywords) -> str:
    with pytest.raises(CheckpointError) as caught:
        locate(*arguments, **keywords)
    return str(caught.value)


def test_a_local_path_is_taken_as_it_is(tmp_path, client):
    cached(tmp_path / "hf" / "hub")
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert locate(str(tmp_path / "org" / "name"), None) == tmp_path / "org" / "name"


def test_a_relative_path_wins_over_a_hub_id(tmp_path, monkeypatch):
    snapshot = cached(tmp_path / "hf" / "hub")
    monkeypatch.chdir(tmp_path)
    assert locate("org/name", None) == snapshot
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert str(locate("org/name", None)) == "org/name"


def test_home_is_expanded(tmp_path):
    (tmp_path / "models").mkdir()
    assert locate("~/models", None) == tmp_path / "models"


def test_a_local_path_has_no_revision(tmp_path):
    assert "revision 'v1'" in not_found(str(tmp_path), "v1")


def test_the_cache_answers_without_network(tmp_path, client):
    snapshot = cached(tmp_path / "hf" / "hub")
    assert locate("org/name", None) == snapshot
    assert client.calls == []


@pytest.mark.parametrize("revision", ["v1.0", "refs/pr/3", "feature/x"])
def test_branches_and_tags_are_looked_up(tmp_path, revision):
    cached(tmp_path / "hf" / "hub")
    snapshot = cached(tmp_path / "hf" / "hub", OTHER, revision)
    assert locate("org/name", revision) == snapshot


def test_a_commit_needs_no_ref(tmp_path):
    cached(tmp_path / "hf" / "hub")
    snapshot = cached(tmp_path / "hf" / "hub", OTHER, "v1")
    assert locate("org/name", OTHER) == snapshot


def test_where_the_cache_is(tmp_path, monkeypatch):
    assert cache_directory() == tmp_path / "hf" / "hub"
    monkeypatch.setenv("HUGGINGFACE_HUB_CACHE", str(tmp_path / "old"))
    assert cache_directory() == tmp_path / "old"
    monkeypatch.setenv("HF_HUB_CACHE", "$HOME/c")
    assert cache_directory() == tmp_path / "c"
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(name)
    assert cache_directory() == tmp_path / ".cache" / "huggingface" / "hub"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "huggingface" / "hub"


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
@pytest.mark.parametrize("value", ["1", "true", "YES", "on"])
def test_offline_makes_no_call_at_all(monkeypatch, client, variable, value):
    monkeypatch.setenv(variable, value)
    message = not_found("org/name")
    assert client.calls == []
    assert all(word in message for word in ("no such local path", "models--org--name", variable, "hf download"))


def test_offline_does_not_even_import_the_client(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delitem(sys.modules, "huggingface_hub")
    not_found("org/name")
    assert "huggingface_hub" not in sys.modules


def test_offline_with_a_snapshot_that_lacks_its_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    snapshot = cached(tmp_path / "hf" / "hub", files=("tokenizer.json",))
    assert "not complete" in not_found("org/name")
    assert locate("org/name", weights=False) == snapshot


def test_offline_with_a_snapshot_that_lacks_a_shard(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    snapshot = cached(tmp_path / "hf" / "hub", files=("model-1.safetensors",))
    (snapshot / "model.safetensors.index.json").write_text(
        '{"weight_map": {"w": "model-1.safetensors", "v": "model-2.safetensors"}}'
    )
    assert "model-2.safetensors is missing" in not_found("org/name")


def test_without_the_client_the_error_says_so():
    assert "huggingface_hub is not installed" in not_found("org/name")


def test_the_network_is_the_last_resort(tmp_path, client):
    client.download = lambda *_: str(cached(tmp_path / "hf" / "hub"))
    assert locate("org/name", "main").name == COMMIT
    assert client.calls == [("org/name", "main", True)]


def test_an_incomplete_snapshot_is_completed(tmp_path, client):
    snapshot = cached(tmp_path / "hf" / "hub", files=("tokenizer.json",))

    def download(*_):
        write_safetensors(snapshot / "model.safetensors", ["w"])
        return str(snapshot)

    client.download = download
    assert locate("org/name", None) == snapshot


def test_pickles_are_fetched_only_where_there_is_nothing_else(tmp_path, client):
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()

    def download(repo_id, revision, ignore_patterns):
        if "*.bin" not in ignore_patterns:
            (snapshot / "pytorch_model.bin").write_bytes(b"PK")
        return str(snapshot)

    client.download = download
    assert locate("org/name", None) == snapshot
    assert [without_pickles for *_, without_pickles in client.calls] == [True, False]


def test_a_tokenizer_is_fetched_without_weights(tmp_path, client):
    ignored = []
    client.download = lambda repo_id, revision, patterns: ignored.extend(patterns) or str(tmp_path)
    assert locate("org/name", None, weights=False) == tmp_path
    assert {"*.safetensors", "*.bin"} <= set(ignored) and len(client.calls) == 1


def test_a_model_without_weights(tmp_path, client):
    client.download = lambda *_: str(tmp_path)
    assert "downloaded, but" in not_found("org/name")


def test_what_the_network_says_is_told(client):
    def download(*_):
        raise RuntimeError("401 Client Error\nlong story")

    client.download = download
    message = not_found("org/name", "v1")
    assert "org/name@v1" in message and "RuntimeError: 401 Client Error" in message and "long story" not in message


@pytest.mark.parametrize(
    "reference", ["/no/such/path", "./missing", "a/b/c", "org/na me", "", "org--x/y", "..", "a/.."]
)
def test_what_is_no_hub_id_is_never_looked_up(client, tmp_path, monkeypatch, reference):
    monkeypatch.chdir(tmp_path)
    if reference in ("", ".."):
        reference += "missing/"
    assert "no hub id" in not_found(reference)
    assert client.calls == []


@pytest.mark.parametrize("revision", ["../../../secret", "/etc/passwd", "", "a//b"])
def test_a_revision_cannot_leave_the_cache(client, revision):
    assert "no hub id" in not_found("org/name", revision)
    assert client.calls == []


def test_a_ref_that_is_no_commit_is_not_followed(tmp_path):
    cached(tmp_path / "hf" / "hub")
    (tmp_path / "hf" / "hub" / "models--org--name" / "refs" / "main").write_text("../../..")
    assert "no revision main" in not_found("org/name")
