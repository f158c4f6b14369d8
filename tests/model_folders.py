"""Model folders for tests of merges on disk: written by torch and the safetensors library, and read back by them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from peta_fast.journal import JOURNAL

LAYERS = 2
HIDDEN, VOCAB = 24, 40
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": LAYERS, "hidden_size": HIDDEN,
    "tie_word_embeddings": False, "torch_dtype": "float32",
}  # fmt: skip
PLACES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "input_layernorm")


def shapes(layers: int = LAYERS) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a small Llama."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(layers):
        for place in PLACES:
            shape = (HIDDEN,) if place.endswith("norm") else (2 * HIDDEN, HIDDEN) if "up" in place else (HIDDEN, HIDDEN)
            found[f"model.layers.{layer}.{place}.weight"] = shape
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}


def tensors(seed: int, layers: int = LAYERS, dtype: torch.dtype = torch.float32, names=None) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=draw).to(dtype) for n, s in (names or shapes(layers)).items()}


def fine_tuned(base: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """A model near the base; what is not floating point is as in the base."""
    draw = torch.Generator().manual_seed(seed)
    moved = {n: (t.float() + torch.randn(t.shape, generator=draw) / 10).to(t.dtype) for n, t in base.items()}
    return {n: moved[n] if base[n].is_floating_point() else base[n].clone() for n in base}


def save_model(folder: Path, state: dict[str, Tensor], shards: int = 1, config=CONFIG, metadata=None, **files) -> Path:
    """Weights as the safetensors library writes them, config.json, and other files by name ("a.json" as a_json)."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(state)
    step = -(-len(names) // shards)
    weight_map = {}
    for k in range(shards):
        mine = names[k * step : (k + 1) * step]
        file = f"model-{k + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
        save_file({n: state[n] for n in mine}, folder / file, metadata={"format": "pt", **(metadata or {})})
        weight_map.update(dict.fromkeys(mine, file))
    if shards > 1:
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (folder / ".".join(name.rsplit("_", 1))).write_text(content)
    return folder


def save_family(folder: Path, num_tasks: int = 2, dtype: torch.dtype = torch.float32, layers: int = LAYERS, names=None):
    """Folders `base`, `a`, `b`, ... and what they hold."""
    base = tensors(0, layers, dtype, names)
    models = [fine_tuned(base, 10 + t) for t in range(num_tasks)]
    config = {**CONFIG, "num_hidden_layers": layers}
    save_model(folder / "base", base, config=config)
    for name, model in zip("abcdefgh", models, strict=False):
        save_model(folder / name, model, config=config)
    return base, models


def load(folder: Path) -> dict[str, Tensor]:
    """All tensors of a merged folder, by the safetensors library; an index must name exactly what the shards hold."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return _load_file(folder / "model.safetensors")
    content = json.loads(index.read_text())
    shards = {file: _load_file(folder / file) for file in sorted(set(content["weight_map"].values()))}
    assert content["weight_map"] == {name: file for file, held in shards.items() for name in held}
    found = {name: t for held in shards.values() for name, t in held.items()}
    assert content["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    return found


def _load_file(file: Path) -> dict[str, Tensor]:
    with safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder except the journal, whose lines depend on the order of events."""
    found = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != JOURNAL)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in found}


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())
