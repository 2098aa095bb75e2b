"""kamim import and kamim export: weights of other projects to checkpoints, and checkpoints to other libraries."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kamim import KamimError
from kamim.cli.arguments import Strict, check_exists
from kamim.cli.console import app, out_console, say, says_errors, write_json
from kamim.models.file_kind import ARCHITECTURE, DECODER_HEADS, check_weights, is_export

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
    checkpoint.save_imported(out, weights)
    head = "encoder alone" if not weights.has_head else "with its pixel head" if weights.decoder is None else "a MAE"
    out_console.print(f"{out}: {weights.architecture} at {weights.resolution} px, {head}")


@app.command()
@says_errors
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A run, or one of its checkpoints.")],
    out: Annotated[Path, typer.Option(help="timm, mae: the .safetensors file to write; huggingface: the folder.")],
    layout: Annotated[
        Literal["timm", "huggingface", "mae"], typer.Option(help="Project whose parameter names and files are written.")
    ] = "timm",
    strict: Strict = False,
) -> None:
    """Writes weights for timm's create_model(..., checkpoint_path=OUT), which loads the encoder, or for Hugging Face's
    from_pretrained(OUT), which loads the whole model.
    """
    check_exists("", checkpoint)
    if layout == "huggingface":
        _check_new(out)
    elif out.suffix != ".safetensors" or out.is_dir():
        raise KamimError(f"out = {out}: must be a file whose name ends in .safetensors")
    elif out.exists():
        if not is_export(out):
            raise KamimError(f"out = {out}: exists already and is no export of kamim; choose another or remove it")
        say(f"--out {out}: exists and will be replaced")

    from kamim.training.checkpoint import read

    saved = read(checkpoint, strict)
    write = {"timm": _export_timm, "huggingface": _export_hugging_face, "mae": _export_mae}[layout]
    write(saved, out)
    if saved.damaged:
        out_console.print(f"{out}: step {saved.step} of {checkpoint}, since its newest checkpoint is damaged")


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """Locks `out` and yields a path to write to, which is renamed to `out` once it is complete."""
    from kamim.storage import lock
    from kamim.storage.files import publish
    from kamim.storage.ownership import discard_unfinished, unfinished

    with lock.alone(out, "out"):
        discard_unfinished(out)
        try:
            yield unfinished(out)
            publish(unfinished(out), out)
        finally:
            discard_unfinished(out)


def _check_new(out: Path) -> None:
    """Raises KamimError if `out` exists, unless it is an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise KamimError(f"out = {out}: exists already; choose another or remove it")


def _export_hugging_face(saved: "Checkpoint", out: Path) -> None:
    from kamim.models import hugging_face
    from kamim.training.checkpoint import save_tensors

    name, resolution = saved.config.model.name, saved.config.data.resolution
    state, has_head = saved.model_state(), saved.has_head and saved.config.method == "simmim"
    if not has_head:
        state = {key: value for key, value in state.items() if key.startswith("encoder.")}
    config, weights = hugging_face.to_hugging_face(state, name, resolution, has_head)
    with _staged(out) as partial:
        partial.mkdir()
        save_tensors(weights, partial / "model.safetensors")
        write_json(partial / "config.json", config)
        write_json(partial / "preprocessor_config.json", hugging_face.preprocessor(resolution))
    out_console.print(f"{out}: transformers.{config['architectures'][0]}.from_pretrained({str(out)!r})")


def _export_mae(saved: "Checkpoint", out: Path) -> None:
    from kamim.models.mae_layout import to_public
    from kamim.training.checkpoint import save_tensors

    if saved.config.method != "mae" or not saved.has_head:
        raise KamimError(f"{saved.path}: is no MAE with its decoder; export it with --layout timm or huggingface")
    decoder = saved.config.mae_decoder
    assert decoder is not None
    about = {ARCHITECTURE: saved.config.model.name, DECODER_HEADS: str(decoder.heads)}
    with _staged(out) as partial:
        save_tensors(to_public(saved.model_state()), partial, about)
    out_console.print(
        f"{out}: models_mae.MaskedAutoencoderViT(...).load_state_dict(safetensors.torch.load_file({str(out)!r}))"
    )


def _export_timm(saved: "Checkpoint", out: Path) -> None:
    from kamim.models import interop
    from kamim.models.architectures import architecture
    from kamim.training.checkpoint import save_tensors

    name = saved.config.model.name
    known = architecture(name, saved.config.model.positions)
    if known.positions == "relative":
        raise KamimError(
            f"{saved.path}: a {name} of relative positions, which timm's ViT does not have; cannot be exported"
        )
    with _staged(out) as partial:
        save_tensors(interop.to_timm(saved.model_state()), partial, {ARCHITECTURE: name})
    options = "".join(f", {key}={value!r}" for key, value in known.options.items())
    if known.norm_eps:
        options += f", norm_layer=functools.partial(torch.nn.LayerNorm, eps={known.norm_eps})"
    out_console.print(
        f"{out}: timm.create_model('{known.timm_name}', img_size={saved.config.data.resolution}, "
        f"num_classes=0{options}, checkpoint_path={str(out)!r})"
    )
