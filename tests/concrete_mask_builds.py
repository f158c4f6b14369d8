"""What the passes of a concrete mask launch on a GPU, recorded over tensors without memory."""

from __future__ import annotations

from pathlib import Path

import torch
from linearized_lora_builds import Build, Launch, build

from peta_fast.ops.concrete_mask import Adam, Piece

OP = "concrete_mask"


def launches(n: int, tasks: int, *, vectors=torch.float32, model=torch.float32, temperature=0.5) -> list[Launch]:
    """Of a step of Concrete AdaMerging: sample, means, merge, both reductions, gradient and Adam with and without."""
    from peta_fast.ops.concrete_mask import launch

    def empty(dtype=torch.float32, *size: int) -> torch.Tensor:
        return torch.empty(*(size or (n,)), dtype=dtype, device="meta")

    found: list[Launch] = []
    untouched = launch.launch
    options = {"BLOCK": launch.BLOCK, "num_warps": launch.WARPS}
    launch.launch = lambda kernel, blocks, *a, **o: found.append(Launch(kernel.fn.__name__, a, {**o, **options}, OP))
    try:
        logits, scalar = empty(), torch.empty((), dtype=torch.float64, device="meta")
        piece = Piece([empty(vectors) for _ in range(tasks)], empty(torch.float32, tasks), logits, 2**63 + 5,
                      empty(model), empty(model), empty(model), scalar)  # fmt: skip
        launch.sample(logits, piece.key, temperature, empty())
        launch.means([piece], temperature)
        launch.merge([piece], temperature)
        launch.coefficient_gradients([piece], temperature)
        launch.coefficient_gradients([piece], temperature, products=True)
        launch.logit_gradients([piece], [scalar], temperature)
        launch.adam([piece], [scalar], temperature, [(empty(), empty())], Adam(1e-3, 1))
        rest = Piece(logits=logits, key=piece.key, g=empty(), mean=scalar)
        launch.adam([rest], [scalar], temperature, [(empty(), empty())], Adam(1e-3, 1))
        plain = Piece(piece.task_vectors, piece.coefficients, None, 0, piece.base, piece.out, piece.g, scalar)
        launch.merge([plain], temperature)
        launch.coefficient_gradients([plain], temperature)
    finally:
        launch.launch = untouched
    return found


def build_all(step: dict, architecture: int, folder: Path) -> list[tuple[str, Build]]:
    """The build of every launch, with the kernel's name."""
    return [(launched.kernel, build(launched, architecture, folder)) for launched in launches(**step)]
