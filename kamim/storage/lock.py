"""A lock that the system lets go of when its holder dies."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from kamim import KamimError

if TYPE_CHECKING:
    from kamim.training.distributed import World


@contextmanager
def alone(out: Path, option: str, world: "World | None" = None) -> Iterator[None]:
    """Inside, no other command writes to `out`: this process, or the first of `world`, holds OUT.lock.

    option: what errors call `out`, such as "--out". Raises ValueError, in every process of `world`, where another
    command does, or where `out` cannot be locked.
    """
    file = out.resolve().with_name(f"{out.resolve().name}.lock")
    problem = ""
    with ExitStack() as stack:
        if world is None or world.is_main:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                busy = f"{option} {out}: another process works there now; wait until it is done, or choose another"
                stack.enter_context(held(file, busy))
            except ValueError as error:
                problem = str(error)
            except OSError as error:
                problem = f"{option} {out}: {file} cannot be made or locked: {error.strerror}; choose another"
        if world is not None:
            problem = world.gather(problem)[0]
        if problem:
            raise KamimError(problem)
        yield


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
            raise KamimError(busy) from None
        os.close(descriptor)
