"""kamim config."""

from typing import TYPE_CHECKING, Annotated

import typer

from kamim import KamimError
from kamim.cli.console import app, out_console, says_errors

if TYPE_CHECKING:
    from kamim.config.schema import Section

config_app = typer.Typer(no_args_is_help=True, help="List presets and explain their keys.")
app.add_typer(config_app, name="config")


def _kinds() -> dict[str, "type[Section]"]:
    """Returns the kinds of presets, by their folder in configs/."""
    from kamim.config.pretrain import Pretrain
    from kamim.evaluation.options import Evaluation
    from kamim.sweep.grid import Grid

    return {kind.PRESETS: kind for kind in (Pretrain, Evaluation, Grid)}


@config_app.command(name="list")
@says_errors
def list_presets() -> None:
    """Lists the presets of `kamim pretrain`, `kamim eval` and `kamim sweep`."""
    from kamim.config.schema import presets

    for folder, kind in _kinds().items():
        for name in presets(kind):
            out_console.print(f"{folder}/{name}")


@config_app.command()
@says_errors
def show(
    name: Annotated[
        str, typer.Argument(help="A preset, such as vit_base_kamim, or pretrain/demo if its name is ambiguous.")
    ],
) -> None:
    """Prints every key of a preset: its value, its default if that differs, and its meaning."""
    import yaml

    from kamim.config.schema import document, presets
    from kamim.storage.flatten import flatten

    folder, _, stem = name.rpartition("/")
    matches = [
        (kind, files[stem]) for at, kind in _kinds().items() if folder in ("", at) and stem in (files := presets(kind))
    ]
    if len(matches) != 1:
        several = " or ".join(f"`kamim config show {kind.PRESETS}/{stem}`" for kind, _ in matches)
        how = f"is the name of {len(matches)} presets; type {several}" if matches else "no such preset"
        raise KamimError(f"{name}: {how}{'' if matches else '; `kamim config list` lists them'}")
    ((kind, file),) = matches
    given = yaml.safe_load(file.read_text()) or {}
    own = {**given, **dict(flatten(given))}  # a key's value may be a mapping, such as a sweep's `pretrain`
    for key, default, meaning in document(kind):
        usual = "" if default == "required" else f" (default {default})"
        value = f"{own[key]}{usual}" if key in own else default
        out_console.print(f"{key} = {value}")
        if meaning:
            out_console.print(f"    {meaning}")
