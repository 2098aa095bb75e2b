"""Sizes, crop boxes and point maps. The coordinate convention is defined here and nowhere else.

Edge coordinates: x right, y down, pixel i spans [i, i + 1). A resize from width a to width b multiplies x
by b / a; a flip of width w is w - x. Detectors report pixel centres: centre = edge - 0.5.
Boxes are (top, left, height, width) in whole pixels. A view is six integers that describe a crop: its box, then
whether it is flipped vertically and horizontally (0 or 1).
"""

import functools
import math

import numpy as np

from kamim.method import rng
from kamim.method.kernels import kernel

CROP_RATIO = (3 / 4, 4 / 3)  # default width / height of a random resized crop
CROP_ATTEMPTS = 10  # as in torchvision's RandomResizedCrop
POSITION_UNIT = 16  # stored keypoint positions are multiples of 1/16 px, the precision of cv2.drawKeypoints
CANONICAL_DRAWS = 512
MAX_FRAME_SIDE = 65535 // POSITION_UNIT  # positions are uint16


def size_for_area(height: int, width: int, area: float) -> tuple[int, int]:
    """Returns the (height, width) of about `area` px that keeps the aspect ratio; sides in 1 .. MAX_FRAME_SIDE."""
    scale = math.sqrt(area / (height * width))
    return _side(height * scale), _side(width * scale)


def _side(length: float) -> int:
    return min(max(round(length), 1), MAX_FRAME_SIDE)


def stored_area(resolution: int, crop_scale: tuple[float, float]) -> float:
    """Returns the smallest area from which no crop is enlarged: (resolution / sqrt(smallest scale))^2 px."""
    return resolution**2 / crop_scale[0]


def stored_size(height: int, width: int, area: float) -> tuple[int, int]:
    """Returns the (height, width) an image is stored at: at most `area` px, never enlarged; sides as above."""
    return size_for_area(height, width, min(area, height * width))


@functools.lru_cache(maxsize=4096)  # data sets have many images of one size
def canonical_frames(
    height: int, width: int, resolution: int, crop_scale: tuple[float, float], count: int
) -> tuple[tuple[int, int], ...]:
    """Returns the `count` sizes (height, width) at which keypoints are detected, chosen from how random crops scale.

    A crop is resized to resolution x resolution px, so it scales the image by one factor vertically and another
    horizontally. The log scales of CANONICAL_DRAWS random crops (aspect ratios CROP_RATIO) are divided into `count`
    equal parts along their principal axis; each frame has the mean log scales of its part. Sides are in
    1 .. MAX_FRAME_SIDE.
    """
    sizes = np.tile((height, width), (CANONICAL_DRAWS, 1))
    views = crop_views(sizes, crop_scale, CROP_RATIO, 0, 0, np.arange(CANONICAL_DRAWS))
    scales = np.log(resolution / views[:, 2:4])
    (yy, yx), (_, xx) = np.cov(scales, rowvar=False)
    angle = math.atan2(2 * yx, yy - xx) / 2  # of the principal axis
    order = np.argsort(scales @ (math.cos(angle), math.sin(angle)), kind="stable")
    means = [np.exp(scales[part].mean(axis=0)) for part in np.array_split(order, count)]
    return tuple((_side(height * down), _side(width * across)) for down, across in means)


@kernel
def nearest_frames(frames, sizes, views, resolution):
    """Returns the index of each image's frame that is nearest in scale to its view: int64 [n].

    frames: int [n, V, 2] (height, width); sizes: int [n, 2], the stored sizes; views: int64 [n, 6].
    """
    nearest = np.zeros(len(views), np.int64)
    for i in range(len(views)):
        least = np.inf
        for v in range(frames.shape[1]):
            down = math.log(frames[i, v, 0] * views[i, 2] / (sizes[i, 0] * resolution))
            across = math.log(frames[i, v, 1] * views[i, 3] / (sizes[i, 1] * resolution))
            if down * down + across * across < least:
                least, nearest[i] = down * down + across * across, v
    return nearest


@kernel
def largest_box(height, width, ratio_min, ratio_max):
    """The largest central box whose width over height is within the ratios -> (top, left, box height, box width)."""
    h, w = height, width
    if width / height < ratio_min:
        h = int(np.rint(width / ratio_min))
    elif width / height > ratio_max:
        w = int(np.rint(height * ratio_max))
    return (height - h) // 2, (width - w) // 2, h, w


@kernel
def crop_box(height, width, scale_min, scale_max, ratio_min, ratio_max, seed, epoch, index):
    """Returns the box (top, left, height, width) that RandomResizedCrop draws (torchvision v2, make_params).

    Draws 2k and 2k + 1 of stream CROP give the area and the aspect ratio of attempt k, draws 20 and 21 the position.
    """
    area = height * width
    log_min, log_max = math.log(ratio_min), math.log(ratio_max)
    for attempt in range(CROP_ATTEMPTS):
        target = area * (scale_min + (scale_max - scale_min) * rng.unit(seed, epoch, index, rng.CROP, 2 * attempt))
        aspect = math.exp(log_min + (log_max - log_min) * rng.unit(seed, epoch, index, rng.CROP, 2 * attempt + 1))
        w = int(np.rint(math.sqrt(target * aspect)))
        h = int(np.rint(math.sqrt(target / aspect)))
        if 0 < w <= width and 0 < h <= height:
            top = int(rng.unit(seed, epoch, index, rng.CROP, 2 * CROP_ATTEMPTS) * (height - h + 1))
            left = int(rng.unit(seed, epoch, index, rng.CROP, 2 * CROP_ATTEMPTS + 1) * (width - w + 1))
            return top, left, h, w
    return largest_box(height, width, ratio_min, ratio_max)  # no attempt fits


@kernel
def flips(seed, epoch, index):
    """Returns (vertical, horizontal), each True with probability 0.5 (stream FLIP, draws 0 and 1)."""
    return rng.unit(seed, epoch, index, rng.FLIP, 0) < 0.5, rng.unit(seed, epoch, index, rng.FLIP, 1) < 0.5


@kernel
def crop_views(sizes, scale, ratio, seed, epoch, indices):
    """Returns a random view of each image: int64 [n, 6].

    sizes: int [n, 2] (height, width). scale, ratio: (min, max), as in crop_box. indices: sample indices, int [n].
    """
    views = np.empty((len(indices), 6), np.int64)
    for i in range(len(indices)):
        height, width, index = int(sizes[i, 0]), int(sizes[i, 1]), indices[i]
        box = crop_box(height, width, scale[0], scale[1], ratio[0], ratio[1], seed, epoch, index)
        views[i, 0], views[i, 1], views[i, 2], views[i, 3] = box
        views[i, 4], views[i, 5] = flips(seed, epoch, index)
    return views


def whole_views(sizes: np.ndarray) -> np.ndarray:
    """Returns the views that show whole, unflipped images: int64 [n, 6]. sizes: int [n, 2] (height, width)."""
    return np.pad(sizes.astype(np.int64), ((0, 0), (2, 2)))


@kernel
def axis_map(start, length, out_length, flip):
    """Returns the (scale, offset) that maps an edge coordinate of the image to the resized, flipped crop."""
    scale = out_length / length
    if flip:
        return -scale, out_length + start * scale
    return scale, -start * scale
