"""linearize, delinearize and the switches of a whole model: which modules become linearized layers, and back."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import nn

from peta_fast.errors import CompatibilityError, RecipeError
from peta_fast.formats.lora_config import pattern_value
from peta_fast.formats.peft_adapter import (
    Linearization,
    LinearizedFactors,
    no_plain_equal,
    plain_config,
    plain_factors,
    refuse_variants,
)
from peta_fast.nn import base_layer
from peta_fast.nn.adapter import AdapterSpec, LinearizedAdapter
from peta_fast.nn.groups import Groups, check_groups, group_projections
from peta_fast.nn.linear import DEFAULT, LinearizedLoRALinear
from peta_fast.nn.targets import find_targets, is_tail
from peta_fast.nn.whole_model import LinearizedModel

SCOPES = ("layer", "model")
PETA_SEED = 42
"""The authors' experiments draw every task's adapter from it, so that all start from one point."""


def linearize(
    model: nn.Module,
    target_modules: Collection[str] | str | None = None,
    *,
    r: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    init: str = "lora",
    seed: int | None = PETA_SEED,
    rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    modules_to_save: Collection[str] = (),
    scope: str = "layer",
    adapter_name: str = DEFAULT,
    autocast_adapter_dtype: bool = True,
    groups: Groups = None,
) -> nn.Module:
    """Replaces the targeted Linears by linearized LoRA layers, in place, and returns the model to train.

        model = linearize(model, ["q_proj", "v_proj"], r=16, alpha=32)

    model            any module with nn.Linear, Conv1D or bitsandbytes 4-bit layers; or a PeftModel with plain LoRA,
                     which is linearized around its adapters and stays a PeftModel: give nothing else but `scope`
    target_modules   names, their tails, a regular expression, or "all-linear", as PEFT reads them
    r, alpha, dropout, init, seed, rslora   see AdapterSpec; the seed is combined with each module's name
    rank_pattern, alpha_pattern   end of a module's name (a regular expression) -> its r or alpha
    modules_to_save  modules that are trained in full (a classifier); everything else is frozen
    scope            "layer": every layer is linear in its own step; trains as any model does.
                     "model": f(x; phi0) + J (phi - phi0), linear in all steps at once; see LinearizedModel
    autocast_adapter_dtype   adapters of a bf16 or fp16 model are kept in fp32, as PEFT does: small steps survive

    groups           siblings that take the same x, computed together: [["q_proj", "k_proj", "v_proj"], ...], or "auto"
                     to find them; see groups.py for when they step aside. None: each layer alone, bit for bit as before

    A model that is linearized already gets a further adapter under another adapter_name; set_adapter makes it active.
    Weight decay acts on the steps: it pulls towards the linearization point.
    Raises RecipeError for names that match nothing and for parameters that do not fit, CompatibilityError for modules
    that cannot be linearized (embeddings, nn.MultiheadAttention's projection, DoRA and other variants).
    """
    if scope not in SCOPES:
        raise RecipeError("linearize", f"scope is {scope!r}, expected 'layer' or 'model'")
    if hasattr(model, "peft_config"):
        if groups is not None:
            group_projections(model, groups)
        return linearize_peft(model, target_modules, scope)
    check_groups(groups)
    inner = model.model if isinstance(model, LinearizedModel) else model
    others = {layer.scope for _, layer in layers(inner)} - {scope}
    if others:
        raise RecipeError(
            "linearize", f"scope is {scope!r}, the model has layers of scope {others.pop()!r}", "Keep one."
        )
    if target_modules is None:
        raise RecipeError("linearize", "target_modules is missing", "Name the Linear modules, or give 'all-linear'.")
    targets = find_targets(inner, target_modules)
    for name, module in targets.items():
        if not isinstance(module, LinearizedLoRALinear):
            base_layer.check_supported(module, name)
    check_patterns(rank_pattern, targets, "rank_pattern")
    check_patterns(alpha_pattern, targets, "alpha_pattern")
    specs = {}
    for name, module in targets.items():
        rank, own_alpha = pattern_value(rank_pattern, name, r), pattern_value(alpha_pattern, name, alpha)
        specs[name] = AdapterSpec(
            rank, own_alpha, dropout, init, seed, rslora, adapter_dtype(module, autocast_adapter_dtype)
        )
        specs[name].check(name, *base_layer.features(module))
    kept = trained_in_full(inner, modules_to_save, targets)
    freeze(inner, kept)
    for name, module in targets.items():
        put_adapter(inner, name, module, specs[name], adapter_name)
    if groups is not None:
        group_projections(inner, groups)
    return with_scope(model, scope)


def adapter_dtype(module: nn.Module, autocast: bool) -> torch.dtype:
    dtype = base_layer.compute_dtype(module)
    return torch.promote_types(dtype, torch.float32) if autocast else dtype


def check_patterns(patterns: Mapping[str, object] | None, targets: Mapping[str, nn.Module], who: str) -> None:
    """A pattern that matches nothing is a typing error."""
    for key in patterns or {}:
        if not any(pattern_value({key: True}, name, False) for name in targets):
            raise RecipeError(who, f"{key!r} matches none of the targeted modules", f"They are {', '.join(targets)}.")


def trained_in_full(model: nn.Module, tails: Collection[str], targets: Mapping[str, nn.Module]) -> list[nn.Module]:
    modules = dict(model.named_modules())
    chosen = []
    for tail in tails:
        found = {n: m for n, m in modules.items() if is_tail(tail, n)}
        clash = [n for n in targets if any(n == f or n.startswith(f"{f}.") for f in found)]
        if not found or clash:
            problem = f"{tail!r} holds the targeted {clash[0]!r}" if clash else f"no module matches {tail!r}"
            raise RecipeError("modules_to_save", problem, "Name modules that target_modules does not reach.")
        chosen += found.values()
    return chosen


def freeze(model: nn.Module, kept: Collection[nn.Module]) -> None:
    """Freezes everything but the given modules, and leaves adapters that are there as they are."""
    steps = {id(s) for _, layer in layers(model) for name in layer.adapter_names for s in layer.adapter(name).steps()}
    for parameter in model.parameters():
        if id(parameter) not in steps:
            parameter.requires_grad_(False)
    for module in kept:
        module.requires_grad_(True)


def put_adapter(model: nn.Module, name: str, module: nn.Module, spec: AdapterSpec, adapter_name: str) -> None:
    """Replaces the module by a linearized layer, or adds the adapter to one."""
    if isinstance(module, LinearizedLoRALinear):
        module.add_adapter(adapter_name, spec)
        return
    layer = LinearizedLoRALinear.from_linear(
        module, r=spec.r, alpha=spec.alpha, dropout=spec.dropout, init=spec.init, seed=spec.seed, rslora=spec.rslora,
        adapter_dtype=spec.dtype, adapter_name=adapter_name, name=name,
    )  # fmt: skip
    replace_module(model, name, layer)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def with_scope(model: nn.Module, scope: str) -> nn.Module:
    for _, layer in layers(model):
        layer.scope = scope
    if scope == "layer":
        return model.model if isinstance(model, LinearizedModel) else model
    return model if isinstance(model, LinearizedModel) else LinearizedModel(model)


def linearize_peft(model: nn.Module, target_modules, scope: str) -> nn.Module:
    """A PeftModel around its own adapters: in place for scope "layer"; unwrapped for scope "model", which PEFT has no
    form for."""
    from peta_fast.nn import peft_layer

    if target_modules is not None:
        raise RecipeError(
            "linearize", "got a PeftModel and target_modules", "A PeftModel's own adapters say which modules."
        )
    for name, config in model.peft_config.items():
        refuse_variants(config.to_dict(), f"adapter {name!r}")
    if scope == "layer":
        return peft_layer.linearize_in_place(model)
    return with_scope(peft_layer.unwrapped(model), scope)


def layers(model: nn.Module) -> Iterator[tuple[str, LinearizedLoRALinear]]:
    """The linearized layers of a model by their names in it; a LinearizedModel's inner model gives the names."""
    inner = model.model if isinstance(model, LinearizedModel) else model
    return ((n, m) for n, m in inner.named_modules() if isinstance(m, LinearizedLoRALinear))


def some_layers(model: nn.Module) -> dict[str, LinearizedLoRALinear]:
    """As layers(); raises RecipeError when there are none."""
    found = dict(layers(model))
    if not found:
        raise RecipeError(type(model).__name__, "has no linearized layers", "Call linearize(model, ...) first.")
    return found


def set_adapter(model: nn.Module, names: str | Sequence[str]) -> None:
    """Makes these adapters active in every layer that has them; the others' layers run plain.

    Raises RecipeError when no layer has one of them.
    """
    if hasattr(model, "peft_config"):
        model.base_model.set_adapter(names if isinstance(names, str) else list(names))
        return
    wanted = (names,) if isinstance(names, str) else tuple(names)
    found = some_layers(model)
    for name in wanted:
        if not any(name in layer.adapter_names for layer in found.values()):
            known = sorted({n for layer in found.values() for n in layer.adapter_names})
            raise RecipeError("set_adapter", f"no layer has an adapter {name!r}", f"There are {', '.join(known)}.")
    for layer in found.values():
        layer.set_adapter([name for name in wanted if name in layer.adapter_names])


@contextlib.contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Inside, the model is the base model."""
    with contextlib.ExitStack() as stack:
        if hasattr(model, "peft_config"):
            stack.enter_context(model.disable_adapter())
        else:
            for layer in some_layers(model).values():
                stack.enter_context(layer.disable_adapter())
        yield


def linearization(model: nn.Module, adapter_name: str) -> Linearization:
    """The adapter's tensors of all layers that have it. Raises RecipeError when none has."""
    found = {n: la for n, la in some_layers(model).items() if adapter_name in la.adapter_names}
    if not found:
        known = sorted({n for la in some_layers(model).values() for n in la.adapter_names})
        raise RecipeError(type(model).__name__, f"has no adapter {adapter_name!r}", f"There are {', '.join(known)}.")
    scope = next(iter(found.values())).scope
    return Linearization({n: layer.adapter(adapter_name).factors() for n, layer in found.items()}, scope)


def base_layers(model: nn.Module) -> nn.Module:
    """Puts plain Linears (or what was there) back in the place of linearized layers, sharing their weights."""
    for name, layer in list(layers(model)):
        if layer.merged:
            layer.unmerge()
        replace_module(model, name, plain_layer(layer))
    return model


def plain_layer(layer: LinearizedLoRALinear) -> nn.Module:
    """A layer of the type that was linearized, with the same weight and bias."""
    plain = layer.base_type.__new__(layer.base_type)
    plain.__dict__.update(layer.base_state)
    plain._parameters = {"weight": layer.weight, "bias": layer.bias}
    return plain.train(layer.training)


def delinearize(model: nn.Module) -> nn.Module:
    """Back to plain PEFT: the same function of x, as a PeftModel whose adapters have rank 2r (r where B0 = 0).

    A PeftModel stays one. What comes back can no longer be trained in the tangent space.
    Raises CompatibilityError for a whole-model linearization, which has no such equal.
    """
    if hasattr(model, "peft_config"):
        from peta_fast.nn import peft_layer

        return peft_layer.delinearize_in_place(model)
    if isinstance(model, LinearizedModel):
        raise no_plain_equal("delinearize")
    from peft import LoraConfig, get_peft_model

    found = some_layers(model)
    active = list(next(iter(found.values())).active)
    present = dict.fromkeys(name for layer in found.values() for name in layer.adapter_names)
    adapters = {name: linearization(model, name).modules for name in present}
    kept = list(trained_modules(model))
    training, plain = model.training, base_layers(model)
    names = [name for name, _ in plain.named_modules()]
    result = None
    for adapter_name, modules in adapters.items():
        fields = plain_config(modules, names, fan_in_fan_out=fan_in_fan_out(found), modules_to_save=kept or None)
        config = LoraConfig(**{k: v for k, v in fields.items() if k != "peft_type"} | {"inference_mode": False})
        if result is None:
            result = get_peft_model(plain, config, adapter_name=adapter_name)
        else:
            result.add_adapter(adapter_name, config)
        fill_plain(result, adapter_name, modules)
    result.base_model.set_adapter(active or list(adapters)[:1])
    return result.train(training)


@torch.no_grad()
def fill_plain(peft_model: nn.Module, adapter_name: str, modules: Mapping[str, LinearizedFactors]) -> None:
    """Writes the plain form into a PeftModel's LoRA layers of the same modules."""
    for name, factors in modules.items():
        layer = peft_model.get_base_model().get_submodule(name)
        for part, value in zip((layer.lora_A, layer.lora_B), plain_factors(factors), strict=True):
            part[adapter_name].weight.copy_(value)


def trained_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules outside of adapters whose own parameters are trained: PEFT's modules_to_save.

    Raises CompatibilityError where the base weight or bias of a linearized layer is trained, which no adapter can hold.
    """
    inner = model.model if isinstance(model, LinearizedModel) else model
    found = {}
    for name, module in inner.named_modules():
        own = [n for n, p in module.named_parameters(recurse=False) if p.requires_grad]
        if isinstance(module, LinearizedLoRALinear):
            own = [n for n in own if n in ("weight", "bias")]
            if own:
                problem = f"its {' and '.join(own)} is trained, which an adapter's file cannot hold"
                raise CompatibilityError(name, problem, "Freeze it, or save the whole model.")
        elif own and not isinstance(module, LinearizedAdapter):
            found[name] = module
    return found


def fan_in_fan_out(found: Mapping[str, LinearizedLoRALinear]) -> bool:
    """PEFT's flag for Conv1D, one for all modules; PEFT corrects it by module where they are mixed."""
    return all(layer.fan_in_fan_out for layer in found.values())
