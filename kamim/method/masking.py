"""SimMIM's masks: a fixed number of whole blocks per image."""

import math
from typing import TYPE_CHECKING

import numpy as np

from kamim.method import rng
from kamim.method.kernels import kernel

if TYPE_CHECKING:
    from torch import Tensor


def masked_count(grid: int, ratio: float) -> int:
    """Returns how many of grid * grid blocks are masked: ceil(ratio * blocks), as in SimMIM."""
    return math.ceil(grid * grid * ratio)


@kernel
def _shuffle_masks(masks, seed, epoch, indices, count):
    blocks = masks.shape[1]
    order = np.empty(blocks, np.int64)
    for row in range(len(indices)):
        order[:] = np.arange(blocks)
        for i in range(count):  # the first `count` steps of Fisher-Yates
            j = i + int(rng.unit(seed, epoch, indices[row], rng.MASK, i) * (blocks - i))
            order[i], order[j] = order[j], order[i]
            masks[row, order[i]] = True


def block_masks(seed: int, epoch: int, indices: np.ndarray, grid: int, ratio: float) -> np.ndarray:
    """Returns the masks of the samples `indices` in `epoch`: bool [B, grid, grid], True = masked (M in Eq. 1 and 3).

    Exactly masked_count(grid, ratio) blocks of every image are masked, uniformly among all such choices.
    """
    masks = np.zeros((len(indices), grid * grid), np.bool_)
    _shuffle_masks(masks, seed, epoch, np.asarray(indices, np.int64), masked_count(grid, ratio))
    return masks.reshape(-1, grid, grid)


def expand_mask(mask: "Tensor", side: int) -> "Tensor":
    """Repeats every value of [B, g, g] over its block: [B, side, side]. side is a multiple of g."""
    factor = side // mask.shape[-1]
    assert factor * mask.shape[-1] == side, (mask.shape, side)
    return mask.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)
