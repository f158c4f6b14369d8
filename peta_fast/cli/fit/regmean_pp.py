"""`peta-fast fit regmean-pp`: Gram matrices of what the merged blocks before a layer let through."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from peta_fast.cli._adapters import Weights
from peta_fast.cli._options import AsJson
from peta_fast.cli._parser import Option
from peta_fast.cli.fit._options import DATA_EPILOG, Data, Device, Dtype, Force, Models, Names, Network, Quiet

EPILOG = f"""  peta-fast fit regmean-pp sst2 rte --data tasks:batches --out stats --recipe regmean.yml
  peta-fast merge regmean.yml merged

{DATA_EPILOG}
Labels are not needed. All batches are held in memory: --examples bounds them."""


def regmean_pp(
    models: Models,
    data: Data = None,
    out: Annotated[Path | None, Option("--out", help="Folder for NAME.stats.safetensors of each model.")] = None,
    recipe: Annotated[Path | None, Option("--recipe", help="Write the recipe that merges with them.")] = None,
    model: Network = None,
    names: Names = None,
    blocks: Annotated[
        list[str] | None, Option("--blocks", several=True, metavar="NAME", help="Modules, in the order they run.")
    ] = None,
    off_diagonal: Annotated[float, Option("--off-diagonal", help="Multiplies off-diagonal elements.", low=0)] = 0.9,
    weights: Weights = None,
    examples: Annotated[int | None, Option("--examples", help="Of each task at most.", low=1)] = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    force: Force = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> int:
    """Collect what regmean_pp solves with, merging block by block on the way."""
    import time

    from peta_fast.cli._adapters import numbers, required_out
    from peta_fast.cli._errors import UsageError
    from peta_fast.cli.fit import _recipes
    from peta_fast.cli.fit._networks import Networks, refuse_other_names
    from peta_fast.cli.fit._steps import steps
    from peta_fast.cli.fit._user import batches_of, names_of
    from peta_fast.cli.fit.statistics import _print, files_of
    from peta_fast.fit import regmean_pp as function

    tasks = names_of(models, names)
    files, weight = files_of(required_out(out), tasks), numbers(weights, "--weights")
    if weight is not None and len(weight) != len(models):
        raise UsageError("--weights", f"expected {len(models)}, one a model, got {len(weight)}")
    _recipes.refuse_existing([recipe, *files], force)
    networks, batches = Networks.of(model, device, dtype), batches_of(data or [], tasks)
    loaded = [networks.load(path) for path in models]
    for network, path in zip(loaded, models, strict=True):
        refuse_other_names(network, path)
    began = time.monotonic()
    with steps(quiet) as tell:
        _, found = function(
            loaded, batches, blocks=blocks, off_diagonal=off_diagonal, weight=weight, examples=examples, out=files,
            force=force, progress=lambda done, of: tell("blocks", done, of, ""),
        )  # fmt: skip
    rows = [
        {"task": task, "model": path, "file": str(file), "kinds": ["input_gram"], "entries": len(statistics),
         "examples": statistics.examples, "bytes": file.stat().st_size, "there": False, "tied": [],
         "seconds": round(time.monotonic() - began, 3)}
        for task, path, file, statistics in zip(tasks, models, files, found, strict=True)
    ]  # fmt: skip
    merging = _recipes.of_statistics("regmean_pp", models, files, off_diagonal=off_diagonal)
    for entry, one in zip(merging["models"], weight or (), strict=False):
        entry["parameters"]["weight"] = one
    if recipe is not None:
        _recipes.write_recipe(recipe, merging)
    _print(rows, merging, recipe, as_json)
    return 0
