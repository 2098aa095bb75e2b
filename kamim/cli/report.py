"""kamim report."""

from pathlib import Path
from typing import Annotated

import typer

from kamim.cli.console import app, check_exists, out_console, says_errors


@app.command()
@says_errors
def report(run: Annotated[Path, typer.Argument(help="A pretraining run's folder.")]) -> None:
    """Writes RUN/report.html: configuration, machine, curves and panels of a finished, stopped or active run."""
    check_exists("", run)

    from kamim.training.report import save_report

    out_console.print(f"{save_report(run)}")
