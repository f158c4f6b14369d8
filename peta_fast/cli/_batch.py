"""What `peta-fast merge` and `peta-fast sweep` share where many checkpoints are made: progress, report, exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def run_batch(named, out: Path, max_memory, max_shard_size, cache, dry_run, quiet, as_json, options) -> int:
    """Merges by several recipes, each into out/<name>; the exit code of the gravest failure."""
    from peta_fast.batches import merge_batch
    from peta_fast.cli._planning import shard_bytes

    if cache is not None:
        os.environ["HF_HUB_CACHE"] = cache
    if dry_run:
        return _print_plans(named, max_memory, max_shard_size, as_json)
    shard = shard_bytes(max_shard_size)
    return run_many(
        lambda tell: merge_batch(
            named, out, max_memory=max_memory, max_shard_size=shard, progress=tell, **options
        ), out, quiet, as_json,
    )  # fmt: skip


def run_many(work: Callable[[Any], Sequence[Any]], out: Path, quiet: bool, as_json: bool) -> int:
    """Runs work(progress) -> outcomes and says what became of each."""
    from peta_fast.cli._errors import Interrupted
    from peta_fast.cli._progress import progress
    from peta_fast.cli._text import print_json

    try:
        with progress(quiet) as tell:
            outcomes = work(tell)
    except KeyboardInterrupt:
        if out.exists():
            raise Interrupted from None
        raise
    print_json([_as_json(o) for o in outcomes]) if as_json else _print(outcomes)
    failed = [o for o in outcomes if o.error is not None]
    for o in failed:
        print(f"peta-fast: {o.name}: {type(o.error).__name__}: {o.error}", file=sys.stderr)
    if failed:
        print(f"peta-fast: {len(failed)} of {len(outcomes)} merges failed.", file=sys.stderr, flush=True)
    return max((o.error.exit_code for o in failed), default=0)


def _as_json(outcome) -> dict[str, Any]:
    report = outcome.report.to_json() if outcome.report else {"out": str(outcome.out)}
    error = f"{type(outcome.error).__name__}: {outcome.error}" if outcome.error else None
    return {"name": outcome.name, **report, "error": error}


def _print(outcomes) -> None:
    from peta_fast.cli.merge import summary

    for outcome in outcomes:
        if outcome.report:
            print(summary(outcome.report))


def _print_plans(named, max_memory, max_shard_size, as_json) -> int:
    from peta_fast.batches import needs_of
    from peta_fast.cli._planning import planned
    from peta_fast.cli._text import print_json, size_text

    needs = needs_of(named)
    plans = {
        name: None if needs[name] else planned(recipe, None, None, max_memory, max_shard_size, 0)
        for name, recipe in named
    }
    if as_json:
        print_json([{"name": n, **(p.to_json() if p else {"after": needs[n]})} for n, p in plans.items()])
        return 0
    for name, plan in plans.items():
        what = f"{len(plan.tensors)} tensors, {size_text(plan.bytes_written)} to write" if plan else ""
        print(f"{name}: {what or 'after ' + ', '.join(needs[name])}")
    return 0
