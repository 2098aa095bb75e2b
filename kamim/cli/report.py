"""kamim report."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from kamim.cli.arguments import check_exists
from kamim.cli.console import app, out_console, say, says_errors


class _RunUnlessNamed(TyperGroup):
    """`kamim report RUN` is `kamim report run RUN`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """See click."""
        return super().resolve_command(ctx, args if args[0] in self.commands else ["run", *args])


report_app = typer.Typer(
    cls=_RunUnlessNamed,
    no_args_is_help=True,
    help="Write the page of a pretraining run, kamim report RUN, or of many evaluations, kamim report eval DIR...",
)
app.add_typer(report_app, name="report")


@report_app.command()
@says_errors
def run(run: Annotated[Path, typer.Argument(help="A pretraining run's folder.")]) -> None:
    """Writes RUN/report.html: configuration, machine, curves and panels of a finished, stopped or active run.

    Example: kamim report runs/kamim
    """
    check_exists("", run)

    from kamim.training.report import save_report

    out_console.print(f"{save_report(run)}")


@report_app.command(name="eval")
@says_errors
def evaluations(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR", help="Folders of kamim eval --out, kamim sweep, or above these.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for index.html, table.md, table.csv and seeds.csv.")] = Path(
        "leaderboard"
    ),
) -> None:
    """Gathers the results of many evaluations into one leaderboard, with means over runs that differ by seed only.

    Example: kamim report eval runs/eval runs/table2 --out runs/leaderboard
    """
    for folder in folders:
        check_exists("", folder)

    from kamim.evaluation.report.leaderboard import Leaderboard, find
    from kamim.evaluation.report.leaderboard_page import check_out, save

    check_out(out)
    results, skipped = find(folders)
    board = Leaderboard(results)
    for line in (*skipped, *board.repeated):
        say(f"skipped: {line}")
    for file in save(board, skipped, out):
        out_console.print(f"{file}")
