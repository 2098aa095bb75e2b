"""JPEG's colour space (JFIF: YCbCr of full range, ITU-R BT.601) and images as its planes with 4:2:0 subsampling.

Such an image of H x W px is the plane Y, uint8 [H, W], then Cb and Cr, uint8 [ceil(H / 2), ceil(W / 2)] each, row by
row. A sample of Cb or Cr stands for a block of 2 x 2 px and lies in its centre, as in JPEG files.
"""

from typing import Any

import numpy as np

from kamim.method.kernels import kernel

_ROUND = 1 << 15  # 1/2 of 16 fractional bits


def planes_bytes(height: Any, width: Any) -> Any:
    """Returns the bytes that the planes of height x width px take: an int, or int64 [n] for arrays of sizes."""
    return height * width + 2 * ((height + 1) // 2) * ((width + 1) // 2)


@kernel
def to_planes(rgb):
    """Converts RGB, uint8 [H, W, 3], to planes, uint8 [planes_bytes(H, W)].

    Y is rounded as libjpeg rounds it; Cb and Cr are those of a block's mean colour, at an odd edge of fewer pixels.
    """
    height, width, _ = rgb.shape
    rows, columns = (height + 1) // 2, (width + 1) // 2
    planes = np.empty(height * width + 2 * rows * columns, np.uint8)
    for y in range(height):
        for x in range(width):
            red, green, blue = int(rgb[y, x, 0]), int(rgb[y, x, 1]), int(rgb[y, x, 2])
            planes[y * width + x] = (19595 * red + 38470 * green + 7471 * blue + _ROUND) >> 16
    cb, cr = height * width, height * width + rows * columns
    for y in range(rows):
        for x in range(columns):
            red = green = blue = count = 0
            for v in range(2 * y, min(2 * y + 2, height)):
                for u in range(2 * x, min(2 * x + 2, width)):
                    red, green, blue = red + rgb[v, u, 0], green + rgb[v, u, 1], blue + rgb[v, u, 2]
                    count += 1
            at, half = y * columns + x, (count << 16) // 2
            offset = (128 * count << 16) + half
            planes[cb + at] = min((-11059 * red - 21709 * green + 32768 * blue + offset) // (count << 16), 255)
            planes[cr + at] = min((32768 * red - 27439 * green - 5329 * blue + offset) // (count << 16), 255)
    return planes
