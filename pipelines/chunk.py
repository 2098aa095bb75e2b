"""One compiled call that maps, decodes, crops, resizes and flips the images of a chunk, and what it works on.

The call runs without the GIL and raises nothing. Images that it cannot process are left to pipelines.loader, which
repeats the same steps for one image in Python and reports the error.
"""

from typing import NamedTuple

import numpy as np
from numba import carray

from kamim.method import keypoints as kp
from kamim.method.colour import planes_bytes
from kamim.method.kernels import kernel
from kamim.method.simd import pointer8, prefetch, stream64
from kamim.storage.manifest import FORMATS
from pipelines.crop import crop_resize, lies_within
from pipelines.turbojpeg import Turbo, decode_planes, turbo
from pipelines.ycbcr import INTERLEAVE, crop_planes, stored_planes

_RAW, _YUV420 = FORMATS.index("raw"), FORMATS.index("yuv420")
_LINE = 64  # bytes of a cache line
_planes_bytes = kernel(planes_bytes)


class Crops(NamedTuple):
    """Crops of n samples, and the views they are taken with.

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


class Stored(NamedTuple):
    """The bytes of n images of a store.

    encoding: its index in FORMATS. addresses: uint64 [n], of `lengths` (int64 [n]) bytes each, or 0.
    """

    encoding: int
    addresses: np.ndarray
    lengths: np.ndarray


class CropScratch(NamedTuple):
    """Memory of decode_and_crop. turbo: see pipelines.turbojpeg; resized: see crop_planes; crop: uint8 [R, R, 3]."""

    turbo: Turbo
    resized: np.ndarray
    crop: np.ndarray


class CountScratch(NamedTuple):
    """Working memory of pipelines.counts.

    bitmap: see keypoints.raster_scratch; dots: two of them. points: int32 [K, 2] and positions: uint16 [K, 2], room for
    the keypoints of one image.
    """

    bitmap: np.ndarray
    dots: np.ndarray
    points: np.ndarray
    positions: np.ndarray


class Scratch:
    """Working memory of one thread of the loader.

    resolution: R. room: bytes, see turbojpeg.room_for; rows: the height of the tallest image.
    """

    def __init__(self, resolution: int, room: int, rows: int):
        self.room = np.empty(room, np.uint8)
        resized = np.empty((3, rows + INTERLEAVE, resolution), np.uint16)
        self.crops = CropScratch(turbo(self.room), resized, np.empty((resolution, resolution, 3), np.uint8))
        bitmap = kp.raster_scratch(resolution, resolution)
        points, positions = np.empty((0, 2), np.int32), np.empty((0, 2), np.uint16)
        self._counts = CountScratch(bitmap, np.stack([bitmap] * 2), points, positions)

    def counts(self, keypoints: int) -> CountScratch:
        """Returns working memory for images of at most so many keypoints each; it grows with the largest number."""
        if keypoints > len(self._counts.points):
            points, positions = np.empty((keypoints, 2), np.int32), np.empty((keypoints, 2), np.uint16)
            self._counts = self._counts._replace(points=points, positions=positions)
        return self._counts


@kernel
def decode_and_crop(stored, crops, scratch, failed, stopped):
    """Writes the crops of n images of a store to crops.pixels, and which of them failed to failed, bool [n].

    stored: Stored; crops: Crops; scratch: CropScratch. Everything that an address is computed from is checked here.
    stopped: bool [1]; once it is true, the remaining images are not processed.
    """
    crop, addresses = scratch.crop, stored.addresses
    crop_bytes, results = crop.reshape(crop.size), crops.pixels.reshape(len(crops.pixels), crop.size)
    for i in range(len(results)):
        if stopped[0]:
            return
        if i + 1 < len(results) and addresses[i + 1] != 0:
            for offset in range(0, stored.lengths[i + 1], _LINE):
                prefetch(addresses[i + 1] + np.uint64(offset))
        failed[i] = not _crop(stored, crops, i, scratch)
        if not failed[i]:
            _stream(crop_bytes, results[i])


@kernel
def _stream(source, to):
    """Copies uint8 [n] to memory that is not in the processor's caches, without fetching its old content."""
    first = min(-to.ctypes.data % _LINE, len(to))
    last = first + (len(to) - first) // _LINE * _LINE
    to[:first] = source[:first]
    for offset in range(first, last, _LINE):
        stream64(source, to, offset)
    to[last:] = source[last:]


@kernel
def _crop(stored, crops, i, scratch):
    """Crops image i to scratch.crop and returns whether that succeeded."""
    address, length, view = stored.addresses[i], stored.lengths[i], crops.views[i]
    height, width = np.int64(crops.sizes[i, 0]), np.int64(crops.sizes[i, 1])
    if address == 0 or not lies_within(view, height, width):
        return False
    if stored.encoding == _RAW:
        if length != 3 * height * width:
            return False
        crop_resize(carray(pointer8(address), (height, width, 3)), view, scratch.crop)
        return True
    if stored.encoding == _YUV420:
        decoded, planes = length == _planes_bytes(height, width), stored_planes(address, height, width)
    else:
        decoded, planes = decode_planes(scratch.turbo, address, length, height, width)
    if not decoded or height + INTERLEAVE > scratch.resized.shape[1]:
        return False
    crop_planes(planes, view, scratch.resized, scratch.crop)
    return True
