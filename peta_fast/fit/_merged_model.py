"""A live model that is merged anew in every step, in place, and what its gradients say about coefficients and masks.

The model's own parameters hold the merge: a step writes them, runs the tasks through them, and reads their gradients.
Kept besides them: base, task vectors (fp32) and one gradient of the model, whatever the number of tasks.
"""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from peta_fast.errors import CheckpointError, CompatibilityError, RecipeError
from peta_fast.fit.tasks import Task, endless, logits_of, loss_of, moved
from peta_fast.ops.concrete_mask import Piece, dispatch

AVERAGED = ("running_mean", "running_var")
Model = Mapping[str, Tensor] | nn.Module


class MergedModel:
    """`model` as base + sum_t lambda_t tau_t, tensor by tensor.

    model   any module; its parameters are overwritten
    models  T fine-tuned models, state dicts or modules
    tasks   what it is fitted to
    base    the pretrained model; None: what `model` holds
    heads   names of tensors or modules, or patterns of names (`*.classifier.*`), of which each task has its own: they
            stay out of the merge, and task t is run with those of models[t]
    summed  [T]: hold sum_t summed[t] tau_t alone, one task vector instead of T; its coefficient is then 1

    names   of the tensors with a task vector that is not zero; coefficients [len(names), T] belong to them

    Raises CompatibilityError where names or shapes do not fit, CheckpointError for NaN and inf, RecipeError for heads.
    """

    def __init__(
        self,
        model: nn.Module,
        models: Sequence[Model],
        tasks: Sequence[Task],
        *,
        base: Model | None = None,
        heads: Sequence[str] = (),
        summed: Sequence[float] | None = None,
    ):
        if not models or not tasks:
            raise RecipeError("models" if not models else "tasks", "expected at least one, got none")
        self.model, self.tasks = model, list(tasks)
        self.parameters = dict(model.named_parameters())
        self.device = next(iter(self.parameters.values())).device
        states = [_state_of(m) for m in models]
        self.base = _apart_from(model, model if base is None else base)
        self.head_names = _head_names(self.parameters, heads, len(tasks), len(models))
        _check_names(model, self.base, states, set(self.head_names))
        self.heads = [{n: s[n].to(self.device, copy=True) for n in self.head_names} for s in states]
        self.names, self.pieces = [], []
        for name, parameter in self.parameters.items():
            if name not in self.head_names and parameter.is_floating_point():
                self._add(name, parameter, [s[name] for s in states], summed)
        if not self.names:
            raise CompatibilityError(
                "models",
                "none of them differs from the base outside of heads",
                "Give base: the model before tuning.",
            )
        self.count = len(models)
        self.averaged = {
            n: torch.stack([s[n].to(self.device, torch.float32) for s in states]).mean(0)
            for n, _ in model.named_buffers()
            if n.rpartition(".")[2] in AVERAGED and all(n in s for s in states)
        }
        width = self.count if summed is None else 1
        self.coefficients = torch.zeros(len(self.names), width, device=self.device)
        self._batches = [endless(task) for task in self.tasks]

    def _add(self, name: str, parameter: nn.Parameter, tuned: Sequence[Tensor], summed) -> None:
        """Notes the task vectors of one tensor, unless they are all zero."""
        base = self.base[name].float()
        vectors = []
        for place, x in enumerate(tuned):
            vector = x.detach().to(self.device).float().contiguous() - base
            if not torch.isfinite(vector).all():
                raise CheckpointError(
                    f"models[{place}]", f"{name!r} is not finite, or the base is not", "`peta-fast verify` finds NaN."
                )
            if summed is not None:
                vector *= float(summed[place])
                vector = vectors.pop().add_(vector) if vectors else vector
            vectors.append(vector)
        if not parameter.data.is_contiguous():
            parameter.data = parameter.data.contiguous()
        if any(v.any() for v in vectors):
            self.names.append(name)
            self.pieces.append(Piece(vectors, base=self.base[name], out=parameter.data))

    @contextlib.contextmanager
    def fitting(self) -> Iterator[None]:
        """In evaluation mode, with gradients for what is merged; an error leaves the base in the model."""
        training = {m: m.training for m in self.model.modules()}
        wanted = {n: p.requires_grad for n, p in self.parameters.items()}
        kept = {n: p.grad for n, p in self.parameters.items()}
        self.model.eval()
        learned = set(self.names)
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in learned)
            parameter.grad = None
        self._load(self.base)
        self._load(self.averaged)
        try:
            yield
        except BaseException:
            self._load(self.base)
            raise
        finally:
            for module, mode in training.items():
                module.training = mode
            for name, parameter in self.parameters.items():
                parameter.requires_grad_(wanted[name])
                parameter.grad = kept[name]

    @torch.no_grad()
    def _load(self, state: Mapping[str, Tensor]) -> None:
        """Copies into parameters and buffers; a head of another shape than the base's stays as it is."""
        for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
            if name in state and state[name].shape == tensor.shape:
                tensor.copy_(state[name])

    @torch.no_grad()
    def rebuild(self, coefficients: Tensor, temperature: float = 0.5) -> None:
        """Writes the merge into the model. coefficients [len(names), T]; masks as the pieces have them."""
        self.coefficients = coefficients.detach()
        for row, piece in zip(self.coefficients, self.pieces, strict=True):
            piece.coefficients, piece.g = row, None
        dispatch.means(self.pieces, temperature)
        dispatch.merge(self.pieces, temperature)

    def backward(self, loss: str) -> Tensor:
        """Runs the next batch of every task, and leaves the gradient of the losses' sum in the pieces.

        Returns the losses, fp32 [tasks]; the gradient is none where one of them is not finite.
        """
        self.model.zero_grad(set_to_none=True)
        losses = []
        for place, task in enumerate(self.tasks):
            batch = moved(next(self._batches[place]), self.device)
            with self.with_head(place):
                value = loss_of(loss, task, logits_of(task, self.model, batch), batch)
                value.backward()
            losses.append(value.detach().float())
        for name, piece in zip(self.names, self.pieces, strict=True):
            g = self.parameters[name].grad
            piece.g = torch.zeros_like(piece.out) if g is None else g.contiguous()
        return torch.stack(losses).cpu()

    def advance(self, batches: int) -> None:
        """Leaves out as many batches of every task, which an earlier run has had."""
        for task in self._batches:
            for _ in range(batches):
                next(task)

    @torch.no_grad()
    def coefficient_gradients(self, temperature: float = 0.5, products: bool = False) -> Tensor:
        """[len(names), T] fp64: dot products of the gradient with the task vectors, in one pass over them."""
        found = dispatch.coefficient_gradients(self.pieces, temperature, products)
        return torch.stack(found) if found else self.coefficients.double()

    @contextlib.contextmanager
    def with_head(self, place: int) -> Iterator[None]:
        """The model with the head of one task."""
        before = {}
        for name, tensor in self.heads[place].items() if self.head_names else ():
            owner, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(owner)
            before[name] = (module, leaf, module._parameters[leaf])
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        try:
            yield
        finally:
            for module, leaf, parameter in before.values():
                module._parameters[leaf] = parameter

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of what the model holds."""
        return {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}


def _state_of(model: Model) -> Mapping[str, Tensor]:
    return model.state_dict() if isinstance(model, nn.Module) else model


def _apart_from(model: nn.Module, base: Model) -> dict[str, Tensor]:
    """The base's tensors on the model's device, and never the model's own memory, which the merge overwrites."""
    own = {t.data_ptr() for t in model.state_dict().values()}
    device = next(model.parameters()).device
    found = {}
    for name, tensor in _state_of(base).items():
        placed = tensor.detach().to(device).contiguous()
        found[name] = placed.clone() if placed.data_ptr() in own else placed
    return found


def _head_names(parameters: Mapping[str, Tensor], heads: Sequence[str], tasks: int, models: int) -> list[str]:
    if isinstance(heads, str):
        raise RecipeError("heads", f"expected a list of names, got {heads!r}", f"Write heads=[{heads!r}].")
    found = []
    for pattern in heads:
        matched = [n for n in parameters if n == pattern or n.startswith(f"{pattern}.") or fnmatch.fnmatch(n, pattern)]
        if not matched:
            raise RecipeError(
                "heads",
                f"{pattern!r} is no parameter's or module's name",
                f"Names are as {next(iter(parameters))!r}.",
            )
        found += [n for n in matched if n not in found]
    if found and tasks != models:
        raise RecipeError("heads", f"expected a model for each of {tasks} tasks, whose head it takes, got {models}")
    return found


def _check_names(model: nn.Module, base: Mapping, states: Sequence[Mapping], heads: set[str]) -> None:
    """All names are there and all shapes agree, but for those of heads."""
    needed = [n for n, _ in model.named_parameters()]
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    for label, state in [("base", base), *((f"models[{t}]", s) for t, s in enumerate(states))]:
        missing = [n for n in needed if n not in state and not (label == "base" and n in heads)]
        if missing:
            raise CompatibilityError(
                label, f"lacks {missing[0]!r}; {len(missing) - 1} more names differ", "Give state dicts of this model."
            )
        wrong = [n for n in needed if n not in heads and tuple(state[n].shape) != shapes[n]]
        if wrong:
            head = wrong[0].rpartition(".")[0]
            raise CompatibilityError(
                label,
                f"{wrong[0]!r} is {list(state[wrong[0]].shape)}, the model has {list(shapes[wrong[0]])}; "
                f"{len(wrong) - 1} more tensors differ",
                f"Heads of different sizes stay out of the merge: heads=[{head!r}] (--heads {head}) keeps one a task.",
            )
