"""Crop, bilinear resize and flips of one image of RGB pixels, in one pass without the GIL.

Each row of the source that is needed is resized once, to 16 bits per value; two of them blend into a row of the result.
Both are short loops over flat arrays, which the compiler vectorises to 16 or 32 values at a time. Gathering
neighbouring pixels, for which there is no vector instruction, moves two pixels at a time as one 8-byte word.
"""

from typing import NamedTuple

import numpy as np

from kamim import KamimError
from kamim.method.kernels import bare_kernel, kernel
from kamim.method.simd import high16, load8, store8

_PIXEL = np.uint64(24)  # bits
_FIRST = np.uint64(0xFFFFFF)
_OTHERS = np.uint64(0xFFFFFFFFFFFFFFFF ^ 0xFFFFFF)
_BYTE = np.uint16(8)  # bits
_HALF = np.uint16(0x81)  # 1/2, and 1/256 for the two truncated products
_SLACK = 8  # bytes that are read or written past the end of a row


class _Columns(NamedTuple):
    """How a row is resized. offset: int64 [R or 1 more] and weight: uint16 [3 R], see _columns."""

    offset: np.ndarray
    weight: np.ndarray


class _Rows(NamedTuple):
    """Working memory for rows. near, far: uint8, room for both neighbours of every output pixel, and _SLACK.

    last: uint8, room for a row of the crop without _SLACK behind it. resized: uint16 [2, 3 R], room for source row n in
    place n % 2.
    """

    near: np.ndarray
    far: np.ndarray
    last: np.ndarray
    resized: np.ndarray


@bare_kernel
def _source(o, scale, length):
    """Returns the position of output sample o among `length` source samples: half-pixel centres, antialias=False."""
    return min(max((o + 0.5) * scale - 0.5, 0.0), length - 1.0)


@bare_kernel
def _columns(width, flip, out):
    """Writes the byte offset of each output column's first pixel, and the second's weight in 256ths, three times."""
    offset, weight = out
    columns = len(weight) // 3
    for o in range(columns):
        source = _source(o, width / columns, width)
        first = min(int(source), max(width - 2, 0))
        to = columns - 1 - o if flip else o
        offset[to] = 3 * first
        weight[3 * to : 3 * to + 3] = int(np.rint((source - first) * 256))
    offset[columns:] = offset[columns - 1]


@bare_kernel
def _resize_row(row, columns, near, far, out):
    """Resizes a row of the crop (uint8 [3 W], _SLACK readable behind it) to out, uint16 [3 R], in 256ths of grey."""
    offset, weight = columns
    for k in range(len(offset) // 2):  # a word holds two neighbouring pixels, and a third in part
        a, b = load8(row, offset[2 * k]), load8(row, offset[2 * k + 1])
        store8(near, 6 * k, (a & _FIRST) | (b << _PIXEL))
        store8(far, 6 * k, ((a >> _PIXEL) & _FIRST) | (b & _OTHERS))
    for i in range(len(weight)):
        value = np.uint16(near[i])
        out[i] = np.uint16(value << _BYTE) + (np.uint16(far[i]) - value) * weight[i]  # exact modulo 2**16


@bare_kernel
def _blend_rows(upper, lower, weight, out):
    """Blends uint16 [3 R] in 256ths of a grey level to out, uint8 [3 R]; weight: the lower row's, in 65536ths."""
    rest = np.uint16(0xFFFF - weight)
    for i in range(len(out)):
        out[i] = np.uint8(np.uint16(high16(upper[i], rest) + high16(lower[i], weight) + _HALF) >> _BYTE)


@kernel
def _within(start, length, whole):
    """Returns whether `length` samples from `start` on lie within `whole` samples."""
    return start >= 0 and 0 < length <= whole - start


@kernel
def lies_within(view, height, width):
    """Returns whether the box of a view lies within an image of height x width px."""
    return _within(view[0], view[2], height) and _within(view[1], view[3], width)


@kernel
def crop_resize(pixels, view, out):
    """Writes the crop `view` = (top, left, height, width, flip_v, flip_h) of an image, resized and flipped, to out.

    pixels: uint8 [H, W, 3]. out: uint8 [R, R, 3]. Both contiguous. Equal to cropping, torchvision's resize with
    antialias=False, then the flips, to within one grey level. Raises KamimError if the crop does not lie within the
    image.
    """
    _, _, _, width, _, flip_h = view
    if not lies_within(view, pixels.shape[0], pixels.shape[1]):
        raise KamimError("the crop lies outside the image")
    side, row_bytes = out.shape[0], 3 * out.shape[1]
    columns = _Columns(np.empty(side + side % 2, np.int64), np.empty(row_bytes, np.uint16))
    _columns(width, flip_h, columns)
    rows = _Rows(
        np.empty(row_bytes + _SLACK, np.uint8),
        np.empty(row_bytes + _SLACK, np.uint8),
        np.empty(3 * width + _SLACK, np.uint8),
        np.empty((2, row_bytes), np.uint16),
    )
    _resize(pixels.reshape(pixels.size), 3 * pixels.shape[1], view, columns, rows, out.reshape(side, row_bytes))


@bare_kernel
def _resize(flat, pitch, view, columns, rows, results):
    """Resizes the crop of an image, uint8 [n], with rows `pitch` bytes apart, to results, uint8 [R, 3 R]."""
    near, far, last, resized = rows
    top, left, height, width, flip_v, _ = view
    side, done = len(results), top  # the source rows before it are resized, or not needed
    for o in range(side):
        source = _source(o, height / side, height)
        upper = top + int(source)
        lower = min(upper + 1, top + height - 1)
        done = max(done, upper)
        while done <= lower:
            start = done * pitch + 3 * left
            row = flat[start : start + 3 * width]
            if start + len(last) > len(flat):
                for i in range(3 * width):
                    last[i] = row[i]
                row = last
            _resize_row(row, columns, near, far, resized[done % 2])
            done += 1
        weight_below = np.uint16(min((source - int(source)) * 65536, 65535.0))
        _blend_rows(resized[upper % 2], resized[lower % 2], weight_below, results[side - 1 - o if flip_v else o])
