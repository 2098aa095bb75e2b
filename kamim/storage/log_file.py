"""The log file of a run or a job: one line per event, with its time in UTC."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import kamim
from kamim.storage.escape import one_line


def write_line(file: Path, line: str) -> None:
    """Appends a line, escaped, after the time. A log that cannot be written ends no work."""
    with suppress(OSError), file.open("a", encoding="utf-8") as log:
        log.write(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {one_line(line)}\n")


@contextmanager
def logged(file: Path, what: str) -> Iterator[None]:
    """Logs the beginning and the end of the work inside, and the exception that ended it if there was one."""
    write_line(file, f"{what}: begun by kamim {kamim.__version__}, process {os.getpid()} on {socket.gethostname()}")
    try:
        yield
    except BaseException as error:
        write_line(file, f"{what}: ended by {type(error).__name__}: {error}")
        raise
    write_line(file, f"{what}: ended")
