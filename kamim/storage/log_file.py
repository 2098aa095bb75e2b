"""The log file of a run or a job: one line per event, with its time in UTC."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import kamim
from kamim import KamimError
from kamim.storage.escape import one_line
from kamim.storage.ownership import append, refuse_links

BEGUN = ": begun by kamim "


def write_line(file: Path, line: str) -> None:
    """Appends a line, escaped, after the time. A log that cannot be written ends no work."""
    with suppress(OSError, KamimError):
        append(file, f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {one_line(line)}\n")


def check_log(file: Path) -> None:
    """Raises KamimError if the file is a link, or not empty and not begun by `logged`."""
    refuse_links([file])
    if file.is_file():
        with file.open("rb") as stream:
            first = stream.readline(1 << 16)
        if first and BEGUN.encode() not in first:
            raise KamimError(f"{file}: is not a log of kamim; move it, or choose another out=...")


@contextmanager
def logged(file: Path, what: str) -> Iterator[None]:
    """Logs the beginning and the end of the work inside, and the exception that ended it if there was one."""
    write_line(file, f"{what}{BEGUN}{kamim.__version__}, process {os.getpid()} on {socket.gethostname()}")
    try:
        yield
    except BaseException as error:
        write_line(file, f"{what}: ended by {type(error).__name__}: {error}")
        raise
    write_line(file, f"{what}: ended")
