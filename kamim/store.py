"""The store: one directory per data set split, self-describing, published whole.

    manifest.json                     what this is, every parameter that shaped the bytes, counts, checksums
    images.beton | images.zarr/       images, FFCV or zarr (below)
    keypoints.zarr/
        frame                         uint16 [N, 2] (height, width) of the canonical frame
        <detector>/positions          uint16 [K, 2] (x, y), pixel centres in 1/16 px of the frame, paged
        <detector>/start              int64 [N] first row of an image's positions
        <detector>/counts             uint32 [N, G] how many in each of the detector's groups, in order
    rejects.csv                       source files that could not be read, and why

    images.zarr/
        data                          uint8, JPEG or raw bytes, paged
        start, length                 int64 [N] where an image's bytes lie
        size                          uint16 [N, 2] (height, width)
        label                         int64 [N], -1 without labels

Sample i is the same image in every array. `paged` arrays map into memory (kamim/paged.py).
"""

import hashlib
import json
import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pydantic
import zarr

from kamim import beton, paged
from kamim.keypoints import Rules

SCHEMA_VERSION = 1
IMAGE_PAGE_BYTES = 1 << 24  # the smallest pages; larger stores have larger ones
KEYPOINT_PAGE_ROWS = 1 << 20

Backend = Literal["ffcv", "zarr"]
Encoding = Literal["jpeg", "raw"]


class Job(pydantic.BaseModel):
    """Everything that shapes the bytes of a store. Equal jobs give equal stores."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    dataset: str
    split: str
    source: str
    fingerprint: str  # sha256 over the keys, labels and sizes of the source's items
    items: int
    detectors: tuple[str, ...]
    images: Backend
    encoding: Encoding
    quality: int
    resolution: int
    crop_scale: tuple[float, float]
    shard_size: int


class Manifest(pydantic.BaseModel):
    """manifest.json."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    schema_version: int
    kamim_version: str
    job: Job
    count: int
    classes: tuple[str, ...]
    rejects: int
    stored_area: float
    canonical_area: float
    rules: dict[str, Rules]
    opencv_version: str
    checksums: dict[str, str]  # sha256 of every other file, by its path within the store


class ImageReader(Protocol):
    """What both image backends offer."""

    labels: np.ndarray
    sizes: np.ndarray
    raw: bool

    def data(self, index: int) -> np.ndarray:
        """Encoded bytes of image `index`: uint8 [n]."""
        ...


class ZarrImages:
    """images.zarr, read-only."""

    def __init__(self, path: Path):
        group = zarr.open_group(path, mode="r")
        self.labels = np.asarray(group["label"])
        self.sizes = np.asarray(group["size"])
        self.raw = group.attrs["encoding"] == "raw"
        self._start = np.asarray(group["start"])
        self._length = np.asarray(group["length"])
        self._bytes = paged.PagedReader(path / "data")

    def data(self, index: int) -> np.ndarray:
        """Encoded bytes of image `index`: uint8 [n], a view of a mapped file."""
        return self._bytes.rows(int(self._start[index]), int(self._length[index]))


def write_zarr_images(
    path: Path, images: Iterable[tuple[np.ndarray, int, int, int, bool]], total_bytes: int, encoding: Encoding
) -> None:
    """Writes images.zarr from (bytes uint8 [n], height, width, label, raw), total_bytes of them in all."""
    group = zarr.create_group(path, attributes={"encoding": encoding})
    writer = paged.PagedWriter(group, "data", (), np.uint8, paged.page_rows(total_bytes, IMAGE_PAGE_BYTES))
    rows = [
        (writer.append(data), len(data), height, width, label) for data, height, width, label, _ in images
    ]  # fmt: skip
    writer.close()
    table = np.array(rows, np.int64).reshape(-1, 5)
    paged.create(group, "start", table[:, 0])
    paged.create(group, "length", table[:, 1])
    paged.create(group, "size", table[:, 2:4].astype(np.uint16))
    paged.create(group, "label", table[:, 4])


class Keypoints:
    """One detector's keypoints, read-only."""

    def __init__(self, path: Path, detector: str, rules: Rules):
        self.rules = rules
        self.frame = np.asarray(zarr.open_array(path / "frame", mode="r"))
        self._start = np.asarray(zarr.open_array(path / detector / "start", mode="r"))
        self._counts = np.asarray(zarr.open_array(path / detector / "counts", mode="r"))
        self._total = self._counts.sum(axis=1)
        self._positions = paged.PagedReader(path / detector / "positions")

    def image(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(positions uint16 [K, 2] as stored, counts uint32 [G] of each group among them, in order)."""
        return self._positions.rows(int(self._start[index]), int(self._total[index])), self._counts[index]


def write_keypoints(
    path: Path, detector: str, images: Iterable[tuple[np.ndarray, np.ndarray]], total_rows: int
) -> None:
    """Writes keypoints.zarr/<detector> from (positions uint16 [K, 2], counts int64 [G]) of every image."""
    group = zarr.open_group(path, mode="a").create_group(detector)
    writer = paged.PagedWriter(group, "positions", (2,), np.uint16, paged.page_rows(total_rows, KEYPOINT_PAGE_ROWS))
    rows = [(writer.append(positions), counts) for positions, counts in images]
    writer.close()
    paged.create(group, "start", np.array([start for start, _ in rows], np.int64))
    paged.create(group, "counts", np.stack([counts for _, counts in rows]).astype(np.uint32))


class Store:
    """A published store, opened read-only. Any number of processes may hold the same one."""

    def __init__(self, path: Path | str):
        """Raises ValueError where there is no store, or one of another schema version."""
        self.path = Path(path)
        self.manifest = read_manifest(self.path)

    def __len__(self) -> int:
        return self.manifest.count

    @property
    def detectors(self) -> tuple[str, ...]:
        """Names of the detectors whose keypoints the store holds."""
        return tuple(self.manifest.rules)

    @cached_property
    def images(self) -> ImageReader:
        """The images, whichever backend holds them."""
        if self.manifest.job.images == "ffcv":
            return beton.Beton(self.path / "images.beton")
        return ZarrImages(self.path / "images.zarr")

    def keypoints(self, detector: str) -> Keypoints:
        """Keypoints of `detector`. Raises ValueError, with what to do, where the store has none of it."""
        if detector not in self.manifest.rules:
            raise ValueError(
                f"{self.path}: has no {detector!r} keypoints, only {', '.join(self.detectors) or 'images'}; "
                f"preprocess again into a new store with --detectors {','.join((*self.detectors, detector))}"
            )
        return Keypoints(self.path / "keypoints.zarr", detector, self.manifest.rules[detector])


def read_manifest(path: Path) -> Manifest:
    """manifest.json of the store at `path`. Raises ValueError, naming what is wrong."""
    file = path / "manifest.json"
    if not file.is_file():
        raise ValueError(f"{path}: not a kamim store (no manifest.json); make one with `kamim preprocess`")
    try:
        fields: dict[str, Any] = json.loads(file.read_text())
        version = fields["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not a manifest: {error}") from error
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{path}: store of schema version {version}, this kamim reads {SCHEMA_VERSION}; "
            "preprocess it again, or use the kamim that wrote it"
        )
    try:
        return Manifest.model_validate_json(file.read_text())
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def checksum(path: Path) -> str:
    """sha256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(path: Path) -> dict[str, str]:
    """sha256 of every file below `path` but the manifest, by relative path, sorted."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and file != path / "manifest.json")
    return {file.relative_to(path).as_posix(): checksum(file) for file in files}


def fsync(path: Path) -> None:
    """Makes a file or a directory entry durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(partial: Path, final: Path) -> None:
    """Makes everything below `partial` durable, then gives it its final name in one rename."""
    for entry in (*partial.rglob("*"), partial):
        fsync(entry)
    partial.rename(final)
    fsync(final.parent)
