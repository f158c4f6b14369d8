"""What the tests of the command line share: three small models, recipes that merge them, and a way to run commands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from peta_fast.cli import main

TIES = """merge_method: ties
base_model: {folder}/base
models:
  - model: {folder}/a
    parameters: {{weight: 1.0, density: 0.5}}
  - model: {folder}/b
    parameters: {{weight: 0.5, density: 0.5}}
"""
LINEAR = """merge_method: linear
models:
  - model: {folder}/a
    parameters: {{weight: 0.25}}
  - model: {folder}/b
    parameters: {{weight: 0.75}}
parameters: {{normalize: false}}
dtype: float32
"""
DARE = TIES.replace("ties", "dare_linear")


def write_model(folder: Path, **tensors: np.ndarray) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"architectures": ["Toy"]}))
    return folder


def toy(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    layers = {f"layers.{i}.weight": rng.standard_normal((16, 8)).astype(np.float32) for i in range(3)}
    return {"ids": np.arange(4), **layers}


def write_models(folder: Path) -> Path:
    """base, a, b and the recipes ties.yml, linear.yml, dare.yml."""
    for name, seed in (("base", 0), ("a", 1), ("b", 2)):
        write_model(folder / name, **toy(seed))
    for name, text in (("ties", TIES), ("linear", LINEAR), ("dare", DARE)):
        (folder / f"{name}.yml").write_text(text.format(folder=folder))
    return folder


def runner(capsys):
    """A function that runs a command line: (exit code, stdout, stderr)."""

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(word) for word in words])
        return code, *capsys.readouterr()

    return run
