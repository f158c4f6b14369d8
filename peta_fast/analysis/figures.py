"""A figure: the numbers as a table, and how they are drawn. matplotlib is imported when the first one is drawn."""

from __future__ import annotations

import csv
import importlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from peta_fast.errors import PetaFastError

DPI = 144


@dataclass(frozen=True)
class Figure:
    """One figure.

    name     of its files, without a suffix
    caption  what is shown and how it was computed, for a reader who sees the figure alone
    columns, rows   the numbers that are drawn, and those beside them
    draw     takes an empty matplotlib Figure; None for a table without a picture
    size     inches
    """

    name: str
    title: str
    caption: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[Any]]
    draw: Callable[[Any], None] | None
    size: tuple[float, float] = (8.0, 4.5)

    def csv(self) -> str:
        """RFC 4180 with a header; numbers to 17 digits, so that they read back as they were."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([[_cell(value) for value in row] for row in self.rows])
        return text.getvalue()

    def png(self) -> bytes:
        """Raises PetaFastError when matplotlib is not installed."""
        assert self.draw is not None, f"{self.name} has no picture"
        figure = require_matplotlib("matplotlib.figure").Figure(
            figsize=self.size, dpi=DPI, facecolor="white", layout="constrained"
        )
        self.draw(figure)
        figure.suptitle(self.title, fontsize=12, x=0.02, ha="left")
        content = io.BytesIO()
        figure.savefig(content, format="png", metadata={"Software": "peta_fast"})
        return content.getvalue()


def _cell(value: Any) -> str:
    if hasattr(value, "item"):
        value = value.item()
    return repr(value) if isinstance(value, float) else str(value)


def require_matplotlib(module: str = "matplotlib") -> ModuleType:
    """The module, e.g. "matplotlib.figure". Raises PetaFastError with the install command when it is not there."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        problem = f"expected the package {(error.name or module).partition('.')[0]!r}, got none: it is not installed"
        raise PetaFastError("analysis", problem, "pip install 'peta_fast[demo]'") from error
