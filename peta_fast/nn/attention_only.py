"""Fine-tuning attention projections alone: most of what linearization gives, at no cost, merged by task arithmetic.

Trained are the weights that make queries, keys and values and the one that joins the heads; frozen is everything else,
biases too. About a third of a transformer block: 4 d² of 12 d².
Good for adding tasks; for unlearning by a negative weight, full linearization (TangentModel) does better.
Source: Jin et al., ICLR 2025, arXiv:2407.07089.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from torch import Tensor, nn

from peta_fast.errors import CompatibilityError, RecipeError
from peta_fast.nn import base_layer
from peta_fast.nn.targets import find_targets

FUSED = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
"""Parameters of nn.MultiheadAttention itself; its out_proj is a module."""

_BLOCK = re.compile(r"attn|attention", re.IGNORECASE)
"""In the name of a module that holds attention: attn, self_attn, SelfAttention, EncDecAttention, crossattention."""
_BETWEEN = re.compile(r"self|output|inner|\d+")
"""What may stand between that and the projection: BERT's attention.self.query, attention.output.dense."""
_INPUT = re.compile(
    r"(to_|w|W|c_)?(q|k|v|qk|kv|qkv)(_?(proj|lin|linear|a_proj|b_proj|a_proj_with_mqa|bias_proj|global))?"
    r"|(query|key|value)(_?(proj|layer|global))?|query_key_value|(to_|W|w)?qkv|c_attn|in_proj|Wqkv"
)
_LETTER = re.compile(r"(?:to_|w|W)?(q|k|v|query|key|value)(?:_?(?:proj|lin|linear))?")
_JOINS = re.compile(r"(to_)?o(ut)?_?(proj|lin)|to_out|[wW]o")
"""Names of output projections that mean nothing else, even outside of a module called attention."""
_OUTPUT = re.compile(r"(to_)?o(ut)?(_?(proj|lin|linear))?|proj|c_proj|dense|[wW]o|out_linear")


def attention_only(model: nn.Module, target_modules: Collection[str] | str | None = None) -> nn.Module:
    """Freezes everything but the weights of attention projections, in place, and returns the model.

        model = pf.attention_only(model)
        trainer.train()
        pf.save_trained(model, "sst2/")        # the projections alone; merges take the rest from the base

    target_modules  names, tails or a regular expression, as `linearize` reads them, instead of what is found by name:
                    nn.MultiheadAttention and, in modules called "...attn..." or "...attention...", Linear and Conv1D
                    layers with the names of timm and transformers, fused or apart
    Raises RecipeError when there is no such layer, naming the layers that there are.
    """
    chosen = attention_weights(model, target_modules)
    kept = {id(parameter) for parameter in chosen.values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in kept)
    return model


def attention_weights(model: nn.Module, target_modules: Collection[str] | str | None = None) -> dict[str, nn.Parameter]:
    """The weights of attention projections by name, in the model's order. Raises RecipeError when there are none."""
    if target_modules is not None:
        chosen = find_targets(model, target_modules)
        weights = {f"{name}.{part}": p for name, module in chosen.items() for part, p in _weights(module).items()}
    else:
        weights = {}
        for name, module in model.named_modules():
            if is_projection(name, module, model):
                weights |= {f"{name}.{part}" if name else part: p for part, p in _weights(module).items()}
    weights = {name: p for name, p in weights.items() if p is not None}
    if not weights:
        raise _nothing_found(model)
    check_floating(weights)
    return weights


def is_projection(name: str, module: nn.Module, model: nn.Module) -> bool:
    """Whether a module makes queries, keys or values of an attention block, or joins its heads."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    if not is_linear(module):
        return False
    *parents, last = name.split(".")
    parent = model.get_submodule(".".join(parents))
    if isinstance(parent, nn.MultiheadAttention):
        return True
    if _holds_qkv(parent) and (_INPUT.fullmatch(last) or _JOINS.fullmatch(last)):
        return True
    block = max((i for i, part in enumerate(parents) if _BLOCK.search(part)), default=None)
    if block is None:
        return False
    if last.isdigit() and parents[-1] == "to_out":  # diffusers: the layer stands in a list with its dropout
        return True
    if not all(_BETWEEN.fullmatch(part) for part in parents[block + 1 :]):
        return False
    return bool(_INPUT.fullmatch(last) or _OUTPUT.fullmatch(last))


def _holds_qkv(parent: nn.Module) -> bool:
    """Whether a module has layers for q, k and v side by side, whatever its own name is."""
    letters = {match[1][0] for name, child in parent.named_children() if is_linear(child)
               if (match := _LETTER.fullmatch(name))}  # fmt: skip
    return letters == {"q", "k", "v"}


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or base_layer.is_conv1d(module)


def _weights(module: nn.Module) -> Mapping[str, nn.Parameter | None]:
    if isinstance(module, nn.MultiheadAttention):
        return {part: getattr(module, part, None) for part in FUSED}
    return {"weight": getattr(module, "weight", None)}


def check_floating(weights: Mapping[str, Tensor]) -> None:
    """Raises CompatibilityError for quantized weights, which nothing can train."""
    packed = [name for name, p in weights.items() if not p.is_floating_point()]
    if packed:
        raise CompatibilityError(
            packed[0], f"is {weights[packed[0]].dtype}, expected a floating weight that can be trained",
            "Load the model without quantization, or train adapters: pf.linearize.",
        )  # fmt: skip


def _nothing_found(model: nn.Module) -> RecipeError:
    linears = [name for name, module in model.named_modules() if name and is_linear(module)]
    inside = [name for name in linears if _BLOCK.search(name)]
    shown = inside or linears
    tails = list(dict.fromkeys(re.sub(r"^.*?\d+\.", "", name) if re.search(r"\d+\.", name) else name for name in shown))
    listed = ", ".join(map(repr, tails[:8])) + (f" and {len(tails) - 8} more" if len(tails) > 8 else "")
    kind = "inside of attention modules" if inside else "it has"
    return RecipeError(
        "attention_only",
        "found no attention projection by its name",
        f"Linear layers {kind}: {listed}. Give the right ones as target_modules." if shown else "It has no Linear.",
    )


def separate_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """nn.MultiheadAttention's fused rows to the q_proj, k_proj, v_proj that other implementations have.

    `<p>.in_proj_weight` [3 d, d] -> `<p>.q_proj.weight` rows 0..d, `.k_proj` d..2d, `.v_proj` 2d..3d; biases likewise.
    Views, no copies; what is not fused stays.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        prefix, _, part = name.rpartition("in_proj_")
        if not _ or part not in ("weight", "bias"):
            found[name] = tensor
            continue
        if len(tensor) % 3:
            raise CompatibilityError(name, f"has {len(tensor)} rows, expected three equal parts for q, k and v")
        for letter, rows in zip("qkv", tensor.chunk(3), strict=True):
            found[f"{prefix}{letter}_proj.{part}"] = rows
    return found


def fused_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of separate_qkv. Raises CompatibilityError where one of the three is missing."""
    import torch

    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"(.*?)([qkv])_proj\.(weight|bias)", name)
        if match is None:
            found[name] = tensor
            continue
        prefix, _, part = match.groups()
        if f"{prefix}in_proj_{part}" in found:
            continue
        names = [f"{prefix}{letter}_proj.{part}" for letter in "qkv"]
        missing = [n for n in names if n not in state]
        if missing:
            raise CompatibilityError(missing[0], f"is missing beside {name!r}", "All three are needed to fuse them.")
        found[f"{prefix}in_proj_{part}"] = torch.cat([state[n] for n in names])
    return found
