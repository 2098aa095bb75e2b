"""The two resizing methods of preprocessing: one for stored images, one for the frames of keypoint detection.

Stored images are downsampled with antialiasing, so that crops of them look like torchvision's antialiased crops of
the original. Frames are downsampled without it, because the released code detects keypoints on crops that are
resized without it, and FAST in particular finds fewer keypoints on smoother pixels.
"""

import cv2
import numpy as np

from kamim.method.kernels import bare_kernel, kernel

REACH = 2  # source pixels on either side that the bicubic kernel reaches, at scale 1


def resize_plain(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes uint8 [H, W, 3] to size (height, width): bilinear without antialiasing, as the released code does."""
    if pixels.shape[:2] == size:
        return pixels
    return cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_LINEAR)


def resize_antialiased(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes uint8 [H, W, 3] to size (height, width): bicubic with antialiasing.

    The filter is Pillow's and torchvision's (Keys' cubic, a = -0.5, stretched by the scale if it shrinks); the sum is
    rounded once, at the end, whereas Pillow also rounds between the two directions.
    """
    if pixels.shape[:2] == size:
        return pixels
    return _bicubic(np.ascontiguousarray(pixels), *size)


@kernel
def _cubic(x):
    """Evaluates Keys' cubic convolution kernel with a = -0.5."""
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    if x < 2:
        return ((-0.5 * x + 2.5) * x - 4) * x + 2
    return 0.0


@kernel
def _taps(length, out_length):
    """Returns the source samples of each output sample: first, count int64 [n], weights float32 [n, most]."""
    scale = length / out_length
    stretch = max(scale, 1.0)
    first, count = np.empty(out_length, np.int64), np.empty(out_length, np.int64)
    weights = np.zeros((out_length, 2 * int(np.ceil(REACH * stretch)) + 1), np.float32)
    for o in range(out_length):
        centre = (o + 0.5) * scale
        first[o] = max(int(centre - REACH * stretch + 0.5), 0)
        count[o] = min(int(centre + REACH * stretch + 0.5), length) - first[o]
        total = 0.0
        for k in range(count[o]):
            total += _cubic((first[o] + k - centre + 0.5) / stretch)
        for k in range(count[o]):
            weights[o, k] = _cubic((first[o] + k - centre + 0.5) / stretch) / total
    return first, count, weights


@bare_kernel
def _weighted_sum(rows, first, count, weights, out):
    """Writes the sum of weights[k] * rows[first + k], k < count, to out, float32 [n]."""
    out[:] = 0
    for k in range(count):
        weight, row = weights[k], rows[first + k]
        for i in range(len(out)):
            out[i] += weight * np.float32(row[i])


@kernel
def _bicubic(pixels, height, width):
    """Resizes the height, then the width. Transposing in between makes both add whole rows, which vectorises."""
    source_height, source_width = pixels.shape[0], pixels.shape[1]
    first, count, weights = _taps(source_height, height)
    rows, row = pixels.reshape(source_height, 3 * source_width), np.empty(3 * source_width, np.float32)
    turned = np.empty((source_width, 3 * height), np.float32)
    for y in range(height):
        _weighted_sum(rows, first[y], count[y], weights[y], row)
        for x in range(source_width):
            for c in range(3):
                turned[x, 3 * y + c] = row[3 * x + c]
    first, count, weights = _taps(source_width, width)
    column, levels = np.empty(3 * height, np.float32), np.empty(3 * height, np.uint8)
    out = np.empty((height, width, 3), np.uint8)
    for x in range(width):
        _weighted_sum(turned, first[x], count[x], weights[x], column)
        for i in range(3 * height):
            levels[i] = np.uint8(min(max(column[i] + np.float32(0.5), np.float32(0)), np.float32(255)))
        for y in range(height):
            for c in range(3):
                out[y, x, c] = levels[3 * y + c]
    return out
