"""The executors that build shards: worker processes of this machine, or a Dask cluster (concurrent.futures)."""

import ctypes
import faulthandler
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

from kamim import KamimError
from preprocess.shards import ShardTask, run_shard

RETRIES = 3  # retries of a shard whose machine of the cluster is lost
AHEAD = 2  # tasks in flight per worker


@contextmanager
def local(workers: int) -> Iterator[tuple[Executor, int]]:
    """Yields worker processes, and how many tasks to keep in flight."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start_worker) as executor:
        try:
            yield executor, AHEAD * workers
        finally:
            executor.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """Makes a worker ignore SIGINT, die with its parent, and print a traceback for fatal signals."""
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


@contextmanager
def dask(address: str) -> Iterator[tuple[Executor, int]]:
    """Yields the cluster whose scheduler is at tcp://HOST:PORT, and how many tasks to keep in flight.

    Raises BrokenExecutor if too many workers die while building one shard.
    """
    try:
        from distributed import Client, KilledWorker
    except ImportError:
        raise KamimError("cluster: Dask is not installed; pip install 'kamim[cluster]'") from None
    try:
        connected = Client(address)
    except (OSError, ValueError) as error:
        raise KamimError(f"cluster = {address}: cannot be reached: {error}; must be tcp://HOST:PORT") from error
    with connected as client:
        threads: dict[str, Any] = client.nthreads()
        if not threads:
            raise KamimError(f"cluster = {address}: has no workers; start some with `dask worker {address}`")
        try:
            yield client.get_executor(pure=False, retries=RETRIES), AHEAD * sum(threads.values())
        except KilledWorker as error:
            raise BrokenExecutor(str(error)) from error


def results(executor: Executor, ahead: int, tasks: Iterator[ShardTask]) -> Iterator[tuple[ShardTask, dict[str, str]]]:
    """Runs the tasks, `ahead` of them at a time; yields each as it finishes, with its files' names by component."""
    running: dict[Future[dict[str, str]], ShardTask] = {}
    for task in tasks:
        running[executor.submit(run_shard, task)] = task
        if len(running) >= ahead:
            yield from _some(running)
    while running:
        yield from _some(running)


def _some(running: dict[Future[dict[str, str]], ShardTask]) -> Iterator[tuple[ShardTask, dict[str, str]]]:
    for future in wait(running, return_when=FIRST_COMPLETED).done:
        yield running.pop(future), future.result()
