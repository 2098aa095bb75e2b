"""kamim import and kamim export: weights of other projects to checkpoints, and checkpoints to other libraries."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kamim import KamimError
from kamim.cli.console import app, check_exists, out_console, says_errors, write_json
from kamim.models.file_kind import check_weights

if TYPE_CHECKING:
    from kamim.training.checkpoint import Checkpoint


@app.command(name="import")
@says_errors
def import_(
    file: Annotated[
        Path,
        typer.Argument(
            help="Weights of the authors, microsoft/SimMIM, MAE, DINO, MoCo v3 or timm, or a Hugging Face folder."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The checkpoint to write.")],
    resolution: Annotated[
        int | None,
        typer.Option(min=1, help="Side of the images in px. Default: as trained; of a Swin, what its windows fit."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="The architecture, such as vit_large_patch16_224. Default: inferred from the weights."),
    ] = None,
) -> None:
    """Converts weights of other projects to a checkpoint."""
    check_exists("", file)
    check_weights(file)
    _check_new(out)

    from kamim.models import interop
    from kamim.training import checkpoint

    weights = interop.load(file, resolution, model)
    checkpoint.save_imported(out, weights.architecture, weights.resolution, weights.state, weights.has_head)
    head = "with its pixel head" if weights.has_head else "encoder alone"
    out_console.print(f"{out}: {weights.architecture} at {weights.resolution} px, {head}")


@app.command()
@says_errors
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A run, or one of its checkpoints.")],
    out: Annotated[Path, typer.Option(help="timm: the .safetensors file to write; huggingface: the folder.")],
    layout: Annotated[
        Literal["timm", "huggingface"], typer.Option(help="Library whose parameter names and files are written.")
    ] = "timm",
) -> None:
    """Writes weights for timm's create_model(..., checkpoint_path=OUT), which loads the encoder, or for Hugging Face's
    from_pretrained(OUT), which loads the whole model.
    """
    check_exists("", checkpoint)
    if layout == "huggingface":
        _check_new(out)
    elif out.suffix != ".safetensors" or out.is_dir():
        raise KamimError(f"out = {out}: must be a file whose name ends in .safetensors")

    from kamim.training.checkpoint import read

    (_export_timm if layout == "timm" else _export_hugging_face)(read(checkpoint), out)


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """Locks `out` and yields a path to write to, which is renamed to `out` once it is complete."""
    from kamim.storage import lock
    from kamim.storage.files import publish

    partial = out.with_name(f"{out.name}.partial")
    with lock.alone(out, "out"):
        _remove(partial)
        try:
            yield partial
            publish(partial, out)
        finally:
            _remove(partial)


def _check_new(out: Path) -> None:
    """Raises KamimError if `out` exists, unless it is an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise KamimError(f"out = {out}: exists already; choose another or remove it")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _export_hugging_face(saved: "Checkpoint", out: Path) -> None:
    from kamim.models import hugging_face
    from kamim.training.checkpoint import save_tensors

    name, resolution = saved.config.model.name, saved.config.data.resolution
    config, weights = hugging_face.to_hugging_face(saved.model_state(), name, resolution, saved.has_head)
    with _staged(out) as partial:
        partial.mkdir()
        save_tensors(weights, partial / "model.safetensors")
        write_json(partial / "config.json", config)
        write_json(partial / "preprocessor_config.json", hugging_face.preprocessor(resolution))
    out_console.print(f"{out}: transformers.{config['architectures'][0]}.from_pretrained({str(out)!r})")


def _export_timm(saved: "Checkpoint", out: Path) -> None:
    from kamim.models import interop
    from kamim.models.architectures import architecture
    from kamim.training.checkpoint import save_tensors

    name = saved.config.model.name
    known = architecture(name)
    if known.shared_position_bias:
        raise KamimError(
            f"{saved.path}: a {name}, whose shared position bias timm's ViT does not have; cannot be exported"
        )
    with _staged(out) as partial:
        save_tensors(interop.to_timm(saved.model_state()), partial, {interop.ARCHITECTURE: name})
    options = "".join(f", {key}={value!r}" for key, value in known.options.items())
    if known.norm_eps:
        options += f", norm_layer=functools.partial(torch.nn.LayerNorm, eps={known.norm_eps})"
    out_console.print(
        f"{out}: timm.create_model('{known.timm_name}', img_size={saved.config.data.resolution}, "
        f"num_classes=0{options}, checkpoint_path={str(out)!r})",
    )
