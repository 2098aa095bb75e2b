"""Announces to the kernel which bytes of mapped files will be read soon, so that it reads them in the background.

A thread that touches a page that is not in memory waits for the disk, for one page or one read-ahead window at a time.
Announced bytes are requested all at once, so that reading takes the disk's bandwidth rather than its latency. It is
advice: nothing is announced on systems other than Linux, and errors are ignored.
"""

import ctypes
import functools
import mmap
import sys

import numpy as np

from kamim.method.kernels import kernel
from kamim.method.simd import call

PIECE = 1 << 17  # bytes; of a longer range the kernel reads at most its read-ahead size, 128 KiB by default
GAP = 1 << 15  # bytes between two ranges that are read rather than making two requests
_PAGE = mmap.PAGESIZE
_WILLNEED = 3  # MADV_WILLNEED on Linux


@functools.cache
def madvise() -> int:
    """Returns the address of the C function madvise, or 0 on systems other than Linux."""
    if sys.platform != "linux":
        return 0
    return ctypes.cast(ctypes.CDLL(None).madvise, ctypes.c_void_p).value or 0


def will_need(addresses: np.ndarray, lengths: np.ndarray) -> None:
    """Announces ranges of mapped files: `lengths` (int [n]) bytes at `addresses` (uint64 [n]). Those at 0 are ignored.

    The kernel reads in the background; the call waits only if the system's queue of requests is full. It holds no GIL.
    """
    if not (function := madvise()):
        return
    starts = addresses.astype(np.int64)
    stops = starts + lengths.astype(np.int64)
    order = np.argsort(starts)[np.count_nonzero(starts == 0) :]
    _announce(np.uint64(function), starts[order], stops[order])


@kernel
def _announce(function, starts, stops):
    """Calls madvise for ranges of addresses, int64 [n], sorted by start. Neighbours are joined, long ranges divided."""
    i = 0
    while i < len(starts):
        start, stop = starts[i] // _PAGE * _PAGE, stops[i]
        while i + 1 < len(starts) and starts[i + 1] <= stop + GAP:
            i += 1
            stop = max(stop, stops[i])
        for at in range(start, stop, PIECE):
            call(function, (at, min(PIECE, stop - at), np.int32(_WILLNEED)))
        i += 1
