"""Stochastic depth (Huang et al. 2016): in training, a block's residual branches are dropped for some of the samples.

timm's DropPath draws from torch's generator for a whole micro-batch, so what is dropped depends on the size of
micro-batches and on the number of ranks. Here every draw is a function of (seed, epoch, index, block, branch).
"""

import numpy as np
import torch
from timm.layers import DropPath as TimmDropPath
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from kamim.method import rng
from pipelines.batch import upload

BRANCHES = ("drop_path1", "drop_path2")  # of a timm block: attention, MLP


class DropPath(nn.Module):
    """Multiplies each sample's residual branch by 0 with probability `rate`, otherwise by 1 / (1 - rate).

    draw: the number of its random draw, 2 * block + branch, both counted from 0. draw_paths sets the factors before
    every training batch. In evaluation mode the branch passes unchanged.
    """

    def __init__(self, rate: float, draw: int):
        super().__init__()
        self.rate = rate
        self.draw = draw
        self.factors: Tensor | None = None  # float32 [B], for the next batch

    def forward(self, branch: Tensor) -> Tensor:
        """Scales the branch, float [B, ...], sample by sample; returns the same shape and dtype."""
        if not self.training:
            return branch
        assert self.factors is not None and len(self.factors) == len(branch), "call draw_paths before every batch"
        return branch * self.factors.to(branch.dtype).view(-1, *(1,) * (branch.ndim - 1))


def replace_drop_paths(encoder: VisionTransformer | SwinTransformer) -> None:
    """Replaces every DropPath of timm's by one of ours, which keeps its rate: linear from 0 at the first block."""
    stages = encoder.layers if isinstance(encoder, SwinTransformer) else [encoder]
    blocks = [block for stage in stages for block in stage.blocks]
    for number, block in enumerate(blocks):
        for branch, name in enumerate(BRANCHES):
            if isinstance(timms := getattr(block, name), TimmDropPath):
                setattr(block, name, DropPath(timms.drop_prob, len(BRANCHES) * number + branch))
    assert not any(isinstance(module, TimmDropPath) for module in encoder.modules())


def draw_paths(network: nn.Module, seed: int, epoch: int, indices: np.ndarray, device: torch.device) -> None:
    """Sets the factors of every DropPath in `network` for a batch of the samples `indices` (int64 [B]) in `epoch`."""
    paths = [module for module in network.modules() if isinstance(module, DropPath)]
    if not paths:
        return
    units = rng.units(seed, epoch, indices, rng.DROP_PATH, 1 + max(path.draw for path in paths))
    rates = np.array([path.rate for path in paths])
    factors = (units[:, [path.draw for path in paths]] >= rates) / (1 - rates)
    for path, factor in zip(paths, upload(factors.T.astype(np.float32, order="C"), device), strict=True):
        path.factors = factor
