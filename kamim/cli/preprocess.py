"""kamim preprocess."""

import os
from pathlib import Path
from typing import Annotated

import typer

from kamim.cli.console import RESUMABLE, app, bar, err_console, out_console, says_errors, terminable
from kamim.cli.store import show_store


@app.command()
@says_errors
def preprocess(
    dataset: Annotated[str, typer.Argument(help="A data set: imagenet, cifar10, webdataset ...")],
    out: Annotated[Path, typer.Option(help="The store to make.")],
    source: Annotated[Path | None, typer.Option(help="Folder of the source images.")] = None,
    split: Annotated[str, typer.Option(help="train or val")] = "train",
    download: Annotated[bool, typer.Option("--download", help="Fetch cifar10 or cifar100 into --source.")] = False,
    detectors: Annotated[str, typer.Option(help="Comma-separated, of fast, sift, orb.")] = "fast",
    images: Annotated[str, typer.Option(help="ffcv, zarr, or auto: ffcv where it is installed.")] = "auto",
    raw: Annotated[bool, typer.Option(help="Store pixels, not JPEGs: 8 times the space, faster to read.")] = False,
    quality: Annotated[int, typer.Option(help="JPEG quality, 1 to 100.")] = 90,
    resolution: Annotated[int, typer.Option(help="Side of the training crops in px.")] = 192,
    crop_scale: Annotated[str, typer.Option(help="Smallest and largest area of a crop.")] = "0.67,1.0",
    workers: Annotated[int, typer.Option(help="Processes; 0: one per core.")] = 0,
    strict: Annotated[bool, typer.Option(help="Stop at the first unreadable image.")] = False,
) -> None:
    """Finds keypoints once and writes a store. Started again, it continues."""
    from preprocess import sources
    from preprocess.build import build, make_job

    if download:
        sources.download(dataset, source)
    if workers < 0:
        raise ValueError(f"--workers {workers}: must be 0 (one per core) or more")
    listed = sources.list_source(dataset, source, split)
    job = make_job(
        dataset, split, listed, detectors=tuple(filter(None, detectors.split(","))), images=images,
        encoding="raw" if raw else "jpeg", quality=quality, resolution=resolution, crop_scale=_pair(crop_scale),
        out=out,
    )  # fmt: skip
    try:
        with terminable(), bar(f"preprocess {dataset} {split}") as update:
            fresh = build(
                job, listed, out, workers=workers or len(os.sched_getaffinity(0)), strict=strict, progress=update
            )
    except KeyboardInterrupt:
        err_console.print("stopped; the same command again continues where it was")
        raise typer.Exit(RESUMABLE) from None
    if not fresh:
        out_console.print(f"{out} is complete already")
    show_store(out)


def _pair(text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--crop-scale {text}: must be two numbers, such as 0.67,1.0") from None
    return low, high
