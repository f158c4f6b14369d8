"""Linearized layers inside a PeftModel: PEFT creates, switches, trains and saves them, and what it saves is plain PEFT.

    model = get_peft_model(model, register(LoraConfig(r=16, target_modules=["query", "value"])))

With B0 = 0, PEFT's default, lora_A is frozen and lora_B is the step from zero: names, shapes and scaling are those of
plain LoRA as they stand. With B0 != 0 lora_A and lora_B each hold a point, stored as [1, ...] so that plain PEFT
refuses it by its shape instead of loading half of the truth, and a step; peft_config.py rewrites what save_pretrained
has written.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from peta_fast.errors import CompatibilityError, RecipeError
from peta_fast.formats.peft_adapter import LinearizedFactors, plain_factors, rank_fields, refuse_variants
from peta_fast.nn import base_layer, reentrant
from peta_fast.nn.adapter import stack, weight_change
from peta_fast.nn.linear import LinearizedLoRALinear
from peta_fast.nn.peft_config import as_linearized, plain_copy
from peta_fast.ops.linearized_lora import linearized_lora

PLAIN_LAYERS = ("peft.tuners.lora.layer.Linear", "peft.tuners.lora.bnb.Linear4bit")


class Point(nn.Module):
    """lora_A where B0 = 0: frozen, so a buffer."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.register_buffer("weight", weight)


class Step(nn.Module):
    """lora_B where B0 = 0: trainable, zero at the start."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)


class PointAndStep(nn.Module):
    """lora_A or lora_B around a point that is not zero: buffer `weight` [1, *shape], parameter `step` [*shape].

    scaling  None for lora_A; for lora_B the layer's, by which the plain form has multiplied it
    """

    def __init__(self, point: Tensor, step: Tensor, scaling: float | None):
        super().__init__()
        self.register_buffer("weight", point[None])
        self.step = nn.Parameter(step)
        self.scaling = scaling

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        """Takes the plain form too: [A0; dA] [2r, in], or s [B | B0] [out, 2r], from which dB comes back rounded."""
        stored = state_dict.get(f"{prefix}weight")
        if stored is not None and stored.dim() == 2 and stored.shape == self._plain_shape():
            if self.scaling is None:
                point, step = stored.chunk(2, 0)
            else:
                both, point = (stored / self.scaling).chunk(2, 1)
                step = both - point
            state_dict[f"{prefix}weight"], state_dict[f"{prefix}step"] = point[None], step
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _plain_shape(self) -> tuple[int, int]:
        rows, columns = self.step.shape
        return (2 * rows, columns) if self.scaling is None else (rows, 2 * columns)


class LinearizedLoraLayer(nn.Module, LoraLayer):
    """A PEFT LoRA layer that is linear in its steps; x [*, in] -> [*, out].

    Arguments as PEFT gives them to a custom module. Raises CompatibilityError for layers that are not Linear
    (embeddings among them), for variants (DoRA, ...), and for adapters from a config that does not know this layer.
    """

    def __init__(
        self, base: nn.Module, adapter_name: str, config: LoraConfig | None = None, r: int = 0, lora_alpha: float = 1,
        **kwargs: Any,
    ):  # fmt: skip
        super().__init__()
        self.name = kwargs.get("target_name", "") or type(self).__name__
        base_layer.check_supported(base, self.name)
        LoraLayer.__init__(self, base)
        self.in_features, self.out_features = base_layer.features(base)
        self.fan_in_fan_out = base_layer.is_conv1d(base)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig | None = None, **kwargs: Any
    ) -> None:
        check_config(config, adapter_name, self.name)
        config.fan_in_fan_out = self.fan_in_fan_out
        if not 0 < r <= max(self.in_features, self.out_features):
            problem = f"r is {r!r}, expected an integer from 1 to {max(self.in_features, self.out_features)}"
            raise RecipeError(self.name, problem, "Choose a rank below the layer's sides.")
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
        self._linearize(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _linearize(self, adapter_name: str) -> None:
        """Takes the adapter's present value as the point."""
        A, B = self.lora_A[adapter_name].weight.detach(), self.lora_B[adapter_name].weight.detach()
        if A.is_meta:
            raise CompatibilityError(
                self.name, "its adapter is on the meta device", "Leave low_cpu_mem_usage at False."
            )
        if B.any():
            self.lora_A[adapter_name] = PointAndStep(A, torch.zeros_like(A), None)
            self.lora_B[adapter_name] = PointAndStep(B, torch.zeros_like(B), self.scaling[adapter_name])
        else:
            self.lora_A[adapter_name], self.lora_B[adapter_name] = Point(A), Step(torch.zeros_like(B))

    def factors(self, adapter_name: str) -> LinearizedFactors:
        A, B, scaling = self.lora_A[adapter_name], self.lora_B[adapter_name], self.scaling[adapter_name]
        alpha, rslora = self.lora_alpha[adapter_name], self.use_rslora.get(adapter_name, False)
        if isinstance(A, Point):
            return LinearizedFactors(A.weight, None, None, B.weight, scaling, alpha, rslora)
        return LinearizedFactors(A.weight[0], B.weight[0], A.step, B.step, scaling, alpha, rslora)

    @torch.no_grad()
    def set_factors(self, adapter_name: str, factors: LinearizedFactors) -> None:
        """Copies in another point and step."""
        A0, dB = factors.A0.clone(), factors.delta_B.detach().clone()
        if factors.B0 is None or factors.delta_A is None:
            self.lora_A[adapter_name], self.lora_B[adapter_name] = Point(A0), Step(dB)
        else:
            self.lora_A[adapter_name] = PointAndStep(A0, factors.delta_A.detach().clone(), None)
            self.lora_B[adapter_name] = PointAndStep(factors.B0.clone(), dB, factors.scaling)
        self.scaling[adapter_name] = factors.scaling
        self.set_adapter(self.active_adapters)

    def dropout_of(self, adapter_name: str) -> float:
        return float(getattr(self.lora_dropout[adapter_name], "p", 0.0))

    def get_delta_weight(self, adapter: str) -> Tensor:
        """dW, in the layout of the base weight, in its dtype."""
        change = weight_change(self.factors(adapter))
        return (change.t() if self.fan_in_fan_out else change).to(self.get_base_layer().weight.dtype)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        base = self.get_base_layer()
        if base_layer.is_quantized(base):
            raise CompatibilityError(self.name, "cannot merge into a quantized weight", "Keep the adapter beside it.")
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.lora_A:
                merged = base.weight + self.get_delta_weight(name)
                if safe_merge and not merged.isfinite().all():
                    raise CompatibilityError(self.name, f"adapter {name!r} makes weights that are not finite")
                base.weight.data = merged
                self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtracts what merge added, as PEFT does."""
        base = self.get_base_layer()
        while self.merged_adapters:
            base.weight.data = base.weight - self.get_delta_weight(self.merged_adapters.pop())

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("adapter_names") is not None:
            raise CompatibilityError(
                self.name, "got adapter_names, a different adapter for every row", "Run one adapter at a time."
            )
        base = self.get_base_layer()
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not names:
            if self.disable_adapters and self.merged:
                self.unmerge()
            return base(x, *args)
        f = stack([self.factors(name) for name in names])
        if self.training and not torch.is_grad_enabled():
            reentrant.refuse_lost_gradients(self.name, x, f.delta_B)
        weight = base_layer.matrix(base)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(weight.dtype)
        return linearized_lora(
            x, weight, base.bias, f.A0, f.delta_A, f.B0, f.delta_B, f.scaling, dropout=self._dropout(names),
            training=self.training,
        )  # fmt: skip

    def _dropout(self, names: Sequence[str]) -> float:
        found = {self.dropout_of(name) for name in names}
        if len(found) > 1 and self.training:
            raise RecipeError(self.name, f"the adapters {', '.join(names)} differ in their dropout", "Train one.")
        return found.pop()


def check_config(config: LoraConfig | None, adapter_name: str, who: str) -> None:
    """Refuses configs in which this layer is not registered; a plain LoraConfig in which it is learns to save it."""
    if config is None:
        raise CompatibilityError(who, "got no config from PEFT", "Update PEFT: 0.21 passes it to custom modules.")
    if LinearizedLoraLayer not in (getattr(config, "_custom_modules", None) or {}).values():
        raise CompatibilityError(
            f"adapter {adapter_name!r}",
            "its LoraConfig knows nothing of linearized layers (one that was read from a file or copied never does)",
            "For a new adapter: add_adapter(name, peta_fast.register(config)). For the sum of adapters: "
            "peta_fast.add_adapters(model, {name: weight}, new_name).",
        )
    refuse_variants(config.to_dict(), f"adapter {adapter_name!r}")
    as_linearized(config)


def register(config: LoraConfig) -> LoraConfig:
    """Makes get_peft_model and add_adapter build linearized layers from this config. Returns the same config.

    save_pretrained, and with it the Trainer's checkpoints, then write the exact plain form and its linearization.
    Raises CompatibilityError for DoRA and other variants, by name.
    """
    refuse_variants(config.to_dict(), "LoraConfig")
    config._register_custom_module({nn.Module: LinearizedLoraLayer})
    return as_linearized(config)


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The LoRA layers of a PeftModel by their names in the base model."""
    return {name: m for name, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}


def linearized_layers(model: nn.Module) -> dict[str, LinearizedLoraLayer]:
    found = {n: m for n, m in lora_layers(model).items() if isinstance(m, LinearizedLoraLayer)}
    if not found:
        raise RecipeError(type(model).__name__, "has no linearized layers", "Call linearize(model) first.")
    return found


def points_of(layer: nn.Module, name: str) -> dict[str, tuple[LinearizedFactors, float]]:
    """Adapter -> its present value as a point, and its dropout, of a plain PEFT layer.

    Raises CompatibilityError for other layers, for variants, and for merged ones.
    """
    who, kind = name or "from_peft", f"{type(layer).__module__}.{type(layer).__name__}"
    if isinstance(layer, LinearizedLoraLayer):
        raise CompatibilityError(who, "is linearized already")
    if kind not in PLAIN_LAYERS:
        raise CompatibilityError(who, f"is a {kind}, expected PEFT's LoRA Linear", "Only Linear layers are linearized.")
    base_layer.check_supported(layer.get_base_layer(), who)
    if layer.merged:
        raise CompatibilityError(who, "has merged adapters", "Call unmerge_adapter() first.")
    for adapter in layer.lora_A:
        variant = layer.lora_variant.get(adapter)
        if variant is not None or layer.lora_bias.get(adapter) or layer.use_dora.get(adapter):
            found = type(variant).__name__ if variant is not None else "lora_bias"
            raise CompatibilityError(who, f"adapter {adapter!r} is no plain LoRA: {found}", "Convert it to LoRA first.")
    return {adapter: (point_of(layer, adapter), dropout_of(layer, adapter)) for adapter in layer.lora_A}


def point_of(layer: LoraLayer, adapter: str) -> LinearizedFactors:
    A, B = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
    step_A, B0 = (torch.zeros_like(A), B) if B.any() else (None, None)
    scaling, alpha = layer.scaling[adapter], layer.lora_alpha[adapter]
    return LinearizedFactors(A, B0, step_A, torch.zeros_like(B), scaling, alpha, layer.use_rslora.get(adapter, False))


def dropout_of(layer: LoraLayer, adapter: str) -> float:
    return float(getattr(layer.lora_dropout[adapter], "p", 0.0))


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def linearize_in_place(model: nn.Module) -> nn.Module:
    """Every LoRA layer of the PeftModel around its own adapters."""
    plain = {n: m for n, m in lora_layers(model).items() if not isinstance(m, LinearizedLoraLayer)}
    for name, layer in plain.items():
        points_of(layer, name)
    for config in model.peft_config.values():
        register(config)
    for name, layer in plain.items():
        put(model.get_base_model(), name, around(layer, name))
    return model


def around(layer: LoraLayer, name: str) -> LinearizedLoraLayer:
    """A linearized layer with the adapters of a plain one, which gives up its parts."""
    new = LinearizedLoraLayer.__new__(LinearizedLoraLayer)
    nn.Module.__init__(new)
    LoraLayer.__init__(new, layer.get_base_layer())
    for part in (
        "r",
        "lora_alpha",
        "scaling",
        "use_rslora",
        "lora_bias",
        "use_dora",
        "lora_dropout",
        "lora_A",
        "lora_B",
    ):
        setattr(new, part, getattr(layer, part))
    new.name, new.fan_in_fan_out = name, base_layer.is_conv1d(layer.get_base_layer())
    for adapter in list(layer.lora_A):
        new._linearize(adapter)
    trained = any(p.requires_grad for n in layer.active_adapters if n in layer.r for p in layer.lora_B[n].parameters())
    new.set_adapter(layer.active_adapters, inference_mode=not trained)
    return new.train(layer.training)


def unwrapped(model: nn.Module) -> nn.Module:
    """The base model with standalone linearized layers around the PeftModel's adapters, without PEFT."""
    base = model.get_base_model()
    for name, module in base.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise CompatibilityError(
                name, "is trained in full beside the adapters (modules_to_save)", "Merge it into the base model first."
            )
    for name, layer in lora_layers(model).items():
        put(base, name, LinearizedLoRALinear.from_peft(layer, name=name))
    return base


def task_vector(model: nn.Module, adapter_name: str | None) -> dict[str, Tensor]:
    """Copies of the steps of an adapter; None means the active one."""
    name = adapter_name or model.active_adapter
    steps = {}
    for module, layer in linearized_layers(model).items():
        if name in layer.lora_A:
            factors = layer.factors(name)
            parts = {"delta_A": factors.delta_A, "delta_B": factors.delta_B}
            steps |= {f"{module}.{part}": t.detach().clone() for part, t in parts.items() if t is not None}
    return steps


def add_adapters(model: nn.Module, weights: Mapping[str, float], adapter_name: str) -> None:
    """combine.add_adapters for a PeftModel."""
    from peta_fast.nn.combine import weighted_sum

    layers, sums = linearized_layers(model), {}
    for module, layer in layers.items():
        terms = {name: layer.factors(name) for name in weights if name in layer.lora_A}
        if terms:
            sums[module] = weighted_sum(module, terms, weights)
    unknown = [name for name in weights if name not in model.peft_config]
    if unknown or adapter_name in model.peft_config:
        problem = f"has no adapter {unknown[0]!r}" if unknown else f"already has an adapter {adapter_name!r}"
        raise RecipeError("add_adapters", problem, f"There are {', '.join(model.peft_config)}.")
    model.add_adapter(adapter_name, copy.deepcopy(model.peft_config[next(iter(weights))]))
    for module, total in sums.items():
        layers[module].set_factors(adapter_name, total)


def delinearize_in_place(model: nn.Module) -> nn.Module:
    """Plain LoRA layers with the same function of x, of rank 2r (r where B0 = 0), and configs that say so."""
    found = linearized_layers(model)
    for name, config in list(model.peft_config.items()):
        ranks = {n: layer.r[name] * (1 + isinstance(layer.lora_A[name], PointAndStep))
                 for n, layer in found.items() if name in layer.lora_A}  # fmt: skip
        plain = plain_copy(config)
        for field, value in rank_fields(ranks).items():
            setattr(plain, field, value)
        model.peft_config[name] = plain
    for name, layer in found.items():
        put(model.get_base_model(), name, plain_layer(layer, model.peft_config))
    return model


@torch.no_grad()
def plain_layer(layer: LinearizedLoraLayer, configs: dict[str, LoraConfig]) -> nn.Module:
    from peft.tuners.lora.layer import Linear

    plain = None
    for name in layer.lora_A:
        A, B = plain_factors(layer.factors(name))
        rank, config = A.shape[0], configs[name]
        if plain is None:
            plain = Linear(layer.get_base_layer(), name, config=config, r=rank, lora_alpha=rank)
        else:
            plain.update_layer(name, rank, lora_alpha=rank, config=config)
        place = {"device": layer.lora_B[name].weight.device, "dtype": A.dtype}
        plain.lora_A[name].weight.data, plain.lora_B[name].weight.data = A.to(**place), B.to(**place)
    plain.set_adapter(layer.active_adapters)
    return plain.train(layer.training)
