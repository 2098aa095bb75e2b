"""Cell counts of one crop: from the store's keypoints, or from the crop's own pixels (the reference path)."""

from typing import NamedTuple, Protocol

import cv2
import numpy as np
from numba import njit

from kamim import keypoints as kp
from kamim.detectors import detector
from kamim.store import Keypoints

MAX_POINTS = 1 << 16  # per image; scratch is grown beyond it where a store needs more


class View(NamedTuple):
    """How a crop was taken: box (top, left, height, width) in the stored image of size (height, width), flips."""

    box: tuple[int, int, int, int]
    image_size: tuple[int, int]
    flip_v: bool
    flip_h: bool


class Scratch:
    """Working memory of one thread."""

    def __init__(self, resolution: int):
        self.bitmap = kp.raster_scratch(resolution, resolution)
        self.points = np.empty((MAX_POINTS, 2), np.int32)


class Counter(Protocol):
    """Fills a sample's cell counts."""

    patch_size: int

    def count(self, index: int, view: View, crop: np.ndarray, scratch: Scratch, out: np.ndarray) -> None:
        """Counts for sample `index`, whose crop (uint8 [R, R, 3]) was taken as `view`, into out (int16 [g, g])."""
        ...


@njit(cache=True, nogil=True)
def _remapped_counts(
    positions, counts, borders, caps, snap, frame, image_size, box, flip_v, flip_h, side, table, patch_size,
    points, bitmap, out,
):  # fmt: skip
    kept = kp.remap(
        positions, counts, borders, caps, snap, frame[0], frame[1], image_size[0], image_size[1], box,
        flip_v, flip_h, side, points,
    )  # fmt: skip
    kp.raster(points, kept, side, side, table, bitmap)
    kp.cell_counts(bitmap, patch_size, out)


class CachedCounts:
    """From keypoints found once on the canonical frame, remapped into the crop."""

    def __init__(self, keypoints: Keypoints, footprint: str, patch_size: int):
        self.patch_size = patch_size
        self._keypoints = keypoints
        self._table = kp.stamps(footprint)
        self._rules = keypoints.rules.arrays()

    def count(self, index: int, view: View, crop: np.ndarray, scratch: Scratch, out: np.ndarray) -> None:
        """See Counter."""
        positions, counts = self._keypoints.image(index)
        if len(positions) > len(scratch.points):
            scratch.points = np.empty((len(positions), 2), np.int32)
        _remapped_counts(
            positions, counts, *self._rules, self._keypoints.frame[index], view.image_size, view.box,
            view.flip_v, view.flip_h, len(crop), self._table, self.patch_size, scratch.points, scratch.bitmap, out,
        )  # fmt: skip


class OnlineCounts:
    """From keypoints found on the crop itself, flips included, as the released code does: slow, and the truth."""

    def __init__(self, name: str, footprint: str, patch_size: int):
        self.patch_size = patch_size
        cv2.setNumThreads(1)  # the loader's threads are the parallelism
        self._detector = detector(name)
        self._footprint = footprint

    def count(self, index: int, view: View, crop: np.ndarray, scratch: Scratch, out: np.ndarray) -> None:
        """See Counter."""
        side = len(crop)
        found = self._detector.detect(crop)
        out[:] = kp.map_counts(kp.keypoint_map(found.xy, side, side, self._footprint), self.patch_size)
