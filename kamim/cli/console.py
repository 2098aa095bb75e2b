"""The application that commands register with, its consoles, and how errors and JSON are written."""

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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.models import OptionInfo

import kamim
from kamim import KamimError
from kamim.storage.escape import one_line, printable, shortened


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


@contextmanager
def terminable() -> Iterator[None]:
    """Handles SIGTERM and SIGUSR1, with which batch systems stop a job, as Ctrl-C in the context."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
