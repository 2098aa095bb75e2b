"""A lock that all ranks of a command share."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from kamim import KamimError
from kamim.runtime.distributed import World
from kamim.storage import lock


@contextmanager
def alone(out: Path, name: str, world: World) -> Iterator[None]:
    """Holds the lock of `out` in the first process of `world`, see kamim.storage.lock.alone.

    Raises its KamimError in every process of `world`.
    """
    problem = ""
    with ExitStack() as stack:
        if world.is_main:
            try:
                stack.enter_context(lock.alone(out, name))
            except KamimError as error:
                problem = str(error)
        if problem := world.gather(problem)[0]:
            raise KamimError(problem)
        yield
