"""Eq. 2: keypoint counts -> density Omega -> weights W, on whatever device the counts are on."""

import torch
from torch import Tensor

MAX_EXPONENT = 20.0  # the released code clips Omega / T to +-20 before the exponential


def density(counts: Tensor, patch_size: int) -> Tensor:
    """Omega: the share of map pixels set in each w_ps x w_ps cell. counts [.., g, g] -> float32 in [0, 1]."""
    return counts.to(torch.float32) / patch_size**2


def weights(omega: Tensor, temperature: float) -> Tensor:
    """W = exp(Omega / T) / min over the image's cells (Eq. 2): [.., g, g] float32, smallest weight of an image 1.

    Raises ValueError unless temperature > 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature = {temperature}: must be greater than 0")
    exponent = (omega.to(torch.float32) / temperature).clamp(-MAX_EXPONENT, MAX_EXPONENT)
    return torch.exp(exponent - exponent.amin(dim=(-2, -1), keepdim=True))


def counts_to_weights(counts: Tensor, patch_size: int, temperature: float, normalize: bool = False) -> Tensor:
    """Cell counts [.., g, g] (any integer dtype) -> W [.., g, g] float32; normalize: divided by the image's mean W."""
    made = weights(density(counts, patch_size), temperature)
    return made / made.mean(dim=(-2, -1), keepdim=True) if normalize else made
