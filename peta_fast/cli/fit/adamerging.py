"""`peta-fast fit adamerging`: coefficients of task vectors, by how sure the merged model is of its answers."""

from __future__ import annotations

from typing import Annotated

from peta_fast.cli._options import AsJson
from peta_fast.cli._parser import Option
from peta_fast.cli.fit._options import (
    DATA_EPILOG,
    Base,
    Data,
    Device,
    Dtype,
    Force,
    Heads,
    Loss,
    Models,
    Names,
    Network,
    Out,
    Quiet,
    Resume,
    SaveEvery,
)

EPILOG = f"""  peta-fast fit adamerging base sst2 rte --data tasks:batches --out fitted
  peta-fast merge fitted/recipe.yml merged

{DATA_EPILOG}
Labels are not looked at unless the loss is cross_entropy. --density 0.2 is AdaMerging++."""


def adamerging(
    base: Base,
    models: Models,
    data: Data = None,
    out: Out = None,
    model: Network = None,
    names: Names = None,
    heads: Heads = None,
    granularity: Annotated[
        str, Option("--granularity", help="layer: one a task and tensor; task: one a task.")
    ] = "layer",
    density: Annotated[float, Option("--density", help="Fraction of each task vector that is kept.")] = 1.0,
    elect: Annotated[bool, Option("--elect", help="Drop entries against the sign of their sum, too.")] = False,
    initial: Annotated[float, Option("--initial", help="Where coefficients start.")] = 0.3,
    learning_rate: Annotated[float, Option("--learning-rate", help="Of Adam.")] = 1e-3,
    steps: Annotated[int, Option("--steps", help="One batch of each task every step.", low=0)] = 1000,
    clamp: Annotated[bool, Option("--clamp/--no-clamp", help="Coefficients to [0, 1].")] = True,
    loss: Loss = "entropy",
    device: Device = "cpu",
    dtype: Dtype = "auto",
    save_every: SaveEvery = 100,
    resume: Resume = False,
    force: Force = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> int:
    """Learn coefficients by minimizing the entropy of the merged model's answers."""
    from peta_fast.cli.fit._fitting import fit, job_of

    job = job_of(base, models, names, heads, out, save_every, resume, force, quiet, as_json)
    from peta_fast.fit.adamerging import adamerging as function

    return fit(
        job, data, model, device, dtype, function, granularity=granularity, density=density, elect=elect,
        initial=initial, learning_rate=learning_rate, steps=steps, clamp=clamp, loss=loss,
    )  # fmt: skip
