"""Distributed training: torchrun's environment and the collectives that the training loops need."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kamim import KamimError
from kamim.runtime import rendezvous
from kamim.storage.escape import one_line
from kamim.storage.flatten import flat_text


@dataclass(frozen=True)
class World:
    """The rank of this process, the number of processes, and the device of this process."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Returns the sum of `value` over all processes, on each of them."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def largest(self, value: Tensor) -> Tensor:
        """Returns the maximum of `value` over all processes, on each of them."""
        if self.size > 1:
            dist.all_reduce(value, dist.ReduceOp.MAX)
        return value

    def broadcast(self, value: Tensor) -> None:
        """Copies `value` of the first process to all processes, in place."""
        if self.size > 1:
            dist.broadcast(value, src=0)

    def gather(self, value: Any) -> list[Any]:
        """Returns the `value` of every process by rank, on each of them. For small and rare objects."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def any(self, flag: bool) -> bool:
        """Returns whether `flag` is set in any process, on each of them. Does not wait for the device."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor(float(flag))))

    def barrier(self) -> None:
        """Waits for all processes, on the hosts: gloo notices at once if one of them has ended, NCCL does not."""
        self.any(False)

    def check_same(self, settings: Mapping[str, Any]) -> None:
        """Raises KamimError, on all processes, if these nested settings differ between them."""
        first, *others = self.gather(dict(flat_text(settings)))
        for rank, theirs in enumerate(others, 1):
            for key in (key for key in {**first, **theirs} if first.get(key) != theirs.get(key)):
                raise KamimError(
                    f"{key}: is {theirs.get(key, 'missing')} on rank {rank}, {first.get(key, 'missing')} on rank 0; "
                    "start all ranks with the same configuration and the same store"
                )


_joined = 0  # calls of start without a matching stop


@contextmanager
def joined(device: str) -> Iterator[World]:
    """Joins torchrun's process group in the context, if there is one. See start.

    Raises KamimError, too, if another process of the group ends in the context.
    """
    with rendezvous.ending_together():
        world = start(device)
        try:
            yield world
        except RuntimeError as error:
            if world.size == 1 or not _is_lost_peer(error):
                raise
            raise KamimError(
                f"rank {world.rank} lost another of the {world.size} ranks, which failed or was killed; see its output "
                f"and rerun the command to resume ({one_line(error).partition('. ')[0][:200]})"
            ) from error
        finally:
            stop()


def _is_lost_peer(error: RuntimeError) -> bool:
    """Returns whether a collective failed. NCCL's errors have a type; gloo's are known by the file in their text."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def start(device: str) -> World:
    """Joins torchrun's process group, if any, unless it is joined already. device: auto, cuda or cpu.

    Raises KamimError if cuda is requested but not available, and what rendezvous.meet raises.
    """
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise KamimError("compute.device = 'cuda': this machine has no CUDA device; use compute.device=cpu or auto")
    kind = "cuda" if has_cuda and device != "cpu" else "cpu"
    rank, size = rendezvous.rank_and_size()
    own = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(own)
    if size > 1 and not dist.is_initialized():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
            timeout=rendezvous.PATIENCE,
            store=rendezvous.meet(kind),
            rank=rank,
            world_size=size,
        )
    global _joined
    _joined += 1
    return World(rank, size, own)


def stop() -> None:
    """Undoes one start. The last call leaves the process group, if any, since it cannot be joined twice."""
    global _joined
    _joined -= 1
    if _joined == 0 and dist.is_initialized():
        dist.destroy_process_group()
