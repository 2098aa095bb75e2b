"""kamim demo."""

from pathlib import Path
from typing import Annotated

import typer

from kamim.cli.console import app, out_console, says_errors
from kamim.cli.progress import bar


@app.command()
@says_errors
def demo(out: Annotated[Path, typer.Option(help="Folder for stores, runs and pictures.")] = Path("runs/demo")) -> None:
    """Runs the whole pipeline on sample photographs on a CPU: preprocess, two pretrainings, three probes, pictures."""
    from kamim.cli.demo_run import run_demo

    with bar("demo") as update:
        run_demo(out, out_console, update)
