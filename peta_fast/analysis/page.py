"""Figures to a folder: NAME.png and NAME.csv each, and one page, index.html, that needs nothing but itself."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peta_fast.analysis.figures import Figure, require_matplotlib
from peta_fast.errors import RecipeError, ResourceError
from peta_fast.formats.disk import real_path, write_together

PAGE = "index.html"
SHOWN = 30
"""Rows of a table that the page shows; the CSV has all."""

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .3rem; } p { margin: .3rem 0 .8rem; color: #555; }
img { max-width: 100%; height: auto; display: block; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .8rem; margin: .5rem 0; }
td, th { padding: .15rem .6rem; text-align: right; border-bottom: 1px solid #e6e6e6; white-space: nowrap; }
td:first-child, th:first-child { text-align: left; } summary { cursor: pointer; color: #0072b2; font-size: .9rem; }
"""


def write_figures(
    figures: Sequence[Figure],
    out: str | Path,
    *,
    title: str = "peta_fast report",
    facts: Sequence[tuple[str, Any]] = (),
    force: bool = False,
) -> Path:
    """Writes all figures and the page; returns the page's path.

    facts  (name, value) rows of the table at the page's top
    force  replace figures that are in `out`

    Everything is drawn before anything is written, all files or none, and the page comes last. Raises RecipeError when
    two figures share a name, PetaFastError without matplotlib, ResourceError when the folder holds a report already or
    cannot be written.
    """
    out = Path(out)
    names = [figure.name for figure in figures]
    if len(set(names)) != len(names) or not names:
        raise RecipeError("figures", f"expected one figure or more of different names, got {names}")
    require_free(out, force)
    require_matplotlib()
    pictures = {figure.name: figure.png() for figure in figures if figure.draw}
    content = {f"{name}.png": png for name, png in pictures.items()}
    content |= {f"{figure.name}.csv": figure.csv().encode() for figure in figures}
    content[PAGE] = page(figures, pictures, title, facts).encode()
    write_together(out, content)
    return out / PAGE


def require_free(out: str | Path, force: bool, inputs: Sequence[str | Path] = ()) -> None:
    """Raises ResourceError when `out` is a file, is or lies in one of the inputs, or holds a report and force is not
    set."""
    out = Path(out)
    if os.path.lexists(out) and not out.is_dir():
        raise ResourceError(str(out), "expected a folder, got a file or a broken link", "Name another folder.")
    for path in inputs:
        if os.path.isdir(path) and real_path(path) in (real_path(out), *real_path(out).parents):
            raise ResourceError(str(out), f"lies inside the input {path}", "Name a folder outside of all inputs.")
    if (out / PAGE).exists() and not force:
        raise ResourceError(str(out), f"holds a report already ({PAGE})", "Name another folder, or give --force.")


def page(figures: Sequence[Figure], pictures: dict[str, bytes], title: str, facts: Sequence[tuple[str, Any]]) -> str:
    """The HTML: pictures as data, tables folded away, every CSV behind a link that holds it."""
    rows = "".join(f"<tr><td>{_text(name)}</td><td>{_text(value)}</td></tr>" for name, value in facts)
    body = [f"<h1>{_text(title)}</h1>", f'<table class="facts">{rows}</table>' if rows else ""]
    body += [_section(figure, pictures.get(figure.name)) for figure in figures]
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><title>{_text(title)}</title><style>{STYLE}</style></head>\n'
        f"<body>\n{chr(10).join(filter(None, body))}\n</body>\n</html>\n"
    )


def _section(figure: Figure, picture: bytes | None) -> str:
    parts = [f'<h2 id="{_text(figure.name)}">{_text(figure.title)}</h2>', f"<p>{_text(figure.caption)}</p>"]
    if picture is not None:
        source = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
        parts.append(f'<img src="{source}" alt="{_text(figure.title)}" width="{round(figure.size[0] * 100)}">')
    parts.append(f"<details><summary>Numbers</summary>{_table(figure)}</details>")
    return "\n".join(parts)


def _table(figure: Figure) -> str:
    head = "".join(f"<th>{_text(column)}</th>" for column in figure.columns)
    lines = [f"<tr>{''.join(f'<td>{_text(value)}</td>' for value in row)}</tr>" for row in figure.rows[:SHOWN]]
    more = f"<p>{len(figure.rows) - SHOWN} more rows in the CSV.</p>" if len(figure.rows) > SHOWN else ""
    data = base64.b64encode(figure.csv().encode()).decode()
    link = f'<a download="{_text(figure.name)}.csv" href="data:text/csv;base64,{data}">{_text(figure.name)}.csv</a>'
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(lines)}</table></div>{more}<p>{link}</p>'


def _text(value: Any) -> str:
    if hasattr(value, "item"):
        value = value.item()
    return html.escape(f"{value:.4g}" if isinstance(value, float) else str(value))
