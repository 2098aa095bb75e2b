"""A report as one HTML file that needs nothing else: parts, all of them escaped, and the page that holds them."""

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from kamim.storage.escape import printable
from kamim.storage.store import write_whole

PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h2 { margin: 2.5rem 0 .5rem; } figure { margin: 1.5rem 0 2.5rem; } img { max-width: 100%; height: auto; }
figcaption, summary { color: #444; } li { margin: .3rem 0; } p, li, details td { overflow-wrap: anywhere; }
.wide { overflow-x: auto; } table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .9rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #e6e6e6; }
th { border-bottom: 2px solid #bbb; white-space: nowrap; }
details { margin: .5rem 0; } summary { cursor: pointer; } details td { font-size: .85rem; min-width: 4rem; }
</style></head><body>
<h1>$title</h1>
$parts
</body></html>
""")


def _text(text: str) -> str:
    """Text as HTML shows it, attributes included."""
    return html.escape(printable(text))


def paragraph(text: str) -> str:
    """A paragraph."""
    return f"<p>{_text(text)}</p>"


def heading(text: str) -> str:
    """Of a section."""
    return f"<h2>{_text(text)}</h2>"


def bullets(lines: Sequence[str]) -> str:
    """A list."""
    return f"<ul>{''.join(f'<li>{_text(line)}</li>' for line in lines)}</ul>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of text below a header, less the columns that are empty in every row; scrolls where it is too wide."""
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]

    def line(cells: Sequence[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{_text(cells[i])}</{tag}>' for i in kept)}</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return f'<div class="wide"><table><thead>{line(header, "th")}</thead><tbody>\n{body}\n</tbody></table></div>'


def picture(png: bytes, name: str, caption: str) -> str:
    """A PNG, inside the page."""
    return (
        f'<figure><img alt="{_text(name)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    )


def folded(summary: str, inner: str) -> str:
    """Another part, shown when asked for."""
    return f"<details><summary>{_text(summary)}</summary>\n{inner}\n</details>"


def save_page(title: str, parts: Sequence[str], file: Path) -> None:
    """One HTML file with all parts (what the functions above give) below its title."""
    write_whole(file, PAGE.substitute(title=_text(title), parts="\n".join(parts)).encode())


def png(figure: Figure) -> bytes:
    """The same figure gives the same bytes."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150)
    return stream.getvalue()


def save_figure(figure: Figure, stem: Path) -> None:
    """stem.png and stem.pdf; the same figure gives the same bytes."""
    pdf = io.BytesIO()
    figure.savefig(pdf, format="pdf", metadata={"CreationDate": None})
    write_whole(stem.with_suffix(".png"), png(figure))
    write_whole(stem.with_suffix(".pdf"), pdf.getvalue())


def plain(value: Any) -> Any:
    """The same for JSON: arrays become lists, floats keep 8 digits, NaN becomes null."""
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
    """As JSON."""
    write_whole(file, (json.dumps(plain(numbers), indent=1, allow_nan=False) + "\n").encode())
