"""How the processes of a command meet, and how all of them end if one fails before that.

torch's rendezvous waits in compiled code, for an hour and deaf to signals, for processes that may have ended. Here they
meet at torch's TCPStore, which rank 0 or torchrun hosts: every process writes that it is there, or why it ended, and
reads in short intervals what the others wrote.
"""

import functools
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from kamim import KamimError
from kamim.storage.escape import one_line

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

# Timeout of the rendezvous and of collectives. Only the first process reads and saves a run; a probe on many images or
# a slow disk may take longer than NCCL's default of 10 minutes.
PATIENCE = timedelta(hours=1)
INTERVAL = 0.1  # seconds between two looks at the store
LINGER = 30  # seconds that a failing process waits for the others, which may still import torch
QUIET = 30  # seconds after which a waiting process names those it waits for
FAILED = "failed"  # the key of the reason why a process ended
_LOG = logging.getLogger(__name__)
_opened: "Store | None" = None
_met = False  # or ended: whether the others need no more word of this process


def rank_and_size() -> tuple[int, int]:
    """Returns RANK and WORLD_SIZE of the environment, by default 0 and 1. Raises KamimError if they do not fit."""
    rank, size = _number("RANK", 0), _number("WORLD_SIZE", 1)
    if not 0 <= rank < size:
        raise KamimError(f"RANK = {rank}: must be 0 to {size - 1} with WORLD_SIZE = {size}")
    return rank, size


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise KamimError(f"{name} = {text}: must be a whole number, as torchrun sets it")
    return int(text)


def meet(kind: str) -> "Store":
    """Waits for all processes of WORLD_SIZE, and returns the store at which they met.

    kind: of their device, which must be the same. Raises KamimError if a process failed, is of another kind or size, or
    does not come within PATIENCE.
    """
    global _met
    rank, size = rank_and_size()
    store = _store(PATIENCE.total_seconds())
    own = f"{kind}, WORLD_SIZE = {size}"
    with _host_present():
        store.set(f"here/{rank}", own)
        begun, said = time.monotonic(), False
        while missing := [other for other in range(size) if not store.check([f"here/{other}"])]:
            if store.check([FAILED]):
                raise KamimError(store.get(FAILED).decode())
            waited = time.monotonic() - begun
            if waited > PATIENCE.total_seconds():
                raise KamimError(f"rank {missing[0]} did not start within {PATIENCE}; start all {size} ranks")
            if waited > QUIET and not said:
                said = True
                _LOG.warning("rank %d waits for %s", rank, ", ".join(f"rank {other}" for other in missing))
            time.sleep(INTERVAL)
        for other in range(size):
            theirs = store.get(f"here/{other}").decode()
            if theirs != own:
                raise KamimError(f"rank {other} computes on {theirs}, rank {rank} on {own}; start all ranks alike")
    _met = True
    return store


@contextmanager
def ending_together() -> Iterator[None]:
    """In the context, an exception of this process also ends the others, if they have not met yet."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get("WORLD_SIZE", "1") != "1" and not _met:
            _announce(error)
        raise


def ends_all_ranks(command: Callable[..., None]) -> Callable[..., None]:
    """Wraps a command that several processes run together in `ending_together`."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        with ending_together():
            command(*args, **kwargs)

    return wrapped


def _announce(error: BaseException) -> None:
    """Writes why this process ended, and as the host of the store waits until the others have read it."""
    global _met
    _met = True
    stopped = isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt)
    reason = "was stopped" if stopped else f"failed: {one_line(error)[:500]}"
    try:
        rank, size = rank_and_size()
        store = _store(0 if stopped else LINGER)
        if not store.check([FAILED]):
            store.set(FAILED, f"rank {rank} {reason}")
        store.set(f"ended/{rank}", "")
        until = time.monotonic() + LINGER
        while rank == 0 and not stopped and time.monotonic() < until:
            if all(store.check([f"ended/{other}"]) for other in range(size)):
                break
            time.sleep(INTERVAL)
    except (KamimError, RuntimeError):  # the host has not come, or is gone
        pass


def _store(patience: float) -> "Store":
    """Returns the store that rank 0 or torchrun hosts, within `patience` seconds, always the same."""
    from torch.distributed import DistError, PrefixStore, TCPStore  # type: ignore[attr-defined]

    global _opened
    if _opened is not None:
        return _opened
    (rank, size), host, port = rank_and_size(), os.environ.get("MASTER_ADDR", ""), _number("MASTER_PORT")
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not hosts:
        _wait_for(host, port, patience)
    try:
        store = TCPStore(host, port, size, hosts, timeout=timedelta(seconds=LINGER), wait_for_workers=False)
    except DistError as error:
        reason = one_line(error).partition(" Exception raised from")[0]
        raise KamimError(f"MASTER_ADDR = {host}, MASTER_PORT = {port}: {reason[:200]}") from error
    _opened = PrefixStore("kamim", store)
    return _opened


def _wait_for(host: str, port: int, patience: float) -> None:
    """Waits until something listens at the address."""
    until = time.monotonic() + patience
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
        except socket.gaierror as error:
            raise KamimError(f"MASTER_ADDR = {host}: {error.strerror}") from error
        except OSError as error:
            if time.monotonic() > until:
                raise KamimError(f"MASTER_ADDR = {host}, MASTER_PORT = {port}: {error.strerror or error}") from error
            time.sleep(INTERVAL)
        else:
            return


@contextmanager
def _host_present() -> Iterator[None]:
    """Turns torch's error into a KamimError if the host of the store ends in the context."""
    try:
        yield
    except RuntimeError as error:
        raise KamimError("rank 0, which the others meet at, ended; its own output says why") from error
