"""What lies beside the weights of a merge: the base's other files, tokenizer, chat template, card, config last."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from peta_fast._assignment import is_stacked, layer_of, main_layers
from peta_fast.buffers import LONG_NAMES, SHORT_NAMES
from peta_fast.errors import CheckpointError
from peta_fast.formats import model_card
from peta_fast.formats.companions import companions_of
from peta_fast.plan import Plan

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""What configs call the number of layers."""
LAYER_LISTS = ("layer_types", "layers_block_type", "mlp_layer_types")
"""What configs call lists with one entry a layer."""
TOKENIZER_FILES = (
    "tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "spiece", "sentencepiece", "tekken",
    "chat_template",
)  # fmt: skip
"""How the names of a tokenizer's files begin."""
CARD, CONFIG, TOKENIZER_CONFIG = "README.md", "config.json", "tokenizer_config.json"


def companions(plan: Plan) -> dict[str, Path | bytes]:
    """Every file beside the weights, by its path in the output: a file to copy, or content. The config comes last.

    Raises CheckpointError when a file of the inputs cannot be read or is not what its name says.
    """
    donor = plan.sources[plan.donor]
    files: dict[str, Path | bytes] = _files_of(donor.directory)
    if plan.tokenizer is not None:
        files = {name: path for name, path in files.items() if not name.startswith(TOKENIZER_FILES)}
        files.update(_tokenizer_files(plan.tokenizer))
    _set_chat_template(plan, files)
    files[CARD] = _card(plan).encode()
    if CONFIG in files:
        del files[CONFIG]
        files[CONFIG] = _json(_merged_config(plan, donor.config))
    return files


def _files_of(folder: Path | None) -> dict[str, Path | bytes]:
    if folder is None or not folder.is_dir():
        return {}
    return {path.relative_to(folder).as_posix(): path for path in companions_of(folder)}


def _tokenizer_files(folder: Path) -> dict[str, Path | bytes]:
    found = {name: path for name, path in _files_of(folder).items() if name.startswith(TOKENIZER_FILES)}
    if not found:
        raise CheckpointError(str(folder), "expected a tokenizer's files, found none", "Change tokenizer_source.")
    return found


def _set_chat_template(plan: Plan, files: dict[str, Path | bytes]) -> None:
    """Jinja text goes into a file of its own and, where there is one, the tokenizer's config."""
    template = plan.recipe.chat_template
    if template in (None, "auto"):
        return
    files["chat_template.jinja"] = template.encode()
    config = files.get(TOKENIZER_CONFIG)
    if isinstance(config, Path):
        files[TOKENIZER_CONFIG] = _json({**_read_json(config), "chat_template": template})


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(str(path), f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(str(path), f"expected JSON, got {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(str(path), f"expected a JSON object, got {type(content).__name__}")
    return content


def _card(plan: Plan) -> str:
    models = [str(r) for r in plan.recipe.references()]
    base = str(plan.recipe.base) if plan.recipe.base else None
    return model_card(base, [m for m in models if m != base], plan.recipe.method, plan.recipe.text)


def _merged_config(plan: Plan, config: dict[str, Any]) -> dict[str, Any]:
    """The donor's config with the layers, the dtype and the ties of what was merged."""
    config = copy.deepcopy(config)
    if any(map(is_stacked, plan.recipe.modules)):
        _renumber(plan, config)
    wanted = plan.recipe.out_dtype or plan.recipe.dtype
    if wanted:
        config.update({key: LONG_NAMES[SHORT_NAMES[wanted]] for key in ("torch_dtype", "dtype") if key in config})
    if plan.warnings and config.get("tie_word_embeddings"):
        config["tie_word_embeddings"] = False
    return config


def _renumber(plan: Plan, config: dict[str, Any]) -> None:
    """Sets what counts or lists the layers, in the config itself or in that part of it (text_config) that has them."""
    path, before = main_layers(plan.sources[plan.donor].tensors)
    origins = _origins(plan, path)
    parts = [config, *(p for key, p in config.items() if key.endswith("_config") and isinstance(p, dict))]
    counting = [p for p in parts if any(key in p for key in LAYER_COUNTS)]
    if config not in counting:
        counting = [p for p in counting if before in (p.get(key) for key in LAYER_COUNTS)]
    for part in counting:
        part.update({key: len(origins) for key in LAYER_COUNTS if key in part})
        for key in LAYER_LISTS:
            if isinstance(part.get(key), list) and len(part[key]) == before:
                part[key] = [part[key][min(i, before - 1)] for i in origins]


def _origins(plan: Plan, path: str) -> list[int]:
    """For every layer of the output, the number it had in the model that gives its names."""
    origins: dict[int, int] = {}
    for tensor in plan.tensors:
        found = layer_of(tensor.name)
        if found and found[0] == path and tensor.inputs:
            origins.setdefault(found[1], layer_of(tensor.inputs[0][1])[1])
    return [origins[layer] for layer in sorted(origins)]


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
