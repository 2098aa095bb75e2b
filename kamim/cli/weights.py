"""kamim weights."""

import io
from pathlib import Path
from typing import Annotated

import typer

from kamim import KamimError
from kamim.cli.arguments import check_folder, check_picture, weighting_of
from kamim.cli.console import app, out_console, says_errors


@app.command()
@says_errors
def weights(
    image: Annotated[Path, typer.Argument(help="Any image file.")],
    detector: Annotated[str, typer.Option(help="fast, sift, orb, akaze or another registered detector.")] = "fast",
    footprint: Annotated[str, typer.Option(help="ring (the released code) or point (the paper's text)")] = "ring",
    patch_size: Annotated[int, typer.Option(help="Side w_ps of a weight cell in px.")] = 8,
    temperature: Annotated[float, typer.Option(help="Temperature T of Eq. 2.")] = 0.25,
    normalize: Annotated[
        bool, typer.Option("--normalize", help="Divide W by its mean, as weighting.normalize=true does.")
    ] = False,
    resolution: Annotated[
        int | None,
        typer.Option(help="Crop and resize the image to this side in px, as in training. Default: the image as it is."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write W here, .npy, float32 [H / w_ps, W / w_ps].")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture here, .png.")] = None,
) -> None:
    """Computes the keypoints and weights W (Eq. 2) of an image, as it is or as training sees it.

    Example: kamim weights photo.jpg --resolution 192 --plot weights.png
    """
    import numpy as np

    from kamim.cli.pictures import image_weights, largest_crop, plot_weights
    from kamim.storage.files import write_whole
    from preprocess.decode import decode

    weighting = weighting_of(detector, footprint, patch_size, temperature, normalize)
    if resolution is not None and (resolution < 1 or resolution % patch_size):
        raise KamimError(f"--resolution {resolution}: must be a multiple of --patch-size {patch_size}")
    check_folder("--out", out)
    check_picture("--plot", plot)
    if not image.is_file():
        raise KamimError(f"{image}: {'is a folder, not an image' if image.is_dir() else 'no such file'}")
    if any(file.exists() and file.samefile(image) for file in filter(None, (out, plot))):
        raise KamimError(f"{image}: would be replaced by what is computed from it; choose another --out or --plot")
    try:
        rgb = decode(image.read_bytes())
        shown = image_weights(rgb if resolution is None else largest_crop(rgb, resolution), weighting)
    except KamimError as error:
        raise KamimError(f"{image}: {error}") from error
    omega, w = shown.omega, shown.weights
    out_console.print(
        f"{image}: {shown.keypoints} {detector} keypoints on {shown.rgb.shape[1]}x{shown.rgb.shape[0]} px; "
        f"density min {omega.min():.4f}, mean {omega.mean():.4f}, max {omega.max():.4f}"
    )
    out_console.print(
        f"W {w.shape[0]}x{w.shape[1]}: mean {w.mean():.3f}, max {w.max():.3f}; it is relative to the smallest density: "
        f"W = exp((density - {omega.min():.4f}) / {temperature:g}){', divided by its mean' if normalize else ''}"
    )
    if plot is not None:
        plot_weights({image.name: shown}, weighting, plot)
    if out is not None:
        content = io.BytesIO()
        np.save(content, w)
        write_whole(out, content.getvalue())
