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
from pipelines.chunk import Crops, Scratch


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


class _Stored(NamedTuple):
    """Keypoints of n images as they are stored, on one frame each.

    coded: whether they are gaps. addresses: [n] and counts: [n, G], see Keypoints; frames: int [n, 2] (height, width).
    """

    coded: bool
    addresses: np.ndarray
    counts: np.ndarray
    frames: np.ndarray


@kernel
def _remapped_counts(stored, rules, footprint, crops, patch_size, scratch, out):
    """Remaps keypoints and counts their pixels. stored: _Stored; scratch: CountScratch; out: int16 [n, g, g]."""
    side, points, bitmap = crops.pixels.shape[1], scratch.points, scratch.bitmap
    for i in range(len(out)):
        address, counts, frame = stored.addresses[i], stored.counts[i], stored.frames[i]
        total = int(counts.sum())
        if total > len(points):
            raise IndexError("more keypoints than there is room for")
        if stored.coded:
            decoded_count = decode_into(carray(pointer8(address), total), frame[0], frame[1], scratch.positions)
            if decoded_count < 0:
                raise IndexError("keypoints lie outside their frame")
            positions = scratch.positions[:decoded_count]  # at most a number of bytes, to which remap clips the counts
        else:
            positions = carray(pointer16(address), (total, 2))
        kept = kp.remap(positions, counts, rules, frame, crops.sizes[i], crops.views[i], side, points)
        if rules.snap:
            kp.raster_whole(points, kept, side, side, footprint, bitmap, scratch.dots)
        else:
            kp.raster(points, kept, side, side, footprint.table, bitmap)
        kp.cell_counts(bitmap, patch_size, out[i])


class CachedCounts:
    """Remaps cached keypoints, of the canonical frame nearest in scale to the crop, into the crop."""

    def __init__(self, keypoints: Keypoints, footprint: str, patch_size: int):
        self.patch_size = patch_size
        self._keypoints = keypoints
        self._rules = keypoints.rules.arrays()
        self._footprint = kp.footprint(footprint, keypoints.rules)

    def check_crops(self, images: int, resolution: int, crop_scale: tuple[float, float] | None) -> None:
        """See Counter."""
        self._keypoints.check_crops(images, resolution, crop_scale)

    def count(self, crops: Crops, scratch: Scratch, out: np.ndarray) -> None:
        """See Counter."""
        side = crops.pixels.shape[1]
        offered = self._keypoints.frame[crops.indices]
        chosen = geometry.nearest_frames(offered, crops.sizes, crops.views, side)
        addresses, counts = self._keypoints.addresses(crops.indices, chosen)
        stored = _Stored(self._keypoints.array == GAPS, addresses, counts, offered[np.arange(len(chosen)), chosen])
        room = scratch.counts(int(counts.sum(axis=1).max()))
        _remapped_counts(stored, self._rules, self._footprint, crops, self.patch_size, room, out)

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
