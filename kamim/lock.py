"""A lock that the system lets go of when its holder dies."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def held(file: Path, busy: str, shared: bool = False) -> Iterator[None]:
    """Inside, nobody else holds the lock of `file`; with shared, only others that share it.

    Raises ValueError(busy) where somebody does.
    """
    descriptor = _take(file, busy, shared)
    try:
        yield
    finally:
        if not shared:
            file.unlink(missing_ok=True)
        os.close(descriptor)


def _take(file: Path, busy: str, shared: bool) -> int:
    """A descriptor of `file` that holds its lock: whoever holds it alone removes the file before letting go."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            if file.exists() and os.path.samestat(os.fstat(descriptor), file.stat()):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise ValueError(busy) from None
        os.close(descriptor)
