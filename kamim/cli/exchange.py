"""kamim import, kamim export: weights from elsewhere, and to it."""

from pathlib import Path
from typing import Annotated

import typer

from kamim.cli.console import app, check_folder, out_console, says_errors


@app.command(name="import")
@says_errors
def import_(
    file: Annotated[Path, typer.Argument(help="The authors', MoCo v3's, microsoft/SimMIM's or timm's weights.")],
    out: Annotated[Path, typer.Option(help="The checkpoint to make.")],
    resolution: Annotated[int | None, typer.Option(help="Side of the images; default: as trained.")] = None,
) -> None:
    """Makes a checkpoint of weights from elsewhere."""
    from kamim import checkpoint, interop

    made = interop.convert(interop.read_file(file), resolution)
    checkpoint.save_imported(out, made.architecture, made.resolution, made.state, made.has_head)
    head = "with its pixel head" if made.has_head else "encoder alone"
    out_console.print(f"{out}: {made.architecture} at {made.resolution} px, {head}")


@app.command()
@says_errors
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A run, or one of its checkpoints.")],
    out: Annotated[Path, typer.Option(help="The file to make, .safetensors.")],
) -> None:
    """Writes the encoder as timm's create_model(..., checkpoint_path=OUT) loads it."""
    from safetensors.torch import save_file

    from kamim import interop
    from kamim.checkpoint import read
    from kamim.models import ARCHITECTURES

    if out.suffix != ".safetensors":
        raise ValueError(f"--out {out}: must end in .safetensors")
    check_folder("--out", out)
    found = read(checkpoint)
    save_file(interop.to_timm(found.model_state()), out)
    architecture = ARCHITECTURES[found.config.model.name]
    options = "".join(f", {key}={value}" for key, value in architecture.options.items())
    out_console.print(
        f"{out}: timm.create_model('{architecture.timm_name}', img_size={found.config.data.resolution}, "
        f"num_classes=0{options}, checkpoint_path='{out}')",
    )
