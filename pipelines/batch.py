"""The batches that the loader passes to a training loop."""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Batch:
    """B samples: a micro-batch of one rank's part of an optimiser step; empty if a short step has none for the rank.

    images: uint8 [B, R, R, 3] RGB. counts: int16 [B, g, g], pixels of the keypoint map F set in each
    w_ps x w_ps cell, or None without weights. labels: int64 [B], -1 without labels; or int64 [B, R, R],
    a class for every pixel, -1 without one.
    indices: int64 [B] on the CPU, the samples' numbers in the store; with `epoch` and the seed they name
    every random draw made for the batch. step: the optimiser step since the start of the run; last: whether
    this micro-batch ends it on this rank; loss_weight: its planned samples over those of the step on all ranks,
    so that a step's loss is the sum of loss_weight * mean over its micro-batches. If a loader leaves out a damaged
    sample, the others of its micro-batch weigh more.

    A loader may reuse the memory of a batch once the next one has been requested; `clone` keeps it.
    """

    images: Tensor
    counts: Tensor | None
    labels: Tensor
    indices: np.ndarray
    epoch: int
    step: int
    last: bool
    loss_weight: float

    def __len__(self) -> int:
        return len(self.indices)

    def stand_in(self) -> "Batch":
        """Returns one black sample with a loss_weight of 0, for a rank that a short step leaves without samples."""
        return replace(
            self,
            images=self.images.new_zeros(1, *self.images.shape[1:]),
            counts=None if self.counts is None else self.counts.new_zeros(1, *self.counts.shape[1:]),
            labels=self.labels.new_full((1, *self.labels.shape[1:]), -1),
            indices=np.zeros(1, np.int64),
            loss_weight=0.0,
        )

    def clone(self) -> "Batch":
        """Returns a copy of the batch in memory of its own."""
        return replace(
            self,
            images=self.images.clone(),
            counts=None if self.counts is None else self.counts.clone(),
            labels=self.labels.clone(),
        )

    def to(self, device: torch.device) -> "Batch":
        """Returns the same batch with its tensors on `device` (without blocking if the memory is pinned)."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=True),
            counts=None if self.counts is None else self.counts.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
        )


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """Returns the array on `device`; on a GPU the copy is queued and does not synchronise."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def normalise(images: Tensor) -> Tensor:
    """Normalises uint8 [B, H, W, 3] by ImageNet's mean and standard deviation to float32 [B, 3, H, W], contiguous."""
    mean, std = (values[:, None, None] for values in _statistics(images.device))
    planes = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return planes.sub_(mean).div_(std)


def denormalise(images: Tensor) -> Tensor:
    """Returns the inverse of normalise, rounded and clipped: float [B, 3, H, W] -> uint8 [B, H, W, 3]."""
    mean, std = _statistics(images.device)
    return (images.permute(0, 2, 3, 1) * std + mean).round().clamp(0, 255).to(torch.uint8)


@lru_cache
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns ImageNet's mean and deviation of 0 .. 255, cached since a copy to a GPU waits for all its work."""
    return torch.tensor(IMAGENET_MEAN, device=device) * 255, torch.tensor(IMAGENET_STD, device=device) * 255
