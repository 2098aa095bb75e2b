"""Crop, bilinear resize and flips of one image, in one pass without the GIL."""

import numpy as np
from numba import njit

_BITS = 11  # weights are whole 1/2048, as in OpenCV's INTER_LINEAR; two passes stay below 2**31


@njit(cache=True, nogil=True)
def _taps(length, out_length, flip, first, second, weight, pitch):
    """For each output coordinate: offsets of its two source samples and the weight of the second.

    Half-pixel centres (o + 1/2) * length / out_length - 1/2, clamped to the crop: torch's antialias=False.
    """
    scale = length / out_length
    for o in range(out_length):
        source = min(max((o + 0.5) * scale - 0.5, 0.0), length - 1.0)
        at = min(int(source), max(length - 2, 0))
        to = out_length - 1 - o if flip else o
        first[to] = at * pitch
        second[to] = min(at + 1, length - 1) * pitch
        weight[to] = int(np.rint((source - at) * (1 << _BITS)))


@njit(cache=True, nogil=True)
def crop_resize(image, box, flip_v, flip_h, out):
    """Writes the crop `box` = (top, left, height, width) of image (uint8 [H, W, 3]), resized and flipped, to out.

    out: uint8 [R, R, 3]. Equal to cropping, torchvision's resize with antialias=False, then the flips, to
    within one grey level.
    """
    top, left, height, width = box
    rows, columns = out.shape[0], out.shape[1]
    taps = np.empty((6, max(rows, columns)), np.int32)
    y0, y1, wy, x0, x1, wx = taps[0], taps[1], taps[2], taps[3], taps[4], taps[5]
    _taps(height, rows, flip_v, y0, y1, wy, 1)
    _taps(width, columns, flip_h, x0, x1, wx, 3)
    one = np.int32(1 << _BITS)
    half = np.int32(1 << (2 * _BITS - 1))
    blend = np.empty(3 * width, np.int32)
    flat = image.reshape(image.shape[0], image.shape[1] * 3)
    for y in range(rows):
        upper = flat[top + y0[y], 3 * left : 3 * (left + width)]
        lower = flat[top + y1[y], 3 * left : 3 * (left + width)]
        b = wy[y]
        a = one - b
        for i in range(3 * width):  # contiguous, so the compiler vectorises it
            blend[i] = upper[i] * a + lower[i] * b
        for x in range(columns):
            i, j, v = x0[x], x1[x], wx[x]
            u = one - v
            out[y, x, 0] = (blend[i] * u + blend[j] * v + half) >> 22
            out[y, x, 1] = (blend[i + 1] * u + blend[j + 1] * v + half) >> 22
            out[y, x, 2] = (blend[i + 2] * u + blend[j + 2] * v + half) >> 22
