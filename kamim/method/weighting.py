"""Eq. 2: keypoint counts -> density Omega -> weights W, in NumPy for tools and in torch for training."""

from typing import TYPE_CHECKING

import numpy as np

from kamim import KamimError

if TYPE_CHECKING:
    from torch import Tensor

MAX_EXPONENT = 20.0  # the released code clips Omega / T to +-20 before the exponential


def density(counts: np.ndarray, patch_size: int) -> np.ndarray:
    """Returns Omega, the share of set pixels in each w_ps x w_ps cell: counts [.., g, g] -> float32 in [0, 1]."""
    return counts.astype(np.float32) / np.float32(patch_size**2)


def weights(omega: np.ndarray, temperature: float, normalize: bool = False) -> np.ndarray:
    """Returns W = exp(Omega / T) / min over the image's cells (Eq. 2): float32 [.., g, g], at least 1.

    normalize: divide W by its mean over the image, which the paper does not; W may then be below 1. Raises KamimError
    unless temperature > 0.
    """
    _check(temperature)
    exponent = (omega.astype(np.float32) / np.float32(temperature)).clip(-MAX_EXPONENT, MAX_EXPONENT)
    w = np.exp(exponent - exponent.min(axis=(-2, -1), keepdims=True))
    return np.asarray(w / w.mean(axis=(-2, -1), keepdims=True) if normalize else w)


def keypoint_weights(counts: np.ndarray, patch_size: int, temperature: float, normalize: bool = False) -> np.ndarray:
    """Returns W, float32 [.., g, g], of cell counts [.., g, g] (any integer dtype)."""
    return weights(density(counts, patch_size), temperature, normalize)


def counts_to_weights(counts: "Tensor", patch_size: int, temperature: float, normalize: bool = False) -> "Tensor":
    """Computes keypoint_weights in torch, on the device of the counts."""
    _check(temperature)
    exponent = (counts.float() / patch_size**2 / temperature).clamp(-MAX_EXPONENT, MAX_EXPONENT)
    w = (exponent - exponent.amin(dim=(-2, -1), keepdim=True)).exp()
    return w / w.mean(dim=(-2, -1), keepdim=True) if normalize else w


def _check(temperature: float) -> None:
    if not temperature > 0:
        raise KamimError(f"temperature = {temperature}: must be greater than 0")
