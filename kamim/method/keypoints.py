"""From keypoints of a canonical frame to counts in the cells of a crop.

`remap` maps stored positions into the crop, `raster` draws their footprints into a bitmap F, `cell_counts`
counts the pixels of F in each w_ps x w_ps cell. All three run without the GIL on scratch arrays of the caller.

Footprints. `ring`: the non-zero pixels of cv2.drawKeypoints on a black canvas, an anti-aliased circle of
radius 3 px around the position rounded to 1/16 px, as in the released code. `point`: the one pixel that
holds the position, as in the paper's text.
"""

import functools
import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

from kamim import KamimError
from kamim.method.geometry import POSITION_UNIT, axis_map
from kamim.method.kernels import bare_kernel, kernel
from kamim.method.simd import load8, store8

FOOTPRINTS = ("ring", "point")
REACH = 4  # a stamp covers pixels -REACH .. REACH + 1 around the pixel that holds the position
STAMP_ROWS = 2 * REACH + 2
STAMP_WORDS = 3  # uint64 words per stamp, each of four rows of 16 bits
# OpenCV clips a ring's segments at the canvas border, which also changes pixels INSIDE the canvas. Columns
# and rows within BORDER px of a side therefore have stamps of their own. Class 0 .. BORDER - 1 is the distance
# from the near side, class BORDER the interior, later classes the distance from the far side.
BORDER = 4
CLASSES = 2 * BORDER + 1
WORD = 64
MARGIN = 8  # bits before the first pixel of a bitmap's row, and at least as many after the last: room for stamps
MOST_GROUPS = 256  # per detector
LARGEST_CAP = 2**31 - 1
_ROUNDER = 1.5 * 2.0**52  # adding it to a float64 and subtracting it again rounds as rint does, and vectorises


@dataclass(frozen=True)
class Group:
    """The rule for one group of keypoints, such as a pyramid level: which of them are kept on a crop.

    border: px at the crop's border in which the detector reports nothing; keypoints with edge coordinates outside
        [border, side - border) are dropped. cap: the largest number kept, in stored order (strongest first);
        0: no cap.
    """

    border: float
    cap: int = 0

    def __post_init__(self) -> None:
        """Raises KamimError if border is negative or not finite, or cap is outside 0 .. LARGEST_CAP."""
        if not 0 <= self.border < math.inf:
            raise KamimError(f"border = {self.border}: must be 0 px or more, and finite")
        if not 0 <= self.cap <= LARGEST_CAP:
            raise KamimError(f"cap = {self.cap}: must be 0 (no cap) to {LARGEST_CAP}")


class RuleArrays(NamedTuple):
    """Rules as compiled loops take them. borders: float64 [G], caps: int64 [G], of the groups; snap: see Rules."""

    borders: np.ndarray
    caps: np.ndarray
    snap: bool


@dataclass(frozen=True)
class Rules:
    """How to approximate, from positions on a canonical frame, what a detector would report on the crop itself.

    groups: one per stored group. snap: the detector reports whole pixels, so remapped centres are rounded.
    """

    groups: tuple[Group, ...]
    snap: bool = False

    def __post_init__(self) -> None:
        """Raises KamimError unless there are 1 .. MOST_GROUPS groups."""
        if not 1 <= len(self.groups) <= MOST_GROUPS:
            raise KamimError(f"groups: are {len(self.groups)}, must be 1 to {MOST_GROUPS}")

    @property
    def in_reading_order(self) -> bool:
        """Whether a frame's keypoints are distinct whole pixels sorted by row and column: one group, without a cap."""
        return self.snap and len(self.groups) == 1 and not self.groups[0].cap

    def arrays(self) -> RuleArrays:
        """Returns the rules as `remap` takes them."""
        borders, caps = [g.border for g in self.groups], [g.cap for g in self.groups]
        return RuleArrays(np.array(borders, np.float64), np.array(caps, np.int64), self.snap)


@functools.cache
def stamps(footprint: str, phases: int = POSITION_UNIT) -> np.ndarray:
    """Returns the footprint bitmaps, uint64 [class y, class x, phase y, phase x, STAMP_WORDS].

    There is one per border class and sub-pixel phase. phases: their number along each axis, starting at 0; 1 suffices
    for positions on whole pixels. Bit b of row r is the pixel (x + b - REACH, y + r - REACH) for a position within
    pixel (x, y); a row takes 16 bits, so a word holds four. Ring stamps are drawn by the installed OpenCV, so they
    match its rings. Raises KamimError if the footprint is unknown.
    """
    if footprint not in FOOTPRINTS:
        raise KamimError(f"footprint = {footprint!r}: must be one of {', '.join(FOOTPRINTS)}")
    words = np.zeros((CLASSES, CLASSES, phases, phases, STAMP_WORDS), np.uint64)
    table = words.view(np.uint16)
    if footprint == "point":
        half = POSITION_UNIT // 2  # a centre at phase >= 1/2 lies in the next pixel
        for fy in range(phases):
            for fx in range(phases):
                table[:, :, fy, fx, REACH + (fy >= half)] = 1 << (REACH + (fx >= half))
        return words
    side = 4 * BORDER + STAMP_ROWS
    centres = [*range(BORDER), side // 2, *range(side - BORDER, side)]
    bits = (1 << np.arange(STAMP_ROWS)).astype(np.uint16)
    black = np.zeros((side, side, 3), np.uint8)
    maps = np.zeros((phases**2, *[side + 2 * STAMP_ROWS] * 2), np.bool_)  # padded for stamps at a border
    for (cy, y), (cx, x) in itertools.product(enumerate(centres), repeat=2):
        for canvas, (fy, fx) in zip(maps, np.ndindex(phases, phases), strict=True):
            at = cv2.KeyPoint(x + fx / POSITION_UNIT, y + fy / POSITION_UNIT, 1.0)
            drawn = cv2.drawKeypoints(black, [at], None, color=(255, 255, 255))
            canvas[STAMP_ROWS:-STAMP_ROWS, STAMP_ROWS:-STAMP_ROWS] = drawn[..., 0]
        top, left = y - REACH + STAMP_ROWS, x - REACH + STAMP_ROWS
        stamp = maps[:, top : top + STAMP_ROWS, left : left + STAMP_ROWS] @ bits
        table[cy, cx, ..., :STAMP_ROWS] = stamp.reshape(phases, phases, STAMP_ROWS)
    return words


def raster_scratch(height: int, width: int) -> np.ndarray:
    """Returns an empty bitmap F of height x width pixels with margins for stamps: uint64 [rows, words].

    Pixel (x, y) is bit MARGIN + x of row REACH + y.
    """
    return np.zeros((height + STAMP_ROWS + 1, -(-(width + 2 * MARGIN) // WORD)), np.uint64)


def pixels(bitmap: np.ndarray, height: int, width: int) -> np.ndarray:
    """Returns the pixels of a bitmap: bool [height, width]."""
    bits = np.unpackbits(bitmap.view(np.uint8), axis=1, bitorder="little").astype(bool)
    return bits[REACH : REACH + height, MARGIN : MARGIN + width]


class _Mapping(NamedTuple):
    """Maps canonical centres in 1/16 px to edge coordinates of the crop: x to scale_x * x + offset_x, y likewise."""

    scale_x: float
    offset_x: float
    scale_y: float
    offset_y: float


@kernel
def remap(positions, counts, rules, frame, size, view, side, out):
    """Maps the stored positions of one image to pixel centres in the crop, in 1/16 px. Returns the number kept.

    positions: uint16 [K, 2] (x, y), pixel centres in 1/16 px of the canonical frame; counts: int [G], the number of
    positions in each group, in order; rules: RuleArrays; frame, size: (height, width) of the canonical frame and of the
    image that `view` (see kamim.method.geometry) refers to; out: int32 [>= K, 2] (x, y).

    For any arguments, kept points lie within the crop and at most K rows of out are written: counts are clipped to
    the number of positions, and negative borders are treated as 0.
    """
    ax, bx = axis_map(view[1], view[3], side, view[5])
    ay, by = axis_map(view[0], view[2], side, view[4])
    # canonical centre in 1/16 px -> edge coordinate of the image -> edge coordinate of the crop
    mapping = _Mapping(
        ax * size[1] / frame[1] / POSITION_UNIT,
        bx + ax * 0.5 * size[1] / frame[1],
        ay * size[0] / frame[0] / POSITION_UNIT,
        by + ay * 0.5 * size[0] / frame[0],
    )
    words, points = positions.reshape(positions.size).view(np.uint32), out.reshape(out.size).view(np.int64)
    inside = np.empty(len(positions), np.uint8)
    kept, stop = np.uint64(0), 0  # an unsigned index needs no check for negative values
    for group in range(min(len(rules.borders), len(counts))):
        start, stop, before = stop, stop + min(max(int(counts[group]), 0), len(positions) - stop), kept
        border = max(rules.borders[group], 0.0)
        _place(words[start:stop], mapping, border, side - border, rules.snap, points[start:], inside)
        for k in range(stop - start):  # without a branch: every point is copied; the next overwrites a dropped one
            points[kept] = points[start + k]
            kept += np.uint64(inside[k])
        if rules.caps[group] > 0:
            kept = min(kept, before + np.uint64(rules.caps[group]))
    return int(kept)


@bare_kernel
def _place(positions, mapping, low, high, snap, points, inside):
    """Maps the positions of one group for `remap`, dropped ones included, and marks which lie in low .. high.

    Each position and each point is one word with x in its lower half, so that the loop vectorises.
    """
    for k in range(len(positions)):
        x = np.int32(positions[k] & np.uint32(0xFFFF)) * mapping.scale_x + mapping.offset_x
        y = np.int32(positions[k] >> np.uint32(16)) * mapping.scale_y + mapping.offset_y
        inside[k] = (low <= x) & (x < high) & (low <= y) & (y < high)
        if snap:  # the pixel that holds the edge coordinate is the rounded centre
            px, py = np.int32(x) * POSITION_UNIT, np.int32(y) * POSITION_UNIT
        else:
            px = max(np.int32((x - 0.5) * POSITION_UNIT + _ROUNDER - _ROUNDER), np.int32(0))
            py = max(np.int32((y - 0.5) * POSITION_UNIT + _ROUNDER - _ROUNDER), np.int32(0))
        points[k] = np.int64(px) | (np.int64(py) << np.int64(32))


@kernel
def _border_class(i, side):
    if i < BORDER:
        return i
    if i >= side - BORDER:
        return i - side + CLASSES
    return BORDER


@bare_kernel
def _draw(points, height, width, table, bitmap):
    """Draws footprints as `raster` does, without clearing. LLVM would not inline the loop body as a function."""
    drawn, pitch = bitmap.reshape(bitmap.size).view(np.uint8), 8 * bitmap.shape[1]
    for k in range(len(points)):
        x, y = points[k, 0], points[k, 1]
        column, row = x >> 4, y >> 4
        if not ((0 <= column < width) & (0 <= row < height)):
            continue
        stamp = table[_border_class(row, height), _border_class(column, width), y & 15, x & 15]
        upper, middle, lower = stamp[0], stamp[1], stamp[2]  # read first: for LLVM, writes could alias the table
        left = column + MARGIN - REACH
        at, shift = row * pitch + (left >> 3), np.uint64(left & 7)
        for r in range(STAMP_ROWS):  # one byte-aligned word per row
            rows = upper if r < 4 else middle if r < 8 else lower
            store8(drawn, at, load8(drawn, at) | (((rows >> np.uint64(16 * (r % 4))) & np.uint64(0xFFFF)) << shift))
            at += pitch


@bare_kernel
def raster(points, count, height, width, table, bitmap):
    """Draws the footprints of points[:count] (int32 [.., 2] (x, y), centres in 1/16 px of the crop) into bitmap.

    bitmap: raster_scratch(height, width), cleared first. Points outside the crop are ignored.
    """
    bitmap[:] = 0
    _draw(points[:count], height, width, table, bitmap)


class Footprint(NamedTuple):
    """A footprint as compiled loops take it. table: the result of `stamps`; runs: that of `runs`."""

    table: np.ndarray
    runs: np.ndarray


def footprint(name: str, rules: Rules) -> Footprint:
    """Returns a footprint for keypoints with such rules. Raises KamimError if its name is unknown."""
    table = stamps(name, 1 if rules.snap else POSITION_UNIT)
    return Footprint(table, runs(table))


def runs(table: np.ndarray) -> np.ndarray:
    """Returns the horizontal runs of set pixels of the interior footprint at phase 0: int64 [R, 3], sorted.

    table: the result of `stamps`. Columns: (length, row, bit), with row and bit as in `stamps`.
    """
    rows = np.unpackbits(table[BORDER, BORDER, 0, 0].view(np.uint8).reshape(-1, 2), axis=1, bitorder="little")
    edges = np.diff(np.pad(rows.astype(np.int64), ((0, 0), (1, 1))), axis=1)
    (row, start), (_, end) = np.nonzero(edges == 1), np.nonzero(edges == -1)
    return np.array(sorted(zip(end - start, row, start, strict=True)), np.int64)


@bare_kernel
def raster_whole(points, count, height, width, footprint, bitmap, dots):
    """Draws as `raster` does, for points on whole pixels; several times as fast if there are many.

    Interior points share one footprint: a bitmap of single points is widened step by step to the length of each of
    the footprint's runs (see `runs`), then ORed in at the run's offset. footprint: Footprint; dots: two bitmaps of
    raster_scratch.
    """
    runs = footprint.runs
    bitmap[:] = 0
    dots[:] = 0
    words, flat = bitmap.shape[1], bitmap.reshape(bitmap.size)
    wide, wider = dots[0].reshape(bitmap.size)[: height * words], dots[1].reshape(bitmap.size)[: height * words]
    bytes_of_dots = wide.view(np.uint8)
    inner_width, inner_height = np.uint32(max(width - 2 * BORDER, 0)), np.uint32(max(height - 2 * BORDER, 0))
    for k in range(count):
        x, y = points[k, 0], points[k, 1]
        column, row = np.uint32((x >> 4) - BORDER), np.uint32((y >> 4) - BORDER)  # negative values wrap to large ones
        if (column < inner_width) & (row < inner_height):
            left = column + np.uint32(BORDER + MARGIN - REACH)
            at = (row + np.uint32(BORDER)) * np.uint32(8 * words) + (left >> np.uint32(3))
            bytes_of_dots[at] |= np.uint8(1) << np.uint8(left & np.uint32(7))
        else:
            _draw(points[k : k + 1], height, width, footprint.table, bitmap)
    length = 1
    for i in range(len(runs)):
        while length < runs[i, 0]:
            step = min(length, runs[i, 0] - length)
            for word in range(len(wide)):
                wider[word] = wide[word]
            _add_moved(wide, step, wider)
            wide, wider, length = wider, wide, length + step
        _add_moved(wide, runs[i, 2], flat[runs[i, 1] * words :])


@bare_kernel
def _add_moved(source, by, to):
    """ORs source (uint64 [n]), moved right by 0 <= `by` < WORD pixels, into `to`. Bits past the last word are lost."""
    if by == 0:
        for i in range(len(source)):
            to[i] |= source[i]
        return
    shift, carry = np.uint64(by), np.uint64(WORD - by)
    to[0] |= source[0] << shift
    near, rest = source[1:], to[1:]
    for i in range(len(near)):
        rest[i] |= (near[i] << shift) | (source[i] >> carry)


@kernel
def _byte_counts(v):
    """Returns the number of set bits in each byte of a word, as the bytes of a word."""
    v = v - ((v >> np.uint64(1)) & np.uint64(0x5555555555555555))
    v = (v & np.uint64(0x3333333333333333)) + ((v >> np.uint64(2)) & np.uint64(0x3333333333333333))
    return (v + (v >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)


@kernel
def _popcount(v):
    return (_byte_counts(v) * np.uint64(0x0101010101010101)) >> np.uint64(56)


@kernel
def _counts_of_bytes(bitmap, patch_size, counts):
    """Computes cell_counts for cells of whole bytes: eight columns of eight pixels at a time."""
    bands, words = patch_size // 8, bitmap.shape[1]
    drawn = bitmap[REACH : REACH + 8 * bands * len(counts)].copy().reshape(-1)
    for i in range(len(drawn)):
        drawn[i] = _byte_counts(drawn[i])
    for band in range(bands * len(counts)):  # 8 rows of at most 8 bits fit a byte
        sums = drawn[8 * words * band : 8 * words * (band + 1)]
        for r in range(1, 8):
            for word in range(words):
                sums[word] += sums[r * words + word]
        row, in_bytes = counts[band // bands], sums.view(np.uint8)[MARGIN // 8 :]
        for byte in range(bands):
            for column in range(len(row)):
                row[column] += np.int16(in_bytes[column * bands + byte])


@kernel
def cell_counts(bitmap, patch_size, counts):
    """Counts the set pixels of F in each patch_size x patch_size cell. counts: int16 [g, g], overwritten.

    int16 is supported by torch on every device and holds patch_size^2 up to patch_size 181. Raises KamimError if the
    cells exceed the bitmap.
    """
    if counts.shape[0] * patch_size > bitmap.shape[0] - STAMP_ROWS - 1 or (
        counts.shape[1] * patch_size > WORD * bitmap.shape[1] - 2 * MARGIN
    ):
        raise KamimError("the cells exceed the bitmap")
    counts[:] = 0
    if patch_size % 8 == 0:
        _counts_of_bytes(bitmap, patch_size, counts)
        return
    for y in range(counts.shape[0] * patch_size):
        for j in range(counts.shape[1]):
            total = np.uint64(0)
            at, end = MARGIN + j * patch_size, MARGIN + (j + 1) * patch_size
            while at < end:  # a cell may span words
                n = min(end, (at // WORD + 1) * WORD) - at
                bits = bitmap[y + REACH, at // WORD] >> np.uint64(at % WORD)
                if n < WORD:
                    bits &= (np.uint64(1) << np.uint64(n)) - np.uint64(1)
                total += _popcount(bits)
                at += n
            counts[y // patch_size, j] += np.int16(total)


def quantise(xy: np.ndarray) -> np.ndarray:
    """Rounds pixel centres in px (float32 [K, 2]) to int32 [K, 2] in 1/16 px, as cv2.drawKeypoints does."""
    return np.rint(np.asarray(xy, np.float32) * POSITION_UNIT).astype(np.int32)


def keypoint_map(xy: np.ndarray, height: int, width: int, footprint: str) -> np.ndarray:
    """Returns the map F of keypoints detected on the image itself: bool [height, width].

    xy: float32 [K, 2], pixel centres in px; those that round to a position outside the image are ignored.
    """
    points = quantise(xy).reshape(-1, 2)
    inside = (points >= 0).all(1) & (points[:, 0] < width * POSITION_UNIT) & (points[:, 1] < height * POSITION_UNIT)
    bitmap = raster_scratch(height, width)
    raster(points[inside], int(inside.sum()), height, width, stamps(footprint), bitmap)
    return pixels(bitmap, height, width)


def opencv_map(xy: np.ndarray, height: int, width: int, footprint: str) -> np.ndarray:
    """keypoint_map by cv2.drawKeypoints, as the released code draws it: slow, but the first map needs no compiled loop.

    Compiled loops take 0.4 s to load, which is most of the time of a command that looks at one image.
    """
    points = quantise(xy).reshape(-1, 2)
    points = points[(points >= 0).all(1) & (points < np.array([width, height]) * POSITION_UNIT).all(1)]
    if footprint == "ring":
        rings = [cv2.KeyPoint(x, y, 1.0) for x, y in (points / POSITION_UNIT).tolist()]
        black = np.zeros((height, width, 3), np.uint8)
        return np.asarray(cv2.drawKeypoints(black, rings, None, color=(255, 255, 255))[..., 0] > 0)  # type: ignore[call-overload]
    assert footprint == "point", footprint
    drawn = np.zeros((height + 1, width + 1), np.bool_)  # a centre near the border may lie in the next pixel
    column, row = (points.T + POSITION_UNIT // 2) // POSITION_UNIT
    drawn[row, column] = True
    return drawn[:height, :width]


def map_counts(bitmap: np.ndarray, patch_size: int) -> np.ndarray:
    """Counts the pixels of a map F (bool [H, W]) per cell: int16 [H // w_ps, W // w_ps]; partial cells are ignored."""
    height, width = (side // patch_size * patch_size for side in bitmap.shape)
    cells = bitmap[:height, :width].reshape(height // patch_size, patch_size, width // patch_size, patch_size)
    return cells.sum(axis=(1, 3), dtype=np.int16)
