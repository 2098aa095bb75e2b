"""Shared parts of all commands: consoles, the progress bar, printing of errors, and checks of paths."""

import errno
import faulthandler
import functools
import inspect
import io
import json
import logging
import math
import os
import re
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.text import Text
from typer.models import OptionInfo

import kamim
from kamim import KamimError
from kamim.cli.time_left import TimeLeft
from kamim.storage.escape import one_line, printable, shortened

if TYPE_CHECKING:
    from kamim.config.schema import Section
    from kamim.evaluation.options import Evaluation
    from kamim.evaluation.task_progress import Position


class _Console(Console):
    """Prints text verbatim, on one line: no markup, no emoji, and no control characters, which a name may contain.

    Messages, on stderr, are shortened.
    """

    def __init__(self, stderr: bool = False):
        super().__init__(stderr=stderr, soft_wrap=True, highlight=False, markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """See Console."""
        return super().render_str(printable(shortened(text) if self.stderr else text), **options)


class _Formatter(logging.Formatter):
    """Formats a warning as one printable line."""

    def format(self, record: logging.LogRecord) -> str:
        return one_line(super().format(record))


app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="Keypoint Aware Masked Image Modelling.")
store_app = typer.Typer(no_args_is_help=True, help="Inspect, verify and preview a store.")
app.add_typer(store_app, name="store")
bench_app = typer.Typer(no_args_is_help=True, help="Measure fidelity and speed on this machine.")
app.add_typer(bench_app, name="bench")
out_console, err_console = _Console(), _Console(stderr=True)
_debug = False

RESUMABLE = 75  # exit code of a command that was stopped and that a rerun resumes (EX_TEMPFAIL)


def _show_version(requested: bool) -> None:
    if requested:
        out_console.print(f"kamim {kamim.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    global _debug
    _debug = debug
    _explain_faults()
    out_console.quiet = not is_main()


def _explain_faults() -> None:
    """Prints a traceback for fatal signals, such as SIGBUS if a mapped file was truncated; makes warnings printable."""
    with suppress(io.UnsupportedOperation, RuntimeError):  # stderr is not a file
        faulthandler.enable()
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_Formatter())


def is_main() -> bool:
    """Returns whether this process prints for the user: the first of torchrun's, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def say(line: str) -> None:
    """Prints a line on stderr, from the main process only."""
    if is_main():
        err_console.print(line)


def options_of(command: Callable[..., None]) -> dict[str, str]:
    """Returns the options of a command by the names of its parameters, such as {"crop_scale": "--crop-scale"}."""
    options = {}
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        for info in getattr(parameter.annotation, "__metadata__", ()):
            if isinstance(info, OptionInfo):
                names = (str(info.default), *(info.param_decls or ()))  # typer takes the first name for the default
                options[name] = next((text for text in names if text.startswith("--")), f"--{name.replace('_', '-')}")
    return options


_PARAMETER = re.compile(r"(?<![\w./-])(\w+)(?:=| = )|^(\w+)(?=: )")


def as_typed(message: str, options: Mapping[str, str]) -> str:
    """Returns a library's message in terms of the command line: `crop_scale = 2` becomes `--crop-scale 2`."""

    def option(match: re.Match[str]) -> str:
        name, alone = match.groups()
        if alone:
            return options.get(alone, alone)
        return f"{options[name]} " if name in options else match[0]

    return _PARAMETER.sub(option, message)


_REMEDIES = {
    errno.EEXIST: "it is a file where a folder is needed, choose another path",
    errno.ENOTDIR: "a file is where a folder is needed, choose another path",
    errno.EACCES: "choose another path",
    errno.EROFS: "choose another path",
    errno.EFBIG: "raise the limit of this shell, `ulimit -f`",
}


def of_system(error: OSError) -> str:
    """Returns the message of an error of the operating system: the path, if it names one, the reason and a remedy."""
    reason = error.strerror or str(error)
    if error.errno in _REMEDIES and reason == os.strerror(error.errno):
        reason = f"{reason}; {_REMEDIES[error.errno]}"
    return reason if error.filename is None else f"{error.filename}: {reason}"


def says_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Wraps a command: a KamimError becomes one line and exit code 1. Another exception is a bug with a traceback."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except typer.Exit:  # is also a RuntimeError
            raise
        except (KamimError, OSError, MemoryError) as error:
            if _debug:
                raise
            text = of_system(error) if isinstance(error, OSError) else str(error)
            line = as_typed(one_line(text), options_of(command))
            memory = "out of memory; " if isinstance(error, MemoryError) else ""
            err_console.print(f"error: {memory}{line}", style="red")
            raise typer.Exit(1) from None
        except Exception:
            err_console.print("this is a bug in kamim; please report it with the command and the lines below")
            raise

    return wrapped


class _Rate(ProgressColumn):
    """The rate of recent images per second."""

    def render(self, task: Task) -> Text:
        rate = (task.finished_speed or task.speed or 0) * task.fields["images"]
        return Text(f"{rate:,.0f} images/s" if rate >= 1 else "")


class _Position(ProgressColumn):
    """Steps done of all, or the task of many; nothing before the first."""

    def render(self, task: Task) -> Text:
        steps = "" if task.total is None else f"{task.completed:g}/{task.total:g}"
        return Text(task.fields["position"] or steps)


class _Left(ProgressColumn):
    """The time left: by the recent rate of steps, or over all tasks of many (kamim/cli/time_left.py)."""

    def render(self, task: Task) -> Text:
        if task.fields["position"]:
            return Text(task.fields["left"])
        seconds = task.time_remaining
        return Text("" if seconds is None else f"{timedelta(seconds=round(seconds))} left")


@contextmanager
def bar(title: str, images: int = 0) -> Iterator["Update"]:
    """Shows a progress bar; images: per step, 0 if steps do not consist of images.

    Without a terminal, it prints a line at every tenth, and at the beginning of every task of many.
    """
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        _Position(),
        _Rate(),
        _Left(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=err_console, disable=not (err_console.is_terminal and is_main())) as progress:
        yield Update(progress, add_bar(progress, title, images))


def add_bar(progress: Progress, title: str, images: int) -> TaskID:
    """Adds the bar that an Update moves."""
    return progress.add_task(printable(title), total=None, note="", position="", left="", images=images)


@contextmanager
def terminable() -> Iterator[None]:
    """Handles SIGTERM and SIGUSR1, with which batch systems stop a job, as Ctrl-C in the context."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Update:
    """Moves a bar: update(done, total, note) for tasks one after the other, of_task for one of a known number."""

    def __init__(self, progress: Progress, task: TaskID):
        self._progress, self._task, self._tenths = progress, task, 0
        self._time_left = TimeLeft(progress.get_time)

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Moves it to `done` of `total`; after the end of a task, or backwards, it starts the next task."""
        shown = self._progress.tasks[self._task]
        if shown.finished or done < shown.completed:  # rich never resumes a finished task, and averages over both
            self._progress.reset(self._task)
            self._tenths = 0
        self._move(done, total, note)

    def of_task(self, position: "Position") -> Callable[[int, int, Mapping[str, float]], None]:
        """Begins a task of many and returns a function that moves the bar over all tasks, each of the same length."""

        def move(done: int, total: int, metrics: Mapping[str, float]) -> None:
            note, left = metrics_line(metrics, f"step {done} of {total}"), self._time_left.move(done, total)
            self._move(position.number - 1 + done / total, position.count, note, str(position), left)

        self._tenths = -1
        self._move(position.number - 1, position.count, "", str(position), self._time_left.begin(position))
        return move

    def _move(self, done: float, total: int, note: str, position: str = "", left: str = "") -> None:
        self._progress.update(
            self._task, completed=done, total=total, position=position, left=left, note=printable(note)
        )
        if self._progress.disable and done * 10 // total > self._tenths:
            say(self._line())
        self._tenths = int(done * 10 // total)

    def _line(self) -> str:
        task = self._progress.tasks[self._task]
        position, rate, left = (column.render(task).plain for column in (_Position(), _Rate(), _Left()))
        return ", ".join(filter(None, (f"{task.description}: {position}", rate, left, task.fields["note"])))


def metrics_line(metrics: Mapping[str, float], title: str = "") -> str:
    """Returns the text of a training step for a bar: title, loss, and the share of time spent waiting for data."""
    parts = [title] if title else []
    if metrics:
        parts.append(f"loss {metrics['loss']:.4f}")
    if "data_wait_share" in metrics:
        parts.append(f"data-wait {metrics['data_wait_share']:.1%}")
    return ", ".join(parts)


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
        from kamim.storage.store import read_manifest

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


def write_json(file: Path | None, content: Any) -> None:
    """Writes JSON, with null for numbers that are not finite; does nothing if `file` is None.

    Raises OSError if it cannot be written.
    """
    from kamim.storage.files import write_whole

    if file is None:
        return
    text = (json.dumps(_finite(content), indent=2, allow_nan=False) + "\n").encode()
    if file.exists() and not file.is_file():  # such as /dev/stdout, which cannot be replaced
        file.write_bytes(text)
    else:
        write_whole(file.resolve(), text)


def _finite(content: Any) -> Any:
    """Returns the content with None for numbers that are not finite."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def shard_of(text: str) -> tuple[int, int]:
    """Returns the value I/N of --shard as (I, N). Raises KamimError unless 1 <= I <= N."""
    try:
        number, count = (int(part) for part in text.split("/"))
    except ValueError:
        number = count = 0
    if not 1 <= number <= count:
        raise KamimError(f"--shard {text}: must be I/N with 1 <= I <= N, such as 3/8")
    return number, count
