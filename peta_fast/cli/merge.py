"""`peta-fast merge`: a recipe to a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from peta_fast.cli._mergekit import EPILOG, Gpu, Ignored, IgnoredValues, TransformersCache
from peta_fast.cli._options import All, AsJson, Compat, Limit, MaxMemory, MaxShardSize, Seed, Threads
from peta_fast.cli._parser import Argument, Option
from peta_fast.cli._text import ROWS

__all__ = ["EPILOG", "merge"]


def merge(
    recipe: Annotated[Path, Argument("RECIPE", "mergekit's YAML; several named recipes between --- are a batch")],
    out: Annotated[Path, Argument("OUT", "folder for what comes out; of a batch, each recipe's is OUT/NAME")],
    dry_run: Annotated[bool, Option("--dry-run", help="Print the plan and write nothing.")] = False,
    resume: Annotated[bool, Option("--resume", help="Go on with a killed merge.")] = False,
    force: Annotated[bool, Option("--force", help="Replace a checkpoint in OUT.")] = False,
    max_memory: MaxMemory = "768MB",
    max_shard_size: MaxShardSize = "5GB",
    threads: Threads = 0,
    compat: Compat = None,
    seed: Seed = None,
    device: Annotated[str, Option("--device", help="cpu, cuda or cuda:1; the bits are the same.")] = "cpu",
    allow_nonfinite: Annotated[bool, Option("--allow-nonfinite", help="NaN and infinities are no fault.")] = False,
    trained_only: Annotated[bool, Option("--trained-only", help="Leave out what no model has trained.")] = False,
    quiet: Annotated[bool, Option("--quiet/--no-quiet", "-q", help="No progress on stderr.")] = False,
    as_json: AsJson = False,
    limit: Limit = ROWS,
    show_all: All = False,
    gpu: Gpu = False,
    transformers_cache: TransformersCache = None,
    ignored: Ignored = False,
    ignored_values: IgnoredValues = None,
) -> int:
    """Merge the models that a recipe names."""
    device = chosen_device(device, gpu)
    from peta_fast.cli._planning import loaded_all, planned

    named = loaded_all(recipe, compat, seed)
    if len(named) > 1:
        from peta_fast.cli._batch import run_batch

        if device != "cpu":
            from peta_fast.cli._errors import UsageError

            raise UsageError("--device", f"expected cpu for several recipes, got {device}", "Merge them one by one.")
        options = {"resume": resume, "force": force, "allow_nonfinite": allow_nonfinite, "threads": threads}
        return run_batch(named, out, max_memory, max_shard_size, transformers_cache, dry_run, quiet, as_json, options)
    plan = planned(named[0][1], None, None, max_memory, max_shard_size, threads, transformers_cache, trained_only)
    if dry_run:
        from peta_fast.cli._plan_text import print_plan

        print_plan(plan, as_json, None if show_all else limit)
        return 0
    run_plan(plan, out, resume, force, allow_nonfinite, threads, quiet, as_json, device)
    return 0


def chosen_device(device: str, gpu: bool) -> str:
    """cpu, cuda or cuda:N; mergekit's GPU flags mean cuda. Raises UsageError for anything else."""
    from peta_fast.cli._errors import UsageError

    name, _, number = device.partition(":")
    if device != "cpu" and (name != "cuda" or (number and not number.isdigit()) or device.endswith(":")):
        raise UsageError("--device", f"expected cpu, cuda or cuda:N, got {device!r}")
    return "cuda" if gpu and device == "cpu" else device


def run_plan(
    plan, out: Path, resume: bool, force: bool, allow_nonfinite: bool, threads: int, quiet, as_json, device: str = "cpu"
) -> None:
    """Runs a plan with progress on stderr and prints what was done. Raises Interrupted where --resume goes on."""
    from peta_fast.cli._errors import Interrupted
    from peta_fast.cli._progress import progress
    from peta_fast.cli._text import print_json
    from peta_fast.journal import JOURNAL
    from peta_fast.run import run

    try:
        with progress(quiet) as tell:
            report = run(
                plan,
                out,
                resume=resume,
                force=force,
                allow_nonfinite=allow_nonfinite,
                threads=threads,
                device=device,
                progress=tell,
            )
    except KeyboardInterrupt:
        if (out / JOURNAL).exists():
            raise Interrupted from None
        raise
    print_json(report.to_json()) if as_json else print(summary(report))


def summary(report) -> str:
    """merged 291 tensors into out: 14.5 GB written, 43.5 GB read in 12 s (4.8 GB/s)"""
    from peta_fast.cli._text import seconds_text, size_text

    rate = size_text((report.bytes_read + report.bytes_written) / max(report.seconds, 1e-9))
    pace = f"{size_text(report.skipped_bytes)} were there already" if report.skipped_bytes else f"{rate}/s"
    return (
        f"merged {report.tensors} tensors into {report.out}: {size_text(report.bytes_written)} written, "
        f"{size_text(report.bytes_read)} read in {seconds_text(report.seconds)} ({pace})"
    ) + "".join(f"\n{line}" for line in solver_lines(report.notes))


def solver_lines(notes) -> list[str]:
    """What linear systems were solved, how well, and where that was not as asked for; --json tells it tensor by tensor.

    solved 38 tensors directly, 2 with a ridge of up to 1e-05: fc.weight, proj.weight
    solved 12 tensors by conjugate gradients, 1 not to its tolerance (|r| = 3.1e-05 |b|): fc.weight
    """
    direct = {name: n["ridge"] for name, n in notes.items() if "ridge" in n}
    iterated = {name: n for name, n in notes.items() if "residuals" in n}
    short = {name: n["residuals"][-1] for name, n in iterated.items() if not n["converged"]}
    ridged = {name: ridge for name, ridge in direct.items() if ridge}
    lines = []
    if direct:
        why = f", {len(ridged)} with a ridge of up to {max(ridged.values()):.0e}: {_some(ridged)}" if ridged else ""
        lines.append(f"solved {len(direct)} tensors directly{why}")
    if iterated:
        worst = max(short.values(), default=0.0)
        why = f", {len(short)} not to the tolerance (|r| up to {worst:.1e} |b|): {_some(short)}" if short else ""
        lines.append(f"solved {len(iterated)} tensors by conjugate gradients{why}")
    return lines


def _some(names) -> str:
    shown = list(names)[:3]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
