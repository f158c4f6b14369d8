"""Small base models on disk, adapters on them as PEFT writes them, and the fp64 truth about what an adapter changes."""

from __future__ import annotations

import copy
import json
import math
import re
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from small_models import Transformer, transformer
from torch import Tensor, nn

QV = ["q_proj", "v_proj"]


def save_base(folder: Path, model: nn.Module | None = None, dtype: torch.dtype = torch.float32, config=None) -> Path:
    """A checkpoint's folder: the small transformer unless told."""
    folder.mkdir(parents=True, exist_ok=True)
    state = (transformer() if model is None else model).state_dict()
    save_file({n: t.to(dtype).contiguous() for n, t in state.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "small"} | (config or {})))
    return folder


def save_peft(folder: Path, model: nn.Module | None = None, seed: int = 1, dtype=torch.float32, **fields) -> Path:
    """An adapter with random factors, written by PEFT itself; its base's name is "small-base" unless told."""
    save_model(peft_model(model, seed, dtype, **fields), folder)
    name = fields.get("base", "small-base")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": name}))
    return folder


def save_model(model: nn.Module, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(str(folder))


def peft_model(model: nn.Module | None = None, seed: int = 1, dtype=torch.float32, **fields) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    fields = {"r": 3, "lora_alpha": 6, "target_modules": QV} | {k: v for k, v in fields.items() if k != "base"}
    model = copy.deepcopy(transformer(torch.float32) if model is None else model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = get_peft_model(model.to(dtype), LoraConfig(**fields))
    return randomized(found, seed)


def randomized(model: nn.Module, seed: int) -> nn.Module:
    """All trained parameters of a PeftModel drawn anew, factors at a size that changes the outputs."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
    return model.eval()


def stored(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def config_of(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def change_config(folder: Path, **fields) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(config_of(folder) | fields))


def change_tensors(folder: Path, change) -> None:
    """change(dict of tensors) edits it in place, or returns another."""
    tensors = stored(folder)
    changed = change(tensors)
    tensors = changed if isinstance(changed, dict) else tensors
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "adapter_model.safetensors", {"format": "pt"})


def exact_deltas(folder: Path) -> dict[str, Tensor]:
    """Module -> scaling B A [out, in] in fp64, read from the files by the format's words; (B A)^T for embeddings."""
    config, tensors = config_of(folder), stored(folder)
    found = {}
    for key, A in tensors.items():
        if not re.search(r"\.lora_(embedding_)?A", key):
            continue
        name = re.sub(r"\.lora_(embedding_)?A.*", "", key.removeprefix("base_model.model."))
        B = tensors[key.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")]
        r = A.shape[0]
        alpha = next(
            (v for k, v in (config["alpha_pattern"] or {}).items() if re.match(rf"(.*\.)?({k})$", name)),
            config["lora_alpha"],
        )
        scaling = alpha / math.sqrt(r) if config["use_rslora"] else alpha / r
        delta = scaling * B.double().flatten(1) @ A.double().flatten(1)
        found[name] = delta.T if "embedding" in key else delta
    return found


def largest_difference(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


def in_plain_peft(folder: Path, model: nn.Module | None = None) -> nn.Module:
    """What PEFT itself makes of the folder, on the base model."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformer(torch.float32) if model is None else model
        return PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval()


def loaded(folder: Path, model: nn.Module | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The network with the weights of a checkpoint's folder; every name must be there."""
    model = Transformer() if model is None else copy.deepcopy(model)
    model.to(dtype).load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()
