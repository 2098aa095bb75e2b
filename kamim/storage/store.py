"""The store: one directory per data set split, self-describing, published whole.

    manifest.json                     what this is, every parameter that shaped the bytes, counts, checksums
    manifest.backup                   its sha256 and a copy of it: any one damage of the two files is put right
    stamps.npy                        uint64 [items], one stamp per item of the source, to notice changed ones
    images.beton | images.zarr/       images, FFCV or zarr (below)
    keypoints.zarr/
        <detector>/frame              uint16 [N, V, 2] (height, width) of an image's canonical frames
        <detector>/positions          uint16 [K, 2] (x, y), pixel centres in 1/16 px of their frame, paged
        <detector>/start              int64 [N, V] first row of a frame's positions
        <detector>/counts             uint32 [N, V, G] how many in each of the detector's groups, in order
    rejects.csv                       source files that could not be read, and why

    images.zarr/
        data                          uint8, JPEG or raw bytes, paged
        start, length                 int64 [N] where an image's bytes lie
        size                          uint16 [N, 2] (height, width)
        label                         int64 [N], -1 without labels

Sample i is the same image in every array. Paged arrays map into memory (kamim/storage/mmap_array.py). A store is made
of components, its images and the keypoints of each detector; each was joined from shards and can be taken apart again.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Collection, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pydantic
import zarr

from kamim.method.keypoints import Rules
from kamim.storage import beton, mmap_array

SCHEMA_VERSION = 4
READABLE = (3, 4)  # version 3 has no `resize` and no originals; the rest is the same
MANIFEST, BACKUP = "manifest.json", "manifest.backup"
STAMPS, REJECTS = "stamps.npy", "rejects.csv"
IMAGES = "images"  # the component that is not a detector's
IMAGE_PAGE_BYTES = 1 << 24  # the smallest pages; larger stores have larger ones
KEYPOINT_PAGE_ROWS = 1 << 20

Backend = Literal["ffcv", "zarr"]
Encoding = Literal["jpeg", "raw", "original"]  # original: the source's own JPEG bytes, neither resized nor re-encoded
Resize = Literal["bilinear", "bicubic"]  # how images are resized into the store: without or with antialiasing
Fingerprint = Literal["stat", "content"]  # an item is told by key, label, size and time, or by key, label and bytes


class Job(pydantic.BaseModel):
    """Everything that shapes the bytes of a store, but the source. Equal jobs on equal sources give equal stores."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    dataset: str
    split: str
    fingerprint: Fingerprint
    items: int
    detectors: tuple[str, ...]
    images: Backend
    encoding: Encoding
    quality: int
    resize: Resize = "bilinear"  # what stores of schema version 3, which do not say, were made with
    resolution: int
    crop_scale: tuple[float, float]
    shard_size: int
    opencv: str  # version: its resize and its detectors shape the bytes

    @property
    def components(self) -> tuple[str, ...]:
        """What the store is made of."""
        return (IMAGES, *self.detectors)

    @property
    def shards(self) -> int:
        """How many shards every component has."""
        return -(-self.items // self.shard_size)

    def recipe(self, component: str) -> dict[str, Any]:
        """The parameters that the component's bytes depend on."""
        names = {"resolution", "crop_scale"}
        if component == IMAGES:
            of_images = {"images", "encoding"}
            names = of_images if self.encoding == "original" else names | of_images | {"resize"}
            names |= {"quality"} if self.encoding == "jpeg" else set()
        return self.model_dump(include=names)


class Manifest(pydantic.BaseModel):
    """manifest.json."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    schema_version: int
    kamim_version: str
    job: Job
    count: int
    classes: tuple[str, ...]
    rejects: int
    stored_area: float | None  # px of a stored image, at most; None: images are as large as the originals
    rules: dict[str, Rules]
    opencv: dict[str, str]  # the version that made each component
    shard_counts: tuple[int, ...]  # images of each shard that could be read
    shards: dict[str, tuple[str, ...]]  # sha256 of every shard of every component
    checksums: dict[str, str]  # sha256 of every other file but the backup, by its path within the store

    @property
    def source(self) -> str:
        """What tells this store's source from another: the sha256 of its stamps."""
        return self.checksums[STAMPS]


def component_of(name: str) -> str:
    """The component that a file of a store, by its path within it, belongs to."""
    room, *rest = name.split("/")
    return rest[0] if room == "keypoints.zarr" and len(rest) > 1 else IMAGES


class ImageReader(Protocol):
    """What both image backends offer."""

    labels: np.ndarray
    sizes: np.ndarray
    raw: bool

    def data(self, index: int) -> np.ndarray:
        """Encoded bytes of image `index`: uint8 [n]."""
        ...

    def in_range(self) -> np.ndarray:
        """Whether each image's bytes lie within the files: bool [N]."""
        ...


class Images(Protocol):
    """What a loader needs of a store."""

    @property
    def path(self) -> Path:
        """What errors name."""
        ...

    @property
    def images(self) -> ImageReader:
        """The images, whichever backend holds them."""
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
        self._bytes = mmap_array.PagedReader(path / "data")

    def data(self, index: int) -> np.ndarray:
        """Encoded bytes of image `index`: uint8 [n], a view of a mapped file."""
        return self._bytes.rows(int(self._start[index]), int(self._length[index]))

    def in_range(self) -> np.ndarray:
        """Whether each image's bytes lie within the files: bool [N]."""
        return self._bytes.holds(self._start, self._length)


def write_zarr_images(
    path: Path, images: Iterable[tuple[np.ndarray, int, int, int, bool]], total_bytes: int,
    encoding: Literal["jpeg", "raw"], largest: int = 0,
) -> None:  # fmt: skip
    """Writes images.zarr from (bytes uint8 [n], height, width, label, raw).

    total_bytes: of all images; largest: of the largest, where that may be more than a page.
    """
    group = zarr.create_group(path, attributes={"encoding": encoding})
    page_bytes = mmap_array.page_rows(total_bytes, max(IMAGE_PAGE_BYTES, mmap_array.power_of_two(largest)))
    writer = mmap_array.PagedWriter(group, "data", (), np.uint8, page_bytes)
    rows = [
        (writer.append(data), len(data), height, width, label) for data, height, width, label, _ in images
    ]  # fmt: skip
    writer.close()
    table = np.array(rows, np.int64).reshape(-1, 5)
    mmap_array.create(group, "start", table[:, 0])
    mmap_array.create(group, "length", table[:, 1])
    mmap_array.create(group, "size", table[:, 2:4].astype(np.uint16))
    mmap_array.create(group, "label", table[:, 4])


class Keypoints:
    """One detector's keypoints, read-only."""

    def __init__(self, path: Path, detector: str, rules: Rules):
        self.rules = rules
        self.frame = np.asarray(zarr.open_array(path / detector / "frame", mode="r"))
        self._start = np.asarray(zarr.open_array(path / detector / "start", mode="r"))
        self._counts = np.asarray(zarr.open_array(path / detector / "counts", mode="r"))
        self._total = self._counts.sum(axis=2)
        self._positions = mmap_array.PagedReader(path / detector / "positions")

    def image(self, index: int, frame: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Of one frame of an image: (positions uint16 [K, 2] as stored, counts uint32 [G] of each group, in order)."""
        start, total = self._start[index, frame], self._total[index, frame]
        return self._positions.rows(int(start), int(total)), self._counts[index, frame]

    def addresses(self, indices: np.ndarray, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of one frame each (int [n]) of several images (int [n]): (addresses uint64 [n], counts uint32 [n, G]).

        An address is that of positions as `image` gives them, good as long as this object lives. Raises IndexError
        where the store is damaged and they lie outside its files.
        """
        totals = self._total[indices, frames].astype(np.int64)
        return self._positions.addresses(self._start[indices, frames], totals), self._counts[indices, frames]

    def in_range(self) -> np.ndarray:
        """Whether each image's positions lie within the files: bool [N]."""
        inside = self._positions.holds(self._start, self._total.astype(np.int64)).all(axis=1)
        return np.asarray(inside)


def write_keypoints(
    path: Path, detector: str, images: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]], total_rows: int
) -> None:
    """Writes keypoints.zarr/<detector>. Of every image: positions uint16 [K, 2], its frames' one after the other;
    counts int64 [V, G]; frames uint16 [V, 2]."""
    group = zarr.open_group(path, mode="a").create_group(detector)
    writer = mmap_array.PagedWriter(
        group, "positions", (2,), np.uint16, mmap_array.page_rows(total_rows, KEYPOINT_PAGE_ROWS)
    )
    starts, all_counts, all_frames = [], [], []
    for positions, counts, frames in images:
        ends = np.cumsum(counts.sum(axis=1))
        starts.append([writer.append(part) for part in np.split(positions, ends[:-1])])
        all_counts.append(counts)
        all_frames.append(frames)
    writer.close()
    mmap_array.create(group, "start", np.array(starts, np.int64))
    mmap_array.create(group, "counts", np.stack(all_counts).astype(np.uint32))
    mmap_array.create(group, "frame", np.stack(all_frames).astype(np.uint16))


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
                f"the command that made it, with --detectors {detector}, adds them"
            )
        return Keypoints(self.path / "keypoints.zarr", detector, self.manifest.rules[detector])


def read_manifest(path: Path) -> Manifest:
    """manifest.json of the store at `path`. Raises ValueError, naming what is wrong."""
    file = path / MANIFEST
    if not file.is_file() and (path / BACKUP).is_file():
        raise ValueError(f"{file}: is missing; put it back with `kamim store verify {path} --repair`")
    if not file.is_file():
        raise ValueError(f"{path}: not a kamim store (no manifest.json); make one with `kamim preprocess`")
    return parse_manifest(file.read_bytes(), path)


def parse_manifest(content: bytes, path: Path) -> Manifest:
    """The manifest of the store at `path` from the file's bytes. Raises ValueError, naming what is wrong."""
    file = path / MANIFEST
    try:
        fields: dict[str, Any] = json.loads(content)
        version = fields["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not a manifest: {error}") from error
    if version not in READABLE:
        raise ValueError(
            f"{path}: store of schema version {version}, this kamim reads {' and '.join(map(str, READABLE))}; "
            "preprocess it again, or use the kamim that wrote it"
        )
    try:
        return Manifest.model_validate_json(content)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def seal(path: Path, content: bytes) -> None:
    """Gives a store that is otherwise whole its manifest, and the manifest's backup."""
    write_whole(path / BACKUP, backup_of(content))
    write_whole(path / MANIFEST, content)


def backup_of(manifest: bytes) -> bytes:
    """What manifest.backup holds."""
    return hashlib.sha256(manifest).hexdigest().encode() + b"\n" + manifest


def agreed_manifest(path: Path) -> bytes | None:
    """The manifest's bytes by the majority of the file, its copy and the sha256; None where no two agree.

    Where one of the two files is missing, the other one's word counts.
    """
    ours, backup = (file.read_bytes() if file.is_file() else b"" for file in (path / MANIFEST, path / BACKUP))
    copy = backup.partition(b"\n")[2]
    if backup == backup_of(copy):
        return copy
    return ours if ours and (not backup or ours == copy or backup.startswith(backup_of(ours)[:64])) else None


def checksum(path: Path) -> str:
    """sha256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(path: Path, besides: Collection[str] = ()) -> dict[str, str]:
    """sha256 of every file below `path`, by relative path, sorted; not of the manifest, its backup, and `besides`."""
    names = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    return {name: checksum(path / name) for name in sorted(names - {MANIFEST, BACKUP, *besides})}


def fsync(path: Path) -> None:
    """Makes a file or a directory entry durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(file: Path, content: bytes) -> None:
    """Writes a file durably so that it is never there in part; one that had its name is replaced."""
    staged = file.with_name(f".{file.name}.{uuid.uuid4().hex}")  # other hosts may write the same file
    try:
        staged.write_bytes(content)
        fsync(staged)
        staged.replace(file)
    finally:
        staged.unlink(missing_ok=True)
    fsync(file.parent)


def publish(partial: Path, final: Path) -> None:
    """Makes everything below `partial` durable, then gives it its final name in one rename."""
    make_durable(partial)
    partial.rename(final)
    fsync(final.parent)


def make_durable(path: Path) -> None:
    """Makes a directory and everything below it durable."""
    for entry in (*path.rglob("*"), path):
        fsync(entry)
