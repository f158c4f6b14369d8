"""Checkpoints in several files: `model.safetensors.index.json` or `pytorch_model.bin.index.json` and its shards.

The index: {"metadata": {"total_size": bytes}, "weight_map": {tensor name: file name}}
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from peta_fast.errors import CheckpointError
from peta_fast.formats._registry import read_tensors
from peta_fast.formats.input_file import InputFile
from peta_fast.formats.strict_json import parse_json
from peta_fast.formats.tensor_index import FileIndex, TensorInfo, brief, name_some, quoted, split_aliases

SUFFIX = ".index.json"

_MAX_INDEX_BYTES = 100_000_000


@dataclass(frozen=True)
class ShardIndex:
    """An index file: which shard holds which tensors, and its free text."""

    file: Path
    names: dict[Path, set[str]]
    metadata: dict[str, str]


def read_shard_index(file: Path) -> ShardIndex:
    """Raises CheckpointError when the file is no index, or names a shard outside its folder."""
    with InputFile(file) as source:
        if source.size > _MAX_INDEX_BYTES:
            raise CheckpointError(
                str(file), f"expected an index of at most {_MAX_INDEX_BYTES} bytes, got {source.size}"
            )
        content = parse_json(source.read(0, source.size), str(file), "the index")
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not weight_map or not isinstance(weight_map, dict) or not all(type(v) is str for v in weight_map.values()):
        raise CheckpointError(str(file), "expected a 'weight_map' of tensor names to file names")
    by_shard: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        by_shard.setdefault(shard, set()).add(name)
    for shard in by_shard:
        if Path(shard).name != shard or "\0" in shard:
            raise CheckpointError(str(file), f"a shard must lie beside the index, got {brief(shard)}")
    free_text = content.get("metadata")
    metadata = {k: v for k, v in free_text.items() if type(v) is str} if isinstance(free_text, dict) else {}
    return ShardIndex(file, {file.parent / shard: by_shard[shard] for shard in sorted(by_shard)}, metadata)


def read_shards(index: ShardIndex) -> list[FileIndex]:
    """Index of each shard, in the order of their names.

    Raises CheckpointError when a shard is missing, or shards and index do not hold the same names.
    """
    _check_shards_exist(index)
    shards = [read_tensors(file) for file in index.names]
    _check_each_name_once(shards)
    for shard in shards:
        _check_same_names(index, shard)
    return shards


def aliases_across(index: ShardIndex, tensors: dict[str, TensorInfo]) -> dict[str, str]:
    """Tied tensors that the index notes: name -> stored name."""
    return split_aliases(index.metadata, tensors)[0]


def _check_shards_exist(index: ShardIndex) -> None:
    missing = [file.name for file in index.names if not os.path.exists(file)]
    if missing:
        raise CheckpointError(
            str(index.file), f"names {len(index.names)} shards, of which {name_some(missing)} cannot be found",
            "Download the missing files.",
        )  # fmt: skip


def _check_each_name_once(shards: list[FileIndex]) -> None:
    holder: dict[str, Path] = {}
    for shard in shards:
        for name in shard.tensors:
            if holder.setdefault(name, shard.file) is not shard.file:
                raise CheckpointError(str(shard.file), f"{quoted(name)} is stored in {holder[name].name} as well")


def _check_same_names(index: ShardIndex, shard: FileIndex) -> None:
    listed = index.names[shard.file]
    absent = listed - shard.tensors.keys() - shard.aliases.keys()
    if absent:
        raise CheckpointError(
            str(shard.file), f"{index.file.name} places {name_some(absent)} here, but it is not there"
        )
    unlisted = shard.tensors.keys() - listed
    if unlisted:
        raise CheckpointError(
            str(shard.file), f"holds {name_some(unlisted)}, which {index.file.name} does not place here"
        )
