"""A report as one self-contained HTML file: functions that give its parts, and one that writes the page.

Parts are rendered by templates/page.html, which escapes every text. A part is Markup, and so is only what a template
returned: a plain string among the parts is escaped like any text.
"""

import base64
import html
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from kamim.storage.escape import printable
from kamim.storage.files import write_whole

Part: TypeAlias = Markup
_TITLE = re.compile("<title>([^<]*)</title>")


def _printable(value: Any) -> Any:
    """Text without control characters; what a template returned as it is."""
    return value if isinstance(value, Markup) else printable(str(value))


_TEMPLATE = Environment(
    loader=PackageLoader("kamim.reporting"),
    autoescape=True,
    undefined=StrictUndefined,
    finalize=_printable,
    trim_blocks=True,
    lstrip_blocks=True,
).get_template("page.html")


def _render(macro: str, *arguments: Any) -> Part:
    part: Part = getattr(_TEMPLATE.module, macro)(*arguments)
    return part


def paragraph(text: str) -> Part:
    """Returns a paragraph."""
    return _render("paragraph", text)


def heading(text: str) -> Part:
    """Returns the heading of a section."""
    return _render("heading", text)


def bullets(lines: Sequence[str]) -> Part:
    """Returns a list."""
    return _render("bullets", lines)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Part:
    """Returns a table of text, without columns that are empty in every row. It scrolls if it is too wide."""
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    return _render("table", [header[i] for i in kept], [[row[i] for i in kept] for row in rows])


def picture(png: bytes, name: str, caption: str) -> Part:
    """Returns a PNG, embedded in the page."""
    return _render("picture", base64.b64encode(png).decode(), name, caption)


def folded(summary: str, inner: Part) -> Part:
    """Returns another part, which the reader unfolds."""
    return _render("folded", summary, inner)


def save_page(title: str, parts: Sequence[Part], file: Path) -> None:
    """Writes one HTML file that shows all parts below the title."""
    write_whole(file, _render("page", title, parts).encode())


def title_of(file: Path) -> str:
    """Returns the title of an HTML file, such as one of save_page; "" if there is none."""
    if file.is_symlink() or not file.is_file():
        return ""
    with file.open(encoding="utf-8", errors="replace") as stream:
        start = stream.read(4096)
    match = _TITLE.search(start)
    return html.unescape(match[1]) if match else ""


def png(figure: Figure, dpi: int = 150) -> bytes:
    """Returns the figure as PNG; the same figure gives the same bytes."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=dpi)
    return stream.getvalue()


def save_picture(figure: Figure, file: Path) -> None:
    """Writes a PNG for the screen."""
    write_whole(file, png(figure, dpi=110))


def save_figure(figure: Figure, stem: Path) -> None:
    """Writes stem.png and stem.pdf; the same figure gives the same bytes."""
    pdf = io.BytesIO()
    figure.savefig(pdf, format="pdf", metadata={"CreationDate": None})
    write_whole(stem.with_suffix(".png"), png(figure))
    write_whole(stem.with_suffix(".pdf"), pdf.getvalue())


def plain(value: Any) -> Any:
    """Returns the value as JSON takes it: arrays become lists, floats keep 8 digits, NaN becomes null."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, float | np.floating):
        return float(f"{value:.8g}") if np.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


def save_numbers(numbers: Any, file: Path) -> None:
    """Writes numbers as JSON (see plain)."""
    write_whole(file, (json.dumps(plain(numbers), indent=1, allow_nan=False) + "\n").encode())
