"""kamim store info, verify, preview."""

import os
from pathlib import Path
from typing import Annotated

import typer

from kamim.cli.arguments import check_picture, weighting_of
from kamim.cli.console import RESUMABLE, err_console, out_console, says_errors, store_app, terminable
from kamim.cli.progress import bar

SHOWN = 5  # classes whose names are printed


def show_store(path: Path) -> None:
    """Prints a summary of a store."""
    from kamim.storage.store import Store
    from preprocess.sources.base import plural

    manifest = Store(path).manifest
    size = sum(_sizes(path).values())
    out_console.print(
        f"{path}: {manifest.count:,} {plural(manifest.count, 'image')} of {len(manifest.classes) or 'no'} "
        f"{plural(len(manifest.classes), 'class', 'classes')} ({manifest.job.images}, "
        f"{manifest.job.encoding}), keypoints: {', '.join(manifest.rules) or 'none'}; {size / 1e6:,.1f} MB"
    )
    if manifest.classes:
        out_console.print(f"classes: {', '.join(manifest.classes[:SHOWN])}{', ...' * (len(manifest.classes) > SHOWN)}")
    if manifest.rejects:
        files = "1 file" if manifest.rejects == 1 else f"{manifest.rejects:,} files"
        out_console.print(f"{files} could not be read: {path / 'rejects.csv'}")


def _sizes(path: Path) -> dict[str, int]:
    """Returns the bytes on disk of each component."""
    from kamim.storage.manifest import component_of

    sizes: dict[str, int] = {}
    for file in path.rglob("*"):
        if file.is_file():
            component = component_of(file.relative_to(path).as_posix())
            sizes[component] = sizes.get(component, 0) + file.stat().st_blocks * 512
    return sizes


@store_app.command()
@says_errors
def info(path: Path, as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Prints what a store contains."""
    from kamim.storage.store import Store

    manifest, sizes = Store(path).manifest, _sizes(path)
    if as_json:
        content = manifest.model_dump(mode="json", exclude={"checksums", "classes", "shards", "shard_counts"})
        content |= {"path": str(path), "classes": len(manifest.classes), "bytes": sizes, "source": manifest.source}
        out_console.print_json(data=content, ensure_ascii=True)
        return
    show_store(path)
    for component, version in manifest.opencv.items():
        out_console.print(f"{component}: {sizes.get(component, 0) / 1e6:,.1f} MB, made with OpenCV {version}")
    for name, value in manifest.job:
        out_console.print(f"{name}: {', '.join(map(str, value)) if isinstance(value, tuple) else value}")


@store_app.command()
@says_errors
def verify(
    path: Path,
    deep: Annotated[bool, typer.Option(help="Also decode every image and compare every shard.")] = False,
    repair: Annotated[bool, typer.Option(help="Rebuild damaged shards from the source.")] = False,
    source: Annotated[Path | None, typer.Option(help="For --repair: the source that the store was made from.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="For --repair: worker processes; 0: one per core.")] = 0,
) -> None:
    """Compares every file with its checksum; lists damaged files and exits with code 1 if there are any."""
    from kamim.storage.store import Store
    from preprocess.verify import problems

    if repair:
        _repair(path, source, workers)
    wrong = problems(path, deep)
    for problem in wrong:
        err_console.print(f"{path / problem.where}: {problem.what}")
    if wrong:
        raise typer.Exit(1)
    out_console.print(f"{path}: {len(Store(path).manifest.checksums)} files, all as written")


def _repair(path: Path, source: Path | None, workers: int) -> None:
    from preprocess.build import Stopped
    from preprocess.repair import repair
    from preprocess.sources import list_source

    try:
        with terminable(), bar(f"repair {path}", images=1) as update:
            repaired = repair(
                path,
                lambda job: list_source(job.dataset, source, job.split),
                workers=workers or len(os.sched_getaffinity(0)),
                progress=update,
                say=err_console.print,
            )
    except (KeyboardInterrupt, Stopped) as error:
        err_console.print(f"stopped: {error or 'rerun the command to resume'}")
        raise typer.Exit(RESUMABLE) from None
    for problem in repaired:
        out_console.print(f"{path / problem.where}: was {problem.what}, repaired")


@store_app.command()
@says_errors
def preview(
    path: Path,
    out: Annotated[Path, typer.Option(help="Picture to write, .png.")],
    detector: Annotated[str, typer.Option(help="A detector of the store.")] = "fast",
    footprint: Annotated[str, typer.Option(help="ring or point")] = "ring",
    patch_size: Annotated[int, typer.Option(help="Side w_ps of a weight cell in px.")] = 8,
    temperature: Annotated[float, typer.Option(help="Temperature T of Eq. 2.")] = 0.25,
    normalize: Annotated[
        bool, typer.Option("--normalize", help="Divide W by its mean, as weighting.normalize=true does.")
    ] = False,
    images: Annotated[int, typer.Option(min=1, help="Number of crops.")] = 6,
    seed: Annotated[int, typer.Option(help="Seed of the crops.")] = 0,
) -> None:
    """Draws random crops as training sees them, with keypoints and weights, and compares W with W of the pixels shown.

    If the two differ much, W follows noise that the stored pixels no longer show.
    """
    from kamim.cli import pictures
    from kamim.storage.store import Store

    check_picture("--out", out)
    weighting = weighting_of(detector, footprint, patch_size, temperature, normalize)
    out_console.print(f"{out}: {pictures.preview(Store(path), weighting, images, seed, out)}")
