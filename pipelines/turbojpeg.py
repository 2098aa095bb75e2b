"""JPEGs decoded to planes of Y, Cb and Cr by libjpeg-turbo, called from compiled loops.

libjpeg-turbo's TurboJPEG library (Debian: libturbojpeg0, conda: libjpeg-turbo) is called through the addresses of its
functions, so that a loop over many images never enters Python. Decoding to planes skips libjpeg's upsampling of chroma
and its conversion to RGB, which pipelines.ycbcr does for the pixels of the crop alone.
"""

import ctypes
import functools
import sys
import weakref
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numba import carray

from kamim.method.kernels import kernel
from kamim.method.simd import call, pointer8
from kamim.storage.jpeg import read_markers, takes_long
from pipelines.ycbcr import Planes

LIBRARY = "libturbojpeg.so.0"  # version 1.4 (2015) or later
_YCBCR, _GREY = 1, 2  # of enum TJCS in turbojpeg.h
# Pixels down and across that share a sample of Cb and Cr, by enum TJSAMP: 4:4:4, 4:2:2, 4:2:0, grey, 4:4:0, 4:1:1 and
# 4:4:1.
_BLOCKS = ((1, 1), (1, 2), (2, 2), (0, 0), (2, 1), (1, 4), (4, 1))
_PADDING = 4  # the library rounds the sides of planes up by less
_takes_long = kernel(takes_long)


class Turbo(NamedTuple):
    """The arguments that a thread needs to call the library.

    functions: uint64 [3], addresses of a decompressor, tjDecompressHeader3 and tjDecompressToYUVPlanes; 0 without the
    library. header: int32 [4]; pointers: uint64 [3]; strides: int32 [3], arguments of the two. room: uint8 [n], see
    room_for.
    """

    functions: np.ndarray
    header: np.ndarray
    pointers: np.ndarray
    strides: np.ndarray
    room: np.ndarray


@functools.cache
def library() -> ctypes.CDLL | None:
    """Loads TurboJPEG, or returns None if it is not installed."""
    for name in (LIBRARY, str(Path(sys.prefix, "lib", LIBRARY)), "libturbojpeg.0.dylib"):
        try:
            loaded = ctypes.CDLL(name)
        except OSError:
            continue
        loaded.tjInitDecompress.restype = ctypes.c_void_p
        loaded.tjDestroy.argtypes = (ctypes.c_void_p,)
        return loaded
    return None


def turbo(room: np.ndarray) -> Turbo:
    """Returns the input of decode_planes, for one thread at a time. Its decompressor lives as long as `functions`."""
    functions, loaded = np.zeros(3, np.uint64), library()
    if loaded is not None and (handle := loaded.tjInitDecompress()):
        calls = (loaded.tjDecompressHeader3, loaded.tjDecompressToYUVPlanes)
        functions[:] = handle, *(ctypes.cast(call, ctypes.c_void_p).value for call in calls)
        weakref.finalize(functions, loaded.tjDestroy, handle)
    return Turbo(functions, np.empty(4, np.int32), np.empty(3, np.uint64), np.empty(3, np.int32), room)


def room_for(sizes: np.ndarray) -> int:
    """Returns the bytes needed for the planes of any of the images of sizes int [N, 2] (height, width)."""
    height, width = (sizes.astype(np.int64) + _PADDING).T
    return int((3 * height * width).max())


@kernel
def decode_planes(turbo, address, length, height, width):
    """Decodes the JPEG of `length` bytes at an address -> (whether it succeeded, Planes within turbo.room).

    It fails without the library, or if the file is damaged in any way, is not of height x width px, is neither YCbCr
    nor grey, or takes_long. Whatever the bytes are, the library writes planes of at most the given size, for which
    there is room.
    """
    stride, rows = width + _PADDING, height + _PADDING
    planes = Planes(turbo.room, height, width, stride, stride * rows, 2 * stride * rows, stride, 0, 0)
    header, base = turbo.header, np.uint64(turbo.header.ctypes.data)
    fields = (base, base + np.uint64(4), base + np.uint64(8), base + np.uint64(12))  # width, height, sampling, colours
    data = (turbo.functions[0], address, np.uint64(length))
    if turbo.functions[0] == 0 or 3 * stride * rows > len(turbo.room):
        return False, planes
    if call(turbo.functions[1], data + fields) != 0 or header[0] != width or header[1] != height:
        return False, planes
    if _takes_long(read_markers(carray(pointer8(address), (length,))).scans, height, width):
        return False, planes
    if not (0 <= header[2] < len(_BLOCKS)) or (header[3] != _YCBCR and header[3] != _GREY):
        return False, planes
    for plane in range(3):
        turbo.pointers[plane] = np.uint64(turbo.room.ctypes.data) + np.uint64(plane * stride * rows)
        turbo.strides[plane] = stride
    pointers, strides = np.uint64(turbo.pointers.ctypes.data), np.uint64(turbo.strides.ctypes.data)
    arguments = (pointers, np.int32(width), strides, np.int32(height), np.int32(0))
    if call(turbo.functions[2], data + arguments) != 0:
        return False, planes
    block_height, block_width = _BLOCKS[header[2]]
    return True, Planes(turbo.room, height, width, stride, planes.cb, planes.cr, stride, block_height, block_width)
