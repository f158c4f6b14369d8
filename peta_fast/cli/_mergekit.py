"""mergekit's command-line flags that peta-fast takes without need of them, so that its command lines run unchanged."""

from __future__ import annotations

from typing import Annotated

from peta_fast.cli._parser import Option

IGNORED = {
    "--lazy-unpickle/--no-lazy-unpickle": "tensors are always mapped when they are asked for",
    "--low-cpu-memory/--no-low-cpu-memory": "memory is bounded by --max-memory",
    "--async-write/--no-async-write": "writing always goes on beside merging",
    "--clone-tensors/--no-clone-tensors": "a tensor may stand in several places of the output",
    "--safe-serialization/--no-safe-serialization": "the output is always safetensors",
    "--copy-tokenizer/--no-copy-tokenizer": "the tokenizer's files are always carried along",
    "--write-model-card/--no-write-model-card": "a model card is always written",
    "--allow-crimes/--no-allow-crimes": "models fit when their tensors' names and shapes do",
    "--trust-remote-code/--no-trust-remote-code": "no code of a model is ever run",
    "--multi-thread/--no-multi-thread": "all cores work, see --threads",
    "--verbose": "a merge has little to say",
    "-v": "the same",
}
"""Flag -> why it means nothing here."""

IGNORED_VALUES = {
    "--lora-merge-cache": "merged adapters are not kept",
    "--lora-merge-dtype": "adapters are merged in fp32",
    "--write-threads": "one thread writes",
}
"""Option with a value -> why it means nothing here."""

GPU_FLAGS = ("--cuda/--no-cuda", "--read-to-gpu/--no-read-to-gpu", "--multi-gpu/--no-multi-gpu", "--gpu-rich")


def _lines(flags: dict[str, str]) -> str:
    return "\n".join(f"  {name.partition('/')[0]:<24} {why}" for name, why in flags.items())


EPILOG = f"mergekit's flags that are taken and ignored:\n{_lines(IGNORED | IGNORED_VALUES)}"

Ignored = Annotated[bool, Option(*IGNORED)]
IgnoredValues = Annotated[list[str] | None, Option(*IGNORED_VALUES)]
Gpu = Annotated[bool, Option(*GPU_FLAGS)]
TransformersCache = Annotated[str | None, Option("--transformers-cache", help="Where downloaded models lie.")]
