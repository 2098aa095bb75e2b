"""kamim store info, verify, preview; kamim weights."""

from pathlib import Path
from typing import Annotated

import typer

from kamim.cli.console import app, err_console, out_console, says_errors, store_app, weighting_of


@app.command()
@says_errors
def weights(
    image: Annotated[Path, typer.Argument(help="Any image file.")],
    detector: Annotated[str, typer.Option(help="fast, sift or orb")] = "fast",
    footprint: Annotated[str, typer.Option(help="ring (the released code) or point (the paper's text)")] = "ring",
    patch_size: Annotated[int, typer.Option(help="w_ps in px")] = 8,
    temperature: Annotated[float, typer.Option(help="T")] = 0.25,
    out: Annotated[Path | None, typer.Option(help="Write W here, .npy, float32 [H / w_ps, W / w_ps].")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture here, .png.")] = None,
) -> None:
    """Keypoints and weights W (Eq. 2) of an image as it is, without a resize."""
    import numpy as np

    from kamim.compose.pictures import image_weights, plot_weights
    from preprocess.decode import decode

    weighting = weighting_of(detector, footprint, patch_size, temperature)
    if not image.is_file():
        raise ValueError(f"{image}: no such file")
    try:
        found = image_weights(decode(image.read_bytes()), weighting)
    except ValueError as error:
        raise ValueError(f"{image}: {error}") from error
    w = found.weights
    out_console.print(
        f"{image}: {found.keypoints} {detector} keypoints; density mean {found.omega.mean():.4f}, "
        f"max {found.omega.max():.4f}; W {w.shape[0]}x{w.shape[1]}, mean {w.mean():.3f}, max {w.max():.3f}"
    )
    if plot is not None:
        plot_weights({image.name: found}, weighting, plot)
    if out is not None:
        with out.open("wb") as file:
            np.save(file, w)


def show_store(path: Path) -> None:
    """A line on what a store is."""
    from kamim.store import Store

    manifest = Store(path).manifest
    size = sum(file.stat().st_blocks * 512 for file in path.rglob("*") if file.is_file())
    out_console.print(
        f"{path}: {manifest.count} images of {len(manifest.classes) or 'no'} classes ({manifest.job.images}, "
        f"{manifest.job.encoding}), keypoints: {', '.join(manifest.rules) or 'none'}; {size / 1e6:,.1f} MB"
    )
    if manifest.rejects:
        out_console.print(f"{manifest.rejects} files could not be read: {path / 'rejects.csv'}")


@store_app.command()
@says_errors
def info(path: Path) -> None:
    """What a store holds."""
    from kamim.store import Store

    show_store(path)
    out_console.print_json(Store(path).manifest.model_dump_json(exclude={"checksums", "classes"}))


@store_app.command()
@says_errors
def verify(path: Path) -> None:
    """Compares every file with its checksum; exit code 1 where one differs."""
    from kamim.store import Store, checksums

    expected, found = Store(path).manifest.checksums, checksums(path)
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    for name in wrong:
        state = "missing" if name not in found else "not in the manifest" if name not in expected else "damaged"
        err_console.print(f"{path / name}: {state}")
    if wrong:
        raise typer.Exit(1)
    out_console.print(f"{path}: {len(expected)} files, all as written")


@store_app.command()
@says_errors
def preview(
    path: Path,
    out: Annotated[Path, typer.Option(help="The picture, .png.")],
    detector: Annotated[str, typer.Option(help="One of the store's.")] = "fast",
    footprint: Annotated[str, typer.Option(help="ring or point")] = "ring",
    patch_size: Annotated[int, typer.Option(help="w_ps in px")] = 8,
    temperature: Annotated[float, typer.Option(help="T")] = 0.25,
    images: Annotated[int, typer.Option(min=1, help="How many crops.")] = 6,
    seed: Annotated[int, typer.Option(help="Which crops.")] = 0,
) -> None:
    """A sheet of random crops as training sees them, with keypoints and weights."""
    from kamim.compose import pictures
    from kamim.store import Store

    pictures.preview(Store(path), weighting_of(detector, footprint, patch_size, temperature), images, seed, out)
    out_console.print(f"{out}")
