"""What an analysis leaves behind: pictures, analysis.json, and one page that holds them all."""

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from matplotlib.figure import Figure

PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>kamim analysis</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
figure { margin: 2.5rem 0; } img { max-width: 100%; } figcaption { color: #444; } li { margin: .3rem 0; }
code { background: #f3f3f3; padding: 0 .2rem; }
</style></head><body>
<h1>kamim analysis</h1>
<p>$about</p>
<ul>$lines</ul>
$figures
</body></html>
""")


def save_figure(figure: Figure, stem: Path) -> None:
    """stem.png and stem.pdf; the same figure gives the same bytes."""
    figure.savefig(stem.with_suffix(".png"), dpi=150)
    figure.savefig(stem.with_suffix(".pdf"), metadata={"CreationDate": None})


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


def save_numbers(numbers: dict[str, Any], file: Path) -> None:
    """analysis.json."""
    file.write_text(json.dumps(plain(numbers), indent=1, allow_nan=False) + "\n")


def save_page(about: str, lines: Sequence[str], pictures: Sequence[tuple[Path, str]], file: Path) -> None:
    """One HTML file with every picture (PNG file, caption) inside."""
    figures = "\n".join(
        f'<figure><img alt="{html.escape(picture.stem)}" src="data:image/png;base64,'
        f'{base64.b64encode(picture.read_bytes()).decode()}"><figcaption>{html.escape(caption)}</figcaption></figure>'
        for picture, caption in pictures
    )
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    file.write_text(PAGE.substitute(about=html.escape(about), lines=items, figures=figures))
