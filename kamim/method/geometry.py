"""Sizes, crop boxes and point maps. This is the one place that knows the coordinate convention.

Edge coordinates: x right, y down, pixel i spans [i, i + 1). A resize from width a to width b multiplies x
by b / a; a flip of width w is w - x. Detectors report pixel centres: centre = edge - 0.5.
Boxes are (top, left, height, width) in whole pixels. A view says how a crop is taken: its box, then whether it is
flipped vertically and horizontally, six whole numbers.
"""

import functools
import math

import numpy as np

from kamim.method import rng
from kamim.method.kernels import kernel

CROP_RATIO = (3 / 4, 4 / 3)  # width over height of a random resized crop, where nobody says otherwise
CROP_ATTEMPTS = 10  # torchvision's RandomResizedCrop
POSITION_UNIT = 16  # stored keypoint positions are whole sixteenths of a pixel, as cv2.drawKeypoints rounds
CANONICAL_DRAWS = 512
MAX_FRAME_SIDE = 65535 // POSITION_UNIT  # positions are uint16


def size_for_area(height: int, width: int, area: float) -> tuple[int, int]:
    """The (height, width) of about `area` pixels that keeps the aspect ratio; sides in 1 .. MAX_FRAME_SIDE."""
    scale = math.sqrt(area / (height * width))
    return _side(height * scale), _side(width * scale)


def _side(length: float) -> int:
    return min(max(round(length), 1), MAX_FRAME_SIDE)


def stored_area(resolution: int, crop_scale: tuple[float, float]) -> float:
    """The smallest area from which no crop is enlarged: (resolution / sqrt(smallest scale))^2 px."""
    return resolution**2 / crop_scale[0]


def stored_size(height: int, width: int, area: float) -> tuple[int, int]:
    """Size an image is stored at: `area` pixels, or as it is where it has no more; sides in 1 .. MAX_FRAME_SIDE."""
    return size_for_area(height, width, min(area, height * width))


@functools.lru_cache(maxsize=4096)  # data sets have many images of one size
def canonical_frames(
    height: int, width: int, resolution: int, crop_scale: tuple[float, float], count: int
) -> tuple[tuple[int, int], ...]:
    """Sizes (height, width) at which random crops see an image, `count` of them: where its keypoints are looked for.

    A crop is resized to resolution x resolution px, so it shows the image at one scale down and another across. Of
    CANONICAL_DRAWS crops those scales are divided into equal parts, along the direction in which they differ most;
    a frame has the mean scales (of their logarithms) of its part. Aspect ratios are CROP_RATIO; sides in
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
    """Which of an image's frames is nearest in scale to a view of it: int64 [n].

    frames: int [n, V, 2] (height, width), of images stored at sizes (int [n, 2]); views: int64 [n, 6].
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
def crop_box(height, width, scale_min, scale_max, ratio_min, ratio_max, seed, epoch, index):
    """RandomResizedCrop's box (torchvision v2 make_params) -> (top, left, box height, box width).

    Draw 2k and 2k + 1 of stream CROP give the area and the aspect of attempt k, draws 20 and 21 the place.
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
    h, w = height, width  # no attempt fits: the largest central box within the ratios
    if width / height < ratio_min:
        h = int(np.rint(width / ratio_min))
    elif width / height > ratio_max:
        w = int(np.rint(height * ratio_max))
    return (height - h) // 2, (width - w) // 2, h, w


@kernel
def flips(seed, epoch, index):
    """(vertical, horizontal), each true with probability 0.5 (stream FLIP, draws 0 and 1)."""
    return rng.unit(seed, epoch, index, rng.FLIP, 0) < 0.5, rng.unit(seed, epoch, index, rng.FLIP, 1) < 0.5


@kernel
def crop_views(sizes, scale, ratio, seed, epoch, indices):
    """A random view of each image: int64 [n, 6]. sizes: int [n, 2] (height, width).

    scale, ratio: (least, greatest) of crop_box. indices: the samples' numbers.
    """
    views = np.empty((len(indices), 6), np.int64)
    for i in range(len(indices)):
        height, width, index = int(sizes[i, 0]), int(sizes[i, 1]), indices[i]
        box = crop_box(height, width, scale[0], scale[1], ratio[0], ratio[1], seed, epoch, index)
        views[i, 0], views[i, 1], views[i, 2], views[i, 3] = box
        views[i, 4], views[i, 5] = flips(seed, epoch, index)
    return views


def whole_views(sizes: np.ndarray) -> np.ndarray:
    """The views that show whole images as they are: int64 [n, 6]."""
    return np.pad(sizes.astype(np.int64), ((0, 0), (2, 2)))


@kernel
def axis_map(start, length, out_length, flip):
    """(scale, offset) that takes an edge coordinate of the image to one of the resized, flipped crop."""
    scale = out_length / length
    if flip:
        return -scale, out_length + start * scale
    return scale, -start * scale
