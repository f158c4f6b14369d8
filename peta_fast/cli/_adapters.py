"""What the adapter commands share: lists and settings out of words, and the report as text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from peta_fast.cli._parser import Option

Out = Annotated[Path | None, Option("--out", help="Folder for what comes out.")]
Force = Annotated[bool, Option("--force", help="Replace what OUT holds.")]
Base = Annotated[
    str | None, Option("--base", help="The base's name in the result, where adapters call it differently.")
]
Weights = Annotated[str | None, Option("--weights", help="One an adapter: 0.4,0.3,0.3.")]
Density = Annotated[float | None, Option("--density", help="Fraction of each change that is kept.", low=0)]
Set = Annotated[list[str] | None, Option("--set", help="A key of the method: --set lambda=0.5; repeatable.")]
Dtype = Annotated[str, Option("--dtype", help="Of the factors: float32, bfloat16, float16.")]


def required_out(out: Path | None) -> Path:
    """Raises UsageError when --out is missing."""
    from peta_fast.cli._errors import UsageError

    if out is None:
        raise UsageError("--out", "is missing", "Say which folder the result goes to: --out DIR.")
    return out


def numbers(text: str | None, option: str) -> list[float] | None:
    """0.4,0.3 -> [0.4, 0.3]. Raises UsageError."""
    from peta_fast.cli._errors import UsageError

    if text is None:
        return None
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise UsageError(option, f"expected numbers with commas between them, got {text!r}") from None


OPTIONS = ("adapters", "base", "compat", "dtype", "force", "inner", "max_memory", "max_shard_size", "method", "models",
           "out", "rank", "replaced", "resume", "seed", "space", "threads", "weights")  # fmt: skip
"""What --set cannot set: it has an option or an argument of its own."""


def keys(settings: Sequence[str] | None, density: float | None) -> dict[str, Any]:
    """lambda=0.5 -> {"lambda": 0.5}: values as YAML has them. Raises UsageError."""
    from peta_fast.cli._errors import UsageError

    found: dict[str, Any] = {} if density is None else {"density": density}
    for word in settings or ():
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise UsageError("--set", f"expected KEY=VALUE, got {word!r}")
        if name in OPTIONS:
            raise UsageError("--set", f"expected a key of the method, got {name!r}", "Run the command with --help.")
        if name in found:
            raise UsageError("--set", f"{name!r} is given twice")
        found[name] = _as_yaml(word, value)
    return found


def _as_yaml(word: str, value: str) -> Any:
    import yaml

    from peta_fast.cli._errors import UsageError

    try:
        return yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise UsageError("--set", f"expected KEY=VALUE with a value as in YAML, got {word!r}") from None


def print_report(report, as_json: bool, limit: int | None) -> None:
    """Of an AdapterReport."""
    from peta_fast.cli._errors import warn
    from peta_fast.cli._text import number_text, print_json, print_table, seconds_text

    for note in report.notes:
        warn(note)
    if as_json:
        print_json(report.to_json())
        return
    rows = [[m.name, str(m.rank), number_text(m.norm), number_text(m.error), f"{m.energy:.4%}"] for m in report.modules]
    print_table(["module", "rank", "norm", "error", "energy kept"], rows, limit=limit,
                numbers=("rank", "norm", "error", "energy kept"))  # fmt: skip
    seconds = seconds_text(sum(report.seconds.values()))
    print(
        f"{report.method}: {len(report.modules)} modules into {report.out} in {seconds}; {report.energy:.4%} of the "
        f"energy kept, error {report.relative_error:.3g} of the norm of the exact change ({report.exact})"
    )
    if report.replaced:
        print(f"whole tensors carried along: {len(report.replaced)}, such as {report.replaced[0]}")
