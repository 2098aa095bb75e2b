"""kamim eval."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kamim import KamimError
from kamim.cli.arguments import PrintConfig, Strict, check_checkpoints, check_folder, check_stores, print_config
from kamim.cli.console import RESUMABLE, app, is_main, out_console, say, says_errors, terminable, write_json
from kamim.cli.progress import bar
from kamim.runtime.rendezvous import ends_all_ranks

if TYPE_CHECKING:
    from kamim.evaluation.results import Result


@app.command(name="eval")
@says_errors
@ends_all_ranks
def evaluate(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value overrides, such as linprobe.optim.lr=1e-3")
    ] = None,
    mode: Annotated[
        str,
        typer.Option(
            help="linprobe, finetune, knn, attentive, probe-sweep, reconstruct, segment, few-shot, corruptions, "
            "shape-bias or all"
        ),
    ] = "linprobe",
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(help="[NAME=]RUN, one of its checkpoints or a weights file; random:RUN, pixels:RUN; repeatable."),
    ] = None,
    train: Annotated[Path | None, typer.Option(help="Store to train on.")] = None,
    val: Annotated[Path | None, typer.Option(help="Store to evaluate on.")] = None,
    norm: Annotated[str | None, typer.Option(help="linprobe.norm: none, token or joint (Table 5)")] = None,
    protocol: Annotated[str | None, typer.Option(help="linprobe.protocol: paper, mae or dinov2")] = None,
    convention: Annotated[str | None, typer.Option(help="reconstruct: paper or honest. Default: both.")] = None,
    config: Annotated[Path | None, typer.Option("-c", "--config", help="Preset or YAML file, such as linprobe")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for state and results; needed to resume.")] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the results here.")] = None,
    strict: Strict = False,
    show_config: PrintConfig = False,
) -> None:
    """Evaluates checkpoints: probes, fine-tuning, kNN, reconstruction, segmentation. With --out, a rerun resumes.

    Example: kamim eval --mode knn --checkpoint runs/kamim --train stores/imagenet-train --val stores/imagenet-val
    """
    from kamim.config.schema import load
    from kamim.evaluation.options import MODES, Evaluation

    check_folder("--json", json_out)
    chosen = None if mode == "all" else [name for name in MODES if name == mode]
    if chosen == []:
        raise KamimError(f"--mode {mode}: must be one of {', '.join(MODES)}, all")
    named = {"checkpoint": checkpoint, "train": train, "val": val, "out": out}
    conventions = None if convention is None else f"[{convention}]"
    shorthands = {"linprobe.norm": norm, "linprobe.protocol": protocol, "reconstruct.conventions": conventions}
    resolved = load(
        Evaluation,
        config,
        [*(overrides or ()), *(f"{key}={value}" for key, value in shorthands.items() if value is not None)],
        {key: value for key, value in named.items() if value is not None},
    )
    if show_config:
        print_config(resolved)
        return
    check_checkpoints(resolved.checkpoint)
    check_stores(resolved, chosen or MODES)
    try:
        with terminable(), bar("eval") as update:
            from kamim.evaluation.evaluate import evaluate as evaluate_all
            from kamim.evaluation.results import majority_lines

            results = evaluate_all(resolved, chosen, update.of_task, strict)
    except KeyboardInterrupt:
        kept = "saved; rerun the command to resume" if resolved.out else "nothing is kept; with --out, results are kept"
        say(f"stopped, {kept}")
        raise typer.Exit(RESUMABLE) from None
    for result in results:
        out_console.print(_line(result))
    for line in majority_lines(results):
        out_console.print(line)
    if resolved.out is not None:
        out_console.print(f"{resolved.out / 'index.html'}")
    if is_main():
        write_json(json_out, [result.as_json() for result in results])


def _line(result: "Result[Any]") -> str:
    settings = result.settings
    step = f" (step {settings.step})" if settings.step else ""
    about = f"{settings.mode} {settings.name}{step}: {result.measured.summary(settings.val.images)}"
    return f"{about} on {settings.val.images} images of {settings.classes} classes"
