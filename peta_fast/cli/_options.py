"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

from peta_fast.cli._parser import Option

AsJson = Annotated[bool, Option("--json", help="Print JSON on stdout, and nothing else there.")]
Limit = Annotated[int, Option("--limit", help="Rows to show.", low=0)]
All = Annotated[bool, Option("--all", help="Show all rows.")]
Compat = Annotated[
    str | None,
    Option("--compat", help="Whose semantics apply: native, mergekit, mergekit-0.1.4, peft, ties-authors, peta."),
]
Seed = Annotated[int | None, Option("--seed", "--random-seed", help="Instead of the recipe's.", low=0)]
Threads = Annotated[int, Option("--threads", "--num-threads", "-j", help="0 is one for each core.", low=0)]
MaxMemory = Annotated[str, Option("--max-memory", help="Bound of working memory, page cache not counted: 768MB, 2GiB.")]
MaxShardSize = Annotated[
    str,
    Option("--max-shard-size", "--out-shard-size", help="Bytes of an output file: 5GB, 1GiB; mergekit's 5B, 500M."),
]
