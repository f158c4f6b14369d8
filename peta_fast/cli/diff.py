"""`peta-fast diff`: in what two checkpoints differ."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from peta_fast.cli._options import All, AsJson, Limit
from peta_fast.cli._parser import Argument, Option
from peta_fast.cli._text import ROWS, number_text, print_json, print_table


def diff(
    a: Annotated[str, Argument("A", "model folder, weight file or hub id")],
    b: Annotated[str, Argument("B", "the other one")],
    tolerance: Annotated[
        float | None,
        Option("--tolerance", help="Largest |A - B| that counts as equal; without it, bits count.", low=0),
    ] = None,
    as_json: AsJson = False,
    limit: Limit = ROWS,
    show_all: All = False,
) -> int:
    """Print in what two checkpoints differ. Names, shapes, dtypes and values count; exit code 1 when any differ."""
    from peta_fast.cli._checkpoints import open_model
    from peta_fast.cli._compare import compare

    with open_model(a) as first, open_model(b) as second:
        found = compare(first, second, tolerance)
    if as_json:
        print_json(_json(a, b, found))
    else:
        print_comparison(a, b, found, None if show_all else limit)
    return 0 if found.same else 1


def _json(a: str, b: str, found) -> dict[str, Any]:
    return {
        "a": a,
        "b": b,
        "same": found.same,
        "equal_tensors": found.equal,
        "only_in_a": found.only_in_a,
        "only_in_b": found.only_in_b,
        "unlike": [{"name": name, "a": kind_a, "b": kind_b} for name, kind_a, kind_b in found.unlike],
        "differing": [asdict(one) for one in found.differing],
    }


def print_comparison(a: str, b: str, found, limit: int | None) -> None:
    """As text. limit: rows of each table, None for all."""
    only = [[name, f"only in {path}"] for path, names in ((a, found.only_in_a), (b, found.only_in_b)) for name in names]
    _print_section(["tensor", "where"], only, limit)
    _print_section(["tensor", "A", "B"], [list(row) for row in found.unlike], limit)
    numbers = ("elements", "norm of A - B", "relative", "largest")
    rows = [
        [d.name, str(d.elements), number_text(d.norm), number_text(d.relative), number_text(d.largest), _first(d)]
        for d in found.differing
    ]
    _print_section(["tensor", *numbers, "first difference"], rows, limit, numbers)
    print(
        f"{found.equal} tensors equal, {len(only)} only in one, {len(found.unlike)} of another shape or dtype, "
        f"{len(found.differing)} with other values"
    )


def _first(one) -> str:
    return f"{list(one.index)}: {one.a!r} and {one.b!r}"


def _print_section(head: list[str], rows: list[list[str]], limit: int | None, numbers=()) -> None:
    if rows:
        print_table(head, rows, limit=limit, numbers=numbers)
        print()
