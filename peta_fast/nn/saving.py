"""Adapters to disk and back: save_adapter writes what plain PEFT loads, load_adapter what can be trained further."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from peta_fast.errors import CheckpointError, CompatibilityError, RecipeError
from peta_fast.formats.lora_config import read_object
from peta_fast.formats.peft_adapter import (
    CONFIG,
    Linearization,
    plain_config,
    read_linearization,
    read_replaced,
    write_adapter,
    write_sidecar,
)
from peta_fast.nn import base_layer
from peta_fast.nn.linear import DEFAULT, LinearizedLoRALinear
from peta_fast.nn.model import (
    fan_in_fan_out,
    freeze,
    layers,
    linearization,
    replace_module,
    some_layers,
    trained_modules,
    with_scope,
)
from peta_fast.nn.whole_model import LinearizedModel


def save_adapter(model: nn.Module, folder: Path | str, *, adapter_name: str | None = None, plain: bool = True) -> None:
    """Writes an adapter that plain PEFT loads with the same function of x, and its linearization beside it.

    folder        gets adapter_config.json, adapter_model.safetensors (rank 2r, or r where B0 = 0; the scaling folded
                  in) and linearization.safetensors; files of an earlier save are replaced
    adapter_name  None means the active one
    plain         False writes linearization.safetensors alone, as a whole-model linearization must

    Modules trained in full (modules_to_save) are written with it. A PeftModel is saved by its own save_pretrained.
    Sharded models (FSDP2) must be gathered first. Raises CompatibilityError for a whole-model linearization with
    plain=True, and for a trained base weight, RecipeError when the model is not linearized.
    """
    folder = Path(folder)
    if hasattr(model, "peft_config"):
        name = adapter_name or model.active_adapter
        model.save_pretrained(str(folder), selected_adapters=[name])
        return
    found = some_layers(model)
    name = adapter_name or the_active(found)
    content = linearization(model, name)
    check_gathered(content)
    if not plain:
        write_sidecar(folder, content)
        return
    inner = model.model if isinstance(model, LinearizedModel) else model
    kept = trained_modules(model)
    fields = {"fan_in_fan_out": fan_in_fan_out(found), "modules_to_save": list(kept) or None}
    fields["base_model_name_or_path"] = getattr(inner, "name_or_path", None) or None
    fields["lora_dropout"] = found[next(iter(content.modules))].adapter(name).dropout
    replaced = {f"{n}.{key}": tensor for n, module in kept.items() for key, tensor in module.state_dict().items()}
    names = [n for n, _ in inner.named_modules()]
    write_adapter(folder, content, plain_config(content.modules, names, **fields), replaced)


def the_active(found: dict[str, LinearizedLoRALinear]) -> str:
    active = {name for layer in found.values() for name in layer.active}
    if len(active) != 1:
        problem = f"{len(active)} adapters are active: {', '.join(sorted(active)) or 'none'}"
        raise RecipeError("save_adapter", problem, "Give adapter_name.")
    return active.pop()


def check_gathered(content: Linearization) -> None:
    """Sharded tensors would be written as if they were whole."""
    from torch.distributed.tensor import DTensor

    for name, factors in content.modules.items():
        if any(isinstance(t, DTensor) for t in (factors.delta_A, factors.delta_B)):
            raise CompatibilityError(
                name, "its adapter is sharded over several processes", "Gather it first: call unshard() on the model."
            )


def load_adapter(
    model: nn.Module, folder: Path | str, *, adapter_name: str = DEFAULT, is_trainable: bool = True
) -> nn.Module:
    """Loads what save_adapter wrote, to train it further in the same tangent space. Returns the model to use.

    model         the base model, whose modules are linearized around the stored point; or a linearized one, which gets
                  a further adapter (an adapter of that name at the same point is overwritten)
    is_trainable  False freezes what was loaded

    The loaded adapter is active. Raises CheckpointError when the folder holds no linearization.safetensors or the names
    in it do not fit the model, CompatibilityError when shapes, point or scope do not.
    """
    if hasattr(model, "peft_config"):
        raise RecipeError("load_adapter", "got a PeftModel", "Give its base model: model.get_base_model().")
    content = read_linearization(Path(folder))
    inner = model.model if isinstance(model, LinearizedModel) else model
    check_scope(model, content, str(folder))
    modules = dict(inner.named_modules())
    missing = [name for name in content.modules if name not in modules]
    if missing:
        raise CheckpointError(
            str(folder),
            f"{missing[0]!r} is not in the model; {len(missing) - 1} more names differ",
            "It belongs to another architecture.",
        )
    if not dict(layers(model)):
        freeze(inner, [])
    dropout = stored_dropout(Path(folder))
    for name, factors in content.modules.items():
        module = modules[name]
        if isinstance(module, LinearizedLoRALinear):
            put_factors(module, adapter_name, factors, dropout)
            continue
        base_layer.check_supported(module, name)
        dtype = torch.promote_types(base_layer.compute_dtype(module), torch.float32)
        layer = LinearizedLoRALinear.from_factors(
            module, factors, dropout=dropout, adapter_name=adapter_name, adapter_dtype=dtype, name=name
        )
        replace_module(inner, name, layer)
    load_replaced(inner, Path(folder), is_trainable)
    for name, layer in layers(model):
        layer.set_adapter([adapter_name] if name in content.modules else [])
        for step in (s for n in layer.active for s in layer.adapter(n).steps()):
            step.requires_grad_(is_trainable)
    return with_scope(model, content.scope)


def check_scope(model: nn.Module, content: Linearization, who: str) -> None:
    scopes = {layer.scope for _, layer in layers(model)}
    if scopes and scopes != {content.scope}:
        raise CompatibilityError(
            who,
            f"was trained with scope {content.scope!r}, the model is linearized with scope {scopes.pop()!r}",
            "Load it into the base model.",
        )


def put_factors(layer: LinearizedLoRALinear, name: str, factors, dropout: float) -> None:
    """Adds the adapter, or overwrites one of that name where the point is the same."""
    from peta_fast.nn.combine import check_same_point

    dtype = torch.promote_types(layer.compute_dtype, torch.float32)
    if name not in layer.adapter_names:
        layer.add_factors(name, factors, dropout=dropout, adapter_dtype=dtype)
        return
    present = layer.adapter(name)
    place = {"device": present.A0.device, "dtype": present.A0.dtype}
    moved = {part: None if t is None else t.to(**place) for part, t in vars(factors).items() if part in ("A0", "B0")}
    check_same_point(layer.name, name, present.factors(), "the stored one", type(factors)(**vars(factors) | moved))
    with torch.no_grad():
        for part in ("delta_A", "delta_B"):
            if getattr(present, part) is not None:
                getattr(present, part).copy_(getattr(factors, part))


def stored_dropout(folder: Path) -> float:
    file = folder / CONFIG
    value = read_object(file).get("lora_dropout") if file.is_file() else None
    if value is not None and not (type(value) in (int, float) and 0.0 <= value <= 1.0):
        raise CheckpointError(str(file), f"lora_dropout is {value!r}, expected a probability", "Save it again.")
    return float(value or 0.0)


def load_replaced(model: nn.Module, folder: Path, is_trainable: bool) -> None:
    """The modules that were trained in full: their tensors, and their being trained."""
    stored = read_replaced(folder)
    if not stored:
        return
    unknown = model.load_state_dict(stored, strict=False).unexpected_keys
    if unknown:
        raise CheckpointError(str(folder), f"{unknown[0]!r} is not in the model", "It belongs to another architecture.")
    names = dict(model.named_parameters())
    for key in stored:
        if key in names:
            names[key].requires_grad_(is_trainable)
