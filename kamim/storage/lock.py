"""File locks, which the operating system releases when their holder dies."""

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from kamim import KamimError
from kamim.storage.ownership import lock_file, open_own

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # a Windows drive has one letter


def check_local(name: str, out: Path) -> None:
    """Raises KamimError for a URL, such as s3://bucket/store, of which pathlib makes a folder "s3:".

    name: of the parameter in errors.
    """
    if _URL.match(str(out)):
        raise KamimError(f"{name} = {str(out).replace(':/', '://', 1)}: is a URL; kamim writes to local folders only")


@contextmanager
def alone(out: Path, name: str) -> Iterator[None]:
    """Holds the lock of `out` in the context, so that no other command writes there.

    name: of the parameter that gives `out`, in errors. Raises KamimError if another command holds the lock or `out`
    cannot be locked.
    """
    check_local(name, out)
    file = lock_file(out.resolve())
    busy = f"{name} = {out}: another process works there now; wait until it is done, or choose another"
    with ExitStack() as stack:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(held(file, busy))
        except OSError as error:
            raise KamimError(
                f"{name} = {out}: {file} cannot be created or locked: {error.strerror}; choose another"
            ) from error
        yield


@contextmanager
def held(file: Path, busy: str, shared: bool = False) -> Iterator[None]:
    """Holds the lock of `file` in the context, exclusively or shared. Raises KamimError(busy) if it is not free."""
    descriptor = _acquire(file, busy, shared)
    try:
        yield
    finally:
        if not shared and _is_of(descriptor, file):
            file.unlink()
        os.close(descriptor)


def _acquire(file: Path, busy: str, shared: bool) -> int:
    """Returns a descriptor of `file` that holds its lock. An exclusive holder removes the file before releasing it."""
    while True:
        descriptor = open_own(file, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            if _is_of(descriptor, file):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise KamimError(busy) from None
        os.close(descriptor)


def _is_of(descriptor: int, file: Path) -> bool:
    """Returns whether the descriptor is of the file that has this name now."""
    return file.exists() and os.path.samestat(os.fstat(descriptor), file.lstat())
