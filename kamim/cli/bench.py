"""kamim bench."""

from pathlib import Path
from typing import Annotated, Any

import typer

from kamim.cli.arguments import Overrides, check_folder, weighting_of
from kamim.cli.console import bench_app, out_console, says_errors, write_json
from kamim.cli.progress import bar

Detectors = Annotated[str, typer.Option(help="Detectors, comma-separated.")]


@bench_app.command(name="loader")
@says_errors
def bench_loader(
    store: Annotated[Path, typer.Option(help="A JPEG store made from --source, with FAST keypoints.")],
    source: Annotated[Path, typer.Option(help="The image folder that the store was made from.")],
    batch: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 256,
    rounds: Annotated[int, typer.Option(min=1, help="Measured passes of each method.")] = 11,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write rates and ratios here.")] = None,
) -> None:
    """Measures images per second of the loader, the released code's method, stock FFCV and JPEG decoding alone."""
    from kamim.bench.loader import bench
    from kamim.storage.store import Store
    from preprocess.sources import list_source

    check_folder("--json", json_out)
    with bar("bench loader") as update:
        result = bench(Store(store), list_source("imagefolder", source, "train"), batch, rounds, update)
    _show(result)
    write_json(json_out, result)


@bench_app.command(name="preprocess")
@says_errors
def bench_preprocess(
    source: Annotated[Path, typer.Option(help="An image folder of JPEGs.")],
    detectors: Detectors = "fast,sift,orb",
    rounds: Annotated[int, typer.Option(min=1, help="Measured passes of each method.")] = 5,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write rates and ratios here.")] = None,
) -> None:
    """Measures images per second and core of each preprocessing step, of all steps, and of JPEG decoding alone."""
    from kamim.bench.preprocess import bench
    from kamim.detectors import detector
    from preprocess.sources import list_source

    check_folder("--json", json_out)
    names = detectors.split(",")
    for name in names:
        detector(name)
    with bar("bench preprocess") as update:
        result = bench(list_source("imagefolder", source, "train"), names, rounds, update)
    _show(result)
    write_json(json_out, result)


@bench_app.command(name="fidelity")
@says_errors
def bench_fidelity(
    source: Annotated[Path, typer.Option(help="An image folder.")],
    detectors: Detectors = "fast,sift,orb",
    images: Annotated[int, typer.Option(min=1, help="Number of images.")] = 400,
    crops: Annotated[int, typer.Option(min=1, help="Random crops of each image.")] = 4,
    patch_size: Annotated[int, typer.Option(help="Side w_ps of a weight cell in px.")] = 8,
    temperature: Annotated[float, typer.Option(help="Temperature T of Eq. 2.")] = 0.25,
    frames: Annotated[
        int | None, typer.Option(min=1, help="Canonical frames per image. Default: as in preprocess.")
    ] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write every number here.")] = None,
) -> None:
    """Compares a store's keypoints and pixels with those of crops of the original images."""
    from kamim.bench.fidelity import FidelityCase, fidelity
    from preprocess.sources import list_source

    check_folder("--json", json_out)
    names = tuple(detectors.split(","))
    for name in names:
        weighting_of(name, "ring", patch_size, temperature)
    setting = FidelityCase(patch_size=patch_size, temperature=temperature, frames=frames)
    with bar("bench fidelity") as update:
        result = fidelity(list_source("imagefolder", source, "train"), names, setting, images, crops, update)
    for row in result["keypoints"]:
        low, high = row["share_of_floor_interval"]
        out_console.print(
            f"{row['detector']:5} {row['footprint']:5} correlation of W {row['weight_correlation']:.3f}, floor "
            f"{row['weight_correlation_floor']:.3f} (share {row['share_of_floor']:.4f}, 95 % {low:.4f} to {high:.4f}); "
            f"mean W {row['mean_weight']:.2f}, online {row['mean_weight_online']:.2f}; "
            f"{row['bytes_per_image']:,.0f} bytes"
        )
    pixels = result["pixels"]
    for name, of in (("crops", pixels), ("whole", pixels["whole"])):
        out_console.print(
            f"{name:5} against torchvision's of the originals: antialiased {of['psnr_antialiased']:.2f} dB, sharpness "
            f"{of['sharpness_antialiased']:.2f}; not antialiased {of['psnr_plain']:.2f} dB, {of['sharpness_plain']:.2f}"
        )
    out_console.print(f"{pixels['bytes_per_image']:,.0f} bytes an image ({pixels['encoding']})")
    write_json(json_out, result)


@bench_app.command(name="eval")
@says_errors
def bench_eval(
    store: Annotated[Path, typer.Option(help="A JPEG store made from --source.")],
    source: Annotated[Path, typer.Option(help="The image folder that the store was made from.")],
    model: Annotated[str, typer.Option(help="A key of kamim.models.presets.ARCHITECTURES.")] = "vit_base",
    resolution: Annotated[int, typer.Option(help="Side of the images in px.")] = 192,
    batch: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 256,
    rounds: Annotated[int, typer.Option(min=1, help="Measured passes of each method.")] = 5,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write rates and ratios here.")] = None,
) -> None:
    """Compares augmentation with torchvision's, the frozen pass with a full one, sweep and attentive with a probe."""
    from kamim.bench.evaluate import bench
    from kamim.storage.store import Store
    from preprocess.sources import list_source

    check_folder("--json", json_out)
    with bar("bench eval") as update:
        listed = list_source("imagefolder", source, "train")
        result = bench(Store(store), listed, model, resolution, batch, rounds, update)
    _show(result)
    write_json(json_out, result)


@bench_app.command(name="train")
@says_errors
def bench_train(
    store: Annotated[Path, typer.Option(help="A store made from --source, with FAST keypoints.")],
    source: Annotated[Path, typer.Option(help="The image folder that the store was made from.")],
    overrides: Overrides = None,
    model: Annotated[str, typer.Option(help="A ViT of kamim.models.presets.ARCHITECTURES.")] = "vit_base",
    batch: Annotated[int, typer.Option(min=1, help="Images per step.")] = 256,
    steps: Annotated[int, typer.Option(min=2, help="Steps per pass.")] = 20,
    rounds: Annotated[int, typer.Option(min=1, help="Measured passes of each method.")] = 5,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write every number here.")] = None,
) -> None:
    """Measures training speed, FLOP utilisation, data-wait and memory of KAMIM, SimMIM and the authors' loop."""
    from kamim.bench.train import bench
    from preprocess.sources import list_source

    check_folder("--json", json_out)
    with bar("bench train") as update:
        listed = list_source("imagefolder", source, "train")
        result = bench(store, listed, model, batch, steps, rounds, update, tuple(overrides or ()))
    _show(result)
    for name in result["images_per_second"]:
        out_console.print(
            f"{name:20} {result['flop_utilisation'][name]:6.1%} of the matmul rate, data-wait "
            f"{result['data_wait_share'][name]:.1%}, peak memory {result['peak_memory_gb'][name]:.2f} GB"
        )
    write_json(json_out, result)


def _show(result: dict[str, Any]) -> None:
    for name, rate in result["images_per_second"].items():
        out_console.print(f"{name:20} {rate:8,.1f} images/s")
    for name, ratio in result["ratios"].items():
        out_console.print(f"{name:28} {ratio:6.2f}")
