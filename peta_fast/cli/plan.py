"""`peta-fast plan`: what a merge would do, from headers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from peta_fast.cli._options import All, AsJson, Compat, Limit, MaxMemory, MaxShardSize, Seed, Threads
from peta_fast.cli._parser import Argument
from peta_fast.cli._text import ROWS


def plan(
    recipe: Annotated[Path, Argument("RECIPE", "mergekit's YAML")],
    max_memory: MaxMemory = "768MB",
    max_shard_size: MaxShardSize = "5GB",
    threads: Threads = 0,
    compat: Compat = None,
    seed: Seed = None,
    as_json: AsJson = False,
    limit: Limit = ROWS,
    show_all: All = False,
) -> int:
    """Print what a merge would do and take. Reads headers alone."""
    from peta_fast.cli._plan_text import print_plan
    from peta_fast.cli._planning import planned

    found = planned(recipe, compat, seed, max_memory, max_shard_size, threads)
    print_plan(found, as_json, None if show_all else limit)
    return 0
