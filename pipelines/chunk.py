"""One compiled call that maps, decodes, crops, resizes and flips the images of a chunk.

It runs without the GIL and raises nothing. Images that it cannot process are left to pipelines.loader, which repeats
the same steps for one image in Python and reports the error.
"""

import numpy as np
from numba import carray

from kamim.method.colour import planes_bytes
from kamim.method.kernels import kernel
from kamim.method.simd import pointer8, prefetch, stream64
from kamim.storage.manifest import FORMATS
from pipelines.crop import crop_resize, lies_within
from pipelines.turbojpeg import decode_planes
from pipelines.ycbcr import WOVEN, crop_planes, stored_planes

_RAW, _YUV420 = FORMATS.index("raw"), FORMATS.index("yuv420")
_LINE = 64  # bytes of a cache line
_planes_bytes = kernel(planes_bytes)


@kernel
def crop_chunk(encoding, addresses, lengths, sizes, views, turbo, resized, crop, out, failed, stopped):
    """Writes the crops of n images of a store to out, uint8 [n, R, R, 3], and which of them failed to failed, bool [n].

    encoding: its index in FORMATS. addresses: uint64 [n], of `lengths` (int64 [n]) bytes each, or 0. sizes: [n, 2]
    (height, width); views: int64 [n, 6], see kamim.method.geometry. Working memory of the thread: turbo, see
    pipelines.turbojpeg; resized, see crop_planes; crop, uint8 [R, R, 3]. Everything that an address is computed from is
    checked here. stopped: bool [1]; once it is true, the remaining images are not processed.
    """
    crop_bytes, results = crop.reshape(crop.size), out.reshape(len(out), crop.size)
    for i in range(len(out)):
        if stopped[0]:
            return
        if i + 1 < len(out) and addresses[i + 1] != 0:
            for offset in range(0, lengths[i + 1], _LINE):
                prefetch(addresses[i + 1] + np.uint64(offset))
        height, width = np.int64(sizes[i, 0]), np.int64(sizes[i, 1])
        failed[i] = addresses[i] == 0 or not (
            lies_within(views[i], height, width)
            and _crop(encoding, addresses[i], lengths[i], height, width, views[i], turbo, resized, crop)
        )
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
def _crop(encoding, address, length, height, width, view, turbo, resized, out):
    """Crops one image and returns whether that succeeded."""
    if encoding == _RAW:
        if length != 3 * height * width:
            return False
        crop_resize(carray(pointer8(address), (height, width, 3)), view, out)
        return True
    if encoding == _YUV420:
        decoded, planes = length == _planes_bytes(height, width), stored_planes(address, height, width)
    else:
        decoded, planes = decode_planes(turbo, address, length, height, width)
    if not decoded or height + WOVEN > resized.shape[1]:
        return False
    crop_planes(planes, view, resized, out)
    return True
