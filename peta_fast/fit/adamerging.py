"""AdaMerging: coefficients of the task vectors by minimizing the entropy of the merged model's answers.

    theta_l = base_l + sum_t lambda[l, t] tau[l, t]       one lambda a task, or one a task and tensor
    dL/dlambda[l, t] = <dL/dtheta_l, tau[l, t]>

It needs unlabelled data of the tasks, and adapts to just these data. A step runs one batch of every task forward and
backward, reads gradient and task vectors once (4 T + 4 bytes a parameter) and writes the model in place (4 T + 8).
AdaMerging++ does the same with task vectors trimmed as TIES trims them: density below 1.
Source: Yang et al., AdaMerging, ICLR 2024, arXiv:2310.02575. As there, lambda starts at 0.3, is used clamped to [0, 1],
and Adam's learning rate is 1e-3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from torch import Tensor, nn

from peta_fast.fit._merged_model import MergedModel, Model
from peta_fast.fit._results import Fitted
from peta_fast.fit._steps import Coefficients, History, Progress, check_positive, check_steps
from peta_fast.fit._trimming import trim
from peta_fast.fit._unfinished import Unfinished
from peta_fast.fit.tasks import Task, check_loss


def adamerging(
    model: nn.Module,
    models: Sequence[Model],
    tasks: Sequence[Task],
    *,
    base: Model | None = None,
    heads: Sequence[str] = (),
    granularity: str = "layer",
    density: float = 1.0,
    elect: bool = False,
    initial: float | Sequence[float] = 0.3,
    learning_rate: float = 1e-3,
    steps: int = 1000,
    clamp: bool = True,
    loss: str = "entropy",
    unfinished: str | Path | None = None,
    save_every: int = 100,
    progress: Callable[[Progress], None] | None = None,
) -> Fitted:
    """Learns coefficients; `model` becomes the merged model, in place.

    model        a module with the architecture; it holds the base again after an error
    models       T fine-tuned models: state dicts or modules
    tasks        their unlabelled data, in any number; one a model where there are heads
    base         the pretrained model; what `model` holds when not given
    heads        names of tensors or modules that stay out of the merge: each task is run with its own model's
    granularity  "layer": a coefficient a task and tensor; "task": one a task
    density      fraction of each task vector that is kept, the largest over the whole model (++ : 0.2)
    elect        drop entries that disagree with the sign of their sum, too
    initial      where coefficients start: one number, or one a model
    clamp        to [0, 1] when used, as the paper's code does
    loss         "entropy", or "cross_entropy" where batches have labels
    unfinished   a safetensors file that holds the state every `save_every` steps until the fit is done; a killed fit
                 goes on from it when called again, to the same result where batches come in the same order
    progress     called after every step

    Returns Fitted: the coefficients, the history, files for a merge elsewhere. The same data in the same order give the
    same result. Raises RecipeError, CompatibilityError, CheckpointError for what does not fit, PetaFastError with the
    step where a loss is not finite, ResourceError for an unfinished fit of something else.
    """
    check_loss(loss)
    check_positive(learning_rate=learning_rate)
    check_steps(steps=steps)
    merged = MergedModel(model, models, tasks, base=base, heads=heads)
    trim(merged, density, elect)
    coefficients = Coefficients(merged, granularity, initial, learning_rate, clamp)
    history = History(merged, progress)
    settings = {
        "adamerging": granularity, "density": density, "elect": elect, "initial": initial, "rate": learning_rate,
        "steps": steps, "clamp": clamp, "loss": loss,
    }  # fmt: skip
    state = Unfinished(unfinished, save_every, merged, history, settings)
    with merged.fitting():
        learn_coefficients(merged, coefficients, history, steps, loss, state)
    state.remove()
    return Fitted(merged, coefficients.current().clone(), history.steps, trimmed=density < 1 or elect)


PHASE = "coefficients"


def learn_coefficients(
    merged: MergedModel,
    coefficients: Coefficients,
    history: History,
    steps: int,
    loss: str,
    state: Unfinished,
    more: Mapping[str, Mapping[str, Tensor]] = MappingProxyType({}),
) -> None:
    """Steps of Adam; the model holds the merge with the last coefficients afterwards.

    more  what else a later run needs to go on
    """
    coefficients.restore(state.take(PHASE) if state.phase == PHASE else {})
    merged.rebuild(coefficients.current())
    for step in range(1 + (state.done if state.phase == PHASE else 0), steps + 1):
        history.note(PHASE, step, steps, merged.backward(loss))
        coefficients.step(history.check(merged.coefficient_gradients()))
        merged.rebuild(coefficients.current())
        state.keep(PHASE, step, lambda: {PHASE: coefficients.kept(), **more})
