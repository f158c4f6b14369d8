"""A Linear with adapters in their tangent space: a drop-in that keeps `weight` and `bias` under their names.

    y = x W0ᵀ + b + s · [(D(x) A0ᵀ) (B0 + dB)ᵀ + (D(x) dAᵀ) B0ᵀ]        D: dropout, on the adapter's branch alone

Cost and kernels: peta_fast.ops.linearized_lora. Source: Tang et al., ICLR 2024, arXiv:2310.04742.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from peta_fast.errors import CompatibilityError, RecipeError
from peta_fast.formats.peft_adapter import LinearizedFactors
from peta_fast.nn import base_layer, reentrant, whole_model
from peta_fast.nn.adapter import AdapterSpec, LinearizedAdapter, stack, weight_change
from peta_fast.ops.linearized_lora import linearized_lora

DEFAULT = "default"


class LinearizedLoRALinear(LinearizedAdapter):
    """x [*, in] -> [*, out], linear in the trainable parameters delta_A and delta_B.

        layer = LinearizedLoRALinear(768, 768, r=16, alpha=32)
        layer = LinearizedLoRALinear.from_linear(linear, r=16, alpha=32)      # shares weight and bias with `linear`

    weight [out, in] ([in, out] from a Conv1D) and bias [out]: frozen
    A0 [r, in], B0 [out, r]            buffers: the point of linearization; B0 is None where it is zero
    delta_A [r, in], delta_B [out, r]  parameters, zero at the start; delta_A is None where B0 = 0

    The adapter made with the layer lies in the layer itself, further ones in `adapters`, by name. `init`, `seed`,
    `rslora`, `alpha`, `dropout`: see AdapterSpec. `dtype` is that of all tensors; in from_linear adapter_dtype is the
    adapter's own (training in bf16 wants it fp32, as small steps are lost otherwise).

    Weight decay acts on the parameters, so it pulls towards the linearization point, not towards zero weights.
    Raises RecipeError for a rank that does not fit, CompatibilityError for inputs that do not.
    """

    group = None
    """(ProjectionGroup, place in it) where siblings that take the same x are computed together; see groups.py."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        r: int,
        alpha: float,
        bias: bool = True,
        dropout: float = 0.0,
        init: str = "lora",
        seed: int | None = None,
        rslora: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        nn.Module.__init__(self)
        spec = AdapterSpec(r, alpha, dropout, init, seed, rslora)
        spec.check(type(self).__name__, in_features, out_features)
        linear = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._take_base(linear, type(self).__name__, DEFAULT)
        self._take_spec(spec)
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        r: int,
        alpha: float,
        dropout: float = 0.0,
        init: str = "lora",
        seed: int | None = None,
        rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        adapter_name: str = DEFAULT,
        name: str = "",
    ) -> LinearizedLoRALinear:
        """Around an nn.Linear, a Conv1D or a bitsandbytes Linear4bit, whose parameters it shares and freezes.

        name  the module's in its model: for errors, and so that modules of one seed differ
        Raises CompatibilityError for other modules (embeddings among them), RecipeError for a rank that does not fit.
        """
        spec = AdapterSpec(r, alpha, dropout, init, seed, rslora, adapter_dtype)
        layer = cls._around(linear, name, adapter_name)
        spec.check(layer.name, layer.in_features, layer.out_features)
        layer._take_spec(spec)
        return layer

    @classmethod
    def from_factors(
        cls, linear: nn.Module, factors: LinearizedFactors, *, dropout: float = 0.0, adapter_name: str = DEFAULT,
        adapter_dtype: torch.dtype | None = None, name: str = "",
    ) -> LinearizedLoRALinear:  # fmt: skip
        """Around a Linear, at a given point and step."""
        layer = cls._around(linear, name, adapter_name)
        layer._take_factors(layer, factors, dropout, adapter_dtype)
        return layer

    @classmethod
    def from_peft(cls, lora_layer: nn.Module, *, name: str = "") -> LinearizedLoRALinear:
        """Linearized around the adapters of a PEFT LoRA layer: A0 = lora_A, B0 = lora_B, steps of zero.

        All adapters are taken, under their names; the active ones stay active. Where lora_B is zero, B0 = 0.
        Raises CompatibilityError for DoRA and other variants, and for a layer that is merged.
        """
        from peta_fast.nn.peft_layer import points_of

        points = points_of(lora_layer, name)
        (first, (factors, dropout)), *others = points.items()
        dtype = factors.A0.dtype
        layer = cls.from_factors(
            lora_layer.get_base_layer(), factors, dropout=dropout, adapter_name=first, adapter_dtype=dtype, name=name
        )
        for other, (factors, dropout) in others:
            layer.add_factors(other, factors, dropout=dropout, adapter_dtype=factors.A0.dtype)
        layer.set_adapter([a for a in lora_layer.active_adapters if a in points])
        layer.train(lora_layer.training)
        return layer

    @classmethod
    def _around(cls, linear: nn.Module, name: str, adapter_name: str) -> LinearizedLoRALinear:
        who = name or cls.__name__
        base_layer.check_supported(linear, who)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._take_base(linear, name, adapter_name)
        for parameter in (layer.weight, layer.bias):
            if parameter is not None:
                parameter.requires_grad_(False)
        return layer.train(linear.training)

    def _take_base(self, linear: nn.Module, name: str, adapter_name: str) -> None:
        self.name = name or type(self).__name__
        self.in_features, self.out_features = base_layer.features(linear)
        self.fan_in_fan_out = base_layer.is_conv1d(linear)
        self.quantized = base_layer.is_quantized(linear)
        self.base_type = type(linear)
        self.base_state = {k: v for k, v in vars(linear).items() if k != "_parameters"}
        self.compute_dtype = base_layer.compute_dtype(linear)
        self.weight = linear.weight
        self.bias = getattr(linear, "bias", None)
        self.scope = "layer"
        self.adapter_name = checked_name(adapter_name, self.name)
        self.active: tuple[str, ...] = (adapter_name,)
        self._disabled = False
        self._unmerged: Tensor | None = None

    def _take_spec(self, spec: AdapterSpec) -> None:
        A0, B0 = self._draw(spec)
        self._set_point(A0, B0, self.out_features, alpha=spec.alpha, rslora=spec.rslora, dropout=spec.dropout)
        self.adapters = nn.ModuleDict()

    def _draw(self, spec: AdapterSpec) -> tuple[Tensor, Tensor | None]:
        place = {"device": self.weight.device, "dtype": spec.dtype or self._float_dtype()}
        seed_name = "" if self.name == type(self).__name__ else self.name
        A0, B0 = spec.draw(self.in_features, self.out_features, seed_name)
        return A0.to(**place), None if B0 is None else B0.to(**place)

    def _float_dtype(self) -> torch.dtype:
        return self.compute_dtype if self.quantized else self.weight.dtype

    def _take_factors(
        self, adapter: LinearizedAdapter, factors: LinearizedFactors, dropout: float, dtype: torch.dtype | None
    ) -> None:
        """Copies the point and the step into `adapter`: this layer itself, or one of its further adapters."""
        expected = {"A0": (factors.r, self.in_features), "delta_B": (self.out_features, factors.r)}
        for part, shape in expected.items():
            got = tuple(getattr(factors, part).shape)
            if got != shape:
                problem = f"the adapter's {part} is {list(got)}, expected {list(shape)}"
                raise CompatibilityError(self.name, problem, "It belongs to another model.")
        place = {"device": self.weight.device, "dtype": dtype or self._float_dtype(), "copy": True}
        B0 = None if factors.B0 is None else factors.B0.detach().to(**place)
        settings = {"alpha": factors.alpha, "rslora": factors.rslora, "dropout": dropout}
        adapter._set_point(factors.A0.detach().to(**place), B0, self.out_features, **settings)
        adapter.scaling = factors.scaling
        with torch.no_grad():
            adapter.delta_B.copy_(factors.delta_B)
            if adapter.delta_A is not None and factors.delta_A is not None:
                adapter.delta_A.copy_(factors.delta_A)
        if adapter is self:
            self.adapters = nn.ModuleDict()

    # adapters by name

    @property
    def adapter_names(self) -> tuple[str, ...]:
        return (self.adapter_name, *self.adapters)

    def adapter(self, name: str | None = None) -> LinearizedAdapter:
        """The adapter of that name; None means the active one. Raises RecipeError for a name that is not there."""
        if name is None:
            if len(self.active) != 1:
                problem = f"{len(self.active)} adapters are active: {', '.join(self.active)}"
                raise RecipeError(self.name, problem, "Name one of them.")
            name = self.active[0]
        if name == self.adapter_name:
            return self
        if name not in self.adapters:
            known = ", ".join(map(repr, self.adapter_names))
            raise RecipeError(self.name, f"has no adapter {name!r}, only {known}", "Load or add it first.")
        return self.adapters[name]

    def add_adapter(self, name: str, spec: AdapterSpec) -> None:
        """A further adapter, inactive until set_adapter."""
        spec.check(self.name, self.in_features, self.out_features)
        A0, B0 = self._draw(spec)
        settings = {"alpha": spec.alpha, "rslora": spec.rslora, "dropout": spec.dropout}
        self._register(name, LinearizedAdapter(A0, B0, self.out_features, **settings))

    def add_factors(
        self, name: str, factors: LinearizedFactors, *, dropout: float = 0.0, adapter_dtype: torch.dtype | None = None
    ) -> None:
        """A further adapter at a given point and step, inactive until set_adapter."""
        adapter = LinearizedAdapter.__new__(LinearizedAdapter)
        nn.Module.__init__(adapter)
        self._take_factors(adapter, factors, dropout, adapter_dtype)
        self._register(name, adapter)

    def _register(self, name: str, adapter: LinearizedAdapter) -> None:
        if name in self.adapter_names:
            raise RecipeError(self.name, f"already has an adapter {name!r}", "Choose another name.")
        self.adapters[checked_name(name, self.name)] = adapter.train(self.training)
        adapter.requires_grad_(False)

    def set_adapter(self, names: str | Sequence[str]) -> None:
        """Makes these adapters the active ones, whose sum runs, and them alone trainable."""
        names = (names,) if isinstance(names, str) else tuple(names)
        chosen = [self.adapter(name) for name in names]
        if len({adapter.dropout for adapter in chosen}) > 1:
            raise RecipeError(
                self.name, f"the adapters {', '.join(names)} differ in their dropout", "Merge them first."
            )
        if self.merged:
            raise RecipeError(self.name, "its adapters are merged into the weight", "Call unmerge() first.")
        for name in self.adapter_names:
            for step in self.adapter(name).steps():
                step.requires_grad_(name in names)
        self.active = names

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside, the layer is the plain Linear. Raises RecipeError when the adapter is merged."""
        if self.merged:
            raise RecipeError(self.name, "its adapters are merged into the weight", "Call unmerge() first.")
        before, self._disabled = self._disabled, True
        try:
            yield
        finally:
            self._disabled = before

    def task_vector(self, name: str | None = None) -> dict[str, Tensor]:
        """Copies of the steps away from the linearization point: delta_B, and delta_A where B0 is not zero."""
        adapter = self.adapter(name)
        steps = {"delta_A": adapter.delta_A, "delta_B": adapter.delta_B}
        return {part: step.detach().clone() for part, step in steps.items() if step is not None}

    # merging into the weight

    @property
    def merged(self) -> bool:
        return self._unmerged is not None

    @torch.no_grad()
    def merge(self) -> None:
        """Adds the active adapters' dW to a copy of the weight, rounded once; unmerge() brings the old weight back.

        While merged, the adapter's branch does not run and does not train, and two weights are kept.
        Raises RecipeError when merged already, CompatibilityError for quantized weights and whole-model linearization.
        """
        if self.merged:
            raise RecipeError(self.name, "is merged already", "Call unmerge() first.")
        if self.quantized or self.scope != "layer":
            kind = "quantized" if self.quantized else "part of a whole-model linearization"
            raise CompatibilityError(self.name, f"cannot merge: the layer is {kind}", "Keep the adapter beside it.")
        change = sum(weight_change(self.adapter(name).factors()) for name in self.active)
        change = change.t() if self.fan_in_fan_out else change
        wide = torch.promote_types(self.weight.dtype, change.dtype)
        merged = (self.weight.to(wide) + change).to(self.weight.dtype)
        unmerged, requires_grad = self.weight, self.weight.requires_grad
        self.weight = nn.Parameter(merged, requires_grad=requires_grad)
        self.__dict__["_unmerged"] = unmerged  # not as a parameter of this module

    def unmerge(self) -> None:
        """Brings back the very weight that merge() replaced."""
        if not self.merged:
            raise RecipeError(self.name, "is not merged", "Call merge() first.")
        self.weight, self.__dict__["_unmerged"] = self._unmerged, None

    # the layer's function

    def forward(self, x: Tensor) -> Tensor:
        self._check_input(x)
        weight = self._matrix()
        if self._disabled or self.merged or not self.active:
            return functional.linear(x, weight, self.bias)
        adapters = [self.adapter(name) for name in self.active]
        f = stack([adapter.factors() for adapter in adapters])
        if self.scope == "model":
            return whole_model.dual_call(self, x, weight, f, adapters[0].dropout)
        if self.training and not torch.is_grad_enabled():
            reentrant.refuse_lost_gradients(self.name, x, adapters[0].delta_B)
        if self.group is not None and not torch.compiler.is_compiling():
            group, place = self.group
            y = group.output(place, self, x)
            if y is not None:
                return y
        return linearized_lora(
            x, weight, self.bias, f.A0, f.delta_A, f.B0, f.delta_B, f.scaling, dropout=adapters[0].dropout,
            training=self.training,
        )  # fmt: skip

    def _matrix(self) -> Tensor:
        """The base weight [out, in] as it is multiplied."""
        if self.quantized:
            return base_layer.dequantized(self.weight, self.compute_dtype)
        return self.weight.t() if self.fan_in_fan_out else self.weight

    def _check_input(self, x: Tensor) -> None:
        """Raises CompatibilityError, naming the layer and the shapes."""
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise CompatibilityError(
                self.name,
                f"x is {list(x.shape)}, expected [*, {self.in_features}]",
                "The last dimension must be the layer's in_features.",
            )
        if x.device != self.weight.device:
            raise CompatibilityError(
                self.name, f"x is on {x.device}, the weight on {self.weight.device}", "Move one of them with .to()."
            )
        expected = self._float_dtype()
        if x.dtype != expected and not torch.is_autocast_enabled(x.device.type):
            raise CompatibilityError(
                self.name, f"x is {x.dtype}, the weight {expected}", "Convert one of them, or run under torch.autocast."
            )

    def extra_repr(self) -> str:
        sizes = f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, r={self.r}, scaling={self.scaling:g}, adapters={list(self.adapter_names)}, scope={self.scope}"


def checked_name(name: str, who: str) -> str:
    """An adapter's name, which becomes a part of the parameters' names."""
    if not name or "." in name:
        raise RecipeError(who, f"the adapter's name is {name!r}, expected one without dots", "Choose another name.")
    return name
