"""`peta-fast fit statistics`: Gram matrices and Fishers of models on their own data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from peta_fast.cli._options import AsJson
from peta_fast.cli._parser import Argument, Option
from peta_fast.cli.fit._options import DATA_EPILOG, Data, Device, Dtype, Force, Names, Network, Quiet, SaveEvery

EPILOG = f"""  peta-fast fit statistics sst2 rte --data tasks:batches --kinds kfac --out stats --recipe mats.yml
  peta-fast merge mats.yml merged

{DATA_EPILOG}
kinds: gram (regmean), kfac (mats: gram and output_gram), fisher (fisher), fisher_gram (mats, of small tensors: --only)

The same command goes on where it was killed, and passes over files that are done. A data loader that does not shuffle
is wanted for that."""

KINDS = {
    "gram": ("input_gram",), "kfac": ("input_gram", "output_gram"), "fisher": ("fisher",),
    "input_gram": ("input_gram",), "output_gram": ("output_gram",), "fisher_gram": ("fisher_gram",),
}  # fmt: skip
SUFFIX = ".stats.safetensors"


def statistics(
    models: Annotated[
        list[str] | None,
        Argument("MODEL", "fine-tuned models: folders, weight files or hub ids; none: what --model makes"),
    ] = None,
    data: Data = None,
    out: Annotated[
        Path | None,
        Option("--out", help="A .safetensors file for one model, else a folder for NAME.stats.safetensors."),
    ] = None,
    kinds: Annotated[str, Option("--kinds", help="What is collected, comma-separated: gram, kfac, fisher.")] = "gram",
    recipe: Annotated[Path | None, Option("--recipe", help="Write the recipe that merges with them.")] = None,
    model: Network = None,
    names: Names = None,
    only: Annotated[
        list[str] | None, Option("--only", help="Modules (Grams) or tensors (Fisher) by name or pattern; repeatable.")
    ] = None,
    examples: Annotated[int | None, Option("--examples", help="Of each task at most.", low=1)] = None,
    labels: Annotated[str, Option("--labels", help="data, or sampled from the model's prediction.")] = "data",
    loss: Annotated[str | None, Option("--loss", help="f(model, batch) -> [N], instead of the cross-entropy.")] = None,
    logits: Annotated[
        str | None, Option("--logits", help="f(model, batch) -> [N, C], instead of the output's.")
    ] = None,
    seed: Annotated[int, Option("--seed", help="Of sampled labels.", low=0)] = 0,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    save_every: SaveEvery = 50,
    resume: Annotated[bool, Option("--resume", help="Is always so: killed collections go on.")] = False,
    force: Force = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> int:
    """Collect what fisher, regmean and mats solve with, from each model on its own task's data."""
    from peta_fast.cli._adapters import required_out
    from peta_fast.cli._errors import Interrupted, UsageError
    from peta_fast.cli.fit import _recipes
    from peta_fast.cli.fit._networks import Networks
    from peta_fast.cli.fit._user import batches_of, names_of

    wanted = kinds_of(kinds)
    if not models and (model is None or recipe is not None):
        raise UsageError("MODEL", "is missing", "Name the models, as folders, or with --model one that is made.")
    networks = Networks.of(model, device, dtype)
    if not models and networks.takes_path:
        raise UsageError("MODEL", f"is missing: {model} takes a path", "Name the model.")
    paths: list[str | None] = list(models) if models else [None]
    tasks = names_of(models, names) if models else names_of(["model"], names)
    files = files_of(required_out(out), tasks)
    _recipes.refuse_existing([recipe], force)
    options = {
        "kinds": wanted, "only": chooser(only), "labels": labels, "examples": examples, "seed": seed, "force": force,
        "save_every": save_every, **_functions(loss=loss, logits=logits),
    }  # fmt: skip
    batches = batches_of(data or [], tasks)
    try:
        rows = [
            _collect(networks, path, task, file, loader, options, quiet)
            for path, task, file, loader in zip(paths, tasks, files, batches, strict=True)
        ]
    except KeyboardInterrupt:
        raise Interrupted from None
    found = _recipes.of_statistics(method_of(wanted), models, files, **settings_of(wanted)) if models else None
    if recipe is not None:
        _recipes.write_recipe(recipe, found)
    _print(rows, found, recipe, as_json)
    return 0


def kinds_of(text: str) -> tuple[str, ...]:
    """gram,fisher -> (input_gram, fisher). Raises UsageError."""
    from peta_fast.cli._errors import UsageError

    words = [word for word in text.split(",") if word]
    unknown = [word for word in words if word not in KINDS]
    if unknown or not words:
        raise UsageError("--kinds", f"expected some of {', '.join(KINDS)}, got {text!r}")
    return tuple(dict.fromkeys(kind for word in words for kind in KINDS[word]))


def method_of(kinds: tuple[str, ...]) -> str:
    """Which method makes most of them."""
    from peta_fast.cli.fit._recipes import METHODS

    if kinds == ("output_gram",):
        return "mats"
    return next(method for kind, method in METHODS.items() if kind in kinds)


def settings_of(kinds: tuple[str, ...]) -> dict[str, str]:
    """What the method has to be told of them."""
    return {"operator": "block"} if kinds == ("fisher_gram",) else {}


def files_of(out: Path, names: list[str]) -> list[Path]:
    """Where each model's statistics go. Raises UsageError."""
    from peta_fast.cli._errors import UsageError

    if out.suffix == ".safetensors":
        if len(names) > 1:
            raise UsageError(
                "--out", f"expected a folder for the statistics of {len(names)} models, got the file {out}"
            )
        return [out]
    return [out / f"{name}{SUFFIX}" for name in names]


def chooser(patterns: list[str] | None):
    """name -> whether one of the patterns means it; None without patterns."""
    from peta_fast.cli.fit._networks import is_head

    return (lambda name: is_head(name, patterns)) if patterns else None


def _all_but(names: list[str], only):
    return lambda name: name not in names and (only is None or only(name))


def _functions(**named: str | None) -> dict[str, Any]:
    from peta_fast.cli._functions import function_at
    from peta_fast.cli.fit._user import called

    def guarded(option: str, function):
        return lambda *words: called(f"--{option}", function, *words)

    return {option: guarded(option, function_at(f"--{option}", text)) for option, text in named.items() if text}


def _collect(networks, path: str | None, task: str, file: Path, batches, options, quiet: bool) -> dict[str, Any]:
    """One model's statistics; what is said of them."""
    import time

    from peta_fast.cli._errors import warn
    from peta_fast.cli.fit._networks import refuse_other_names, tied_elsewhere
    from peta_fast.cli.fit._steps import steps
    from peta_fast.fit import collect_statistics

    there = file.exists() and not options["force"]
    network = networks.load(path)
    tied: list[str] = []
    if path is not None:
        refuse_other_names(network, path)
        tied = tied_elsewhere(network, path)
    if tied and set(options["kinds"]) & {"input_gram", "output_gram"}:
        warn(f"{task}: no Gram matrices of {', '.join(tied)}, whose weight is tied to another tensor: it is averaged")
        options = options | {"only": _all_but(tied, options["only"])}
    began = time.monotonic()
    with steps(quiet) as tell:
        found = collect_statistics(
            network, batches, file, progress=lambda done, of: tell(f"{task}: batches", done, of, ""), **options
        )
    return {
        "task": task, "model": path, "file": str(file), "kinds": list(options["kinds"]), "entries": len(found),
        "examples": found.examples, "bytes": file.stat().st_size, "there": there, "tied": tied,
        "seconds": round(time.monotonic() - began, 3),
    }  # fmt: skip


def _print(rows: list[dict[str, Any]], recipe, path: Path | None, as_json: bool) -> None:
    from peta_fast.cli._text import print_json, seconds_text, size_text
    from peta_fast.cli.fit._recipes import as_yaml

    if as_json:
        print_json({"statistics": rows, "recipe": recipe, "recipe_file": None if path is None else str(path)})
        return
    for row in rows:
        how = "was there already" if row["there"] else f"in {seconds_text(row['seconds'])}"
        print(
            f"{row['task']}: {row['entries']} entries of {row['examples']:,} examples in {row['file']} "
            f"({size_text(row['bytes'])}), {how}"
        )
    if path is not None:
        print(f"merge with them: peta-fast merge {path} OUT")
    elif recipe is not None:
        print(f"merge with them by this recipe (--recipe FILE writes it):\n\n{as_yaml(recipe)}", end="")
