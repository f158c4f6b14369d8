"""`peta-fast fit concrete`: one mask for all tasks, by how sure the merged model is of its answers."""

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

EPILOG = f"""  peta-fast fit concrete base sst2 rte --data tasks:batches --out fitted [--adamerging]
  peta-fast merge fitted/recipe.yml merged

{DATA_EPILOG}
Labels are not looked at unless the loss is cross_entropy."""


def concrete(
    base: Base,
    models: Models,
    data: Data = None,
    out: Out = None,
    model: Network = None,
    names: Names = None,
    heads: Heads = None,
    adamerging: Annotated[bool, Option("--adamerging", help="Learn coefficients, too, on two levels.")] = False,
    scaling: Annotated[float, Option("--scaling", help="Of task vectors; with --adamerging, where it starts.")] = 0.3,
    granularity: Annotated[str, Option("--granularity", help="Of coefficients: layer or task.")] = "layer",
    learning_rate: Annotated[float, Option("--learning-rate", help="Of Adam on the mask's logits.")] = 1e-3,
    steps: Annotated[int, Option("--steps", help="Of the mask.", low=0)] = 2000,
    coefficient_steps: Annotated[int, Option("--coefficient-steps", help="With --adamerging, then.", low=0)] = 1000,
    temperature: Annotated[float, Option("--temperature", help="Of the relaxed mask.")] = 0.5,
    mask: Annotated[str, Option("--mask", help="In the result: soft, binary or expected.")] = "soft",
    clamp: Annotated[bool, Option("--clamp/--no-clamp", help="Coefficients to [0, 1].")] = True,
    loss: Loss = "entropy",
    seed: Annotated[int, Option("--seed", help="Of the masks' noise.", low=0)] = 0,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    save_every: SaveEvery = 100,
    resume: Resume = False,
    force: Force = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> int:
    """Learn a mask by minimizing the entropy of the merged model's answers."""
    from peta_fast.cli.fit._fitting import fit, job_of

    job = job_of(base, models, names, heads, out, save_every, resume, force, quiet, as_json)
    from peta_fast.fit.concrete import concrete_adamerging, concrete_task_arithmetic

    options = {
        "learning_rate": learning_rate, "steps": steps, "temperature": temperature, "mask": mask, "loss": loss,
        "seed": seed,
    }  # fmt: skip
    if adamerging:
        options |= {"initial": scaling, "granularity": granularity, "coefficient_steps": coefficient_steps,
                    "clamp": clamp}  # fmt: skip
    else:
        options["scaling"] = scaling
    function = concrete_adamerging if adamerging else concrete_task_arithmetic
    return fit(job, data, model, device, dtype, function, mask, **options)
