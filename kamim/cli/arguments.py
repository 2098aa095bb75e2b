"""Arguments that several commands have, and their checks, which need no torch."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kamim import KamimError
from kamim.cli.console import out_console, say

if TYPE_CHECKING:
    from kamim.config.schema import Section
    from kamim.evaluation.options import Evaluation

Overrides = Annotated[list[str] | None, typer.Argument(help="key=value overrides, such as optim.lr=1e-3")]
ConfigFile = Annotated[Path | None, typer.Option("-c", "--config", help="Preset or YAML file, such as demo")]


Strict = Annotated[bool, typer.Option("--strict", help="Fail if a run's newest checkpoint is damaged.")]
PrintConfig = Annotated[bool, typer.Option("--print-config", help="Print the resolved configuration and exit.")]


def print_config(config: "Section") -> None:
    """Prints a configuration as YAML, which -c reads back."""
    from kamim.config.schema import dump

    for line in dump(config).splitlines():
        out_console.print(line)


def weighting_of(detector: str, footprint: str, patch_size: int, temperature: float, normalize: bool = False) -> Any:
    """Returns the kamim.config.pretrain.Weighting that the options describe."""
    from kamim.config.pretrain import Weighting
    from kamim.config.schema import load

    keys = {
        "detector": detector,
        "footprint": footprint,
        "patch_size": patch_size,
        "temperature": temperature,
        "normalize": normalize,
    }
    return load(Weighting, None, given=keys)


def check_store(store: Path | None) -> None:
    """Reads a store's manifest, without torch. Raises KamimError if there is none."""
    if store is not None:
        from kamim.storage.manifest import read_manifest

        read_manifest(store)


def check_exists(name: str, path: Path | None) -> None:
    """Raises KamimError unless the path exists; name: of the parameter in the error, empty for an argument."""
    if path is not None and not path.exists():
        raise KamimError(f"{name} = {path}: no such file or folder".removeprefix(" = "))


def check_stores(config: "Evaluation", modes: Sequence[str]) -> None:
    """Checks an evaluation's stores, without torch. Raises KamimError if one is missing, or if their classes differ."""
    from kamim.evaluation.options import UNCLASSIFIED
    from kamim.storage.store import Store
    from pipelines.labels import check_labels

    train, val = (None if path is None else Store(path) for path in (config.train, config.val))
    if not set(modes) <= set(UNCLASSIFIED):
        check_labels(train, val)


def check_checkpoints(specs: Sequence[str]) -> None:
    """Raises KamimError for the first [NAME=][random:|pixels:]PATH that does not exist or is a file of another kind.

    timm:MODEL has no path.
    """
    from kamim.models.file_kind import check_weights

    for spec in specs:
        source = spec.partition("=")[2] if "=" in spec else spec
        path = Path(source.removeprefix("random:").removeprefix("pixels:"))
        if source and not source.startswith("timm:") and not path.exists():
            raise KamimError(f"checkpoint = {spec}: no such file or folder")
        check_weights(path)


def check_folder(option: str, file: Path | None) -> None:
    """Raises KamimError, before any work, if the file cannot be written. option: its name in the error."""
    if file is None:
        return
    folder = file.absolute().parent
    if file.is_dir():
        raise KamimError(f"{option} {file}: is a folder; name a file")
    if not folder.is_dir():
        raise KamimError(f"{option} {file}: the folder {folder} does not exist")
    replaced = file.is_file() or not file.exists()  # another, such as /dev/stdout, is written to
    if not os.access(folder if replaced else file, os.W_OK):
        raise KamimError(f"{option} {file}: cannot be written to{f', as {folder} is not writable' * replaced}")
    if file.is_file():
        say(f"{option} {file}: exists and will be replaced")


def check_picture(option: str, file: Path | None) -> None:
    """Raises KamimError, before any work, if the file cannot be written or is not named as a PNG."""
    check_folder(option, file)
    if file is not None and file.suffix.lower() != ".png":
        raise KamimError(f"{option} {file}: must end in .png")


def shard_of(text: str) -> tuple[int, int]:
    """Returns the value I/N of --shard as (I, N). Raises KamimError unless 1 <= I <= N."""
    try:
        number, count = (int(part) for part in text.split("/"))
    except ValueError:
        number = count = 0
    if not 1 <= number <= count:
        raise KamimError(f"--shard {text}: must be I/N with 1 <= I <= N, such as 3/8")
    return number, count
