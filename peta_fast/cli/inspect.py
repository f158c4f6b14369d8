"""`peta-fast inspect`: what checkpoints hold."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

from peta_fast.cli._options import All, AsJson, Limit
from peta_fast.cli._parser import Argument, Option
from peta_fast.cli._text import ROWS, number_text, print_facts, print_json, print_table, shape_text, size_text

STATISTICS = ("min", "max", "mean", "norm", "zeros", "nonfinite")


def inspect(
    paths: Annotated[list[str], Argument("PATH", "model folders, weight files or hub ids")],
    stats: Annotated[bool, Option("--stats", help="Read the values: min, max, mean, norm, zeros, NaN.")] = False,
    as_json: AsJson = False,
    limit: Limit = ROWS,
    show_all: All = False,
) -> int:
    """Print what checkpoints hold. With --json an object; a list of them for several paths."""
    found = []
    for number, path in enumerate(paths):
        content = described(path, stats)
        found.append(content)
        if not as_json:
            print("\n" * (number > 0), end="")
            print_content(content, None if show_all else limit)
    if as_json:
        print_json(found[0] if len(found) == 1 else found)
    return 0


def described(path: str, stats: bool) -> dict[str, Any]:
    """What --json prints of one checkpoint. Raises CheckpointError."""
    from peta_fast.buffers import LONG_NAMES
    from peta_fast.cli._checkpoints import open_model

    with open_model(path) as checkpoint:
        infos = checkpoint.tensors.values()
        return {
            "path": path,
            "files": [{"file": str(file), "bytes": file.stat().st_size} for file in checkpoint.files],
            "metadata": checkpoint.metadata,
            "architectures": checkpoint.config.get("architectures"),
            "aliases": checkpoint.aliases,
            "dtypes": dict(Counter(LONG_NAMES[info.dtype] for info in infos)),
            "parameters": sum(info.size for info in infos),
            "bytes": sum(info.nbytes for info in infos),
            "tensors": [_tensor(checkpoint, info, stats) for info in infos],
        }


def _tensor(checkpoint, info, stats: bool) -> dict[str, Any]:
    from peta_fast.buffers import LONG_NAMES

    known = {
        "name": info.name,
        "dtype": LONG_NAMES[info.dtype],
        "shape": list(info.shape),
        "parameters": info.size,
        "bytes": info.nbytes,
        "file": info.file.name,
        "offset": info.offset,
    }
    if not stats:
        return known
    from dataclasses import asdict

    from peta_fast.cli._statistics import statistics

    return known | asdict(statistics(checkpoint.buffer(info.name)))


def print_content(content: dict[str, Any], limit: int | None) -> None:
    """As text. limit: rows of the table, None for all."""
    print_facts(_facts(content))
    print()
    tensors = content["tensors"]
    stats = STATISTICS if tensors and "norm" in tensors[0] else ()
    rows = [
        [t["name"], t["dtype"], shape_text(t["shape"]), size_text(t["bytes"]), *(_cell(t[s]) for s in stats)]
        for t in tensors
    ]
    print_table(["tensor", "dtype", "shape", "size", *stats], rows, limit=limit, numbers=("size", *stats))


def _facts(content: dict[str, Any]) -> dict[str, str]:
    files = [f"{entry['file']} ({size_text(entry['bytes'])})" for entry in content["files"]]
    facts = {
        "path": content["path"],
        "files": files[0] if len(files) == 1 else f"{len(files)}, from {files[0]} to {files[-1]}",
        "tensors": str(len(content["tensors"])),
        "parameters": f"{content['parameters']:,}",
        "size": size_text(content["bytes"]),
        "dtypes": ", ".join(f"{count} {dtype}" for dtype, count in content["dtypes"].items()),
    }
    if content["architectures"]:
        facts["architecture"] = ", ".join(map(str, content["architectures"]))
    if content["metadata"]:
        facts["metadata"] = ", ".join(f"{key}={value}" for key, value in content["metadata"].items())
    if content["aliases"]:
        facts["tied"] = ", ".join(f"{alias} = {name}" for alias, name in content["aliases"].items())
    return facts


def _cell(value: float | int | None) -> str:
    return "" if value is None else str(value) if isinstance(value, int) else number_text(value)
