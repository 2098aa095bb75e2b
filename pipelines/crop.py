"""Crop, bilinear resize and flips of one image, in one pass without the GIL.

A pixel is one 64-bit word of three 21-bit lanes, so that a multiplication weighs its three channels at once.
Vertical weights have 11 bits and leave 5 bits of fraction; horizontal weights have 8: 8 + 5 + 8 = 21.
"""

import numpy as np
from numba import njit

_LANE = 21
_BYTE = (np.uint64(0xFF), np.uint64(0xFF00), np.uint64(0xFF0000))
_SPREAD = (np.uint64(_LANE - 8), np.uint64(2 * (_LANE - 8)))
_LOW_13 = np.uint64(0x1FFF * (1 + (1 << _LANE) + (1 << 2 * _LANE)))
_HALF = np.uint64((1 << 12) * (1 + (1 << _LANE) + (1 << 2 * _LANE)))
_OUT = (np.uint64(13), np.uint64(_LANE + 13), np.uint64(2 * _LANE + 13))
_VERTICAL, _HORIZONTAL = 11, 8  # bits of the weights


@njit(cache=True, nogil=True)
def _taps(length, out_length, flip, bits, first, weight):
    """For each output coordinate: the first of its two source samples, and the weight of the second.

    Half-pixel centres (o + 1/2) * length / out_length - 1/2, clamped to the crop: torch's antialias=False.
    """
    scale = length / out_length
    for o in range(out_length):
        source = min(max((o + 0.5) * scale - 0.5, 0.0), length - 1.0)
        at = int(source)
        to = out_length - 1 - o if flip else o
        first[to] = at
        weight[to] = int(np.rint((source - at) * (1 << bits)))


@njit(cache=True, nogil=True)
def _spread(pixel):
    """RGBX bytes of a uint32 -> R, G, B in lanes of a uint64."""
    p = np.uint64(pixel)
    return (p & _BYTE[0]) | ((p & _BYTE[1]) << _SPREAD[0]) | ((p & _BYTE[2]) << _SPREAD[1])


@njit(cache=True, nogil=True)
def crop_resize(pixels, box, flip_v, flip_h, out):
    """Writes the crop `box` = (top, left, height, width) of an image, resized and flipped, to out.

    pixels: uint32 [H, W], bytes R, G, B and one unused. out: uint8 [R, R, 3]. Equal to cropping, torchvision's
    resize with antialias=False, then the flips, to within one grey level.
    """
    top, left, height, width = box
    rows, columns = out.shape[0], out.shape[1]
    y0, wy = np.empty(rows, np.int64), np.empty(rows, np.uint64)
    x0, wx = np.empty(columns, np.uint64), np.empty(columns, np.uint64)  # unsigned: no test for negative indices
    _taps(height, rows, flip_v, _VERTICAL, y0, wy)
    _taps(width, columns, flip_h, _HORIZONTAL, x0, wx)
    blend = np.empty(width + 1, np.uint64)
    for y in range(rows):
        upper = pixels[top + y0[y], left : left + width]
        lower = pixels[top + min(y0[y] + 1, height - 1), left : left + width]
        v = wy[y]
        u = np.uint64(1 << _VERTICAL) - v
        for i in range(width):  # contiguous, so the compiler vectorises it
            blend[i] = ((_spread(upper[i]) * u + _spread(lower[i]) * v) >> np.uint64(6)) & _LOW_13
        blend[width] = blend[width - 1]
        for x in range(columns):
            i, w = x0[x], wx[x]
            pixel = blend[i] * (np.uint64(1 << _HORIZONTAL) - w) + blend[i + np.uint64(1)] * w + _HALF
            out[y, x, 0] = pixel >> _OUT[0]
            out[y, x, 1] = pixel >> _OUT[1]
            out[y, x, 2] = pixel >> _OUT[2]


@njit(cache=True, nogil=True)
def pack(rgb, out):
    """RGB uint8 [H, W, 3] -> out uint32 [H, W], as crop_resize takes it."""
    for y in range(rgb.shape[0]):
        for x in range(rgb.shape[1]):
            out[y, x] = np.uint32(rgb[y, x, 0]) | np.uint32(rgb[y, x, 1]) << 8 | np.uint32(rgb[y, x, 2]) << 16
