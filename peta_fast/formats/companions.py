"""The files of a model directory that belong beside its weights: config, tokenizer, chat template, preprocessor, code.

Everything is carried along, except what is known to be weights, an index of weights, a README, or a trainer's state.
Of subfolders, only those that Hugging Face libraries read by name: additional chat templates, and the modules of a
sentence-transformers model.
"""

from __future__ import annotations

import os
from pathlib import Path

from peta_fast.errors import CheckpointError
from peta_fast.formats.disk import PARTIAL, make_directory, write_whole
from peta_fast.formats.strict_json import parse_json

_MODEL_MARKS = ("config.json", "adapter_config.json", "tokenizer_config.json", "modules.json")
"""A folder without any of these is a place where weights lie, not a model: nothing is taken from it."""

_WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot",
    ".tflite", ".mlmodel", ".npz", ".npy", ".pkl", ".pickle", ".nemo", ".distcp", ".zip", ".tar", ".gz", ".zst", ".7z",
    ".index.json", PARTIAL,
)  # fmt: skip
_OTHERS_LEFT = (
    "readme", "optimizer", "scheduler", "rng_state", "training_args", "trainer_state", "events.out.tfevents",
    "zero_to_fp32", "mergekit_config", "peta_fast_journal", "all_results", "train_results", "eval_results",
    "test_results",
)  # fmt: skip


def companions_of(directory: Path) -> list[Path]:
    """Files to carry along, by name, config.json last. Raises CheckpointError when the folder cannot be listed."""
    if not any(os.path.isfile(directory / mark) for mark in _MODEL_MARKS):
        return []
    found = [path for folder in _folders(directory) for path in _list(folder) if _belongs(path)]
    return sorted(found, key=lambda path: (path == directory / "config.json", path))


def copy_companions(checkpoint, out_dir: str | Path) -> list[Path]:
    """Copy a checkpoint's companions into `out_dir`, each whole or not at all; returns the new files.

    Raises CheckpointError when one cannot be read, ResourceError when one cannot be written.
    """
    copies = []
    for path in checkpoint.companions():
        copy = Path(out_dir) / path.relative_to(checkpoint.directory)
        make_directory(copy.parent)
        write_whole(copy, _read(path))
        copies.append(copy)
    return copies


def _folders(directory: Path) -> list[Path]:
    named = {"additional_chat_templates", *_sentence_transformer_modules(directory / "modules.json")}
    return [directory] + [directory / name for name in sorted(named) if os.path.isdir(directory / name)]


def _sentence_transformer_modules(file: Path) -> set[str]:
    if not os.path.isfile(file):
        return set()
    modules = parse_json(_read(file), str(file), "the list of modules")
    paths = [module.get("path") for module in modules if isinstance(module, dict)] if isinstance(modules, list) else []
    return {path for path in paths if isinstance(path, str) and path not in ("", ".", "..") and Path(path).name == path}


def _list(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if os.path.isfile(path)]
    except OSError as error:
        raise CheckpointError(str(folder), f"cannot be listed: {error.strerror}") from error


def _belongs(path: Path) -> bool:
    name = path.name.lower()
    return not (name.startswith((".", *_OTHERS_LEFT)) or name.endswith(_WEIGHT_SUFFIXES))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(str(path), f"cannot be read: {error.strerror}") from error
