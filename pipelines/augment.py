"""The augmentation of the evaluation's training: TrivialAugment (Wide), random erasing, then MixUp or CutMix.

Source: the paper's evaluation recipe. Every part follows torchvision v2's definition, pixel for pixel. The loader's
threads augment a chunk of images in one compiled call; batches are mixed on their device. Every random
decision is drawn from kamim.method.rng, so the augmentation of a sample does not depend on its batch.
"""

import math

import numpy as np
from torch import Tensor
from torch.nn.functional import one_hot

from kamim.method import rng
from kamim.method.kernels import kernel
from pipelines.batch import Batch, normalise
from pipelines.operations import BINS, OPS, apply_operation, tables

ERASE_P, ERASE_SCALE, ERASE_RATIO = 0.5, (0.02, 0.33), (0.3, 3.3)  # probability; share of the area; height / width
ERASE_ATTEMPTS = 10  # torchvision's RandomErasing
_COUNT = len(OPS)


class Augment:
    """Applies TrivialAugmentWide and random erasing to images of resolution x resolution px, in any thread.

    One compiled call changes any number of images, without the GIL.
    """

    def __init__(self, resolution: int):
        self._tables = tables(resolution, resolution)

    def __call__(self, images: np.ndarray, seed: int, epoch: int, indices: np.ndarray) -> None:
        """Changes the images of samples `indices` (int64 [n]), uint8 [n, R, R, 3], in place."""
        _augment(images, seed, epoch, indices, self._tables)


@kernel
def _augment(images, seed, epoch, indices, tables):
    for i in range(len(images)):
        image, index = images[i], indices[i]
        op, setting = draw_operation(seed, epoch, index)
        apply_operation(image, op, setting, tables)
        if rng.unit(seed, epoch, index, rng.ERASE, 0) < ERASE_P:
            top, left, h, w = erasing_box(image.shape[0], image.shape[1], ERASE_SCALE, ERASE_RATIO, seed, epoch, index)
            image[top : top + h, left : left + w] = 0


@kernel
def draw_operation(seed, epoch, index):
    """Returns the operation of a sample, 0 .. 13 as in OPS, and its setting, 0 .. 61 (see operations.magnitudes).

    Operation and magnitude bin are uniform; half the settings are the negative ones (stream AUGMENT, draws 0, 1, 2).
    """
    op = int(rng.unit(seed, epoch, index, rng.AUGMENT, 0) * _COUNT)
    setting = int(rng.unit(seed, epoch, index, rng.AUGMENT, 1) * BINS)
    return op, setting + BINS if rng.unit(seed, epoch, index, rng.AUGMENT, 2) <= 0.5 else setting


@kernel
def erasing_box(height, width, scale, ratio, seed, epoch, index):
    """Returns RandomErasing's box (top, left, height, width) (Zhong et al., AAAI 2020; torchvision v2 make_params).

    It is the first of ten attempts that is smaller than the image both ways, or all 0 if none is. Areas are uniform in
    scale, shares of the image's; aspect ratios, height / width, log-uniform in ratio. Draws 4k + 1 .. 4k + 4 of stream
    ERASE are attempt k's area, aspect ratio, top and left.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for draw in range(1, 4 * ERASE_ATTEMPTS, 4):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * rng.unit(seed, epoch, index, rng.ERASE, draw))
        aspect = math.exp(low + (high - low) * rng.unit(seed, epoch, index, rng.ERASE, draw + 1))
        h, w = int(np.rint(math.sqrt(area * aspect))), int(np.rint(math.sqrt(area / aspect)))
        if h < height and w < width:
            top = int(rng.unit(seed, epoch, index, rng.ERASE, draw + 2) * (height - h + 1))
            left = int(rng.unit(seed, epoch, index, rng.ERASE, draw + 3) * (width - w + 1))
            return top, left, h, w
    return 0, 0, 0, 0


def mixup_or_cutmix(
    images: Tensor, labels: Tensor, num_classes: int, seed: int, epoch: int, step: int
) -> tuple[Tensor, Tensor]:
    """Applies MixUp or CutMix, at even odds for the whole batch, to each sample and the one before it (the first and
    the last); alpha = 1, so lam, the weight of the sample itself, is uniform in [0, 1). torchvision v2's definitions,
    MixUp to within rounding.

    images: float [B, C, H, W]. labels: int64 [B], 0 .. num_classes - 1. Returns new images and the soft
    targets, float32 [B, num_classes].
    """
    choice, lam, x, y = (rng.unit(seed, epoch, step, rng.MIX, k) for k in range(4))
    targets = one_hot(labels, num_classes).float()
    if choice < 0.5:
        mixed = images.roll(1, 0).lerp_(images, lam)
    else:
        height, width = images.shape[-2:]
        r, centre_x, centre_y = 0.5 * math.sqrt(1.0 - lam), int(x * width), int(y * height)
        left, right = max(centre_x - int(r * width), 0), min(centre_x + int(r * width), width)
        top, bottom = max(centre_y - int(r * height), 0), min(centre_y + int(r * height), height)
        mixed = images.clone()
        mixed[..., top:bottom, left:right] = images[..., top:bottom, left:right].roll(1, 0)
        lam = 1.0 - (right - left) * (bottom - top) / (width * height)
    return mixed, targets.roll(1, 0).mul_(1.0 - lam).add_(targets * lam)


def mixed_batch(batch: Batch, num_classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Returns a mixed training batch of the evaluation: normalised [B, 3, R, R] and float32 [B, num_classes]."""
    return mixup_or_cutmix(normalise(batch.images), batch.labels, num_classes, seed, batch.epoch, batch.step)
