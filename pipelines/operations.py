"""TrivialAugmentWide's operations on one image, in place, while it is in the processor's cache and without the GIL.

Source: Müller & Hutter, ICCV 2021, as torchvision v2 defines and rounds it, bit for bit. The effect of a setting on a
value, or on the positions of pixels, is computed by torchvision itself, once.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numba.extending import intrinsic
from torch import Tensor
from torchvision.transforms.v2 import TrivialAugmentWide

from kamim.method.kernels import kernel

OPS = (
    "Identity",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
    "Brightness",
    "Color",
    "Contrast",
    "Sharpness",
    "Posterize",
    "Solarize",
    "AutoContrast",
    "Equalize",
)
BINS = 31
_IDENTITY, _ROTATE, _COLOR, _CONTRAST, _SHARPNESS, _AUTOCONTRAST, _EQUALIZE = 0, 5, 7, 8, 9, 12, 13
_MOVES, _MAPS, _MIXES = OPS[1:6], ("Brightness", "Posterize", "Solarize"), ("Color", "Contrast", "Sharpness")
_LIBRARY = TrivialAugmentWide(num_magnitude_bins=BINS)
_RED, _GREEN, _BLUE = np.float32(0.2989), np.float32(0.587), np.float32(0.114)  # torchvision's weights of grey


class Tables(NamedTuple):
    """Lookup tables of the operations for images of H x W px, by setting (see magnitudes).

    moves: int32 [5, 62, H * W], of each operation that moves pixels: 1 + the input pixel of each output pixel, 0 for
    outside. maps: uint8 [14, 62, 256], of Brightness, Posterize and Solarize: the new value of a value. factors:
    float32 [62, 2], of Color, Contrast and Sharpness: 1 + the magnitude, the image's own; 1 - that, the other image's.
    """

    moves: np.ndarray
    maps: np.ndarray
    factors: np.ndarray


@lru_cache(maxsize=2)
def tables(height: int, width: int) -> Tables:
    """Computes the Tables, exact up to 2**24 pixels, the whole numbers of a float32."""
    numbers = torch.arange(1, height * width + 1, dtype=torch.float32).view(1, height, width)
    moves = [[_of_torchvision(op, m, numbers).int().flatten() for m in magnitudes(op)] for op in _MOVES]
    values, maps = torch.arange(256, dtype=torch.uint8).view(1, 16, 16), np.zeros((len(OPS), 2 * BINS, 256), np.uint8)
    for op in _MAPS:
        maps[OPS.index(op)] = [_of_torchvision(op, m, values).flatten().numpy() for m in magnitudes(op)]
    own = 1 + np.array(magnitudes("Color"))
    factors = np.stack([own, 1 - own], 1).astype(np.float32)
    return Tables(torch.stack([torch.stack(rows) for rows in moves]).numpy(), maps, factors)


def magnitudes(op: str) -> list[float]:
    """Returns an operation's 62 settings: its 31 bins, then their negatives (or the same, if it has no sign)."""
    bins_of, signed = _LIBRARY._AUGMENTATION_SPACE[op]
    bins = bins_of(BINS, 0, 0)  # the wide ranges are the same for every image size
    values = [0.0] * BINS if bins is None else bins.tolist()
    return values + ([-v for v in values] if signed else values)


def _of_torchvision(op: str, magnitude: float, image: Tensor) -> Tensor:
    moved: Tensor = _LIBRARY._apply_image_or_video_transform(
        image, op, magnitude, _LIBRARY.interpolation, _LIBRARY._fill
    )
    return moved


@kernel
def apply_operation(image, op, setting, tables):
    """Applies operation `op` of OPS with a setting, 0 .. 61, to uint8 [H, W, 3], contiguous, in place."""
    if op == _IDENTITY:
        return
    if op <= _ROTATE:
        _move(image, tables.moves[op - 1, setting])
    elif op == _COLOR:
        _color(image, tables.factors[setting])
    elif op == _CONTRAST:
        _contrast(image, tables.factors[setting])
    elif op == _SHARPNESS:
        _sharpness(image, tables.factors[setting])
    elif op == _AUTOCONTRAST:
        _autocontrast(image)
    elif op == _EQUALIZE:
        _equalize(image)
    else:
        table = tables.maps[op, setting]
        _map(image, table, table, table)


# Flat indices below, since the compiler vectorises them, but not those of [pixels, 3].


@kernel
def _move(image, sources):
    out = image.reshape(-1)
    pixels = np.zeros(out.size + 3, np.uint8)  # pixel 0 is black
    pixels[3:] = out
    for i in range(len(sources)):
        at = np.uint64(3) * np.uint64(sources[i])  # unsigned: no test for negative indices
        out[3 * i] = pixels[at]
        out[3 * i + 1] = pixels[at + np.uint64(1)]
        out[3 * i + 2] = pixels[at + np.uint64(2)]


@kernel
def _map(image, red, green, blue):
    """Maps each value to its entry in the table of its channel, uint8 [256]."""
    x = image.reshape(-1)
    for i in range(x.size // 3):
        x[3 * i] = red[x[3 * i]]
        x[3 * i + 1] = green[x[3 * i + 1]]
        x[3 * i + 2] = blue[x[3 * i + 2]]


@intrinsic
def _fma(typing, a, b, c):
    """Returns a * b + c of float32, rounded once, as torch's add(alpha=) does if the CPU has it."""
    return a(a, b, c), lambda context, builder, signature, arguments: builder.fma(*arguments)


@kernel
def _byte(x):
    """Truncates and clips a float32 of less than 2**31."""
    return np.uint8(min(max(np.int32(x), np.int32(0)), np.int32(255)))


@kernel
def _grey(red, green, blue):
    """Returns grey as float32 whole numbers, with torchvision's weights and roundings."""
    return np.floor(_fma(blue, _BLUE, _fma(green, _GREEN, red * _RED)))


@kernel
def _color(image, factors):
    """Blends the image with its grey version."""
    own, other = factors
    x = image.reshape(-1)
    for i in range(x.size // 3):
        red, green, blue = np.float32(x[3 * i]), np.float32(x[3 * i + 1]), np.float32(x[3 * i + 2])
        grey = _grey(red, green, blue)
        x[3 * i] = _byte(_fma(grey, other, red * own))
        x[3 * i + 1] = _byte(_fma(grey, other, green * own))
        x[3 * i + 2] = _byte(_fma(grey, other, blue * own))


@kernel
def _contrast(image, factors):
    """Blends the image with its mean grey, whose sum is exact; torchvision's is, too, up to 65793 pixels."""
    own, other = factors
    x, total = image.reshape(-1), np.int64(0)
    for i in range(x.size // 3):
        total += np.int32(_grey(np.float32(x[3 * i]), np.float32(x[3 * i + 1]), np.float32(x[3 * i + 2])))
    mean = np.float32(total) / np.float32(x.size // 3)
    table = np.empty(256, np.uint8)
    for value in range(256):
        table[value] = _byte(_fma(mean, other, np.float32(value) * own))
    _map(image, table, table, table)


@kernel
def _sharpness(image, factors):
    """Blends the image with its 3 x 3 smoothed version, whose edge pixels are unchanged."""
    height, length, other = image.shape[0], 3 * image.shape[1], factors[1]
    rows, out = image.copy().reshape(height, length), image.reshape(height, length)
    column = np.empty(length, np.int32)
    for y in range(1, height - 1):
        upper, middle, lower, result = rows[y - 1], rows[y], rows[y + 1], out[y]
        for i in range(length):
            column[i] = np.int32(upper[i]) + np.int32(middle[i]) + np.int32(lower[i])
        for i in range(length - 6):
            x = np.float32(middle[i + 3])
            # Weights 1 1 1, 1 5 1, 1 1 1 over 13, rounded; a 13th is never half.
            box = column[i] + column[i + 3] + column[i + 6] + 4 * np.int32(middle[i + 3])
            result[i + 3] = _byte(_fma(np.float32(np.uint32(box + 6) // np.uint32(13)) - x, other, x))


@kernel
def _autocontrast(image):
    """Stretches each channel to 0 .. 255."""
    counts, table = _counts(image), np.empty((3, 256), np.uint8)
    for c in range(3):
        values = np.flatnonzero(counts[c])
        low, step = np.float32(values[0]), np.float32(values[-1] - values[0]) * np.float32(1 / 255)
        for value in range(256):
            table[c, value] = _byte((np.float32(value) - low) / step) if step else value
    _map(image, table[0], table[1], table[2])


@kernel
def _equalize(image):
    """Equalises the histogram of each channel, by PIL's integer recipe as in torchvision."""
    counts, table = _counts(image), np.empty((3, 256), np.uint8)
    for c in range(3):
        brightest = counts[c, np.flatnonzero(counts[c])[-1]]  # pixels of the greatest value that occurs
        step = (image.size // 3 - brightest) // 255
        below = 0
        for value in range(256):
            table[c, value] = min((below + step // 2) // step, 255) if step else value
            below += counts[c, value]
    _map(image, table[0], table[1], table[2])


@kernel
def _counts(image):
    """Returns how often each value occurs in each channel: int64 [3, 256]."""
    x, counts = image.reshape(-1), np.zeros((3, 256), np.int64)
    for i in range(x.size // 3):
        counts[0, x[3 * i]] += 1
        counts[1, x[3 * i + 1]] += 1
        counts[2, x[3 * i + 2]] += 1
    return counts
