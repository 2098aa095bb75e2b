"""kamim sweep."""

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from kamim.cli.console import (
    RESUMABLE,
    app,
    bar,
    metrics_line,
    out_console,
    say,
    says_errors,
    terminable,
)


@app.command()
@says_errors
def sweep(
    file: Annotated[Path, typer.Argument(help="Preset or YAML file, such as table2")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value overrides, such as pretrain.optim.lr=1e-3")
    ] = None,
) -> None:
    """Pretrains and evaluates every setting of a grid, and prints a table. Rerun it to resume."""
    from kamim.evaluation.grid import Grid
    from kamim.training.settings import load

    grid = load(Grid, file, overrides or ())
    try:
        with terminable(), bar("sweep") as update:
            from kamim.evaluation.run_grid import run_grid

            table = run_grid(
                grid,
                lambda title: (
                    lambda done, total, m: update(done, total, ", ".join(filter(None, (title, metrics_line(m)))))
                ),
            )
    except KeyboardInterrupt:
        say("stopped, saved; rerun the command to resume")
        raise typer.Exit(RESUMABLE) from None
    shown = Table(*table.header, box=box.SIMPLE_HEAD)
    for row in table.rows:
        shown.add_row(*row)
    out_console.print(shown)
    for name in ("table.json", "table.md", "index.html"):
        out_console.print(f"{grid.out / name}")
