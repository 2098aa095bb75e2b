"""Reports images of a finished store from which KAMIM learns little: of few grey levels, or without keypoints."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from kamim.storage.images import ImageReader
from kamim.storage.store import Store
from preprocess.decode import decode_plain_jpeg

LOOKED_AT = 500  # images whose grey levels are counted, spread evenly over a store
OUTSIDE = 0.005  # share of the pixels at each end that does not count, such as a label burned into an X-ray
FEW_LEVELS = 25  # a tenth of the range of 8 bits


def cautions(store: Store) -> list[str]:
    """Returns a line for images that use less than a tenth of their range, and one for each detector without keypoints.

    Images that cannot be decoded are left out. Raises KamimError if a component of the store is damaged.
    """
    chosen = np.unique(np.linspace(0, len(store) - 1, LOOKED_AT).astype(np.int64))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        levels = [one for one in pool.map(lambda i: _levels(store.images, int(i)), chosen) if one is not None]
    lines = []
    if narrow := sum(one < FEW_LEVELS for one in levels):
        lines.append(
            f"{narrow:,} of {len(levels):,} images looked at use less than a tenth of the range of 0 to 255, so "
            "detectors find few keypoints on them; if their files have 16 bits with values of fewer bits, scale those "
            "to the whole range first"
        )
    for name in store.detectors:
        if none := int((store.keypoints(name).held == 0).sum()):
            lines.append(f"{none:,} of {len(store):,} images have no {name} keypoints: their W is 1, as in SimMIM")
    return lines


def _levels(images: ImageReader, index: int) -> int | None:
    """Returns the number of levels that nearly all pixels lie within, in the channel where they are most."""
    data, (height, width) = images.data(index), images.sizes[index].tolist()
    if images.encoding == "jpeg":
        decoded = decode_plain_jpeg(data.tobytes())
        if decoded is None:
            return None
        data = decoded
    elif images.encoding == "yuv420":
        data = data[: height * width]  # the plane Y
    return max(_range(channel) for channel in data.reshape(height * width, -1).T)


def _range(values: np.ndarray) -> int:
    """Returns the distance between the quantiles OUTSIDE and 1 - OUTSIDE of values, uint8 [n]."""
    below = np.cumsum(np.bincount(values, minlength=256))
    low, high = np.searchsorted(below, [OUTSIDE * len(values), (1 - OUTSIDE) * len(values)])
    return int(high - low)
