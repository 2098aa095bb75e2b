"""kamim pretrain, kamim replay."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kamim.cli.arguments import (
    ConfigFile,
    Overrides,
    PrintConfig,
    check_exists,
    check_folder,
    check_picture,
    print_config,
)
from kamim.cli.console import RESUMABLE, app, out_console, say, says_errors, terminable, write_json
from kamim.cli.progress import bar, metrics_line
from kamim.runtime.rendezvous import ends_all_ranks

if TYPE_CHECKING:
    from kamim.storage.store import Store
    from kamim.training.replay import Replayed

WORST = 10  # samples that a replay shows


@app.command()
@says_errors
@ends_all_ranks
def pretrain(
    overrides: Overrides = None,
    config: ConfigFile = None,
    resume: Annotated[
        Literal["auto", "never"], typer.Option(help="If out holds a run: auto resumes it, never fails.")
    ] = "auto",
    show_config: PrintConfig = False,
) -> None:
    """Pretrains SimMIM, KAMIM or MAE on a store. Rerun it to resume from the newest checkpoint.

    On SIGINT, SIGTERM or SIGUSR1 it saves its state and exits with code 75.

    Example: kamim pretrain -c vit_base_kamim weighting.temperature=0.5 out=runs/t05
    """
    from kamim.config.pretrain import Pretrain
    from kamim.config.schema import load
    from kamim.training.prepare import prepare

    resolved = load(Pretrain, config, overrides or ())
    if show_config:
        print_config(resolved)
        return
    title = f"pretrain {resolved.title.lower()} {resolved.model.name}"
    try:
        with (
            terminable(),
            prepare(resolved, resume == "never") as prepared,
            bar(title, images=resolved.optim.batch_size) as update,
        ):
            from kamim.training.pretrain import train

            outcome = train(prepared, lambda done, total, m: update(done, total, metrics_line(m)))
    except KeyboardInterrupt:
        say("stopped at once; rerun the command to resume from the newest checkpoint")
        raise typer.Exit(RESUMABLE) from None
    if not outcome.finished:
        say(f"stopped after step {outcome.step}, saved; rerun the command to resume")
        raise typer.Exit(RESUMABLE)
    steps = "steps done" if outcome.first < outcome.step else "steps, all done before"
    out_console.print(f"{resolved.out}: {outcome.step} {steps}; {resolved.out / 'report.html'}")


@app.command()
@says_errors
def replay(
    run: Annotated[Path, typer.Argument(help="A run of kamim pretrain.")],
    step: Annotated[
        int | None, typer.Option(help="Step to replay. Default: the newest with a non-finite loss.")
    ] = None,
    source: Annotated[
        Path | None, typer.Option(help="The folder that the run's store was made from, to name the samples' files.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the losses of all samples here, as JSON.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write a picture of the samples with the largest loss here, .png.")
    ] = None,
    device: Annotated[Literal["auto", "cuda", "cpu"], typer.Option(help="Device to compute on.")] = "auto",
) -> None:
    """Computes one step of a run again and prints the loss of its samples, largest first.

    Example: kamim replay runs/photos --step 100 --source photos
    """
    check_folder("--out", out)
    check_picture("--plot", plot)
    check_exists("", run)

    from kamim.training.recorded_steps import step_to_replay

    _, store, _ = step_to_replay(run, step)
    files = None if source is None else _source_files(store, source)

    from kamim.training.replay import replay as replay_step

    replayed = replay_step(run, step, device)
    title = f"step {replayed.step}, replayed from step {replayed.began}: loss {replayed.loss:.6f}"
    out_console.print(f"{title} over {len(replayed.samples)} samples, by falling loss")
    _print_worst(replayed, store, files)
    samples = [
        {
            "index": s.index,
            "class": store.class_of(s.index) or None,
            "file": files and files[s.index],
            "loss": s.loss,
            "weight_max": s.weight_max,
        }
        for s in replayed.samples
    ]
    write_json(out, {"step": replayed.step, "loss": replayed.loss, "samples": samples})
    if plot is not None:
        _draw_worst(replayed, title, plot)


def _print_worst(replayed: "Replayed", store: "Store", files: list[str | None] | None) -> None:
    for sample in replayed.worst[:WORST]:
        file = "" if files is None else files[sample.index] or "its file has changed since"
        origin = ", ".join(filter(None, (store.class_of(sample.index), file)))
        largest = "" if sample.weight_max is None else f", largest W {sample.weight_max:.1f}"
        out_console.print(f"  sample {sample.index}{origin and f' ({origin})'}: loss {sample.loss:.6f}{largest}")


def _draw_worst(replayed: "Replayed", title: str, file: Path) -> None:
    import numpy as np

    from kamim.reporting.page import save_picture
    from kamim.reporting.plots import reconstruction_sheet

    images, masks, reconstructions = (
        np.stack([getattr(sample, name) for sample in replayed.worst[:WORST]])
        for name in ("image", "masked", "reconstruction")
    )
    save_picture(reconstruction_sheet(images, masks, [("reconstructed", reconstructions)], title), file)


def _source_files(store: "Store", source: Path) -> list[str | None]:
    from preprocess.source_files import source_files
    from preprocess.sources import list_source

    job = store.manifest.job
    return source_files(store, list_source(job.dataset, source, job.split))
