"""Every command that README.md, docs/ and --help print is parsed, and reaches its configuration; README's are run."""

import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import typer
from conftest import build_store
from typer.testing import CliRunner

from kamim.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```(?:sh|bash)?\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:torchrun [^`]*-m )?kamim [^`]*)`")
# What stands for something in a command -> what a command line could hold in its place.
PLACEHOLDERS = {"[--json]": "--json", "$mode": "knn", "$SLURM_ARRAY_TASK_ID/64": "1/64", "N": "3", "W.png": "w.png"}
ELLIPSIS = {  # what `...` leaves out
    "preprocess": ["--source", "s", "--out", "o"],
    "pretrain": ["-c", "demo"],
    "eval": ["--val", "v", "--out", "o"],
}
YAML = re.compile(r"^```(?:yaml)?\n# (\S+\.yaml)\n(.*?)^```", re.MULTILINE | re.DOTALL)  # a file for -c
COMMANDS = typer.main.get_command(app)


def commands(text: str) -> Iterator[list[str]]:
    """The arguments of every command `kamim ...` in the blocks of a page, those of a torchrun included."""
    blocks = [block.replace("\\\n", " ") for block in FENCED.findall(text)]
    yield from _arguments(line for block in blocks for line in block.splitlines())


def mentions(text: str) -> Iterator[list[str]]:
    """The arguments of every command within a sentence, which may leave out what the command needs."""
    yield from _arguments(INLINE.findall(" ".join(text.split("\n"))))


def _arguments(lines: Iterable[str]) -> Iterator[list[str]]:
    for line in lines:
        found = re.match(r"(?:torchrun .*-m |.*; do )?kamim (.*)", line.strip())
        if found:
            arguments = shlex.split(re.split(r" &(?: |$)|[|>]", found[1])[0], comments=True)
            yield [PLACEHOLDERS.get(argument, argument.replace("=N", "=3")) for argument in arguments]


def parse(arguments: list[str]) -> str:
    """Parses a command as typer does, without running it; returns its path, such as "store verify"."""
    command, names = COMMANDS, []
    while hasattr(command, "commands"):
        if not arguments or arguments[0].startswith("-"):  # kamim --help
            break
        name, command, arguments = command.resolve_command(typer.Context(command), list(arguments))
        names.append(name)
    if "..." in arguments and arguments[arguments.index("...") - 1] != "--source":  # there it stands for a folder
        at = arguments.index("...")
        arguments = [*arguments[:at], *ELLIPSIS.get(names[-1], []), *arguments[at + 1 :]]
    if arguments and "--help" not in arguments and not hasattr(command, "commands"):
        command.make_context(names[-1], list(arguments))
    return " ".join(names)


PRINTED = [
    pytest.param(arguments, whole, id=f"{page.stem}-{'block' if whole else 'text'}-{number}-{arguments[0]}")
    for page in PAGES
    for whole, find in ((True, commands), (False, mentions))
    for number, arguments in enumerate(find(page.read_text()))
]
assert len(PRINTED) > 70


@pytest.mark.parametrize(("arguments", "whole"), PRINTED)
def test_a_printed_command_is_one(
    arguments: list[str], whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names a command and options that exist, and its presets and keys are known."""
    try:
        name = parse(list(arguments))
    except Exception as error:
        if whole or type(error).__name__ != "MissingParameter":
            raise
        return
    if name in ("pretrain", "eval", "sweep") and len(arguments) > 1 and "..." not in arguments:
        if "--help" in arguments or arguments[1] == "--print-config":
            return
        monkeypatch.chdir(tmp_path)
        for file, content in (match for page in PAGES for match in YAML.findall(page.read_text())):
            Path(file).write_text(content)
        done = CliRunner().invoke(app, [*arguments, "--print-config"])
        required = ("out: is missing", "data: is missing", "--checkpoint: is missing", "--val: is missing")
        assert done.exit_code == 0 or any(missing in done.output for missing in required), done.output


def walk(command: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every command's path and help."""
    for name, inner in getattr(command, "commands", {}).items():
        yield from walk(inner, (*path, name))
    yield path, str(getattr(command, "help", "") or "")


EXAMPLES = [line.strip() for _, text in walk(COMMANDS) for line in re.findall(r"Example: (kamim .*)", text)]
assert len(EXAMPLES) >= 6


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_of_help_is_a_command(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (arguments,) = mentions(f"`{example}`")
    name = parse(list(arguments))
    if name in ("pretrain", "eval", "sweep"):
        monkeypatch.chdir(tmp_path)
        for file, content in (match for page in PAGES for match in YAML.findall(page.read_text())):
            Path(file).write_text(content)
        done = CliRunner().invoke(app, [*arguments, "--print-config"])
        assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("command", "given"),
    [
        ("pretrain", ["-c", "demo"]),
        ("eval", ["-c", "linprobe", "--checkpoint", "x", "--val", "y"]),
        ("sweep", ["table2"]),
    ],
)
def test_keys_that_help_names_are_keys(command: str, given: list[str]) -> None:
    shown = " ".join(re.sub(r"[│╭╰─╮╯]", " ", CliRunner().invoke(app, [command, "--help"]).output).split())
    (key,) = re.findall(r"overrides, such as ([\w.]+=[\w.-]+)", shown)
    done = CliRunner().invoke(app, [command, *given, key, "--print-config"])
    assert done.exit_code == 0, done.output


# Settings that make the README's commands quick; everything else of them is as printed.
TINY = {
    "preprocess": ["--workers", "1", "--resolution", "64"],
    "pretrain": [
        "model.name=vit_demo",
        "data.resolution=64",
        "optim.batch_size=8",
        "optim.duration=2 steps",
        "optim.warmup=1 steps",
        "panel_epochs=null",
        "compute.device=cpu",
        "data.workers=1",
    ],
    "eval": [
        "linprobe.optim.epochs=2",
        "linprobe.optim.warmup_epochs=1",
        "linprobe.optim.batch_size=8",
        "compute.device=cpu",
        "workers=1",
    ],
}


def test_the_readmes_commands_run(class_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ImageNet in four commands, on a folder of that layout with a few photographs, and the loop of README's Python."""
    for split in ("train", "val"):
        for number, name in enumerate(sorted(folder.name for folder in class_folder.iterdir())):
            (tmp_path / "imagenet" / split).mkdir(parents=True, exist_ok=True)
            (tmp_path / "imagenet" / split / f"n0000000{number}").symlink_to(class_folder / name)
    readme = (ROOT / "README.md").read_text()
    section = readme.partition("## ImageNet in four commands")[2].partition("\n## ")[0]
    printed = [block for block in FENCED.findall(section) if "imagenet" in block]
    four = list(commands(f"```\n{printed[0]}```"))
    assert len(four) == 4
    monkeypatch.chdir(tmp_path)
    for arguments in four:
        line = [argument.replace("/data/imagenet", str(tmp_path / "imagenet")) for argument in arguments]
        done = CliRunner().invoke(app, [*line, *TINY[line[0]]])
        assert done.exit_code == 0, done.output
    assert "top-1" in done.output
    (code,) = re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    seen: dict[str, object] = {}
    exec(code.replace("=256", "=8").replace(", 192,", ", 64,").replace("100 *", "1 *"), seen)
    assert tuple(seen["weights"].shape) == (8, 8, 8)  # type: ignore[attr-defined]


def test_commands_of_a_store_run(class_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What docs/preprocessing.md prints of verify, repair, info and preview."""
    build_store(class_folder, tmp_path / "STORE")
    text = (ROOT / "docs/preprocessing.md").read_text().partition("## Inspecting")[2]
    printed = [arguments for arguments in commands(text) if "STORE" in arguments]
    assert {arguments[1] for arguments in printed} == {"info", "verify", "preview"}
    monkeypatch.chdir(tmp_path)
    for arguments in printed:
        line = [str(class_folder) if argument == "DIR" else argument for argument in arguments]
        done = CliRunner().invoke(app, line)
        assert done.exit_code == 0, done.output
