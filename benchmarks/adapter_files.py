"""Random LoRA adapters for benchmarks: on every matrix of a Llama's layers, written as PEFT would."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def llama_shapes(hidden: int, inner: int, layers: int, key_value: int | None = None) -> dict[str, tuple[int, int]]:
    """Module -> [out, in] of all matrices of the layers."""
    key_value = hidden if key_value is None else key_value
    one = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden), "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    return {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in one.items()}


LLAMA_7B = llama_shapes(4096, 11008, 32)


def make_adapter(folder: Path, shapes: Mapping[str, tuple[int, int]], rank: int, seed: int, base: str = "base") -> Path:
    """Made where it is missing: fp32 factors whose product is about a thousandth of a weight."""
    if (folder / "adapter_config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (out, inner) in shapes.items():
        key = f"base_model.model.{name}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(rank, inner, generator=draw) * inner**-0.5
        tensors[f"{key}.lora_B.weight"] = torch.randn(out, rank, generator=draw) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": 2 * rank,
        "bias": "none",
        "target_modules": list(PROJECTIONS),
        "task_type": None,
        "use_rslora": False,
        "fan_in_fan_out": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
        "modules_to_save": None,
        "lora_dropout": 0.0,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
