"""The command line: parses, calls one function, shows progress, and says a user's mistake in one line."""

# Imported for their commands, in the order of --help.
from kamim.cli import preprocess, store, pretrain, report, sweep, evaluate, analyze, exchange, bench, doctor, demo  # isort: skip # noqa: F401
from kamim.cli.console import RESUMABLE, app

__all__ = ["RESUMABLE", "app", "main"]


def main() -> None:
    """Entry point of the `kamim` script."""
    app()
