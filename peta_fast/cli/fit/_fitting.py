"""What fitting coefficients and masks share: networks and states in, recipe, masks and history out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peta_fast.errors import ResourceError

RECIPE, MASKS, HISTORY, STATE, MERGED = (
    "recipe.yml",
    "masks.safetensors",
    "history.csv",
    "unfinished.safetensors",
    "merged",
)


@dataclass(frozen=True)
class Job:
    """One call of a fitting command."""

    base: str
    models: Sequence[str]
    names: Sequence[str]
    heads: Sequence[str]
    out: Path
    save_every: int
    quiet: bool
    as_json: bool


def job_of(base, models, names, heads, out: Path | None, save_every, resume, force, quiet, as_json) -> Job:
    """Checked options, before anything is loaded. Raises UsageError, ResourceError."""
    from peta_fast.cli._adapters import required_out
    from peta_fast.cli.fit._options import listed
    from peta_fast.cli.fit._user import names_of

    job = Job(base, models, names_of(models, names), listed(heads), required_out(out), save_every, quiet, as_json)
    finished, state = job.out / RECIPE, job.out / STATE
    if force:
        state.unlink(missing_ok=True)
    elif finished.exists() or (job.out / MERGED).exists():
        raise ResourceError(str(job.out), "holds a fit already", "Use --force to replace it, or another folder.")
    elif state.exists() and not resume:
        raise ResourceError(
            str(job.out), "holds an unfinished fit", "Use --resume to go on with it, --force to begin anew."
        )
    return job


def fit(job: Job, data: Sequence[str] | None, network: str | None, device: str, dtype: str, function: Callable,
        mask_kind: str = "soft", **options: Any) -> int:  # fmt: skip
    """Loads, fits by the function of peta_fast.fit, and writes what a recipe needs."""
    from peta_fast.cli._errors import Interrupted
    from peta_fast.cli.fit._networks import Networks, refuse_other_names
    from peta_fast.cli.fit._steps import steps
    from peta_fast.cli.fit._user import batches_of
    from peta_fast.fit.tasks import Task
    from peta_fast.formats.disk import make_directory

    networks = Networks.of(network, device, dtype)
    tasks = [Task(n, b) for n, b in zip(job.names, batches_of(data or [], job.names), strict=True)]
    model = networks.load(job.base, job.heads)
    refuse_other_names(model, job.base, job.heads)
    states = [networks.state(path, job.heads) for path in job.models]
    make_directory(job.out)
    try:
        with steps(job.quiet) as tell:

            def progress(step: Any) -> None:
                if step.phase != "inner":  # half a step of the masks
                    tell(step.phase, step.step, step.steps, f"loss {step.loss:.4g}")

            fitted = function(
                model, states, tasks, heads=job.heads, unfinished=job.out / STATE, save_every=job.save_every,
                progress=progress, **options,
            )  # fmt: skip
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and (job.out / STATE).exists():
            raise Interrupted from None
        if not any(job.out.iterdir()):
            job.out.rmdir()
        raise
    _write(job, fitted, states, mask_kind)
    return 0


def _write(job: Job, fitted: Any, states: Sequence[dict], mask_kind: str) -> None:
    """The recipe last: where it is, all that it names is there."""
    from peta_fast.cli.fit._recipes import write_recipe
    from peta_fast.formats.disk import write_whole

    (job.out / RECIPE).unlink(missing_ok=True)
    write_whole(job.out / HISTORY, _history(fitted, job.names).encode())
    apart = _apart(job, fitted)
    masks = None
    if apart:
        _save_merged(job, fitted)
    else:
        if fitted.has_masks:
            masks = job.out / MASKS
            fitted.save_masks(masks, mask_kind)
        write_recipe(job.out / RECIPE, fitted.recipe(job.base, job.models, masks))
    _print(job, fitted, masks, apart)


def _apart(job: Job, fitted: Any) -> str:
    """A head that has another size in a checkpoint than in the base, so that no recipe can merge the files; or ""."""
    from peta_fast.formats import open_checkpoint
    from peta_fast.formats.hub import locate

    if not job.heads:
        return ""
    sources = [open_checkpoint(locate(path)) for path in (job.base, *job.models)]
    for name in fitted.heads[0]:
        shapes = {tuple(s.tensors[name].shape) if name in s.tensors else None for s in sources}
        if len(shapes) > 1:
            return name
    return ""


def _save_merged(job: Job, fitted: Any) -> None:
    """The merged model without heads, as a folder that looks like the base's."""
    import os

    from safetensors.torch import save_file

    from peta_fast.formats import copy_companions, open_checkpoint
    from peta_fast.formats.disk import PARTIAL, make_directory, publish
    from peta_fast.formats.hub import locate

    folder = job.out / MERGED
    make_directory(folder)
    base = open_checkpoint(locate(job.base))
    heads = set(fitted.heads[0])
    stored = {n: t.contiguous() for n, t in fitted.state_dict().items() if n in base.tensors and n not in heads}
    file = folder / "model.safetensors"
    partial = file.with_name(file.name + PARTIAL)
    try:
        save_file(stored, partial, metadata={"format": "pt"})
        copy_companions(base, folder)
        publish(partial, file)
    finally:
        if os.path.exists(partial):
            partial.unlink()


def _history(fitted: Any, names: Sequence[str]) -> str:
    lines = [",".join(["phase", "step", *names])]
    lines += [",".join([p.phase, str(p.step), *(f"{loss:.9g}" for loss in p.losses)]) for p in fitted.history]
    return "\n".join(lines) + "\n"


def _print(job: Job, fitted: Any, masks: Path | None, apart: str) -> None:
    from peta_fast.cli._errors import warn
    from peta_fast.cli._text import number_text, print_json

    rows = [row.tolist() for row in fitted.coefficients.values()]
    means = {n: sum(row[t] for row in rows) / len(rows) for t, n in enumerate(job.names)}
    first, last = (fitted.history[place].loss if fitted.history else None for place in (0, -1))
    where = str(job.out / (MERGED if apart else RECIPE))
    if apart:
        warn(f"{apart!r} has not one size in all models, so no recipe can merge them; {where} has all but the heads")
    if job.as_json:
        print_json({
            "merged" if apart else "recipe": where, "masks": masks and str(masks), "steps": len(fitted.history),
            "loss": {"first": first, "last": last}, "mean_coefficients": means, "tensors": len(rows),
            "heads": sorted(fitted.heads[0]),
        })  # fmt: skip
        return
    if fitted.history:
        print(f"{len(fitted.history):,} steps: loss {number_text(first)} -> {number_text(last)}")
    print("mean coefficients: " + ", ".join(f"{name} {value:.3f}" for name, value in means.items()))
    print(f"merged without heads: {where}" if apart else f"merge with them: peta-fast merge {where} OUT")
