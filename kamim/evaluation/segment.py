"""The linear probe of semantic segmentation: batch norm and a 1x1 layer on the patch tokens of a frozen encoder.

Source: DINOv3 (Siméoni et al. 2025), `dinov3/eval/segmentation`; docs/evaluation.md lists the differences.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from torchmetrics.classification import MulticlassConfusionMatrix

from kamim.config.pretrain import Compute
from kamim.evaluation.mask_folder import UNLABELLED
from kamim.evaluation.results import Segmentation
from kamim.models.readout import Encoder, token_map
from kamim.runtime.device import autocast, should_compile
from kamim.runtime.distributed import World
from kamim.training.trainer import Losses
from pipelines.batch import Batch, normalise

STRIP_VALUES = 1 << 24  # logits that are upsampled at once


class FrozenTokens:
    """Maps images to a frozen encoder's patch tokens, float32 [B, D, g, g] (kamim.models.readout.token_map)."""

    def __init__(self, encoder: Encoder, block: int, compute: Compute, device: torch.device):
        self._encoder = encoder.to(device).eval().requires_grad_(False)
        self._block = block
        self._read = torch.compile(self._tokens) if should_compile(compute, device) else self._tokens

    def _tokens(self, images: Tensor) -> Tensor:
        return token_map(self._encoder, images, self._block)

    def __call__(self, images: Tensor) -> Tensor:
        """Maps images, float [B, 3, R, R], normalised, to tokens, in the precision of the surrounding autocast."""
        with torch.no_grad():
            return self._read(images).float()


class SegmentationHead(nn.Module):
    """Batch norm and a 1x1 convolution, with initial weights of normal deviation 0.01 and initial biases of 0."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, classes, kernel_size=1)
        nn.init.normal_(self.conv.weight, std=0.01)
        assert self.conv.bias is not None
        nn.init.zeros_(self.conv.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps float32 [B, D, g, g] to logits float32 [B, classes, g, g], outside of autocast."""
        with torch.autocast(tokens.device.type, enabled=False):
            logits: Tensor = self.conv(self.norm(tokens))
        return logits


@dataclass
class PixelCrossEntropy:
    """The cross entropy of upsampled logits: an objective of the Trainer.

    It is the mean over all pixels, and a pixel without a class counts 0, as in DINOv3; so the contribution of a
    micro-batch to a step does not depend on how many of its pixels have a class.
    """

    network: nn.Module
    read: FrozenTokens
    compute: Compute

    def __call__(self, batch: Batch) -> Losses:
        """Returns the loss of a micro-batch with labels int64 [B, R, R]."""
        with autocast(self.compute, batch.images.device):
            tokens = self.read(normalise(batch.images))
        logits = interpolate(self.network(tokens), batch.labels.shape[1:], mode="bilinear")
        losses = cross_entropy(logits, batch.labels, ignore_index=UNLABELLED, reduction="sum")
        return Losses(losses / batch.labels.numel())


class Masks(Protocol):
    """The truth of every sample, at its own size."""

    def mask(self, index: int) -> np.ndarray:
        """Returns int16 [H, W], -1 for pixels without a class."""
        ...


def measure(
    head: nn.Module, read: FrozenTokens, batches: Iterable[Batch], masks: Masks, classes: int, world: World
) -> Tensor:
    """Returns the confusion matrix of all ranks' pixels, int64 [classes, classes]: true class, predicted class.

    Logits of whole images, in fp32, are upsampled to the size of the mask.
    """
    head.eval()
    for buffer in head.buffers():  # every rank has a batch norm's statistics of its own samples
        world.broadcast(buffer)
    confusion = MulticlassConfusionMatrix(classes, ignore_index=UNLABELLED, validate_args=False).to(world.device)
    for batch in batches:
        if len(batch) == 0:  # a rank may have no samples of a short last step
            continue
        with torch.no_grad():
            logits = head(read(normalise(batch.images)))
        for scores, index in zip(logits, batch.indices.tolist(), strict=True):
            truth = torch.from_numpy(masks.mask(index))
            for rows, predicted in predictions(scores, (truth.shape[0], truth.shape[1])):
                confusion.update(predicted, truth[rows].long().to(world.device))
    return confusion.compute()


def predictions(logits: Tensor, size: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
    """Yields (rows, the class of their pixels int64 [n, W]) of an image of `size` (height, width), strip by strip.

    logits: float32 [classes, g, g], upsampled bilinearly with half-pixel centres, torch's align_corners=False. Strips
    keep the memory small, which whole images of many classes would exceed.
    """
    height, width = size
    upper, lower, down = _neighbours(logits.shape[1], height, logits.device)
    left, right, across = _neighbours(logits.shape[2], width, logits.device)
    step = max(STRIP_VALUES // (len(logits) * width), 1)
    for at in range(0, height, step):
        rows = slice(at, min(at + step, height))
        strip = torch.lerp(logits[:, upper[rows]], logits[:, lower[rows]], down[rows, None])
        yield rows, torch.lerp(strip[:, :, left], strip[:, :, right], across).argmax(dim=0)


def _neighbours(length: int, out_length: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Returns an output sample's two source samples and the second's weight: int64, int64, float32 [out_length]."""
    at = (torch.arange(out_length, dtype=torch.float64) + 0.5) * (length / out_length) - 0.5
    at = at.clamp(0, length - 1)
    first = at.long()
    second = (first + 1).clamp(max=length - 1)
    return first.to(device), second.to(device), (at - first).float().to(device)


def segmentation(confusion: Tensor, classes: tuple[str, ...], ignored: int) -> Segmentation:
    """Returns intersection over union by class, and its mean over the classes in the truth or a prediction.

    confusion: from measure. ignored: the index of a class that is excluded; none if it is not a class.
    """
    counts = confusion.double().cpu()
    right = counts.diag()
    union = counts.sum(0) + counts.sum(1) - right
    shares = (100 * right / union).tolist()
    iou = {
        name: share if count > 0 and index != ignored else None
        for index, (name, share, count) in enumerate(zip(classes, shares, union.tolist(), strict=True))
    }
    occurring = [share for share in iou.values() if share is not None]
    mean = sum(occurring) / max(len(occurring), 1)
    return Segmentation(mean, 100 * float(right.sum() / counts.sum().clamp(min=1)), iou)
