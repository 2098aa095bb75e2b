"""kamim sweep."""

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from kamim.cli.arguments import PrintConfig, check_stores, print_config, shard_of
from kamim.cli.console import RESUMABLE, app, out_console, say, says_errors, terminable
from kamim.cli.progress import bar
from kamim.runtime.rendezvous import ends_all_ranks


@app.command()
@says_errors
@ends_all_ranks
def sweep(
    file: Annotated[Path, typer.Argument(help="Preset or YAML file, such as table2")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value overrides, such as pretrain.optim.lr=1e-3")
    ] = None,
    shard: Annotated[
        str | None, typer.Option(help="I/N: every N-th run from the I-th on, next to processes with the others.")
    ] = None,
    show_config: PrintConfig = False,
) -> None:
    """Pretrains and evaluates every run of a grid, and prints tables. Rerun it to resume.

    Example: kamim sweep table2 pretrain.optim.epochs=20 out=runs/short
    """
    from kamim.config.schema import load
    from kamim.sweep.grid import Grid, evaluation, points, pretraining
    from kamim.training.prepare import open_store

    grid = load(Grid, file, overrides or ())
    if show_config:
        out_console.print(f"# {grid.runs:,} runs")
        print_config(grid)
        return
    share = (1, 1) if shard is None else shard_of(shard)
    for point in points(grid):
        open_store(pretraining(grid, point))
    check_stores(evaluation(grid, points(grid)), grid.modes)
    try:
        with terminable(), bar("sweep") as update:
            from kamim.sweep.sweep import run_grid
            from kamim.sweep.table import runs_table

            results = run_grid(grid, update.of_task, share)
    except KeyboardInterrupt:
        say("stopped, saved; rerun the command to resume")
        raise typer.Exit(RESUMABLE) from None
    table = runs_table(results)
    shown = Table(*table.header, box=box.SIMPLE_HEAD)
    for row in table.rows:
        shown.add_row(*row)
    out_console.print(shown)
    for name in ("table.json", "table.md", "index.html"):
        out_console.print(f"{grid.out / name}")
