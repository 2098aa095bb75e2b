"""kamim eval."""

from pathlib import Path
from typing import Annotated

import typer

from kamim.cli.console import ConfigFile, Overrides, app, bar, check_folder, out_console, says_errors, write_json


@app.command(name="eval")
@says_errors
def evaluate(
    overrides: Overrides = None,
    mode: Annotated[str, typer.Option(help="linprobe")] = "linprobe",
    checkpoint: Annotated[str | None, typer.Option(help="A run, one of its checkpoints, or random:RUN.")] = None,
    train: Annotated[Path | None, typer.Option(help="Store to train the probe on.")] = None,
    val: Annotated[Path | None, typer.Option(help="Store to measure on.")] = None,
    config: ConfigFile = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
) -> None:
    """Evaluates a checkpoint with the paper's linear probe."""
    from kamim.config import Probe, load

    check_folder("--json", json_out)
    if mode != "linprobe":
        raise ValueError(f"--mode {mode}: must be linprobe")
    named = {"checkpoint": checkpoint, "train": train, "val": val}
    resolved = load(Probe, config, overrides or (), {key: value for key, value in named.items() if value is not None})
    from kamim.compose.evaluation import run_linprobe

    with bar("linprobe", factor=resolved.optim.batch_size) as update:
        result = run_linprobe(resolved, lambda done, total, m: update(done, total, f"loss {m['loss']:.4f}"))
    out_console.print(
        f"top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} % on {result['val']['images']} images "
        f"of {result['classes']} classes; {result['checkpoint']}"
    )
    write_json(json_out, result)
