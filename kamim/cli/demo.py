"""kamim demo."""

from pathlib import Path
from typing import Annotated

import typer

from kamim.cli.console import app, bar, out_console, says_errors


@app.command()
@says_errors
def demo(
    out: Annotated[Path, typer.Option(help="Where stores, runs and pictures go.")] = Path("runs/demo"),
) -> None:
    """The whole way on real photographs, on a CPU: preprocess, pretrain twice, probe three times, look."""
    from kamim.cli.demo_run import run_demo

    with bar("demo") as update:
        run_demo(out, out_console, update)
