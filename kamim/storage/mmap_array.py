"""Memory-mapped, paged zarr arrays, and small zarr arrays that are read whole.

A paged array is a one- or two-dimensional, uncompressed zarr v3 array whose chunk (page) files are the plain
little-endian bytes of their rows. Items are runs of rows. No item crosses a page, so every item is a contiguous
view of one mapped file, shared by all processes of a machine. Any zarr reader can open the array.

Arrays are written with zarr and read without it. On reading, the metadata must equal, key by key, what this module
writes, and files must have exactly the sizes that follow from it. An untrusted file can therefore choose no codec, no
layout and no amount of memory.
"""

import json
import math
import operator
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import zarr

from kamim import KamimError
from kamim.storage import read_ahead

PAGES = 64
METADATA = "zarr.json"
METADATA_BYTES = 1 << 16  # largest zarr.json that is read; those written here have a few hundred bytes


def create_group(path: Path, attributes: dict[str, str] | None = None) -> "zarr.Group":
    """Creates a zarr group, without its parents. zarr is imported here because readers do not need it."""
    import zarr

    return zarr.create_group(path, zarr_format=3, attributes=attributes or {})


def create(group: "zarr.Group", name: str, array: np.ndarray) -> None:
    """Writes a small array as one uncompressed chunk."""
    group.create_array(name, shape=array.shape, dtype=array.dtype, chunks=_chunks(array), compressors=None)[:] = array


def _chunks(array: np.ndarray) -> tuple[int, ...]:
    return tuple(max(side, 1) for side in array.shape)


def power_of_two(least: int) -> int:
    """Returns the smallest power of two that is at least `least`."""
    return 1 << max(least - 1, 0).bit_length()


def page_rows(total: int, smallest: int) -> int:
    """Returns the rows per page for `total` rows: a power of two that gives at most about PAGES pages.

    Every page is a mapped file, and the number of open files per process is limited (often to 1,024).
    """
    return max(smallest, 1 << max(total // PAGES, 1).bit_length())


class ArrayWriter:
    """Appends items to the array `name` of `group`."""

    def __init__(self, group: "zarr.Group", name: str, row_shape: tuple[int, ...], dtype: Any, page_rows: int):
        self._array = group.create_array(
            name,
            shape=(0, *row_shape),
            dtype=dtype,
            chunks=(page_rows, *row_shape),
            compressors=None,
            fill_value=0,
            config={"write_empty_chunks": True},
        )
        self._page = np.zeros((page_rows, *row_shape), dtype)
        self._pages = 0
        self._used = 0

    def append(self, rows: np.ndarray) -> int:
        """Appends one item (rows [n, *row_shape]) and returns its first row.

        Raises KamimError if the item is larger than a page.
        """
        if len(rows) > len(self._page):
            raise KamimError(f"an item of {len(rows)} rows does not fit a page of {len(self._page)}")
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


def file_size(file: Path) -> int:
    """Returns the size of a regular file in bytes. Raises KamimError if it is missing, a link, a pipe or a folder."""
    try:
        status = file.lstat()
    except (FileNotFoundError, NotADirectoryError):
        raise KamimError(f"{file}: is missing") from None
    if not stat.S_ISREG(status.st_mode):
        raise KamimError(f"{file}: is not a regular file; a store holds no links")
    return status.st_size


def check_size(file: Path, size: int) -> None:
    """Raises KamimError unless `file` is a regular file of `size` bytes."""
    actual = file_size(file)
    if actual != size:
        raise KamimError(f"{file}: has {actual} bytes, must have {size}")


def read_metadata(path: Path) -> dict[str, Any]:
    """Returns the unchecked metadata of an array or a group. Raises KamimError if it is not a JSON object."""
    file = path / METADATA
    if file_size(file) <= METADATA_BYTES:
        try:
            fields = json.loads(file.read_bytes())
        except (ValueError, RecursionError):
            fields = None
        if isinstance(fields, dict):
            return fields
    raise KamimError(f"{file}: is not the metadata of a zarr array or group")


def check_metadata(path: Path, actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raises KamimError, naming the first key that differs, unless the metadata is as expected."""
    for key in sorted(actual.keys() | expected.keys()):
        if actual.get(key) != expected.get(key):
            value, allowed = (json.dumps(fields[key]) if key in fields else "missing" for fields in (actual, expected))
            raise KamimError(f"{path / METADATA}: {key!r:.40} is {value:.80}, must be {allowed}")


def check_group(path: Path, attributes: dict[str, str]) -> None:
    """Raises KamimError unless `path` has the metadata that zarr writes for a group with these attributes."""
    check_metadata(path, read_metadata(path), {"attributes": attributes, "zarr_format": 3, "node_type": "group"})


def _metadata(dtype: Any, shape: Sequence[int], chunks: Sequence[int]) -> dict[str, Any]:
    """Returns the content of zarr.json for an array that this module writes."""
    dtype = np.dtype(dtype)
    codec = {"name": "bytes", "configuration": {"endian": "little"}} if dtype.itemsize > 1 else {"name": "bytes"}
    return {
        "zarr_format": 3,
        "node_type": "array",
        "attributes": {},
        "shape": [*shape],
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [*chunks]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [codec],
        "storage_transformers": [],
    }


def _lengths(path: Path, fields: dict[str, Any], axes: int) -> tuple[list[int], list[int]]:
    """Returns the shapes of an array and of its chunks: `axes` non-negative integers each. Raises KamimError."""
    try:
        shapes = fields["shape"], fields["chunk_grid"]["configuration"]["chunk_shape"]
        shape, chunks = ([*map(operator.index, lengths)] for lengths in shapes)
        if len(shape) == len(chunks) == axes and min(*shape, *chunks) >= 0:
            return shape, chunks
    except (LookupError, TypeError):
        pass
    raise KamimError(f"{path / METADATA}: gives no shape of {axes} axes for the array and its chunks")


def read(path: Path, dtype: Any, shape: Sequence[int | None]) -> np.ndarray:
    """Reads a small array that `create` wrote. shape: the expected lengths, None for any length.

    zarr does not write a chunk of zeros only. An array of unknown lengths must have a chunk nevertheless, so that it
    takes no more memory than disk. Raises KamimError, naming the file and the fault.
    """
    fields = read_metadata(path)
    stored, _ = _lengths(path, fields, len(shape))
    lengths = [have if want is None else want for have, want in zip(stored, shape, strict=True)]
    check_metadata(path, fields, _metadata(dtype, lengths, [max(length, 1) for length in lengths]))
    chunk = path.joinpath("c", *"0" * len(shape))
    if None not in shape and not chunk.is_symlink() and not chunk.exists():
        return np.zeros(lengths, dtype)
    check_size(chunk, math.prod(lengths) * np.dtype(dtype).itemsize)
    return np.fromfile(chunk, dtype).reshape(lengths)


class ArrayReader:
    """Maps the pages of a paged array of rows of `row_shape`, read-only.

    Raises KamimError, naming the file and the fault, if the array is not as this module writes it.
    """

    def __init__(self, path: Path, dtype: Any, row_shape: tuple[int, ...] = ()):
        fields = read_metadata(path)
        (total, *_), (self._page_rows, *_) = _lengths(path, fields, 1 + len(row_shape))
        check_metadata(path, fields, _metadata(dtype, (total, *row_shape), (self._page_rows, *row_shape)))
        if self._page_rows < 1 or total % self._page_rows:
            raise KamimError(f"{path / METADATA}: {total} rows are no whole pages of {self._page_rows}")
        shape, tail = (self._page_rows, *row_shape), "/0" * len(row_shape)
        self._row_bytes = np.dtype(dtype).itemsize * math.prod(row_shape)
        self._pages = []
        for page in range(total // self._page_rows):
            file = path / f"c/{page}{tail}"
            check_size(file, self._page_rows * self._row_bytes)
            self._pages.append(np.asarray(np.memmap(file, dtype, "r", shape=shape)))  # a plain array slices faster
        self._empty = np.empty((0, *row_shape), dtype)
        self._bases = np.array([page.ctypes.data for page in self._pages] or [0], np.uint64)

    def rows(self, start: int, count: int) -> np.ndarray:
        """Returns the item of `count` rows that starts at row `start`, as a view."""
        if count == 0:
            return self._empty
        page, at = divmod(start, self._page_rows)
        return self._pages[page][at : at + count]

    def addresses(self, start: np.ndarray, count: np.ndarray) -> np.ndarray:
        """Returns the memory addresses of the items of `count` rows at rows `start`: uint64 of their shape.

        They are valid as long as the reader exists. Raises IndexError if an item does not lie within a page.
        """
        if not self.holds(start, count).all():
            raise IndexError("rows lie outside the pages")
        page, at = np.divmod(np.where(count > 0, start, 0), self._page_rows)
        return self._bases[page] + (at * self._row_bytes).astype(np.uint64)

    def will_need(self, start: np.ndarray, count: np.ndarray) -> None:
        """Announces that the items of `count` rows at rows `start` (int of one shape) will be read soon."""
        inside = self.holds(start, count)
        start, count = start[inside], count[inside]
        read_ahead.will_need(self.addresses(start, count), count * self._row_bytes)

    def holds(self, start: np.ndarray, count: np.ndarray) -> np.ndarray:
        """Returns whether each item of `count` rows at row `start` lies within a page: bool of their shape."""
        rows, total = self._page_rows, self._page_rows * len(self._pages)
        return (count == 0) | ((count > 0) & (start >= 0) & (start < total) & (start % rows <= rows - count))
