"""From a model reference to a directory: local path, then Hugging Face cache, then, if allowed, the network.

    <cache>/models--<org>--<name>/refs/<revision>         text: a commit
    <cache>/models--<org>--<name>/snapshots/<commit>/     the files, as links into ../../blobs

HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE means that no network call is made at all.
Source: https://huggingface.co/docs/huggingface_hub/guides/manage-cache.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from peta_fast.errors import CheckpointError
from peta_fast.formats.checkpoint import find_weights
from peta_fast.formats.shard_index import SUFFIX, read_shard_index

_PART = r"[A-Za-z0-9](?:[\w.-]*\w)?"
_HUB_ID = re.compile(rf"{_PART}(?:/{_PART})?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TRUE = {"1", "ON", "YES", "TRUE"}

_NEVER_NEEDED = ("*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.ot", "*.tflite", "onnx/*", "original/*")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def locate(ref_path: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The directory or file that a reference means.

    ref_path  a local path, or a hub id `name` or `org/name`
    revision  branch, tag or full commit of a hub id; None means main
    weights   False where the tokenizer and config are enough

    Raises CheckpointError that says all that was tried.
    """
    local = Path(ref_path).expanduser()
    if os.path.exists(local):
        if revision is not None:
            raise CheckpointError(ref_path, f"expected a hub id before revision {revision!r}, got a local path")
        return local
    tried = [f"no such local path: {local}"]
    if not _is_hub_id(ref_path) or not _is_revision(revision):
        raise _not_found(ref_path, revision, [*tried, "it is no hub id (name or org/name) with a revision either"])
    return _from_cache(ref_path, revision, weights, tried) or _from_network(ref_path, revision, weights, tried)


def cache_directory() -> Path:
    """Where Hugging Face libraries keep downloads: HF_HUB_CACHE, HUGGINGFACE_HUB_CACHE, HF_HOME/hub, or the default."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return _expanded(os.environ[variable])
    default_home = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return _expanded(os.environ.get("HF_HOME") or default_home) / "hub"


def is_offline() -> bool:
    return any(os.environ.get(name, "").upper() in _TRUE for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))


def _from_cache(ref_path: str, revision: str | None, weights: bool, tried: list[str]) -> Path | None:
    """The cached snapshot; None, and why in `tried`, when it is not there or not complete."""
    folder = cache_directory() / f"models--{ref_path.replace('/', '--')}"
    snapshot = _snapshot(folder, revision or "main")
    if snapshot is None:
        tried.append(f"not in the cache: {folder} has no revision {revision or 'main'}")
        return None
    missing = _what_is_missing(snapshot) if weights else ""
    if missing:
        tried.append(f"in the cache, but not complete: {missing}")
        return None
    return snapshot


def _snapshot(folder: Path, revision: str) -> Path | None:
    commit = revision
    try:
        commit = (folder / "refs" / revision).read_text().strip()
    except (OSError, ValueError):
        if not _COMMIT.fullmatch(revision):
            return None
    snapshot = folder / "snapshots" / commit
    return snapshot if _COMMIT.fullmatch(commit) and os.path.isdir(snapshot) else None


def _what_is_missing(snapshot: Path) -> str:
    """Why the snapshot's weights cannot be opened; empty when they are all there."""
    try:
        weights = find_weights(snapshot)
        shards = read_shard_index(weights).names if weights.name.endswith(SUFFIX) else ()
    except CheckpointError as error:
        return str(error).partition("\n")[0]
    return next((f"{shard} is missing" for shard in shards if not os.path.exists(shard)), "")


def _from_network(ref_path: str, revision: str | None, weights: bool, tried: list[str]) -> Path:
    """Download a snapshot, safetensors alone where there are any."""
    if is_offline():
        raise _not_found(
            ref_path, revision, [*tried, "not on the network: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set"]
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise _not_found(ref_path, revision, [*tried, "not on the network: huggingface_hub is not installed"]) from None
    missing = ""
    safetensors_alone = _NEVER_NEEDED + _PICKLES
    for ignored in (safetensors_alone, _NEVER_NEEDED) if weights else (safetensors_alone + ("*.safetensors",),):
        try:
            snapshot = Path(snapshot_download(ref_path, revision=revision, ignore_patterns=list(ignored)))
        except Exception as error:  # the client's errors share no base class: HTTP, authorization, validation, disk
            reason = (str(error).strip() or "no reason given").splitlines()[0]
            tried.append(f"not on the network: {type(error).__name__}: {reason}")
            raise _not_found(ref_path, revision, tried) from error
        missing = _what_is_missing(snapshot) if weights else ""
        if not missing:
            return snapshot
    raise _not_found(ref_path, revision, [*tried, f"downloaded, but {missing}"])


def _not_found(ref_path: str, revision: str | None, tried: list[str]) -> CheckpointError:
    reference = f"{ref_path}@{revision}" if revision else ref_path
    return CheckpointError(
        reference,
        "expected a local path or a model of the hub, found neither:\n  " + "\n  ".join(tried),
        "Check the spelling, or download it first: `hf download " + ref_path + "`." if _is_hub_id(ref_path) else "",
    )


def _is_hub_id(text: str) -> bool:
    return len(text) <= 96 and "--" not in text and ".." not in text and _HUB_ID.fullmatch(text) is not None


def _is_revision(revision: str | None) -> bool:
    """No path that could leave refs/."""
    return revision is None or all(part not in ("", ".", "..") for part in revision.split("/"))


def _expanded(path: str) -> Path:
    return Path(os.path.expanduser(os.path.expandvars(path)))
