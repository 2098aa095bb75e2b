"""Whole-pixel positions on a frame as the gaps between them, about a byte per keypoint.

The pixels of a frame are numbered row by row, and keypoints are sorted by that number. A keypoint's gap is the number
of pixels between it and the keypoint before it (for the first one: before it). The code of a gap is one byte LONG for
every LONG pixels, then one byte with the rest, which is less. Any bytes are therefore a code of at most one keypoint
per byte, and all of its keypoints lie on the frame if the last one does.
"""

import numpy as np

from kamim.method.geometry import POSITION_UNIT
from kamim.method.kernels import bare_kernel, kernel

LONG = 255


@kernel
def encode(positions, height, width):
    """Returns the code of the positions on a frame of height x width px: uint8 [B].

    positions: uint16 [K, 2] (x, y) in 1/16 px, sorted by y, x. Raises ValueError unless they are distinct whole pixels
    of the frame.
    """
    code, used, after = np.full(len(positions) + height * width // LONG, LONG, np.uint8), 0, 0
    for k in range(len(positions)):
        x, y = np.int64(positions[k, 0]), np.int64(positions[k, 1])
        gap = (y * width + x) // POSITION_UNIT - after
        if (x | y) % POSITION_UNIT or x >= width * POSITION_UNIT or y >= height * POSITION_UNIT or gap < 0:
            raise ValueError("positions are not sorted, distinct pixels of the frame")
        used += gap // LONG
        code[used] = gap % LONG
        used, after = used + 1, after + gap + 1
    return code[:used].copy()


def decode(code: np.ndarray, height: int, width: int) -> np.ndarray:
    """Returns the positions that a code (uint8 [B]) holds: uint16 [K, 2], see `encode`.

    Raises IndexError if they do not lie on a frame of height x width px.
    """
    positions = np.empty((len(code), 2), np.uint16)
    kept = decode_into(code, height, width, positions)
    if kept < 0:
        raise IndexError("keypoints lie outside their frame")
    return positions[:kept]


@bare_kernel
def decode_into(code, height, width, positions):
    """Computes `decode` in positions (uint16 [>= B, 2]). Returns K, or -1 if there is no room or a pixel lies outside.

    height, width: at most MAX_FRAME_SIDE. Neither loop branches, and the second one vectorises.
    """
    if len(code) > len(positions):
        return -1
    words = positions.reshape(positions.size).view(np.uint32)
    kept, pixel = np.uint64(0), np.uint64(0)  # an unsigned index needs no check for negative values
    for i in range(len(code)):
        gap, ends = np.uint64(code[i]), np.uint64(code[i] != LONG)
        words[kept] = np.uint32(pixel + gap)
        kept, pixel = kept + ends, pixel + gap + ends
    if pixel > np.uint64(height) * np.uint64(width):
        return -1
    positions, rows_per_pixel = words[: np.int64(kept)], 1.0 / max(np.float64(width), 1.0)
    skipped = np.uint32(1 << 16) - np.uint32(width)  # x + 65536 y is the pixel's number and y times this
    for k in range(len(positions)):  # the half keeps quotients farther from whole numbers than the rounding moves them
        y = np.uint32(np.int32((np.int32(positions[k]) + 0.5) * rows_per_pixel))
        positions[k] = (positions[k] + y * skipped) * np.uint32(POSITION_UNIT)
    return len(positions)
