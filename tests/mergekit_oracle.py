"""Small Llama checkpoints, and what mergekit and this package make of one recipe about them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

import peta_fast

MODELS = ("base", "a", "b", "c")
LAYERS = 4
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
    "hidden_act": "silu", "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
LAYER_SHAPES = {
    "self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32), "mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32), "mlp.down_proj": (32, 48),
    "input_layernorm": (32,), "post_attention_layernorm": (32,),
}  # fmt: skip
ROUNDINGS = 4 * torch.finfo(torch.float32).eps
"""How far two fp32 merges of numbers of order 1 may be apart."""


def shapes() -> dict[str, tuple[int, ...]]:
    layers = {f"model.layers.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in LAYER_SHAPES.items()}
    return {"model.embed_tokens.weight": (64, 32), **layers, "model.norm.weight": (32,), "lm_head.weight": (64, 32)}


def write_model(folder: Path, tensors: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    dtype = str(tensors["lm_head.weight"].dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(CONFIG | {"torch_dtype": dtype}))


def write_family(folder: Path, dtype: torch.dtype, change: float) -> Path:
    """A base and models a, b and c, whose changes in fp32 are all different and in bf16 often equal."""
    draw = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes().items()}
    write_model(folder / "base", base)
    for model in MODELS[1:]:
        changed = {n: (w.float() + change * torch.randn(w.shape, generator=draw)).to(dtype) for n, w in base.items()}
        write_model(folder / model, changed)
    return folder


def state_dict(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def placed(recipe: str, family: Path) -> str:
    """The recipe with the models' names as paths of the family."""
    return re.sub(r"\b((?:base_)?model): (base|a|b|c)\b", rf"\1: {family}/\2", recipe)


def merge_by_mergekit(recipe: str, out: Path, seed: int = 0) -> dict[str, Tensor]:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True, random_seed=seed)
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(recipe)), str(out), options=options)
    return state_dict(out)


def merge_by_us(recipe: str, out: Path, seed: int = 0) -> dict[str, Tensor]:
    peta_fast.merge(f"{recipe}\nseed: {seed}", out)
    return state_dict(out)


def assert_same_merge(ours: dict[str, Tensor], theirs: dict[str, Tensor], left_out: dict[str, Tensor] | None = None):
    """Equal up to fp32 rounding, and one unit of the last place of a shorter output dtype.

    left_out  by name, the elements on which the two need not agree
    """
    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        actual = ours[name]
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), name
        assert expected.isfinite().all(), f"{name}: mergekit's own result is not finite"
        allowed = ROUNDINGS * expected.double().abs().max().clamp(min=1.0)
        if expected.dtype != torch.float32:
            allowed = allowed + torch.finfo(expected.dtype).eps * expected.double().abs()
        wrong = ~((actual.double() - expected.double()).abs() <= allowed)
        if left_out:
            wrong &= ~left_out[name]
        assert not wrong.any(), (
            f"{name}: {int(wrong.sum())} of {wrong.numel()} elements differ; first at {wrong.nonzero()[0].tolist()}: "
            f"mergekit has {expected[wrong][0].item()!r}, we have {actual[wrong][0].item()!r}"
        )


def split_equals(delta: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Where |delta| [*S] equals a magnitude of which some are among the `count` largest, and some are not."""
    ordered = delta.abs().flatten().sort(descending=True).values
    split = [ordered[c] for c in counts if 0 < c < ordered.numel() and ordered[c - 1] == ordered[c]]
    return torch.stack([delta.abs() == value for value in split]).any(0) if split else torch.zeros_like(delta).bool()
