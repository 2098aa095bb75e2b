"""The augmentation of the evaluation's training: whole batches, on any device.

Source: the paper's evaluation recipe: TrivialAugment (Wide), random erasing, then MixUp or CutMix. Each is
torchvision v2's definition, pixel for pixel, but batched, and with every random decision drawn from
kamim.rng: a sample is augmented alike in whatever batch it stands.
"""

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad
from torchvision.transforms.v2 import TrivialAugmentWide
from torchvision.transforms.v2 import functional as F

from kamim import rng
from kamim.batch import Batch, normalise

BINS = 31
_LIBRARY = TrivialAugmentWide(num_magnitude_bins=BINS)
_SPACE = _LIBRARY._AUGMENTATION_SPACE
OPS = tuple(_SPACE)
_REACH = 32  # the longest translation


def trivial_augment_wide(images: Tensor, seed: int, epoch: int, indices: np.ndarray) -> Tensor:
    """One operation of TrivialAugmentWide on each image (Müller & Hutter, ICCV 2021; torchvision v2's space).

    images: uint8 [B, 3, H, W]. indices: int [B], the samples' numbers in the store. Returns a new uint8
    [B, 3, H, W]: nearest sampling, black where an image has been moved away.
    """
    ops, settings = draw_operations(seed, epoch, indices)
    done: dict[int, Tensor] = {}
    for k, op in enumerate(OPS):
        rows = np.flatnonzero(ops == k)
        if len(rows):
            group, setting = torch.from_numpy(np.stack([rows, settings[rows]])).to(images.device)
            results = apply_operation(op, images.index_select(0, group), setting)
            done |= zip(rows.tolist(), results.unbind(), strict=True)
    return torch.stack([done[i] for i in range(len(images))])


def draw_operations(seed: int, epoch: int, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which operation each sample gets, 0 .. 13 as in OPS, and its setting, 0 .. 61: both int64 [B].

    Operation and magnitude bin are uniform; half the settings (see magnitudes) are the negative ones.
    """
    u = rng.units(seed, epoch, indices, rng.AUGMENT, 3)
    ops, bins = (u[:, 0] * len(OPS)).astype(np.int64), (u[:, 1] * BINS).astype(np.int64)
    return ops, bins + BINS * (u[:, 2] <= 0.5)


def magnitudes(op: str) -> list[float]:
    """The 62 settings of an operation: its 31 bins, then the same negated (as they are where it has no sign)."""
    bins_of, signed = _SPACE[op]
    bins = bins_of(BINS, 0, 0)  # the wide ranges are the same for every image size
    values = [0.0] * BINS if bins is None else bins.tolist()
    return values + ([-v for v in values] if signed else values)


def apply_operation(op: str, images: Tensor, setting: Tensor) -> Tensor:
    """One operation on n images, each at its own setting: uint8 [n, 3, H, W], int64 [n] -> uint8 [n, 3, H, W]."""
    m = torch.tensor(magnitudes(op), dtype=torch.float64, device=images.device)[setting, None, None, None]
    match op:  # m is rounded where torchvision rounds it
        case "ShearX" | "ShearY" | "Rotate":
            return _move(images, _sources(op, *images.shape[-2:], images.device).index_select(0, setting))
        case "TranslateX" | "TranslateY":
            return _translate(images, m.long(), rows=op == "TranslateY")
        case "Brightness":
            return _bytes(images.float().mul_((1 + m).float()))
        case "Color":
            return _blend(x := images.float(), _grey(x), m)
        case "Contrast":
            # The mean's sum is one of whole numbers: exact, so in any order the same, up to 65793 pixels.
            grey = _grey(x := images.float())
            return _blend(x, grey.copy_(grey.mean((-3, -2, -1), keepdim=True)), m)
        case "Sharpness":
            return _sharpness(images, m)
        case "Posterize":
            return images & (256 - 2 ** (8 - m)).to(torch.uint8)
        case "Solarize":
            x = images.short()
            below = (255 * m).float().ceil().short() - 1 - x  # negative where the value is to be inverted
            return x.bitwise_xor_(below.bitwise_right_shift_(15)).to(torch.uint8)
        case "AutoContrast":
            stretched: Tensor = F.autocontrast(images)  # each channel of each image by itself
            return stretched
        case "Equalize":
            return _equalize(images)
    return images  # Identity


@lru_cache(maxsize=6)  # three operations, two sizes
def _sources(op: str, height: int, width: int, device: torch.device) -> Tensor:
    """Where each output pixel comes from, by setting: int32 [62, H * W], 1 + the input pixel, 0 for outside.

    torchvision itself moves an image of pixel numbers, so every tie of its nearest sampling falls as there.
    Exact up to 2**24 pixels, the whole numbers of its float32.
    """
    numbers = torch.arange(1, height * width + 1, dtype=torch.float32).view(1, height, width)
    moved = [
        _LIBRARY._apply_image_or_video_transform(numbers, op, m, _LIBRARY.interpolation, _LIBRARY._fill)
        for m in magnitudes(op)
    ]
    return torch.stack(moved).to(torch.int32).flatten(1).to(device)


def _move(images: Tensor, sources: Tensor) -> Tensor:
    """uint8 [n, 3, H, W], int32 [n, H * W] as in _sources -> uint8 [n, 3, H, W]."""
    pixels = pad(images.flatten(2), (1, 0))  # pixel 0 is black
    return pixels.gather(2, sources.long()[:, None].expand(-1, 3, -1)).view_as(images)


def _translate(images: Tensor, by: Tensor, rows: bool) -> Tensor:
    """uint8 [n, 3, H, W] moved down or right by int64 [n, 1, 1, 1] pixels, as far as _REACH, on black.

    A row of the result is a stretch of memory in the images with a border: copying it takes a fifth of _move.
    """
    canvas = pad(images, (_REACH,) * 4)
    size, strides, device = images.shape, canvas.stride(), images.device
    n, c, y = (torch.arange(size[k], device=device) * strides[k] for k in range(3))
    start = n[:, None, None] + c[:, None] + y + _REACH * (strides[2] + 1) - by[..., 0] * (strides[2] if rows else 1)
    return canvas.flatten().unfold(0, size[3], 1).index_select(0, start.flatten()).view_as(images)


def _bytes(x: Tensor) -> Tensor:
    """float32 -> uint8, cut off and clipped. By way of int16: torch's direct conversion takes 5 times as long."""
    return x.to(torch.int16).clamp_(0, 255).to(torch.uint8)


def _grey(x: Tensor) -> Tensor:
    """float32 [n, 3, H, W] -> whole numbers, float32 [n, 1, H, W], with torchvision's weights and roundings."""
    return x[:, :1].mul(0.2989).add_(x[:, 1:2], alpha=0.587).add_(x[:, 2:], alpha=0.114).floor_()


def _blend(x: Tensor, other: Tensor, m: Tensor) -> Tensor:
    """(1 + m) * x - m * other: float32 [n, 3, H, W] (overwritten), float32 [n, 1, H, W] -> uint8 [n, 3, H, W].

    torchvision's add(alpha=) is a fused multiply-add where the CPU has one; so is addcmul.
    """
    ratio = 1 + m
    return _bytes(x.mul_(ratio.float()).addcmul_(other, (1 - ratio).float()))


def _sharpness(images: Tensor, m: Tensor) -> Tensor:
    """Towards or away from the 3 x 3 smoothed image, whose edge pixels stay as they are."""
    x = images.short()
    inner = x[..., 1:-1, 1:-1]
    rows = (x[..., :-2, :] + x[..., 1:-1, :]).add_(x[..., 2:, :])
    box = (rows[..., :-2] + rows[..., 1:-1]).add_(rows[..., 2:]).add_(inner, alpha=4)
    # Weights 1 1 1, 1 5 1, 1 1 1 over 13. A 13th is never half, so rounding hides the order of summation.
    smoothed = box.float().mul_(1 / 13).round_()
    inner_float = inner.float()
    inner.copy_(inner_float.addcmul_(smoothed.sub_(inner_float), (1 - (1 + m)).float()))
    return x.clamp_(0, 255).to(torch.uint8)


def _equalize(images: Tensor) -> Tensor:
    """The histogram of every channel flattened, by PIL's integer recipe as torchvision has it."""
    planes = images.flatten(2).flatten(0, 1).int()
    n, pixels = planes.shape
    planes += 256 * torch.arange(n, dtype=torch.int32, device=images.device)[:, None]  # a table of 256 for each
    counts = torch.bincount(planes.flatten(), minlength=256 * n).view(n, 256)
    up_to = counts.cumsum(1)
    brightest = counts.gather(1, up_to.argmax(1, keepdim=True))  # pixels of the greatest value there is
    step = (pixels - brightest) // 255
    table = ((up_to - counts + step // 2) // step.clamp(min=1)).clamp_(0, 255)
    table = torch.where(step > 0, table, torch.arange(256, device=images.device)).to(torch.uint8)
    return table.flatten().index_select(0, planes.flatten()).view_as(images)


def random_erasing(
    images: Tensor,
    seed: int,
    epoch: int,
    indices: np.ndarray,
    p: float = 0.5,
    scale: tuple[float, float] = (0.02, 0.33),
    ratio: tuple[float, float] = (0.3, 3.3),
) -> Tensor:
    """A box of zeros in each image with probability p (Zhong et al., AAAI 2020; torchvision v2's algorithm).

    images: [B, C, H, W] of any dtype, finite. scale: the box's share of the area. ratio: its height over its
    width. Returns a new tensor of the same shape and dtype.
    """
    u = rng.units(seed, epoch, indices, rng.ERASE, 41)
    height, width = images.shape[-2:]
    boxes = erasing_boxes(u[:, 1:].reshape(-1, 10, 4), height, width, scale, ratio)
    boxes[u[:, 0] >= p] = 0
    top, left, h, w = torch.from_numpy(boxes).to(images.device)[..., None].unbind(1)
    y, x = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    spared_rows = ((y < top) | (y >= top + h)).to(images.dtype)
    spared_columns = ((x < left) | (x >= left + w)).to(images.dtype)
    # A product: on the CPU torch multiplies bytes 40 times as fast as it fills or selects them under a mask.
    return images * torch.maximum(spared_rows[:, None, :, None], spared_columns[:, None, None, :])


def erasing_boxes(
    u: np.ndarray, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> np.ndarray:
    """The first box that fits of ten attempts: (top, left, height, width), all 0 where none fits; int64 [B, 4].

    u: float64 [B, 10, 4] in [0, 1): an attempt's area, aspect ratio, top and left. Areas are uniform, aspect
    ratios log-uniform; a box fits if it is smaller than the image both ways.
    """
    area = height * width * (scale[0] + (scale[1] - scale[0]) * u[..., 0])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = np.exp(low + (high - low) * u[..., 1])
    h, w = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    top, left = np.floor(u[..., 2] * (height - h + 1)), np.floor(u[..., 3] * (width - w + 1))
    fits = (h < height) & (w < width)
    first = np.stack([top, left, h, w], -1)[np.arange(len(u)), fits.argmax(1)]
    return np.where(np.any(fits, axis=1, keepdims=True), first, 0).astype(np.int64)


def mixup_or_cutmix(
    images: Tensor, labels: Tensor, num_classes: int, seed: int, epoch: int, step: int
) -> tuple[Tensor, Tensor]:
    """MixUp or CutMix, at even odds for the whole batch, of each sample with the one before it (the first with
    the last); alpha = 1, so the share of the sample itself is uniform in [0, 1). torchvision v2's definitions.

    images: float [B, C, H, W]. labels: int64 [B], 0 .. num_classes - 1. Returns new images and the soft
    targets, float32 [B, num_classes].
    """
    choice, share, x, y = (rng.unit(seed, epoch, step, rng.MIX, k) for k in range(4))
    others, targets = images.roll(1, 0), one_hot(labels, num_classes).float()
    if choice < 0.5:
        mixed = others.mul_(1.0 - share).add_(images * share)
    else:
        height, width = images.shape[-2:]
        r, centre_x, centre_y = 0.5 * math.sqrt(1.0 - share), int(x * width), int(y * height)
        left, right = max(centre_x - int(r * width), 0), min(centre_x + int(r * width), width)
        top, bottom = max(centre_y - int(r * height), 0), min(centre_y + int(r * height), height)
        mixed = images.clone()
        mixed[..., top:bottom, left:right] = others[..., top:bottom, left:right]
        share = 1.0 - (right - left) * (bottom - top) / (width * height)
    return mixed, targets.roll(1, 0).mul_(1.0 - share).add_(targets * share)


def probe_augment(batch: Batch, num_classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """A training batch of the evaluation: float32 [B, 3, R, R], normalised, and float32 [B, num_classes]."""
    images = batch.images.permute(0, 3, 1, 2).contiguous()
    images = trivial_augment_wide(images, seed, batch.epoch, batch.indices)
    images = random_erasing(images, seed, batch.epoch, batch.indices)
    normalised = normalise(images.permute(0, 2, 3, 1))
    return mixup_or_cutmix(normalised, batch.labels, num_classes, seed, batch.epoch, batch.step)
