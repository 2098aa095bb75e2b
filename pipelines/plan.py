"""Assigns samples to steps and ranks, as a pure function of integers."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from kamim import KamimError
from kamim.method import rng


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch: its samples (int64 [B]), epoch and step. last and share: see Batch."""

    indices: np.ndarray
    epoch: int
    step: int
    last: bool
    share: float


@dataclass(frozen=True)
class Plan:
    """Steps of `batch_size` samples over all ranks, in micro-batches of at most `micro_batch` on each.

    Step s covers the next batch_size positions of its epoch's order; a rank takes a contiguous part of them.
    So the global order depends on neither the number of ranks nor that of micro-batches, and the position of a
    run is one integer. With drop_last the incomplete step at an epoch's end is dropped, otherwise it is short.
    listed: the samples' numbers in the store, int64 [samples], if they are not simply 0 .. samples - 1.
    """

    samples: int
    batch_size: int
    micro_batch: int
    seed: int
    shuffle: bool = True
    drop_last: bool = True
    rank: int = 0
    world: int = 1
    listed: np.ndarray | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.batch_size < self.world:
            raise KamimError(f"batch_size = {self.batch_size}: is less than the {self.world} ranks that share it")
        if self.steps_per_epoch == 0:
            raise KamimError(
                f"batch_size = {self.batch_size}: is more than the store's {self.samples} samples, "
                "so that an epoch has no complete batch; choose a smaller one"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in one pass over the samples."""
        return self.samples // self.batch_size if self.drop_last else -(-self.samples // self.batch_size)

    @property
    def largest_micro_batch(self) -> int:
        """Samples of the largest micro-batch on any rank."""
        return min(self.micro_batch, -(-self.batch_size // self.world))

    def step_indices(self, step: int) -> np.ndarray:
        """Returns the samples of a global step, on all ranks: int64 [<= batch_size]."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = _order(self.seed, epoch, self.samples) if self.shuffle else np.arange(self.samples)
        chosen = order[within * self.batch_size : (within + 1) * self.batch_size]
        return chosen if self.listed is None else self.listed[chosen]

    def micro_batches(self, first: int, stop: int) -> Iterator[MicroBatch]:
        """Yields this rank's micro-batches of the steps first .. stop - 1, in order."""
        for step in range(first, stop):
            whole = self.step_indices(step)
            mine = whole[len(whole) * self.rank // self.world : len(whole) * (self.rank + 1) // self.world]
            for at in range(0, max(len(mine), 1), self.micro_batch):
                part = mine[at : at + self.micro_batch]
                last = at + self.micro_batch >= len(mine)
                yield MicroBatch(part, step // self.steps_per_epoch, step, last, len(part) / len(whole))


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, samples: int) -> np.ndarray:
    return rng.permutation(seed, epoch, samples)
