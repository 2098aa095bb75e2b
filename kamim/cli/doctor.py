"""kamim doctor."""

from pathlib import Path
from typing import Annotated

import typer

from kamim.cli.console import ConfigFile, Overrides, app, out_console, says_errors


@app.command()
@says_errors
def doctor(
    store: Annotated[Path, typer.Option(help="A store made by `kamim preprocess`.")],
    overrides: Overrides = None,
    config: ConfigFile = None,
) -> None:
    """Says what machine and store are good for; with -c or key=value, what would hold that training up.

    Exit code 1: something is wrong, or the loader would be.
    """
    from kamim.bench.doctor import examine
    from kamim.training.config import Pretrain
    from kamim.training.settings import load

    given = [f"data.store={store}", "out=unused", *(overrides or ())]
    resolved = load(Pretrain, config, given) if config is not None or overrides else None
    if not examine(store, resolved, out_console.print):
        raise typer.Exit(1)
