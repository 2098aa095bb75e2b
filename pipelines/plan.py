"""Assigns samples to steps and ranks, as a pure function of integers."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, get_args

import numpy as np

from kamim import KamimError
from kamim.method import rng

Order = Literal["shuffled", "chunked", "stored"]
ORDERS: tuple[Order, ...] = get_args(Order)
CHUNK = 64  # neighbouring samples that a chunked order reads together
WINDOW = 256  # chunks that it mixes


def largest_batch(samples: int) -> int:
    """Returns the largest power of two that is at most `samples`, 1 or more: a batch size to suggest."""
    return 1 << (max(samples, 1).bit_length() - 1)


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch: its samples (int64 [B]), epoch and step. last and loss_weight: see Batch.

    window: the number of the window that it begins in, counted from epoch 0; see Plan.windows.
    """

    indices: np.ndarray
    epoch: int
    step: int
    last: bool
    loss_weight: float
    window: int


@dataclass(frozen=True)
class Plan:
    """Steps of `batch_size` samples over all ranks, in micro-batches of at most `micro_batch` on each.

    Step s covers the next batch_size positions of its epoch's order; a rank takes a contiguous part of them.
    So the global order depends on neither the number of ranks nor that of micro-batches, and the position of a
    run is one integer. With drop_last the incomplete step at an epoch's end is dropped, otherwise it is short.
    listed: the samples' numbers in the store, int64 [samples], if they are not simply 0 .. samples - 1.

    order: shuffled is another permutation of all samples in every epoch, stored the store's order; chunked, for stores
    larger than memory, is a permutation that reads runs of neighbours, see chunked().
    """

    samples: int
    batch_size: int
    micro_batch: int
    seed: int
    order: Order = "shuffled"
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

    @property
    def windows(self) -> int:
        """Windows of an epoch: the parts that a chunked order mixes, best read as a whole; else single samples."""
        return _windows(self.samples) if self.order == "chunked" else self.samples

    def step_indices(self, step: int) -> np.ndarray:
        """Returns the samples of a global step, on all ranks: int64 [<= batch_size]."""
        epoch, within = divmod(step, self.steps_per_epoch)
        chosen = _order(self.order, self.seed, epoch, self.samples)[
            within * self.batch_size : (within + 1) * self.batch_size
        ]
        return chosen if self.listed is None else self.listed[chosen]

    def micro_batches(self, first: int, stop: int) -> Iterator[MicroBatch]:
        """Yields this rank's micro-batches of the steps first .. stop - 1, in order."""
        for step in range(first, stop):
            epoch, within = divmod(step, self.steps_per_epoch)
            whole = self.step_indices(step)
            start, end = (len(whole) * rank // self.world for rank in (self.rank, self.rank + 1))
            for at in range(start, max(end, start + 1), self.micro_batch):
                part = whole[at : min(at + self.micro_batch, end)]
                window = epoch * self.windows + (within * self.batch_size + at) * self.windows // self.samples
                yield MicroBatch(part, epoch, step, at + self.micro_batch >= end, len(part) / len(whole), window)


def chunked(seed: int, epoch: int, samples: int) -> np.ndarray:
    """Returns an order that is nearly random and reads runs of neighbours: a permutation of 0 .. samples - 1, int64.

    Chunks of CHUNK neighbours are put into a random order, which is divided into windows of WINDOW chunks or a few
    more; the samples of each window are shuffled. A store of less than two windows is shuffled as a whole.
    """
    chunks = rng.permutation(seed, epoch, -(-samples // CHUNK), rng.CHUNK)
    runs = (chunks[:, None] * CHUNK + np.arange(CHUNK)).ravel()
    runs = runs[runs < samples]
    window = np.arange(samples) * _windows(samples) // samples
    return runs[np.argsort(window + rng.units(seed, epoch, runs, rng.ORDER, 1)[:, 0], kind="stable")]


def _windows(samples: int) -> int:
    return max(samples // (CHUNK * WINDOW), 1)


@lru_cache(maxsize=2)
def _order(order: Order, seed: int, epoch: int, samples: int) -> np.ndarray:
    if order == "stored":
        return np.arange(samples)
    return (chunked if order == "chunked" else rng.permutation)(seed, epoch, samples)
