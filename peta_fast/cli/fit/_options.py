"""Options that the commands of this group share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from peta_fast.cli._parser import Argument, Option

Base = Annotated[str, Argument("BASE", "what the models were tuned from: a folder, weight file or hub id")]
Models = Annotated[list[str], Argument("MODEL", "the fine-tuned ones")]
Data = Annotated[
    list[str] | None,
    Option(
        "--data", help="f(task) -> batches, as MODULE:FUNCTION or FILE.py:FUNCTION; once, or once a model.", metavar="F"
    ),
]
Network = Annotated[
    str | None,
    Option("--model", help="f() -> the network, or f(path) -> with its weights. Unless given, transformers builds it."),
]
Names = Annotated[str | None, Option("--names", help="Of the tasks, comma-separated, instead of the folders'.")]
Heads = Annotated[
    str | None, Option("--heads", help="Tensors or modules of which each task has its own: classifier,*.score.")
]
Loss = Annotated[str, Option("--loss", help="entropy, or cross_entropy where batches have labels.")]
Device = Annotated[str, Option("--device", help="Where networks run: cpu, cuda, cuda:1.")]
Dtype = Annotated[str, Option("--dtype", help="They run in: float32, bfloat16, float16; auto: as stored.")]
SaveEvery = Annotated[int, Option("--save-every", help="Steps after which the state is kept.", low=1)]
Resume = Annotated[bool, Option("--resume", help="Go on with a killed fit.")]
Force = Annotated[bool, Option("--force", help="Replace what is there, and start anew.")]
Quiet = Annotated[bool, Option("--quiet/--no-quiet", "-q", help="No progress on stderr.")]
Out = Annotated[Path | None, Option("--out", help="Folder for recipe.yml, history.csv and, where there are, masks.")]

DATA_EPILOG = """What is evaluated comes from a Python file of yours, say tasks.py:

  def batches(task):                 # the name of a model's folder
      return DataLoader(...)         # mappings as Hugging Face's collators make them, or (inputs, labels)
"""


def listed(text: str | None) -> list[str]:
    """a,b -> [a, b]"""
    return [word for word in (text or "").split(",") if word]
