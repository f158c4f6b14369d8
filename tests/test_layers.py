"""The arrows between modules point down, and what start-up must not load is not loaded."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from interpreter import run_code

import peta_fast

PACKAGE = Path(peta_fast.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
LAYERS: tuple[dict[str, tuple[str, ...]], ...] = (
    {"errors": ("errors",)},
    {"buffers": ("buffers",), "_native": ("_native", "_cpu"), "_cuda": ("_cuda", "_cuda_build")},
    {"ops": ("ops",), "formats": ("formats",)},
    {"methods": ("methods",), "nn": ("nn",)},
    {"recipe": ("recipe", "_recipe_reader", "_recipe_settings", "_recipe_spec", "_yaml_lines")},
    {"plan": ("plan", "_assignment", "_beside", "_tensor_plan")},
    {
        "run": (
            "run",
            "_run_variants",
            "_engine",
            "_device_engine",
            "_variants",
            "_output",
            "_companions",
            "journal",
        )
    },  # fmt: skip
    {"merging": ("merging",)},
    {
        "adapters": ("adapters",),
        "fit": ("fit",),
        "analysis": ("analysis",),
        "disentangling": ("disentangling",),
        "sweeps": ("sweeps", "batches", "_grid", "_sweep_results", "_variant_memory"),
    },
    {"demo": ("demo",)},
    {"cli": ("cli", "__main__")},
    {"the package itself": ("",)},
)
"""From the bottom up; parts of one layer do not know each other."""
PART_OF = {module: part for layer in LAYERS for part, modules in layer.items() for module in modules}
HEIGHT = {part: height for height, layer in enumerate(LAYERS) for part in layer}
LONGEST = 600
MAY_IMPORT_TORCH = (
    "adapters", "demo", "fit", "nn", "ops.concrete_mask", "ops.gram", "ops.kronecker_sum", "ops.linearized_lora",
    "ops.low_rank", "ops.spd_solve",
)  # fmt: skip
"""Modules, with all that stands below them."""


def module_name(file: Path) -> str:
    """peta_fast/formats/hub.py -> formats.hub; peta_fast/formats/__init__.py -> formats"""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(name: str) -> str:
    return PART_OF[name.split(".")[0]]


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Full names of all modules that the code imports, wherever the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "."
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def arrows(source: str) -> set[str]:
    """The modules of this package that a source imports, without the package's name."""
    found = {n.removeprefix("peta_fast.") for n in imported_names(ast.parse(source)) if n.startswith("peta_fast.")}
    return {n for n in found if n.split(".")[0] in PART_OF}


def points_up(name: str, imported: str) -> bool:
    importer, other = part_of(name), part_of(imported)
    return importer != other and HEIGHT[other] >= HEIGHT[importer]


def imported_at_top(tree: ast.Module) -> set[str]:
    """Packages that are imported when the module is, whatever else happens."""
    pending: list[ast.AST] = list(tree.body)
    found: set[str] = set()
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {n.split(".")[0] for n in imported_names(node)}
        pending.extend(ast.iter_child_nodes(node))
    return found


def test_every_module_has_its_layer():
    assert {module_name(f).split(".")[0] for f in FILES} - set(PART_OF) == set()


@pytest.mark.parametrize("file", FILES, ids=[module_name(f) or "__init__" for f in FILES])
def test_imports_point_down(file):
    name = module_name(file)
    assert [n for n in sorted(arrows(file.read_text())) if points_up(name, n)] == []


@pytest.mark.parametrize("file", FILES, ids=[module_name(f) or "__init__" for f in FILES])
def test_imports_say_the_full_name(file):
    nodes = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.ImportFrom)]
    assert [n.lineno for n in nodes if n.level] == []


@pytest.mark.parametrize(
    "name, source",
    [
        ("formats.hub", "from peta_fast.recipe import ModelRef"),
        ("formats.hub", "def locate():\n    import peta_fast.methods.ties"),
        ("ops.delta_merge", "from peta_fast import formats"),
        ("formats.disk", "from peta_fast.ops import backend"),
        ("journal", "from peta_fast.cli import main"),
        ("plan", "if True:\n    from peta_fast.run import run"),
        ("buffers", "from peta_fast._native import native"),
    ],
)
def test_an_arrow_that_points_up_would_be_found(name, source):
    assert any(points_up(name, n) for n in arrows(source))


@pytest.mark.parametrize("file", FILES, ids=[module_name(f) or "__init__" for f in FILES])
def test_torch_is_imported_where_it_is_needed_and_not_before(file):
    if not any(f"{module_name(file)}.".startswith(f"{allowed}.") for allowed in MAY_IMPORT_TORCH):
        assert imported_at_top(ast.parse(file.read_text())) & {"torch", "safetensors", "transformers", "peft"} == set()


def test_an_import_of_torch_in_a_class_or_try_would_be_found():
    source = "class A:\n    try:\n        from torch import nn\n    except ImportError:\n        pass"
    assert imported_at_top(ast.parse(source)) == {"torch"}
    assert imported_at_top(ast.parse("def f():\n    import torch")) == set()


@pytest.mark.parametrize("file", FILES, ids=[module_name(f) or "__init__" for f in FILES])
def test_nothing_imports_pydantic_or_click(file):
    names = {n.split(".")[0] for n in imported_names(ast.parse(file.read_text()))}
    assert names & {"pydantic", "click"} == set()


@pytest.mark.parametrize("module", ["peta_fast", "peta_fast.merging", "peta_fast.cli"])
def test_start_up_loads_nothing_heavy(module):
    code = f"import {module}, sys; print([m for m in {HEAVY!r} if m in sys.modules])"
    ran = run_code(code)
    assert ran.stdout.strip() == "[]", ran.stderr


HEAVY = ("torch", "pydantic", "typer", "rich", "transformers", "matplotlib", "sklearn", "peft")


@pytest.mark.parametrize("file", FILES, ids=[module_name(f) or "__init__" for f in FILES])
def test_no_file_needs_a_table_of_contents(file):
    assert len(file.read_text().splitlines()) < LONGEST
