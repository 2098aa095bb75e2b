"""kamim pretrain."""

from typing import Annotated

import typer

from kamim.cli.console import RESUMABLE, ConfigFile, Overrides, app, bar, err_console, note, out_console, says_errors


@app.command()
@says_errors
def pretrain(
    overrides: Overrides = None,
    config: ConfigFile = None,
    print_config: Annotated[bool, typer.Option(help="Show the resolved configuration and stop.")] = False,
) -> None:
    """Trains SimMIM or KAMIM on a store. Started again, it resumes from the newest checkpoint."""
    from kamim.config import Pretrain, dump, load

    resolved = load(Pretrain, config, overrides or ())
    if print_config:
        out_console.print(dump(resolved), end="")
        return
    from kamim.compose.training import run_pretrain

    method = "simmim" if resolved.weighting is None else "kamim"
    with bar(f"pretrain {method} {resolved.model.name}", factor=resolved.optim.batch_size) as update:
        outcome = run_pretrain(resolved, lambda done, total, m: update(done, total, note(m)))
    if not outcome.finished:
        err_console.print(f"stopped after step {outcome.step}, saved; the same command again continues")
        raise typer.Exit(RESUMABLE)
    out_console.print(f"{resolved.out}: {outcome.step} steps done; {resolved.out / 'report.html'}")
