"""kamim doctor."""

from pathlib import Path
from typing import Annotated

import typer

from kamim.cli.console import ConfigFile, Overrides, app, check_store, out_console, says_errors


@app.command()
@says_errors
def doctor(
    store: Annotated[Path, typer.Option(help="A store made by `kamim preprocess`.")],
    overrides: Overrides = None,
    config: ConfigFile = None,
) -> None:
    """Checks the machine and a store; with -c or key=value, benchmarks loader and model and names the bottleneck.

    Exits with code 1 if a check fails or the loader is the bottleneck.

    Example: kamim doctor --store stores/imagenet-train -c vit_base_kamim
    """
    from kamim.training.config import Pretrain
    from kamim.training.settings import load

    check_store(store)
    given = [f"data.store={store}", "out=unused", *(overrides or ())]
    resolved = load(Pretrain, config, given) if config is not None or overrides else None

    from kamim.bench.doctor import examine

    if not examine(store, resolved, out_console.print):
        raise typer.Exit(1)
