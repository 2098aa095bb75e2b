"""kamim preprocess."""

import os
from pathlib import Path
from typing import Annotated

import typer

from kamim import KamimError
from kamim.cli.arguments import shard_of
from kamim.cli.console import RESUMABLE, app, out_console, say, says_errors, terminable
from kamim.cli.progress import bar
from kamim.cli.store import show_store


@app.command()
@says_errors
def preprocess(
    dataset: Annotated[str, typer.Argument(help="A data set: imagenet, cifar10, webdataset ...")],
    out: Annotated[Path, typer.Option(help="The store to write or extend.")],
    source: Annotated[Path | None, typer.Option(help="Folder of the source images.")] = None,
    split: Annotated[
        str, typer.Option(help="train or val; of an image folder, its subfolder of that name if it has such.")
    ] = "train",
    download: Annotated[bool, typer.Option("--download", help="Fetch cifar10 or cifar100 into --source.")] = False,
    detectors: Annotated[
        str, typer.Option(help="Comma-separated, such as fast,sift,orb; added to those of OUT.")
    ] = "fast",
    container: Annotated[
        str | None, typer.Option(help="zarr, or ffcv, which FFCV's own loader reads. Default: OUT's, or zarr.")
    ] = None,
    pixels: Annotated[
        str | None,
        typer.Option(
            help="How images are stored. Resized for the crops: jpeg, yuv420 (YCbCr planes, 4 times the space; zarr "
            "only) or raw (RGB, 8 times); original: unchanged files, about 6 times the space. Default: OUT's, or raw "
            "for images under 96 px, else jpeg."
        ),
    ] = None,
    quality: Annotated[int | None, typer.Option(help="JPEG quality, 1 to 100. Default: OUT's, or 90.")] = None,
    resolution: Annotated[
        int | None, typer.Option(help="Side of the training crops in px. Default: OUT's, or 192.")
    ] = None,
    crop_scale: Annotated[
        str | None, typer.Option(help="Smallest and largest area of a crop. Default: OUT's, or 0.67,1.0.")
    ] = None,
    fingerprint: Annotated[
        str | None, typer.Option(help="Detect changed sources by stat or content. Default: OUT's, or stat.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Worker processes; 0: one per core.")] = 0,
    cluster: Annotated[str | None, typer.Option(help="Run on the Dask scheduler tcp://HOST:PORT.")] = None,
    shard: Annotated[str | None, typer.Option(help="I/N: build only the I-th of N shares, for a batch queue.")] = None,
    publish: Annotated[bool, typer.Option(help="Only join the shares that --shard built.")] = False,
    strict: Annotated[bool, typer.Option(help="Stop at the first unreadable image.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Print the planned work and exit.")] = False,
    images: Annotated[str | None, typer.Option(hidden=True)] = None,
    images_as: Annotated[str | None, typer.Option(hidden=True)] = None,
    encoding: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Detects keypoints once and writes a store. Rerun it to resume; OUT.log is its log.

    Example: kamim preprocess imagefolder --source photos --out stores/photos
    """
    from kamim.storage.store import Store
    from preprocess import exposure, sources
    from preprocess.build import Stopped, build, build_share, publish_shares, stopping
    from preprocess.estimate import describe
    from preprocess.plan import make_job

    if download:
        sources.download(dataset, source)
    if workers < 0:
        raise KamimError(f"--workers {workers}: must be 0 (one per core) or more")
    if publish and shard is not None:
        raise KamimError(f"--publish --shard {shard}: all shares have to be done before --publish; give one of them")
    share = None if shard is None else shard_of(shard)
    workers = workers or len(os.sched_getaffinity(0))
    listed = sources.list_source(dataset, source, split)
    job = make_job(
        dataset,
        split,
        listed,
        detectors=tuple(filter(None, map(str.strip, detectors.split(",")))),
        container=_container(container, images),  # type: ignore[arg-type]  # make_job checks both
        pixels=_pixels(pixels, images_as, encoding),  # type: ignore[arg-type]
        quality=quality,
        resolution=resolution,
        crop_scale=None if crop_scale is None else _pair(crop_scale),
        fingerprint=fingerprint,
        out=out,
    )
    if job.fingerprint == "content":
        say("reading the whole source first, to detect changes (--fingerprint content)")
    fresh = True
    try:
        if dry_run:
            with stopping():
                lines = describe(job, listed, out, workers)
            for line in lines:
                out_console.print(line)
            return
        with terminable(), bar(f"preprocess {dataset} {split}", images=1) as update:
            if publish:
                fresh = publish_shares(job, listed, out)
            elif share is not None:
                build_share(
                    job,
                    listed,
                    out,
                    share=share,
                    workers=workers,
                    strict=strict,
                    progress=update,
                    cluster=cluster,
                    say=say,
                )
            else:
                fresh = build(
                    job, listed, out, workers=workers, strict=strict, progress=update, cluster=cluster, say=say
                )
    except KeyboardInterrupt:
        say("stopped; rerun the command to resume")
        raise typer.Exit(RESUMABLE) from None
    except Stopped as error:
        say(f"stopped: {error}")
        raise typer.Exit(RESUMABLE) from None
    if share is not None:
        out_console.print(
            f"share {shard} is done; when all are, run the same command with --publish instead of --shard"
        )
        return
    if not fresh:
        out_console.print(f"{out} is complete already")
    show_store(out)
    for line in exposure.cautions(Store(out)):
        say(f"caution: {line}")


def _container(container: str | None, images: str | None) -> str | None:
    """Returns the container that --container or its earlier name --images selects."""
    if images is None:
        return container
    if container is not None:
        raise KamimError(f"--images {images}: is an earlier name of --container; give --container alone")
    say(f"note: --images {images} is now {'the default' if images == 'auto' else f'--container {images}'}")
    return None if images == "auto" else images


def _pixels(pixels: str | None, images_as: str | None, encoding: str | None) -> str | None:
    """Returns the pixels that --pixels or its earlier names --images-as and --encoding select."""
    if images_as is None and encoding is None:
        return pixels
    earlier = f"--encoding {encoding}" if images_as is None else f"--images-as {images_as}"
    if pixels is not None:
        raise KamimError(f"{earlier}: is an earlier name of --pixels; give --pixels alone")
    if images_as not in (None, "resized", "original"):
        raise KamimError(f"{earlier}: must be resized or original; now --pixels")
    if images_as == "original" and encoding is not None:
        raise KamimError(f"--encoding {encoding}: is for resized images, not for --images-as original; give --pixels")
    chosen = "original" if images_as == "original" else encoding or "auto"
    say(f"note: {earlier} is now --pixels {'jpeg or raw' if chosen == 'auto' else chosen}")
    return chosen


def _pair(text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise KamimError(f"--crop-scale {text}: must be two numbers, such as 0.67,1.0") from None
    return low, high
