"""The command line: parses, calls one function, shows progress, and prints a user's mistake as one line."""

import os

# Imported to register their commands, in the order of --help.
from kamim.cli import (  # isort: skip  # noqa: F401
    preprocess,
    weights,
    store,
    pretrain,
    config,
    report,
    sweep,
    evaluate,
    analyze,
    import_export,
    bench,
    doctor,
    demo,
)
from kamim.cli.console import RESUMABLE, app

__all__ = ["RESUMABLE", "app", "main"]


def main() -> None:
    """Runs the `kamim` script."""
    # OpenMP's threads sleep while they wait for work, unless the user sets otherwise. By default they spin, and two
    # processes on the same cores spend most of their time on that. OpenMP reads this when a command imports torch.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app()
