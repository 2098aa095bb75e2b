"""The images of a store: the interface of both containers, the zarr container, and the checks of single images.

The FFCV container is kamim/storage/beton.py.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from kamim.method.colour import planes_bytes
from kamim.storage import mmap_array
from kamim.storage.manifest import FORMATS

PAGE_BYTES = 1 << 24  # smallest page size; larger stores have larger pages
LARGEST_IMAGE = 178_956_970  # px; preprocessing decodes no larger images, of which Pillow warns as decompression bombs


class ImageReader(Protocol):
    """The interface of both image backends, for N images.

    sizes: uint16 [N, 2] (height, width). labels, lengths (in bytes): int64 [N]. encoding: one of FORMATS.
    """

    labels: np.ndarray
    sizes: np.ndarray
    lengths: np.ndarray
    encoding: str

    def data(self, index: int) -> np.ndarray:
        """Returns the encoded bytes of image `index`: uint8 [n]."""
        ...

    def addresses(self, indices: np.ndarray) -> np.ndarray:
        """Returns the addresses of the encoded bytes of images (int [n]): uint64 [n], 0 for bytes outside the files.

        They are valid as long as the reader lives.
        """
        ...

    def in_range(self) -> np.ndarray:
        """Returns whether each image's bytes lie within the files: bool [N]."""
        ...


class Images(Protocol):
    """The part of a store that a loader needs."""

    @property
    def path(self) -> Path:
        """The path that errors name."""
        ...

    @property
    def images(self) -> ImageReader:
        """The images, from either backend."""
        ...


class ZarrImages:
    """Read-only view of images.zarr. Raises KamimError, naming the file and the fault, if it is damaged."""

    def __init__(self, path: Path):
        attributes = mmap_array.read_metadata(path).get("attributes")
        self.encoding = next((name for name in FORMATS if attributes == {"encoding": name}), "jpeg")
        mmap_array.check_group(path, {"encoding": self.encoding})
        self.sizes = mmap_array.read(path / "size", np.uint16, (None, 2))
        count = len(self.sizes)
        self.labels = mmap_array.read(path / "label", np.int64, (count,))
        self.lengths = mmap_array.read(path / "length", np.int64, (count,))
        self._start = mmap_array.read(path / "start", np.int64, (count,))
        self._bytes = mmap_array.ArrayReader(path / "data", np.uint8)

    def data(self, index: int) -> np.ndarray:
        """Returns the encoded bytes of image `index`: uint8 [n], a view of a mapped file."""
        return self._bytes.rows(int(self._start[index]), int(self.lengths[index]))

    def addresses(self, indices: np.ndarray) -> np.ndarray:
        """Returns the addresses of the encoded bytes of images (int [n]): uint64 [n], 0 for bytes outside the files."""
        start, lengths = self._start[indices], self.lengths[indices]
        inside = (lengths > 0) & self._bytes.holds(start, lengths)
        return np.where(inside, self._bytes.addresses(np.where(inside, start, 0), np.where(inside, lengths, 0)), 0)

    def in_range(self) -> np.ndarray:
        """Returns whether each image's bytes lie within the files: bool [N]."""
        return (self.lengths > 0) & self._bytes.holds(self._start, self.lengths)


def decoded_bytes(encoding: str, height: Any, width: Any) -> Any:
    """Returns the bytes of a raw or yuv420 image of height x width px: an int, or int64 [n] for arrays of sizes."""
    return planes_bytes(height, width) if encoding == "yuv420" else 3 * height * width


def image_faults(images: ImageReader, classes: int) -> dict[str, np.ndarray]:
    """Returns the possible faults of single images and which images have them, bool [N]. classes: their number."""
    height, width = images.sizes.astype(np.int64).T
    pixels = height * width
    needed = images.lengths if images.encoding == "jpeg" else decoded_bytes(images.encoding, height, width)
    return {
        "lies outside its file": ~images.in_range(),
        f"is of no size that images have, 1 to {LARGEST_IMAGE} px": (pixels < 1) | (pixels > LARGEST_IMAGE),
        "has another number of bytes than its size needs": images.lengths != needed,
        "has a label without a class": (images.labels < -1) | (images.labels >= classes),
    }


def write_zarr_images(
    path: Path,
    images: Iterable[tuple[np.ndarray, int, int, int, bool]],
    total_bytes: int,
    encoding: str,
    largest: int = 0,
) -> None:
    """Writes images.zarr from (bytes uint8 [n], height, width, label, raw) of every image. encoding: one of FORMATS.

    total_bytes: bytes of all images. largest: bytes of the largest image; required if it may exceed a page.
    """
    group = mmap_array.create_group(path, {"encoding": encoding})
    page_bytes = mmap_array.page_rows(total_bytes, max(PAGE_BYTES, mmap_array.power_of_two(largest)))
    writer = mmap_array.ArrayWriter(group, "data", (), np.uint8, page_bytes)
    rows = [(writer.append(data), len(data), height, width, label) for data, height, width, label, _ in images]
    writer.close()
    table = np.array(rows, np.int64).reshape(-1, 5)
    mmap_array.create(group, "start", table[:, 0])
    mmap_array.create(group, "length", table[:, 1])
    mmap_array.create(group, "size", table[:, 2:4].astype(np.uint16))
    mmap_array.create(group, "label", table[:, 4])
