"""Text that ships with Python: sentences of the standard library's documentation strings, and where each comes from.

Every task is a set of packages, and the question which of them a sentence comes from; the sets share none. Sources are
parsed, never imported. A sentence that names one of its task's packages would give the answer away and is left out, and
so is one that two packages of the task have.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from peta_fast.errors import PetaFastError

TASKS: dict[str, tuple[str, ...]] = {
    "network": ("email", "http", "urllib", "xml"),
    "running": ("asyncio", "importlib", "multiprocessing", "threading"),
    "checking": ("doctest", "inspect", "logging", "unittest"),
}
"""Task -> the packages that are its labels. All are in Python 3.10 and in what has come since."""

SPLITS = ("train", "validation", "test")
WORDS = (5, 16)
"""Words that a sentence has at least and at most."""
TESTS = {"test", "tests", "idle_test"}


@dataclass(frozen=True)
class Sentence:
    text: str
    label: int


def library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def documentation(package: str, root: Path | None = None) -> Iterator[str]:
    """The documentation strings of a package's modules, classes and functions, file by file.

    Raises PetaFastError where its source is not on the disk.
    """
    root = root or library()
    single, folder = root / f"{package}.py", root / package
    files = [single] if single.is_file() else sorted(folder.rglob("*.py"))
    if not files:
        raise PetaFastError(str(root), f"expected the source of the package {package!r}, found none")
    for file in files:
        if TESTS.isdisjoint(file.relative_to(root).parts):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                    yield ast.get_docstring(node) or ""


def sentences(text: str) -> Iterator[str]:
    """The sentences of one documentation string: prose of WORDS words, without examples and tables."""
    for paragraph in re.split(r"\n\s*\n", text):
        if ">>>" in paragraph:
            continue
        for found in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(paragraph.split())):
            letters = sum(c.isalpha() or c == " " for c in found)
            if WORDS[0] <= len(found.split()) <= WORDS[1] and letters > 0.85 * len(found):
                yield found


def place(sentence: str, seed: int) -> float:
    """In [0, 1), by a hash of the words: the same for the same sentence, whatever package or file it stands in."""
    digest = hashlib.blake2b(f"{seed}:{plain(sentence)}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def plain(sentence: str) -> str:
    return " ".join(re.findall(r"[a-z]+", sentence.lower()))


@functools.cache
def collected(task: str, root: Path | None = None) -> list[list[str]]:
    """For each package of a task its sentences, none twice, none that names a package, none of two packages."""
    packages = TASKS[task]
    found: list[dict[str, str]] = []
    for package in packages:
        every = (s for text in documentation(package, root) for s in sentences(text))
        found.append({plain(s): s for s in every if not any(name in s.lower() for name in packages)})
    shared = {key for own in found for key in own if sum(key in other for other in found) > 1}
    return [[s for key, s in own.items() if key not in shared] for own in found]


def split(task: str, seed: int, most: dict[str, int], root: Path | None = None) -> dict[str, list[Sentence]]:
    """Split -> sentences with their labels, at most most[split] of a label, in the order of their hashes.

    60 % of the hashes belong to train, 15 % to validation and 25 % to test, so that splits share no sentence.
    """
    ends = {"train": 0.6, "validation": 0.75, "test": 1.0}
    parts: dict[str, list[tuple[float, Sentence]]] = {name: [] for name in SPLITS}
    for label, own in enumerate(collected(task, root)):
        ranked = sorted((place(s, seed), s) for s in own)
        begin = 0.0
        for name, end in ends.items():
            inside = [(where, Sentence(s, label)) for where, s in ranked if begin <= where < end]
            parts[name] += inside[: most[name]]
            begin = end
    return {name: [s for _, s in sorted(part, key=lambda p: p[0])] for name, part in parts.items()}
