"""Flat zarr arrays that map into memory.

A paged array is a one- or two-dimensional zarr v3 array, uncompressed, whose chunk (page) files are the
plain little-endian bytes of their rows. Items are runs of rows; none crosses a page, so that every item is
one contiguous view of one mapped file, shared by all processes of a machine. Any zarr reader opens it.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import zarr

PAGES = 64


def create(group: zarr.Group, name: str, array: np.ndarray) -> None:
    """Writes a whole small array as one uncompressed chunk, so that it maps too."""
    group.create_array(name, shape=array.shape, dtype=array.dtype, chunks=_chunks(array), compressors=None)[:] = array


def _chunks(array: np.ndarray) -> tuple[int, ...]:
    return tuple(max(side, 1) for side in array.shape)


def power_of_two(least: int) -> int:
    """The smallest power of two that is not less than `least`."""
    return 1 << max(least - 1, 0).bit_length()


def page_rows(total: int, smallest: int) -> int:
    """Rows of a page for `total` rows in all: a power of two that makes at most about PAGES of them.

    Every page is a mapped file, and a process may hold only so many open (often 1,024).
    """
    return max(smallest, 1 << max(total // PAGES, 1).bit_length())


class PagedWriter:
    """Appends items to the array `name` of `group`. The only writer of its chunk files."""

    def __init__(self, group: zarr.Group, name: str, row_shape: tuple[int, ...], dtype: Any, page_rows: int):
        self._array = group.create_array(
            name, shape=(0, *row_shape), dtype=dtype, chunks=(page_rows, *row_shape), compressors=None,
            fill_value=0, config={"write_empty_chunks": True},
        )  # fmt: skip
        self._page = np.zeros((page_rows, *row_shape), dtype)
        self._pages = 0
        self._used = 0

    def append(self, rows: np.ndarray) -> int:
        """Adds one item (rows [n, *row_shape]); returns the row it starts at.

        Raises ValueError for an item larger than a page.
        """
        if len(rows) > len(self._page):
            raise ValueError(f"an item of {len(rows)} rows does not fit a page of {len(self._page)}")
        if self._used + len(rows) > len(self._page):
            self._flush()
        start = self._pages * len(self._page) + self._used
        self._page[self._used : self._used + len(rows)] = rows
        self._used += len(rows)
        return start

    def _flush(self) -> None:
        page_rows = len(self._page)
        self._array.resize(((self._pages + 1) * page_rows, *self._page.shape[1:]))
        self._array[self._pages * page_rows :] = self._page
        self._pages += 1
        self._used = 0
        self._page[:] = 0

    def close(self) -> None:
        """Writes the last page."""
        if self._used:
            self._flush()


class PagedReader:
    """Maps the pages of a paged array, read-only."""

    def __init__(self, path: Path):
        array = zarr.open_array(path, mode="r")
        self._page_rows = array.chunks[0]
        shape = (self._page_rows, *array.shape[1:])
        tail = "/0" * (array.ndim - 1)
        self._pages = [
            np.asarray(np.memmap(path / f"c/{page}{tail}", dtype=array.dtype, mode="r", shape=shape))  # slices faster
            for page in range(array.shape[0] // self._page_rows)
        ]
        self._empty = np.empty((0, *array.shape[1:]), array.dtype)
        self._row_bytes = array.dtype.itemsize * math.prod(array.shape[1:])
        self._bases = np.array([page.ctypes.data for page in self._pages] or [0], np.uint64)

    def rows(self, start: int, count: int) -> np.ndarray:
        """The item of `count` rows that starts at row `start`, as a view."""
        if count == 0:
            return self._empty
        page, at = divmod(start, self._page_rows)
        return self._pages[page][at : at + count]

    def addresses(self, start: np.ndarray, count: np.ndarray) -> np.ndarray:
        """Where in memory the items of `count` rows at rows `start` begin: uint64 of their shape.

        They hold as long as the reader lives. Raises IndexError where an item does not lie within a page.
        """
        if not self.holds(start, count).all():
            raise IndexError("rows lie outside the pages")
        page, at = np.divmod(np.where(count > 0, start, 0), self._page_rows)
        return self._bases[page] + (at * self._row_bytes).astype(np.uint64)

    def holds(self, start: np.ndarray, count: np.ndarray) -> np.ndarray:
        """Whether each item of `count` rows at row `start` lies within a page: bool of their shape."""
        rows, total = self._page_rows, self._page_rows * len(self._pages)
        return (count == 0) | ((count > 0) & (start >= 0) & (start < total) & (start % rows <= rows - count))
