"""Checkpoints of very many tensors that take no room: true headers, and files with holes for the data.

A mixture of experts with L layers and E experts has 3 L E expert tensors of one shape each, and a few others.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

LAYERS, EXPERTS = 64, 260
SHARDS = 16
HIDDEN, INNER = 64, 32
BYTES = 2
TASKS = 3


def expert_tensors(layers: int = LAYERS, experts: int = EXPERTS) -> Iterator[tuple[str, tuple[int, int]]]:
    """Names and shapes, (3 experts + 2) layers of them: 50,048 by default."""
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "self_attn.o_proj.weight", (HIDDEN, HIDDEN)
        yield prefix + "mlp.gate.weight", (experts, HIDDEN)
        for expert in range(experts):
            yield f"{prefix}mlp.experts.{expert}.gate_proj.weight", (INNER, HIDDEN)
            yield f"{prefix}mlp.experts.{expert}.up_proj.weight", (INNER, HIDDEN)
            yield f"{prefix}mlp.experts.{expert}.down_proj.weight", (HIDDEN, INNER)


def write_sparse_checkpoint(folder: Path, tensors: list[tuple[str, tuple[int, int]]], shards: int = SHARDS) -> None:
    """model-0000i-of-0000n.safetensors with bf16 tensors that are all holes, their index and config.json."""
    folder.mkdir(parents=True)
    step = -(-len(tensors) // shards)
    weight_map, total = {}, 0
    for number in range(shards):
        mine = tensors[number * step : (number + 1) * step]
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        total += _write_shard(folder / file, mine)
        weight_map.update(dict.fromkeys((name for name, _ in mine), file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "mixtral", "num_hidden_layers": LAYERS}))


def _write_shard(file: Path, tensors: list[tuple[str, tuple[int, int]]]) -> int:
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in tensors:
        start, end = end, end + BYTES * shape[0] * shape[1]
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)
    return end


def expert_recipe(folder: Path, tensors: list[tuple[str, tuple[int, int]]] | None = None) -> dict:
    """Writes base and task vectors' models below `folder` and returns a TIES recipe over them."""
    tensors = list(expert_tensors()) if tensors is None else tensors
    for name in ("base", *(f"task{t}" for t in range(TASKS))):
        write_sparse_checkpoint(folder / name, tensors)
    models = [{"model": str(folder / f"task{t}"), "parameters": {"weight": 0.4, "density": 0.2}} for t in range(TASKS)]
    return {"merge_method": "ties", "base_model": str(folder / "base"), "models": models, "dtype": "bfloat16"}


def parse_headers(folder: Path) -> int:
    """Reads and parses the headers of every checkpoint below `folder`: what a plan cannot do without. Returns the
    number of tensors."""
    found = 0
    for file in sorted(folder.glob("*/*.safetensors")):
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            found += len(json.loads(stream.read(length))) - 1
    return found
