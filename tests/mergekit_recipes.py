"""Recipes in mergekit's YAML about the models base, a, b and c of four layers."""

from __future__ import annotations

from mergekit_oracle import LAYERS


def three(method: str, parameters: str = "", keys: str = "", densities=(None, None, None)) -> str:
    """A recipe of models a, b and c with weights 0.7, -0.4 and 0.9; `parameters` and `keys` hold for all."""
    models = [
        f"{{model: {model}, parameters: {{weight: {weight}{'' if density is None else f', density: {density}'}}}}}"
        for model, weight, density in zip("abc", (0.7, -0.4, 0.9), densities, strict=True)
    ]
    base = "" if method == "linear" else "base_model: base\n"
    return (
        f"merge_method: {method}\n{base}models: [{', '.join(models)}]\nparameters: {{{parameters}}}\n"
        f"dtype: float32\n{keys}"
    )


SLERP = """
merge_method: slerp
base_model: a
slices:
  - sources:
      - {model: a, layer_range: [0, 4]}
      - {model: b, layer_range: [0, 4]}
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - value: 0.5
"""
FRANKENMERGE = """
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 3]}]
  - sources: [{model: b, layer_range: [1, 4]}]
"""
GRADIENTS = """
merge_method: ties
base_model: base
models:
  - {model: a, parameters: {weight: [0, 1], density: [0.2, 0.9, 0.4]}}
  - {model: b, parameters: {weight: [1, 0.5, 0], density: 0.5}}
  - {model: c, parameters: {weight: [1, 2, 3, 4, 5, 6, 7], density: [0.3]}}
parameters: {lambda: [0.5, 1.5], normalize: [false, false, true]}
"""
FILTERS = """
merge_method: ties
base_model: base
models:
  - model: base
  - model: a
    parameters:
      weight: [{filter: embed_tokens, value: 0.1}, {filter: lm_head, value: 0.2}, {filter: model.norm, value: 0.3},
               {filter: layernorm, value: [0.4, 0.8]}, {value: 1}]
      density: [{filter: q_proj, value: 0.1}, {value: 0.8}]
  - model: b
    parameters: {weight: [{filter: mlp, value: [0.2, 0.4, 0.9]}, {value: -0.3}], density: 0.5}
  - model: c
    parameters: {weight: [{filter: self_attn, value: 1}, {filter: "*", value: 0.25}]}
parameters:
  normalize: [{filter: mlp, value: false}, {value: true}]
  int8_mask: true
"""
PRECEDENCE = """
merge_method: ties
base_model: base
models:
  - {model: a, parameters: {weight: [{filter: mlp, value: 0.3}]}}
  - {model: b}
parameters: {weight: [{filter: self_attn, value: 0.7}, {value: 2}], density: [1, 0.5, 0.2]}
"""
SLICES = """
merge_method: ties
base_model: base
slices:
  - sources:
      - {model: a, layer_range: [0, 2], parameters: {weight: 0.7, density: 0.5}}
      - {model: b, layer_range: [1, 3], parameters: {weight: [0.1, 0.9]}}
      - {model: base, layer_range: [0, 2]}
    parameters: {lambda: 0.5, density: 0.1}
  - sources:
      - {model: a, layer_range: [2, 4], parameters: {weight: 1}}
      - {model: c, layer_range: [1, 3], parameters: {weight: -0.5}}
      - {model: base, layer_range: [2, 4]}
parameters: {lambda: 2, density: 0.9}
"""
OTHER_BASE = """
merge_method: ties
base_model: base
slices:
  - sources:
      - {model: a, layer_range: [0, 2], parameters: {weight: 0.7, density: 0.5}}
      - {model: base, layer_range: [0, 2]}
  - sources:
      - {model: a, layer_range: [2, 4], parameters: {weight: 0.7, density: 0.5}}
      - {model: c, layer_range: [2, 4]}
    base_model: c
"""
MODULES = """
merge_method: ties
base_model: base
modules:
  default:
    models:
      - {model: a, parameters: {weight: 0.7, density: 0.5}}
      - {model: b, parameters: {weight: -0.4}}
    parameters: {lambda: 0.5}
parameters: {lambda: 2}
"""


def one_layer_slices() -> str:
    """Each layer a slice of its own, where gradients end at their last value."""
    sources = "{{model: {m}, layer_range: [{i}, {j}]{p}}}"
    slices = [
        ", ".join(
            sources.format(m=m, i=i, j=i + 1, p=p)
            for m, p in [("a", ", parameters: {weight: 1}"), ("b", ", parameters: {weight: [0.1, 0.9]}"), ("base", "")]
        )
        for i in range(LAYERS)
    ]
    listed = "\n".join(f"  - sources: [{s}]" for s in slices)
    return f"merge_method: task_arithmetic\nbase_model: base\nslices:\n{listed}\n"


RECIPES = {
    "slerp-by-layer-and-filter": SLERP,
    "slerp-from-the-second-model": "merge_method: slerp\nbase_model: b\nmodels: [{model: a}, {model: b}]\n"
    "parameters: {t: 0.3}",
    "slerp-base-not-listed": "merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\nparameters: {t: 1.2}",
    "frankenmerge": FRANKENMERGE,
    "frankenmerge-scaled": FRANKENMERGE.replace(
        "[1, 4]", "[1, 4], parameters: {scale: [{filter: o_proj, value: 0.5}, {value: [0, 1, 2]}]}"
    ),
    "frankenmerge-of-one-model": FRANKENMERGE.replace("model: b", "model: a"),
    "passthrough-scaled": "merge_method: passthrough\nmodels: [{model: a, parameters: {scale: [0.5, 2]}}]",
    "averaged-slices": FRANKENMERGE.replace("passthrough", "linear")
    .replace("[0, 3]}", "[0, 3], parameters: {weight: 0.3}}, {model: c, layer_range: [1, 4], parameters: {weight: 1}}")
    .replace("[1, 4]}]\n", "[1, 4], parameters: {weight: 1}}]\n"),
    "gradients": GRADIENTS,
    "filters": FILTERS,
    "precedence": PRECEDENCE,
    "slices": SLICES,
    "slices-of-one-layer": one_layer_slices(),
    "slice-with-its-own-base": OTHER_BASE,
    "modules": MODULES,
    "base-among-the-averaged": "merge_method: linear\nbase_model: base\nmodels: [{model: a}, {model: base}]\n"
    "parameters: {weight: 0.3}",
    "weights-that-cancel": "merge_method: task_arithmetic\nbase_model: base\nmodels:\n"
    "  - {model: a, parameters: {weight: 1}}\n  - {model: b, parameters: {weight: -1}}\nparameters: {normalize: true}",
    "bf16-output": three("task_arithmetic", keys="out_dtype: bfloat16").replace("dtype: float32\n", "", 1),
    "fp16-output": three("linear", keys="out_dtype: float16").replace("dtype: float32\n", "", 1),
}

LET_PASS = {
    "unknown-key": three("ties", "densty: 0.5"),
    "key-of-all-under-one-model": three("ties").replace("weight: 0.7", "weight: 0.7, lambda: 0.5"),
    "density-above-1": three("ties", "density: 1.5"),
    "nothing-but-the-base": "merge_method: ties\nbase_model: base\nmodels: [{model: base, parameters: {weight: 1}}]",
    "average-by-weights-that-cancel": three("linear").replace("0.9", "-0.3"),
}
LAST_SLICE = """
merge_method: linear
slices:
  - sources: [{model: a, layer_range: [0, 2], parameters: {weight: 0.3}}]
  - sources:
      - {model: b, layer_range: [1, 4], parameters: {weight: 0.5}}
      - {model: c, layer_range: [1, 4], parameters: {weight: 0.1}}
parameters: {normalize: false}
dtype: float32
"""
