"""Reads and writes FFCV's .beton files, version 2, with one image field and one int field.

The layout, little-endian:

    HEADER, then FIELD x 2, then SAMPLE x num_samples            from byte 0
    pages of page_size bytes, holding the images                 from the next multiple of page_size
    ALLOCATION x num_samples                                     at header.alloc_table_ptr

The ffcv package is not needed: it imports torch, and its DatasetWriter would encode every image a second time, start
processes of its own, and hang if one of them died. Files are byte for byte those of its fields and its page allocator.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from kamim import KamimError
from kamim.storage.mmap_array import file_size, power_of_two

VERSION = 2
INT_FIELD, IMAGE_FIELD = 1, 2  # type ids
JPG, RAW = 0, 1  # image modes
PAGE_SIZE = 1 << 23  # ffcv's default; files with larger images have larger pages

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
FIELD = np.dtype([("type_id", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)], align=True)
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
SAMPLE = np.dtype([("image", IMAGE), ("label", "<i8")], align=True)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])


class Beton:
    """Read-only view of a .beton file of N images.

    sizes: uint16 [N, 2] (height, width). labels, lengths (in bytes): int64 [N]. encoding: jpeg or raw.
    """

    def __init__(self, path: Path):
        """Raises KamimError, naming the file and the fault, if the file cannot belong to a store."""
        size, header = file_size(path), np.fromfile(path, HEADER, 1)
        if len(header) == 0 or header[0]["version"] != VERSION:
            raise KamimError(f"{path}: not an FFCV file of version {VERSION}")
        _, field_count, page_size, count, table = header[0].item()
        fields = np.fromfile(path, FIELD, min(field_count, 3), offset=HEADER.itemsize)
        if fields["type_id"].tolist() != [IMAGE_FIELD, INT_FIELD]:
            raise KamimError(f"{path}: fields of types {fields['type_id'].tolist()}, expected an image and an integer")
        start = HEADER.itemsize + fields.nbytes
        if start + count * SAMPLE.itemsize > table or table + count * ALLOCATION.itemsize != size:
            raise KamimError(
                f"{path}: truncated or damaged, its {size} bytes do not hold {count} samples and their table"
            )
        samples = np.fromfile(path, SAMPLE, count, offset=start)
        allocations = np.fromfile(path, ALLOCATION, count, offset=table)
        images, owners = samples["image"], allocations["sample_id"]
        if not np.array_equal(np.sort(owners), np.arange(count, dtype=np.uint64)):
            raise KamimError(f"{path}: its allocation table does not name each of the {count} samples once")
        modes = np.unique(images["mode"]).tolist()
        if modes not in ([JPG], [RAW]):
            raise KamimError(f"{path}: images of modes {modes}; expected {JPG} (JPEG) or {RAW} (raw), the same for all")
        self.labels = samples["label"].astype(np.int64)
        self.sizes = np.stack([images["height"], images["width"]], axis=1)
        self.encoding = "raw" if modes == [RAW] else "jpeg"
        pointers, lengths = np.empty((2, count), np.uint64)
        pointers[owners], lengths[owners] = allocations["ptr"], allocations["size"]
        self._inside = (images["data_ptr"] == pointers) & (pointers >= start + samples.nbytes) & (pointers <= table)
        self._inside &= (lengths > 0) & (lengths <= page_size) & (lengths <= table - np.minimum(pointers, table))
        self.lengths, self._start = lengths.astype(np.int64), pointers.astype(np.int64)
        self._bytes = np.asarray(np.memmap(path, np.uint8, mode="r"))  # a plain array slices faster

    def data(self, index: int) -> np.ndarray:
        """Returns the encoded bytes of image `index`: uint8 [n], a view of the mapped file."""
        return self._bytes[self._start[index] : self._start[index] + self.lengths[index]]

    def addresses(self, indices: np.ndarray) -> np.ndarray:
        """Returns the addresses of the encoded bytes of images (int [n]): uint64 [n], 0 for bytes outside the file."""
        base = np.uint64(self._bytes.ctypes.data)
        return np.where(self._inside[indices], base + self._start[indices].astype(np.uint64), np.uint64(0))

    def in_range(self) -> np.ndarray:
        """Returns whether each image's bytes lie within the file: bool [N]."""
        return self._inside


def write(path: Path, count: int, images: Iterable[tuple[np.ndarray, int, int, int, bool]], largest: int = 0) -> None:
    """Writes `count` images, each (bytes uint8 [n], height, width, label, raw).

    largest: bytes of the largest image; required if it may exceed PAGE_SIZE.
    """
    page_size = max(PAGE_SIZE, power_of_two(largest))
    fields = np.zeros(2, FIELD)
    for field, type_id, name in zip(fields, (IMAGE_FIELD, INT_FIELD), (b"image", b"label"), strict=True):
        field["type_id"] = type_id
        field["name"][: len(name)] = np.frombuffer(name, np.uint8)
    samples, allocations = np.zeros(count, SAMPLE), np.zeros(count, ALLOCATION)
    at = -(-(HEADER.itemsize + fields.nbytes + samples.nbytes) // page_size) * page_size  # file offset of `page`
    page, used = np.zeros(page_size, np.uint8), 0
    with path.open("wb") as file:
        file.seek(at)
        for index, (data, height, width, label, raw) in enumerate(images):
            if used + len(data) > page_size:
                file.write(page.data)
                page[:] = 0
                at, used = at + page_size, 0
            page[used : used + len(data)] = data
            samples[index] = ((RAW if raw else JPG, width, height, at + used), label)
            allocations[index] = (index, at + used, len(data))
            used += len(data)
        file.write(page.data)
        header = np.array((VERSION, len(fields), page_size, count, file.tell()), HEADER)
        file.write(allocations.tobytes())  # tofile hides a full disk's errno
        file.seek(0)
        for block in (header, fields, samples):
            file.write(block.tobytes())
