"""Cell counts of crops: from the store's keypoints, or from the crops' own pixels (the reference path)."""

from typing import NamedTuple, Protocol

import cv2
import numpy as np
from numba import carray

from kamim.detectors import detector
from kamim.method import geometry
from kamim.method import keypoints as kp
from kamim.method.kernels import kernel
from kamim.method.simd import pointer8, pointer16
from kamim.storage.gaps import decode_into
from kamim.storage.keypoints import GAPS, Keypoints


class Scratch:
    """Working memory of one thread."""

    def __init__(self, resolution: int):
        self.bitmap = kp.raster_scratch(resolution, resolution)
        self.dots = np.stack([self.bitmap] * 2)
        self.points = np.empty((0, 2), np.int32)
        self.positions = np.empty((0, 2), np.uint16)


class Crops(NamedTuple):
    """Crops of n samples, and the views they were taken with.

    indices: int64 [n], their numbers. sizes: int [n, 2], (height, width) of the stored images. views: int64 [n, 6],
    see kamim.method.geometry. pixels: uint8 [n, R, R, 3].
    """

    indices: np.ndarray
    sizes: np.ndarray
    views: np.ndarray
    pixels: np.ndarray

    def only(self, i: int) -> "Crops":
        """Returns the i-th crop as Crops of one sample."""
        return Crops(*(array[i : i + 1] for array in self))


class Counter(Protocol):
    """Computes the cell counts of samples."""

    patch_size: int

    def check_crops(self, images: int, resolution: int, crop_scale: tuple[float, float] | None) -> None:
        """Raises KamimError if it cannot count on such crops of a store of `images` images.

        crop_scale: smallest and largest area, None for whole images.
        """
        ...

    def count(self, crops: Crops, scratch: Scratch, out: np.ndarray) -> None:
        """Writes the counts of every crop to out (int16 [n, g, g])."""
        ...

    def will_need(self, indices: np.ndarray) -> None:
        """Announces that samples (int [n]) will be counted soon. See kamim.storage.read_ahead."""
        ...


@kernel
def _remapped_counts(
    coded,
    addresses,
    counts,
    borders,
    caps,
    snap,
    frames,
    sizes,
    views,
    side,
    table,
    runs,
    patch_size,
    decoded,
    points,
    bitmap,
    dots,
    out,
):
    """Counts remapped keypoints. addresses [n], counts [n, G]: see Keypoints; frames, sizes [n, 2], views [n, 6].

    coded: whether addresses are of gaps. decoded: room for their positions.
    """
    for i in range(len(out)):
        total = int(counts[i].sum())
        if total > len(points):
            raise IndexError("more keypoints than there is room for")
        if coded:
            decoded_count = decode_into(carray(pointer8(addresses[i]), total), frames[i, 0], frames[i, 1], decoded)
            if decoded_count < 0:
                raise IndexError("keypoints lie outside their frame")
            positions = decoded[:decoded_count]  # at most counts[i], a number of bytes, to which remap clips
        else:
            positions = carray(pointer16(addresses[i]), (total, 2))
        kept = kp.remap(positions, counts[i], borders, caps, snap, frames[i], sizes[i], views[i], side, points)
        if snap:
            kp.raster_whole(points, kept, side, side, table, runs, bitmap, dots)
        else:
            kp.raster(points, kept, side, side, table, bitmap)
        kp.cell_counts(bitmap, patch_size, out[i])


class CachedCounts:
    """Remaps cached keypoints, of the canonical frame nearest in scale to the crop, into the crop."""

    def __init__(self, keypoints: Keypoints, footprint: str, patch_size: int):
        self.patch_size = patch_size
        self._keypoints = keypoints
        self._rules = keypoints.rules.arrays()
        self._table = kp.stamps(footprint, 1 if keypoints.rules.snap else geometry.POSITION_UNIT)
        self._runs = kp.runs(self._table)

    def check_crops(self, images: int, resolution: int, crop_scale: tuple[float, float] | None) -> None:
        """See Counter."""
        self._keypoints.check_crops(images, resolution, crop_scale)

    def count(self, crops: Crops, scratch: Scratch, out: np.ndarray) -> None:
        """See Counter."""
        side = crops.pixels.shape[1]
        offered = self._keypoints.frame[crops.indices]
        chosen = geometry.nearest_frames(offered, crops.sizes, crops.views, side)
        addresses, counts = self._keypoints.addresses(crops.indices, chosen)
        if (most := int(counts.sum(axis=1).max())) > len(scratch.points):
            scratch.points, scratch.positions = np.empty((most, 2), np.int32), np.empty((most, 2), np.uint16)
        _remapped_counts(
            self._keypoints.array == GAPS,
            addresses,
            counts,
            *self._rules,
            offered[np.arange(len(chosen)), chosen],
            crops.sizes,
            crops.views,
            side,
            self._table,
            self._runs,
            self.patch_size,
            scratch.positions,
            scratch.points,
            scratch.bitmap,
            scratch.dots,
            out,
        )

    def will_need(self, indices: np.ndarray) -> None:
        """See Counter."""
        self._keypoints.will_need(indices)


class OnlineCounts:
    """Detects keypoints on the crop itself, flips included, as the released code does: slow, but the reference."""

    def __init__(self, name: str, footprint: str, patch_size: int):
        self.patch_size = patch_size
        cv2.setNumThreads(1)  # the loader's threads are the parallelism
        self._detector = detector(name)
        self._footprint = footprint

    def check_crops(self, images: int, resolution: int, crop_scale: tuple[float, float] | None) -> None:
        """See Counter. Counts on any crop."""

    def count(self, crops: Crops, scratch: Scratch, out: np.ndarray) -> None:
        """See Counter."""
        side = crops.pixels.shape[1]
        for crop, counts in zip(crops.pixels, out, strict=True):
            keypoints = self._detector.detect(crop)
            counts[:] = kp.map_counts(kp.keypoint_map(keypoints.xy, side, side, self._footprint), self.patch_size)

    def will_need(self, indices: np.ndarray) -> None:
        """See Counter. Reads nothing besides the pixels."""
