"""Make a base Llama-shaped checkpoint and T fine-tunes of it, sharded safetensors, as a user would have them.

    base   0.02 N(0, 1), norms 1
    task   base + 0.0015 d |d|,  d ~ N(0, 1)

The deltas are heavy-tailed and sparse-ish, as real fine-tunes are, so that trimming matters. The same arguments and
the same torch give the same bytes.

usage: make_llama_family.py OUT_DIR --size {tiny,160m,1b} --tasks 3 [--seed 0]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

SIZES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512},
    "160m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
             "num_key_value_heads": 12, "vocab_size": 32000},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 32000},
}  # fmt: skip


def tensor_shapes(size: dict[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of the model, in the order in which it is drawn."""
    hidden, inner, vocabulary = size["hidden_size"], size["intermediate_size"], size["vocab_size"]
    keys = hidden // size["num_attention_heads"] * size["num_key_value_heads"]
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(size["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        yield prefix + "self_attn.q_proj.weight", (hidden, hidden)
        yield prefix + "self_attn.k_proj.weight", (keys, hidden)
        yield prefix + "self_attn.v_proj.weight", (keys, hidden)
        yield prefix + "self_attn.o_proj.weight", (hidden, hidden)
        yield prefix + "mlp.gate_proj.weight", (inner, hidden)
        yield prefix + "mlp.up_proj.weight", (inner, hidden)
        yield prefix + "mlp.down_proj.weight", (hidden, inner)
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def config(size: dict[str, int]) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "use_cache": True,
        **size,
    }


def base_tensors(size: dict[str, int], dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        name: (torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=draw) * 0.02).to(dtype)
        for name, shape in tensor_shapes(size)
    }


def finetuned(base: dict[str, torch.Tensor], dtype: torch.dtype, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    for name, weight in base.items():
        step = torch.randn(weight.shape, generator=draw)
        yield name, (weight.float() + 0.0015 * step * step.abs()).to(dtype)


def nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def into_shards(tensors: Iterable[tuple[str, torch.Tensor]], shard_bytes: int) -> list[dict[str, torch.Tensor]]:
    """Runs of tensors of at most shard_bytes, or of one tensor where that alone is larger."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    held = 0
    for name, tensor in tensors:
        if shards[-1] and held + nbytes(tensor) > shard_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = tensor
        held += nbytes(tensor)
    return shards


def write_checkpoint(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], settings: dict, shard_bytes: int):
    """config.json, the shards, and their index where there is more than one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings, indent=2))
    shards = into_shards(tensors, shard_bytes)
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, 1):
        single = len(shards) == 1
        file = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        total += sum(nbytes(tensor) for tensor in shard.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def make_family(
    out: Path, size: str, *, tasks: int = 3, seed: int = 0, dtype: str = "bfloat16", shard_mb: int = 700
) -> int:
    """Writes out/base and out/task0, task1, ...; returns the number of parameters of one model."""
    stored, settings = getattr(torch, dtype), config(SIZES[size])
    base = base_tensors(SIZES[size], stored, seed)
    write_checkpoint(out / "base", base.items(), settings, shard_mb << 20)
    for task in range(tasks):
        tuned = finetuned(base, stored, seed + 100 + task)
        write_checkpoint(out / f"task{task}", tuned, settings, shard_mb << 20)
    return sum(weight.numel() for weight in base.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", default="tiny", choices=SIZES)
    parser.add_argument("--tasks", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--shard-mb", type=int, default=700)
    given = parser.parse_args()
    parameters = make_family(
        given.out, given.size, tasks=given.tasks, seed=given.seed, dtype=given.dtype, shard_mb=given.shard_mb
    )
    print("params", parameters)


if __name__ == "__main__":
    main()
