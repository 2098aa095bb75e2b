"""Keypoints of the canonical frame -> counts in the cells of one crop.

remap places stored positions in the crop, raster draws their footprint into a bit map F, cell_counts
counts F's pixels per w_ps x w_ps cell. All three run without the GIL on scratch the caller owns.

Footprints. `ring`: what cv2.drawKeypoints leaves above zero on a black canvas, an anti-aliased circle of
radius 3 px around the position rounded to 1/16 px; the released code weighs with this. `point`: the one
pixel that holds the position; the paper's text says this.
"""

import functools
from dataclasses import dataclass

import cv2
import numpy as np
from numba import njit

from kamim.geometry import POSITION_UNIT, axis_map

FOOTPRINTS = ("ring", "point")
REACH = 4  # a stamp covers pixels -REACH .. REACH + 1 around the pixel that holds the position
STAMP_ROWS = 2 * REACH + 2
# OpenCV clips a ring's segments at the canvas border, which changes pixels INSIDE the canvas too; so the
# columns (and rows) within BORDER of either side have stamps of their own. Class 0 .. BORDER - 1: distance
# from the near side; BORDER: interior; then the distance from the far side.
BORDER = 4
CLASSES = 2 * BORDER + 1
WORD = 64


@dataclass(frozen=True)
class Group:
    """Keypoints of an image that share a rule of survival (a pyramid level, or all of them).

    border: px of the crop in which the detector is blind: edge coordinates outside [border, side - border)
        are dropped. cap: at most so many are kept, the first in stored order (strongest first); 0: no cap.
    """

    border: float
    cap: int = 0


@dataclass(frozen=True)
class Rules:
    """What a detector would do on the crop itself, as far as positions found elsewhere can tell.

    groups: one per stored group. snap: the detector reports whole pixels, so remapped centres are rounded.
    """

    groups: tuple[Group, ...]
    snap: bool = False

    def arrays(self) -> tuple[np.ndarray, np.ndarray, bool]:
        """(borders float64 [G], caps int64 [G], snap), as the kernel takes them."""
        return (
            np.array([g.border for g in self.groups], np.float64),
            np.array([g.cap for g in self.groups], np.int64),
            self.snap,
        )


@functools.cache
def stamps(footprint: str) -> np.ndarray:
    """Footprints for every border class and sub-pixel phase: uint64 [class y, class x, phase y, phase x, STAMP_ROWS].

    Bit b of row r is the pixel (x + b - REACH, y + r - REACH) for a position within pixel (x, y). Ring
    stamps are drawn by OpenCV itself, so they are its rings, whatever its version. Raises ValueError for
    an unknown footprint.
    """
    if footprint not in FOOTPRINTS:
        raise ValueError(f"footprint = {footprint!r}: must be one of {', '.join(FOOTPRINTS)}")
    table = np.zeros((CLASSES, CLASSES, POSITION_UNIT, POSITION_UNIT, STAMP_ROWS), np.uint64)
    if footprint == "point":
        half = POSITION_UNIT // 2  # a centre at phase >= 1/2 lies in the next pixel
        for fy in range(POSITION_UNIT):
            for fx in range(POSITION_UNIT):
                table[:, :, fy, fx, REACH + (fy >= half)] = 1 << (REACH + (fx >= half))
        return table
    side = 4 * BORDER + STAMP_ROWS
    places = [*range(BORDER), side // 2, *range(side - BORDER, side)]
    bits = (1 << np.arange(STAMP_ROWS)).astype(np.uint64)
    padded = np.zeros((side + 2 * STAMP_ROWS,) * 2, np.bool_)
    for cy, cx, fy, fx in np.ndindex(table.shape[:4]):
        at = cv2.KeyPoint(places[cx] + fx / POSITION_UNIT, places[cy] + fy / POSITION_UNIT, 1.0)
        canvas = cv2.drawKeypoints(np.zeros((side, side, 3), np.uint8), [at], None, color=(255, 255, 255))
        padded[STAMP_ROWS:-STAMP_ROWS, STAMP_ROWS:-STAMP_ROWS] = canvas[..., 0] > 0
        top, left = places[cy] - REACH + STAMP_ROWS, places[cx] - REACH + STAMP_ROWS
        table[cy, cx, fy, fx] = padded[top : top + STAMP_ROWS, left : left + STAMP_ROWS] @ bits
    return table


def raster_scratch(height: int, width: int) -> np.ndarray:
    """An empty bit map F of height x width pixels, with a margin for stamps: uint64 [rows, words]."""
    return np.zeros((height + STAMP_ROWS, -(-width // WORD) + 2), np.uint64)


@njit(cache=True, nogil=True)
def remap(positions, counts, borders, caps, snap, frame, size, view, side, out):
    """Stored positions of one image -> centres in the crop, in 1/16 px. Returns how many survive.

    positions: uint16 [K, 2] (x, y), 1/16 px of the canonical frame, pixel centres; counts: int [G], how
    many belong to each group, in order; frame, size: (height, width) of the canonical frame and of the image that
    `view` (see kamim.geometry) refers to; out: int32 [>= K, 2] (x, y).
    """
    ax, bx = axis_map(view[1], view[3], side, view[5])
    ay, by = axis_map(view[0], view[2], side, view[4])
    # canonical centre in 1/16 px -> edge coordinate of the image -> edge coordinate of the crop
    ax, bx = ax * size[1] / frame[1] / POSITION_UNIT, bx + ax * 0.5 * size[1] / frame[1]
    ay, by = ay * size[0] / frame[0] / POSITION_UNIT, by + ay * 0.5 * size[0] / frame[0]
    kept, stop = 0, 0
    for group in range(len(borders)):
        start, stop, before = stop, stop + int(counts[group]), kept
        low, high = borders[group], side - borders[group]
        for k in range(start, stop):  # without a branch: every position is written, and the next one over a lost one
            x = positions[k, 0] * ax + bx
            y = positions[k, 1] * ay + by
            if snap:  # the pixel that holds the edge coordinate is the rounded centre
                out[kept, 0] = int(x) * POSITION_UNIT
                out[kept, 1] = int(y) * POSITION_UNIT
            else:
                out[kept, 0] = max(int(np.rint((x - 0.5) * POSITION_UNIT)), 0)
                out[kept, 1] = max(int(np.rint((y - 0.5) * POSITION_UNIT)), 0)
            kept += (low <= x) & (x < high) & (low <= y) & (y < high)
        if caps[group] > 0:
            kept = min(kept, before + caps[group])
    return kept


@njit(cache=True, nogil=True)
def _border_class(i, side):
    if i < BORDER:
        return i
    if i >= side - BORDER:
        return i - side + CLASSES
    return BORDER


@njit(cache=True, nogil=True)
def raster(points, count, height, width, table, bitmap):
    """Draws the footprints of points[:count] (int32 [.., 2] (x, y), centres in 1/16 px of the crop) into bitmap.

    bitmap: raster_scratch(height, width); it is cleared first. Every point lies within the crop.
    """
    bitmap[:] = 0
    for k in range(count):
        _stamp(points[k, 0], points[k, 1], height, width, table, bitmap)


def runs(table: np.ndarray) -> np.ndarray:
    """The unbroken runs of pixels in a footprint on a whole pixel, far from borders: int64 [R, 3] (length, row, bit).

    table: as stamps gives it. Sorted; bit and row as in stamps.
    """
    rows = np.unpackbits(table[BORDER, BORDER, 0, 0].view(np.uint8).reshape(STAMP_ROWS, 8), axis=1, bitorder="little")
    edges = np.diff(np.pad(rows.astype(np.int64), ((0, 0), (1, 1))), axis=1)
    (row, start), (_, end) = np.nonzero(edges == 1), np.nonzero(edges == -1)
    return np.array(sorted(zip(end - start, row, start, strict=True)), np.int64)


@njit(cache=True, nogil=True)
def raster_whole(points, count, height, width, table, runs, bitmap, dots):
    """raster, for points on whole pixels: several times as fast where there are many.

    Inside, their footprints are all alike: a bit map of the points alone is widened, step by step, to every length of
    the footprint's runs (see runs), and put in the runs' places. dots: two of raster_scratch.
    """
    bitmap[:] = 0
    dots[:] = 0
    for k in range(count):
        x, y = points[k, 0], points[k, 1]
        column, row = x >> 4, y >> 4
        if _border_class(column, width) == BORDER and _border_class(row, height) == BORDER:
            left = column + WORD - REACH
            dots[0, row, left >> 6] |= np.uint64(1) << np.uint64(left & 63)
        else:
            _stamp(x, y, height, width, table, bitmap)
    words = bitmap.shape[1]
    drawn, single = bitmap.reshape(bitmap.size), dots[0].reshape(bitmap.size)
    wide = dots[1].reshape(bitmap.size)
    length = 0
    for i in range(len(runs)):
        while length < runs[i, 0]:
            _add_moved(single[: height * words], length, wide)
            length += 1
        _add_moved(wide[: height * words], runs[i, 2], drawn[runs[i, 1] * words :])


@njit(cache=True, nogil=True)
def _add_moved(source, by, to):
    """ORs source (uint64 [n]), moved right by 0 <= `by` < WORD pixels, into `to`. Rows' margins are empty."""
    if by == 0:
        for i in range(len(source)):
            to[i] |= source[i]
        return
    shift, carry = np.uint64(by), np.uint64(WORD - by)
    near, rest = source[1:], to[1:]
    for i in range(len(near)):
        rest[i] |= (near[i] << shift) | (source[i] >> carry)


@njit(cache=True, nogil=True)
def _stamp(x, y, height, width, table, bitmap):
    """Draws the footprint of one point."""
    column, row = x >> 4, y >> 4
    stamp = table[_border_class(row, height), _border_class(column, width), y & 15, x & 15]
    left = column + WORD - REACH
    word, shift = left >> 6, np.uint64(left & 63)
    for r in range(STAMP_ROWS):
        bitmap[row + r, word] |= stamp[r] << shift
    if left & 63 > WORD - STAMP_ROWS:  # it goes on in the next word
        for r in range(STAMP_ROWS):
            bitmap[row + r, word + 1] |= stamp[r] >> (np.uint64(WORD) - shift)


@njit(cache=True, nogil=True)
def _byte_counts(v):
    """Bits set in each byte of a word, as bytes of a word."""
    v = v - ((v >> np.uint64(1)) & np.uint64(0x5555555555555555))
    v = (v & np.uint64(0x3333333333333333)) + ((v >> np.uint64(2)) & np.uint64(0x3333333333333333))
    return (v + (v >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)


@njit(cache=True, nogil=True)
def _popcount(v):
    return (_byte_counts(v) * np.uint64(0x0101010101010101)) >> np.uint64(56)


@njit(cache=True, nogil=True)
def _counts_of_bytes(bitmap, patch_size, counts):
    """cell_counts where cells are whole bytes wide: eight columns of eight pixels at a time."""
    bands, words = patch_size // 8, bitmap.shape[1] - 2
    sums = np.empty(words, np.uint64)
    in_bytes = sums.view(np.uint8)
    for band in range(counts.shape[0] * bands):  # 8 rows of at most 8 bits fit a byte
        for word in range(words):
            total = np.uint64(0)
            for r in range(8):
                total += _byte_counts(bitmap[REACH + 8 * band + r, word + 1])
            sums[word] = total
        row, byte = counts[band // bands], 0
        for column in range(len(row)):
            for _ in range(bands):
                row[column] += np.int16(in_bytes[byte])
                byte += 1


@njit(cache=True, nogil=True)
def cell_counts(bitmap, patch_size, counts):
    """Pixels of F set in each patch_size x patch_size cell. counts: int16 [g, g], overwritten.

    int16 because torch sums and casts it everywhere; it holds patch_size^2 up to patch_size 181.
    """
    counts[:] = 0
    if patch_size % 8 == 0:
        _counts_of_bytes(bitmap, patch_size, counts)
        return
    for y in range(counts.shape[0] * patch_size):
        for j in range(counts.shape[1]):
            total = np.uint64(0)
            at, end = j * patch_size, (j + 1) * patch_size
            while at < end:  # a cell may span words
                n = min(end, (at // WORD + 1) * WORD) - at
                bits = bitmap[y + REACH, at // WORD + 1] >> np.uint64(at % WORD)
                if n < WORD:
                    bits &= (np.uint64(1) << np.uint64(n)) - np.uint64(1)
                total += _popcount(bits)
                at += n
            counts[y // patch_size, j] += np.int16(total)


def quantise(xy: np.ndarray) -> np.ndarray:
    """Pixel centres in px (float32 [K, 2]) -> int32 [K, 2] in 1/16 px, rounded as cv2.drawKeypoints rounds."""
    return np.rint(np.asarray(xy, np.float32) * POSITION_UNIT).astype(np.int32)


def keypoint_map(xy: np.ndarray, height: int, width: int, footprint: str) -> np.ndarray:
    """The map F of keypoints found on an image itself: bool [height, width].

    xy: float32 [K, 2], pixel centres in px; those that round to outside the image are left out.
    """
    points = quantise(xy).reshape(-1, 2)
    inside = (points >= 0).all(1) & (points[:, 0] < width * POSITION_UNIT) & (points[:, 1] < height * POSITION_UNIT)
    bitmap = raster_scratch(height, width)
    raster(points[inside], int(inside.sum()), height, width, stamps(footprint), bitmap)
    bits = np.unpackbits(bitmap.view(np.uint8), axis=1, bitorder="little").astype(bool)
    return bits[REACH : REACH + height, WORD : WORD + width]


def map_counts(bitmap: np.ndarray, patch_size: int) -> np.ndarray:
    """Cells of a map F (bool [H, W]) counted: int16 [H // w_ps, W // w_ps]; a partial last cell is left out."""
    height, width = (side // patch_size * patch_size for side in bitmap.shape)
    cells = bitmap[:height, :width].reshape(height // patch_size, patch_size, width // patch_size, patch_size)
    return cells.sum(axis=(1, 3), dtype=np.int16)
