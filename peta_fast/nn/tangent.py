"""The tangent model: a whole network, linearized in all its weights.

    f_lin(x; theta) = f(x; theta0) + J(x; theta0) (theta - theta0)

One forward pass with tangents, about twice the time and memory of a plain one; a step as large as the weights is kept
beside them. Exactly linear in the step, so that the task vectors of several trainings add up.
Source: Ortiz-Jimenez et al., NeurIPS 2023, arXiv:2305.12827.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils import _pytree

from peta_fast.errors import CompatibilityError, RecipeError
from peta_fast.nn.whole_model import (
    forward_ad_only,
    named_errors,
    refuse_unlinearized,
    tangent_of,
    value_of,
    value_plus_tangent,
)


class TangentModel(nn.Module):
    """Linearizes a model around its present weights, in those that require a gradient: by default, all of them.

        model = pf.TangentModel(encoder)                 # trains as any module; its parameters are the step
        model = pf.TangentModel(encoder, tuned)          # post-hoc: at weights that an ordinary training found

    tuned  state dict; the step is tuned - theta0. What it lacks has no step

    The model is frozen in place and stays in eval mode whatever train() says: theta0 has no dropout, and its buffers do
    not move. The steps are parameters named as the model's, "/" for ".", zero at the start, so weight decay pulls
    towards theta0. Linear is what the model returns, hidden states or logits; a head behind it is another function.
    A task vector of this model means nothing in the plain network: merge such vectors with each other, evaluate the
    merged weights as TangentModel(base, merged).
    """

    def __init__(self, model: nn.Module, tuned: Mapping[str, Tensor] | None = None):
        super().__init__()
        chosen = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if tuned is not None:
            chosen = {name: p for name, p in model.named_parameters() if name in tuned and p.is_floating_point()}
        if not chosen:
            raise RecipeError("TangentModel", "no parameter has a step: all are frozen", "Call requires_grad_() on it.")
        self.model = model.requires_grad_(False).eval()
        self.step = nn.ParameterDict({_key(name): nn.Parameter(torch.zeros_like(p)) for name, p in chosen.items()})
        if tuned is not None:
            self.set_tuned(tuned)

    def train(self, mode: bool = True) -> TangentModel:
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, *args, **kwargs):
        return self._call(args, kwargs, value_plus_tangent)

    def dual(self, *args, **kwargs):
        """(f(x; theta0), J (theta - theta0)), each shaped as the model's output."""
        return self._call(args, kwargs, value_of, tangent_of)

    def _call(self, args, kwargs, *readers):
        refuse_unlinearized(kwargs)
        point = dict(self.model.named_parameters())
        with forward_ad_only(), forward_ad.dual_level(), named_errors():
            duals = {n: forward_ad.make_dual(point[n].detach(), step) for n, step in self._steps().items()}
            output = torch.func.functional_call(self.model, duals, args, kwargs, tie_weights=True)
            found = tuple(_pytree.tree_map(read, output) for read in readers)
        return found if len(readers) > 1 else found[0]

    def _steps(self) -> dict[str, nn.Parameter]:
        return {_name(key): step for key, step in self.step.items()}

    def task_vector(self) -> dict[str, Tensor]:
        """A copy of the step, by the model's names."""
        return {name: step.detach().clone() for name, step in self._steps().items()}

    def tuned(self) -> dict[str, Tensor]:
        """theta0 + step as an ordinary state dict, buffers included: what merges take. One rounding, in the dtype."""
        steps = self._steps()
        return {
            name: (t + steps[name].detach()) if name in steps else t.detach().clone()
            for name, t in self.model.state_dict().items()
        }

    @torch.no_grad()
    def set_tuned(self, tuned: Mapping[str, Tensor]) -> None:
        """step = tuned - theta0. Raises CompatibilityError where names or shapes differ from the model's."""
        names = {*self.model.state_dict(), *dict(self.model.named_parameters())}
        unknown = [name for name in tuned if name not in names]
        if unknown:
            problem = f"{unknown[0]!r} is not in the model; {len(unknown) - 1} more names differ"
            raise CompatibilityError("TangentModel", problem, "Give the state dict of the same architecture.")
        point = dict(self.model.named_parameters())
        for name, step in self._steps().items():
            if name in tuned and tuned[name].shape != step.shape:
                shapes = f"{list(tuned[name].shape)}, in the model {list(step.shape)}"
                raise CompatibilityError("TangentModel", f"{name!r} is {shapes}")
        for name, step in self._steps().items():
            step.copy_(tuned[name].to(step) - point[name] if name in tuned else torch.zeros_like(step))


def _key(name: str) -> str:
    """A parameter's name must not hold a dot."""
    return name.replace(".", "/")


def _name(key: str) -> str:
    return key.replace("/", ".")
