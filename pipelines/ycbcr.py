"""Crop, bilinear resize, flips and conversion to RGB of an image stored as planes of Y, Cb and Cr.

Each plane is resized at its own resolution, and only the result becomes RGB. First all rows of the crop are resized to
the columns of the result, at 16 bits per value; then two rows blend into each row of the result. Four rows are resized
at a time: interleaved into one row of four-byte values, so that both neighbours of a column in all four are one 8-byte
word. The rest is short loops over flat arrays, which the compiler vectorises to 16 or 32 values at a time.
"""

from typing import NamedTuple

import numpy as np
from numba import carray

from kamim.method.kernels import bare_kernel, kernel
from kamim.method.simd import high16, less16, load8, pointer8, store8

INTERLEAVE = 4  # rows that are resized at a time
_WORD = np.uint64(32)  # bits: half of a loaded word, one value of each of the woven rows
_NEAR = np.uint64(0xFFFFFFFF)
_FAR = np.uint64(0xFFFFFFFF00000000)
_BYTE = np.uint16(8)  # bits
_NEUTRAL = np.uint16((128 << 8) + 1)  # Cb and Cr of greys, which _mean makes 128

# JFIF's R = Y + 1.402 (Cr - 128), G = Y - 0.344136 (Cb - 128) - 0.714136 (Cr - 128), B = Y + 1.772 (Cb - 128), for
# values in 256ths, with results in 64ths: factors as 65536ths of a 64th, and their products with 128.
_TO_64TH, _HALF, _FROM_64TH = np.uint16(2), np.uint16(32), np.uint16(6)  # bits, a half, bits
_RED_CR, _RED_OFFSET = np.uint16(22970), np.uint16(11485)
_GREEN_CB, _GREEN_CR, _GREEN_OFFSET = np.uint16(5638), np.uint16(11700), np.uint16(8669)
_BLUE_CB, _BLUE_OFFSET = np.uint16(29032), np.uint16(14516)


class Planes(NamedTuple):
    """An image of height x width px as planes within `data`.

    data: uint8 [n]. Y begins at 0, its rows `stride` bytes apart; Cb and Cr begin at `cb` and `cr`, with rows
    `chroma_stride` apart. block_height, block_width: pixels that share a sample of Cb and Cr, which lies in the centre
    of its block; 0 for grey images, which have neither.
    """

    data: np.ndarray
    height: int
    width: int
    stride: int
    cb: int
    cr: int
    chroma_stride: int
    block_height: int
    block_width: int


class _Axis(NamedTuple):
    """How the results along an axis map to the samples of a plane, see _axis."""

    first: int
    samples: int
    scale: float
    lead: float


class _Columns(NamedTuple):
    """How rows are resized to R columns, see _columns. offset: int64 [R or 1 more]; weight: uint16 [R]."""

    axis: _Axis
    offset: np.ndarray
    weight: np.ndarray


class _Weave(NamedTuple):
    """Working memory for interleaved rows: the rows themselves, and the output of _neighbours; uint8 [n] each."""

    rows: np.ndarray
    near: np.ndarray
    far: np.ndarray


@kernel
def stored_planes(address, height, width):
    """Returns the Planes of an image in a store's encoding yuv420 (kamim.method.colour) at the address of its bytes."""
    columns, cb = (width + 1) // 2, height * width
    chroma = (height + 1) // 2 * columns
    data = carray(pointer8(address), (cb + 2 * chroma,))
    return Planes(data, height, width, width, cb, cb + chroma, columns, 2, 2)


@kernel
def crop_planes(planes, view, resized, out):
    """Writes the crop `view` = (top, left, height, width, flip_v, flip_h) of an image, resized and flipped, to out.

    planes: Planes, which hold the crop. resized: uint16 [3, n, R] of working memory, n at least INTERLEAVE more than
    the image's height. out: uint8 [R, R, 3], RGB, contiguous. The result is that of converting every pixel to RGB,
    cropping, and resizing without antialiasing, except that roundings differ and that chroma is interpolated once
    instead of twice.
    """
    top, left, height, width, flip_v, flip_h = view
    data, side = planes.data, out.shape[0]
    room = INTERLEAVE * (max(side, width) + 2)
    weave = _Weave(np.empty(room, np.uint8), np.empty(room, np.uint8), np.empty(room, np.uint8))
    rows, columns = _axis(top, height, 1, side), _columns(_axis(left, width, 1, side), flip_h, side)
    _resize_columns(data, planes.stride, rows, columns, weave, resized[0])
    if planes.block_width == 0:  # grey: one row of Cb and Cr, for every row of the result
        chroma_rows = _axis(0, 1, 1, side)
        resized[1:, 0] = _NEUTRAL
    else:
        chroma_rows = _axis(top, height, planes.block_height, side)
        columns = _columns(_axis(left, width, planes.block_width, side), flip_h, side)
        for plane, start in ((1, planes.cb), (2, planes.cr)):
            _resize_columns(data[start:], planes.chroma_stride, chroma_rows, columns, weave, resized[plane])
    _blend_rows(resized, rows, chroma_rows, flip_v, out.reshape(side, 3 * side))


@bare_kernel
def _axis(start, length, block, side):
    """Returns how `side` results map to the samples of a plane, each of which covers `block` pixels of an axis.

    The crop is pixels start .. start + length - 1. Returns the first sample that overlaps it, the number of such
    samples, samples per result, and the crop's position in the first sample.
    """
    first = start // block
    samples = (start + length - 1) // block - first + 1
    return _Axis(first, samples, length / block / side, (start % block) / block)


@bare_kernel
def _source(o, axis):
    """Returns the position of result o among an axis' samples, from the first one's centre: half-pixel centres."""
    return min(max((o + 0.5) * axis.scale - 0.5 + axis.lead, 0.0), axis.samples - 1.0)


@kernel
def _columns(axis, flip, side):
    """Returns _Columns: each result's first sample, relative to the axis' first, and the second's weight in 256ths."""
    offset, weight = np.empty(side + side % 2, np.int64), np.empty(side, np.uint16)
    for o in range(side):
        source = _source(o, axis)
        first = min(int(source), max(axis.samples - 2, 0))
        to = side - 1 - o if flip else o
        offset[to], weight[to] = first, int(np.rint((source - first) * 256))
    offset[side:] = offset[side - 1]
    return _Columns(axis, offset, weight)


@bare_kernel
def _resize_columns(plane, stride, rows, columns, weave, out):
    """Resizes all rows of a plane's crop (uint8 [n]) to out, uint16 [>= rows + INTERLEAVE - 1, R], in 256ths."""
    top, count = rows.first, rows.samples
    left, width = columns.axis.first, columns.axis.samples
    for n in range(0, count, INTERLEAVE):
        a = (top + n) * stride + left
        b = (top + min(n + 1, count - 1)) * stride + left
        c = (top + min(n + 2, count - 1)) * stride + left
        d = (top + min(n + 3, count - 1)) * stride + left
        _interleave(plane[a : a + width], plane[b : b + width], plane[c : c + width], plane[d : d + width], weave.rows)
        _neighbours(weave.rows, columns.offset, weave.near, weave.far)
        _blend_columns(weave.near, weave.far, columns.weight, out[n], out[n + 1], out[n + 2], out[n + 3])


@bare_kernel
def _interleave(a, b, c, d, woven):
    """Interleaves four rows uint8 [W] in woven, uint8 [>= 4 W]: their first values, their second ones, and so on."""
    for i in range(len(a)):
        woven[4 * i], woven[4 * i + 1], woven[4 * i + 2], woven[4 * i + 3] = a[i], b[i], c[i], d[i]


@bare_kernel
def _neighbours(woven, offset, near, far):
    """Writes four values of each column's first sample to near and four of its second to far, uint8 [4 R] each."""
    for k in range(len(offset) // 2):
        a, b = load8(woven, 4 * offset[2 * k]), load8(woven, 4 * offset[2 * k + 1])
        store8(near, 8 * k, (a & _NEAR) | (b << _WORD))
        store8(far, 8 * k, (a >> _WORD) | (b & _FAR))


@bare_kernel
def _between(near, far, weight):
    """Interpolates in 256ths, exact modulo 2**16."""
    return np.uint16(np.uint16(near) << _BYTE) + (np.uint16(far) - np.uint16(near)) * weight


@bare_kernel
def _blend_columns(near, far, weight, a, b, c, d):
    """Blends the output of _neighbours into four rows of the result, uint16 [R]."""
    for i in range(len(weight)):
        a[i] = _between(near[4 * i], far[4 * i], weight[i])
        b[i] = _between(near[4 * i + 1], far[4 * i + 1], weight[i])
        c[i] = _between(near[4 * i + 2], far[4 * i + 2], weight[i])
        d[i] = _between(near[4 * i + 3], far[4 * i + 3], weight[i])


@bare_kernel
def _blend_rows(resized, rows, chroma_rows, flip_v, results):
    """Blends two rows of each plane into each row of the result, uint8 [R, 3 R], as RGB."""
    side, luma, cb, cr = len(results), resized[0], resized[1], resized[2]
    for o in range(side):
        upper, lower, weight = _row_pair(rows, o)
        c_upper, c_lower, c_weight = _row_pair(chroma_rows, o)
        _to_rgb(
            luma[upper],
            luma[lower],
            weight,
            cb[c_upper],
            cb[c_lower],
            cr[c_upper],
            cr[c_lower],
            c_weight,
            results[side - 1 - o if flip_v else o],
        )


@bare_kernel
def _row_pair(rows, o):
    """Returns the two rows around row o of the result, and the second one's weight in 65536ths."""
    source = _source(o, rows)
    first = int(source)
    return first, min(first + 1, rows.samples - 1), np.uint16(min((source - first) * 65536, 65535.0))


@bare_kernel
def _mean(upper, lower, weight):
    """Returns the weighted mean of two uint16, truncated; the weights add up to 65535 of 65536."""
    return np.uint16(high16(upper, np.uint16(0xFFFF - weight)) + high16(lower, weight))


@bare_kernel
def _to_rgb(luma, luma_below, weight, cb, cb_below, cr, cr_below, chroma_weight, out):
    """Blends rows, uint16 [R] in 256ths, and converts them to out, uint8 [3 R].

    Sums are unsigned, below 2**16; 128's part is subtracted last.
    """
    for i in range(len(luma)):
        y = np.uint16((_mean(luma[i], luma_below[i], weight) >> _TO_64TH) + _HALF)
        blue, red = _mean(cb[i], cb_below[i], chroma_weight), _mean(cr[i], cr_below[i], chroma_weight)
        less = np.uint16(high16(blue, _GREEN_CB) + high16(red, _GREEN_CR))
        out[3 * i] = _byte(less16(np.uint16(y + high16(red, _RED_CR)), _RED_OFFSET))
        out[3 * i + 1] = _byte(less16(np.uint16(y + _GREEN_OFFSET), less))
        out[3 * i + 2] = _byte(less16(np.uint16(y + high16(blue, _BLUE_CB)), _BLUE_OFFSET))


@bare_kernel
def _byte(value):
    """Converts 64ths of a grey level, uint16, to uint8, at most 255."""
    whole = np.uint16(value >> _FROM_64TH)
    return np.uint8(whole if whole < np.uint16(255) else np.uint16(255))
