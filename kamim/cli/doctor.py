"""kamim doctor."""

from pathlib import Path
from typing import Annotated

import typer

from kamim.cli.arguments import ConfigFile, Overrides, check_store
from kamim.cli.console import app, out_console, says_errors


@app.command()
@says_errors
def doctor(
    store: Annotated[
        Path | None, typer.Option(help="A store made by `kamim preprocess`. Default: the configuration's data.store.")
    ] = None,
    overrides: Overrides = None,
    config: ConfigFile = None,
) -> None:
    """Checks the machine and, if given, a store; with -c or key=value, also benchmarks loader and model.

    It names the bottleneck and how long the run would take. Exits with code 1 if a check fails or the loader is the
    bottleneck.

    Example: kamim doctor -c vit_base_kamim --store stores/imagenet-train
    """
    from kamim.config.pretrain import Pretrain
    from kamim.config.schema import load

    resolved = None
    if config is not None or overrides:
        named = [] if store is None else [f"data.store={store}"]
        resolved = load(Pretrain, config, ["out=unused", *named, *(overrides or ())])
        store = resolved.data.store
    check_store(store)

    from kamim.bench.doctor import examine

    if not examine(store, resolved, out_console.print):
        raise typer.Exit(1)
