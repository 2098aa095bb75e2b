"""One process or many: torchrun's environment, and the few collectives the loops need."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kamim import KamimError

# How long a process waits for the others: the first one alone looks at a run and saves it, and a probe on many images
# or a slow disk may take more than the 10 minutes of NCCL.
PATIENCE = timedelta(hours=1)


@dataclass(frozen=True)
class World:
    """Which of how many processes this is, and the device it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """The sum of `value` over all processes, on each of them."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def largest(self, value: Tensor) -> Tensor:
        """The largest of `value` over all processes, on each of them."""
        if self.size > 1:
            dist.all_reduce(value, dist.ReduceOp.MAX)
        return value

    def broadcast(self, value: Tensor) -> None:
        """Makes `value` the first process's, on each of them."""
        if self.size > 1:
            dist.broadcast(value, src=0)

    def gather(self, value: Any) -> list[Any]:
        """Every process's `value`, by rank, on each of them; for what is small and rare."""
        found = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(found, value)
        return found

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in any process; all get the same answer. No device is waited for."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor(float(flag))))

    def barrier(self) -> None:
        """Waits for all processes."""
        if self.size > 1:
            dist.barrier()


_joined = 0  # starts that were not stopped yet


@contextmanager
def joined(device: str) -> Iterator[World]:
    """Inside, this process belongs to torchrun's group, if there is one. See start."""
    world = start(device)
    try:
        yield world
    finally:
        stop()


def start(device: str) -> World:
    """Joins the process group torchrun announces, if any, or goes on with the one that is joined. device: auto, cuda
    or cpu.

    Raises ValueError where cuda is asked for and there is none.
    """
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise KamimError("compute.device = 'cuda': this machine has no CUDA device; use compute.device=cpu or auto")
    kind = "cuda" if has_cuda and device != "cpu" else "cpu"
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    where = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(where)
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", timeout=PATIENCE)
    global _joined
    _joined += 1
    return World(rank, size, where)


def stop() -> None:
    """Undoes a start; the last one leaves the process group, if there is one: it cannot be joined twice."""
    global _joined
    _joined -= 1
    if _joined == 0 and dist.is_initialized():
        dist.destroy_process_group()
