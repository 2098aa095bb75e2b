"""The store: one self-describing directory per data set split, published atomically.

    manifest.json                     format, every parameter that shaped the bytes, counts, checksums
    manifest.backup                   its sha256 and a copy: if one of the two files is damaged, it can be repaired
    stamps.npy                        uint64 [items], one hash per item of the source, to detect changed items
    images.beton | images.zarr/       images, FFCV or zarr (below)
    keypoints.zarr/
        <detector>/frame              uint16 [N, V, 2] (height, width) of an image's canonical frames
        <detector>/positions          uint16 [K, 2] (x, y), pixel centres in 1/16 px of their frame, paged
        <detector>/gaps               uint8 [B], in place of positions on whole pixels, see kamim/storage/gaps.py, paged
        <detector>/start              int64 [N, V] first row of a frame's positions or gaps
        <detector>/counts             uint32 [N, V, G] rows of each of the detector's groups, in order
    rejects.csv                       source files that could not be read, with the reason

    images.zarr/
        data                          uint8, JPEG, RGB pixels or YCbCr planes, paged
        start, length                 int64 [N] offset and number of an image's bytes
        size                          uint16 [N, 2] (height, width)
        label                         int64 [N], -1 without labels

Sample i is the same image in every array. Paged arrays are memory-mapped (kamim/storage/mmap_array.py). A store
consists of components: its images and the keypoints of each detector. Each is joined from shards and can be split into
them again.

A store may come from an untrusted source. What the compiled kernels and the rest of the code rely on is checked in
three places: names and numbers of the manifest by Manifest; layout, types, shapes and sizes of files by the readers;
offsets, sizes, frames and label of every image by image_faults and keypoint_faults, when Store opens a component.
"""

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Collection, Iterable
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Protocol, Self

import numpy as np
import pydantic
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from kamim import KamimError
from kamim.method.colour import planes_bytes
from kamim.method.geometry import MAX_FRAME_SIDE
from kamim.method.keypoints import Rules
from kamim.storage import beton, gaps, mmap_array
from kamim.storage.files import checksum, write_whole

SCHEMA_VERSION = 5
READABLE = (3, 4, 5)  # versions below 5 have no gaps, version 3 has no `resize` and no originals
MANIFEST, BACKUP = "manifest.json", "manifest.backup"
STAMPS, REJECTS = "stamps.npy", "rejects.csv"
NO_LINKS = "a store has files and folders only; `cp -rL` copies one with what its links lead to"
IMAGES = "images"  # the component of the images; the others are named after detectors
IMAGE_PAGE_BYTES = 1 << 24  # smallest page size; larger stores have larger pages
KEYPOINT_PAGE_ROWS = 1 << 20
LARGEST_IMAGE = 178_956_970  # px; preprocessing decodes no larger images, of which Pillow warns as decompression bombs
MANIFEST_BYTES = 1 << 30  # largest manifest that is read
IMAGE_ARRAYS = ("data", "start", "length", "size", "label")
KEYPOINT_ARRAYS = ("frame", "positions", "gaps", "start", "counts")

Backend = Literal["ffcv", "zarr"]
# original: the source's own JPEG bytes, neither resized nor re-encoded; yuv420: see kamim.method.colour
Encoding = Literal["jpeg", "raw", "yuv420", "original"]
FORMATS = ("jpeg", "raw", "yuv420")  # of an image's bytes; those of `original` are JPEGs
Resize = Literal["bilinear", "bicubic"]  # interpolation of stored images: without and with antialiasing
WholePixels = Literal["positions", "gaps"]  # the array of keypoints in reading order; others always have positions
Fingerprint = Literal["stat", "content"]  # an item's hash covers key, label, size and time, or key, label and bytes
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Share = Annotated[float, Field(gt=0, le=1)]


class KeypointArray(NamedTuple):
    """The paged array of a detector's keypoints."""

    name: str
    dtype: type[np.generic]
    row_shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """The bytes of a row."""
        return np.dtype(self.dtype).itemsize * math.prod(self.row_shape)


POSITIONS = KeypointArray("positions", np.uint16, (2,))
GAPS = KeypointArray("gaps", np.uint8, ())


class Job(pydantic.BaseModel):
    """Everything except the source that shapes the bytes of a store: equal jobs on equal sources give equal stores."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    dataset: str
    split: str
    fingerprint: Fingerprint
    items: PositiveInt
    detectors: tuple[str, ...]
    images: Backend
    encoding: Encoding
    quality: Annotated[int, Field(ge=1, le=100)]
    resize: Resize = "bilinear"  # the default is that of schema version 3, which does not record it
    whole_pixels: WholePixels = "positions"  # the default is that of schema versions 3 and 4
    resolution: Annotated[int, Field(ge=16, le=1024)]
    crop_scale: tuple[Share, Share]
    shard_size: PositiveInt
    opencv: str  # version; OpenCV's resize and detectors shape the bytes

    @pydantic.field_validator("detectors")
    @classmethod
    def _folder_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            _require(name.isidentifier() and name != IMAGES, f"{name!r} is not a detector name")
            _require(names.count(name) == 1, f"{name} is named twice")
        return names

    @property
    def components(self) -> tuple[str, ...]:
        """The names of the store's components."""
        return (IMAGES, *self.detectors)

    @property
    def format(self) -> str:
        """The encoding of an image's bytes: one of FORMATS."""
        return "jpeg" if self.encoding == "original" else self.encoding

    @property
    def shards(self) -> int:
        """The number of shards of every component."""
        return -(-self.items // self.shard_size)

    def keypoint_array(self, rules: Rules) -> KeypointArray:
        """Returns the array that holds the keypoints of a detector with these rules."""
        return GAPS if self.whole_pixels == "gaps" and rules.in_reading_order else POSITIONS

    def other_crops(self, resolution: int, crop_scale: tuple[float, float] | None) -> str:
        """Describes how crops differ from those that the keypoints are for; returns "" if they do not.

        crop_scale: smallest and largest area; None for whole images.
        """
        own, other = [str(self.resolution)], [str(resolution)]
        if crop_scale is not None:
            own, other = [*own, str(list(self.crop_scale))], [*other, str(list(crop_scale))]
        if own == other:
            return ""
        return f"resolution {' and crop scale '.join(own)}, not {' and '.join(other)}"

    def recipe(self, component: str) -> dict[str, Any]:
        """Returns the parameters that the component's bytes depend on."""
        names = {"resolution", "crop_scale"}
        if component != IMAGES:
            names |= {"whole_pixels"}
        else:
            of_images = {"images", "encoding"}
            names = of_images if self.encoding == "original" else names | of_images | {"resize"}
            names |= {"quality"} if self.encoding == "jpeg" else set()
        return self.model_dump(include=names)


class Manifest(pydantic.BaseModel):
    """The content of manifest.json."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    schema_version: int
    kamim_version: str
    job: Job
    count: PositiveInt
    classes: tuple[str, ...]
    rejects: NonNegativeInt
    stored_area: PositiveFloat | None  # largest area of a stored image in px; None: images have their original size
    rules: dict[str, Rules]
    opencv: dict[str, str]  # the OpenCV version of each component
    shard_counts: tuple[NonNegativeInt, ...]  # images of each shard that could be read
    shards: dict[str, tuple[Sha256, ...]]  # sha256 of every shard of every component
    checksums: dict[str, Sha256]  # sha256 of every file except the manifest and its backup, by path within the store

    @pydantic.model_validator(mode="after")
    def _agreeing(self) -> Self:
        """Raises KamimError if numbers disagree, or if checksums name a file that such a store does not have."""
        job, parts = self.job, self.shard_counts
        _require(
            self.count + self.rejects == job.items and self.count == sum(parts),
            f"count: is {self.count}; with {self.rejects} rejects of {job.items} items, and {sum(parts)} in shards",
        )
        low, high = job.crop_scale
        _require(low <= high, f"job.crop_scale: is {low}, {high}; the first must not be larger")
        _require(max(parts) <= job.shard_size, f"shard_counts: {max(parts)} in a shard of {job.shard_size}")
        for key, components in (("rules", job.detectors), ("opencv", job.components), ("shards", job.components)):
            actual, expected = (", ".join(map(repr, sorted(names))) for names in (getattr(self, key), components))
            _require(actual == expected, f"{key}: is of {actual}; must be of {expected}")
        for key, values in (("shard_counts", parts), *((f"shards.{name}", of) for name, of in self.shards.items())):
            _require(len(values) == job.shards, f"{key}: has {len(values)} of {job.shards} shards")
        known = file_names(job)
        for name in self.checksums:
            _require(known.fullmatch(name) is not None, f"checksums: {name!r} is no file of such a store")
        for name in (STAMPS, REJECTS):
            _require(name in self.checksums, f"checksums: has no {name}")
        return self

    @property
    def source(self) -> str:
        """The identity of the store's source: the sha256 of its stamps."""
        return self.checksums[STAMPS]


def _require(condition: bool, message: str) -> None:
    """Raises KamimError(message) unless the condition holds."""
    if not condition:
        raise KamimError(message)


def file_names(job: Job) -> re.Pattern[str]:
    """Returns a pattern of the allowed file paths within a job's store, except the manifest and its backup.

    No path that it matches is absolute or leads out of the store.
    """
    array = r"(zarr\.json|c(/[0-9]+)+)"
    images = r"images\.beton" if job.images == "ffcv" else rf"images\.zarr/(zarr\.json|{_any(IMAGE_ARRAYS)}/{array})"
    detector = rf"{_any(job.detectors)}/(zarr\.json|{_any(KEYPOINT_ARRAYS)}/{array})"
    return re.compile(rf"{_any((STAMPS, REJECTS))}|{images}|keypoints\.zarr/(zarr\.json|{detector})")


def _any(names: Iterable[str]) -> str:
    return f"({'|'.join(map(re.escape, names)) or '(?!)'})"


def component_of(name: str) -> str:
    """Returns the component that a file belongs to. name: the file's path within the store."""
    folder, *rest = name.split("/")
    return rest[0] if folder == "keypoints.zarr" and len(rest) > 1 else IMAGES


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
    page_bytes = mmap_array.page_rows(total_bytes, max(IMAGE_PAGE_BYTES, mmap_array.power_of_two(largest)))
    writer = mmap_array.ArrayWriter(group, "data", (), np.uint8, page_bytes)
    rows = [(writer.append(data), len(data), height, width, label) for data, height, width, label, _ in images]
    writer.close()
    table = np.array(rows, np.int64).reshape(-1, 5)
    mmap_array.create(group, "start", table[:, 0])
    mmap_array.create(group, "length", table[:, 1])
    mmap_array.create(group, "size", table[:, 2:4].astype(np.uint16))
    mmap_array.create(group, "label", table[:, 4])


class Keypoints:
    """Read-only keypoints of one detector, of N images on V frames in G groups.

    frame: uint16 [N, V, 2] (height, width). array: POSITIONS or GAPS, whose rows hold them, see Job.keypoint_array.
    job: that of their store, None without one. Raises KamimError, naming the file and the fault, if they are damaged.
    """

    def __init__(self, path: Path, detector: str, rules: Rules, array: KeypointArray, job: Job | None = None):
        self.path = path.parent
        self.job = job
        self.rules = rules
        self.array = array
        folder = path / detector
        mmap_array.check_group(path, {})
        mmap_array.check_group(folder, {})
        self.frame = mmap_array.read(folder / "frame", np.uint16, (None, None, 2))
        shape = self.frame.shape[:2]
        self._start = mmap_array.read(folder / "start", np.int64, shape)
        self._counts = mmap_array.read(folder / "counts", np.uint32, (*shape, len(rules.groups)))
        self._total = np.zeros(shape, np.int64)
        for group in range(len(rules.groups)):  # several times as fast as a sum over a short last axis
            self._total += self._counts[..., group]
        self._rows = mmap_array.ArrayReader(folder / array.name, array.dtype, array.row_shape)

    def check_crops(self, images: int, resolution: int, crop_scale: tuple[float, float] | None) -> None:
        """Raises KamimError if the keypoints are not of `images` images, or their frames are for other crops.

        crop_scale: see Job.other_crops.
        """
        if images != len(self.frame):
            raise KamimError(f"{self.path}: has keypoints of {len(self.frame)} images, the loader's store {images}")
        if self.job is not None and (difference := self.job.other_crops(resolution, crop_scale)):
            raise KamimError(
                f"{self.path}: its keypoints are for {difference}; preprocess with --resolution and --crop-scale to "
                "match, or count with OnlineCounts"
            )

    @property
    def held(self) -> np.ndarray:
        """The rows of each image on all frames, 0 for an image without keypoints: int64 [N]."""
        return np.asarray(self._total.sum(axis=1))

    def image(self, index: int, frame: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Returns the keypoints of one frame of an image: (positions uint16 [K, 2], counts int [G]).

        Raises IndexError if the store is damaged and gaps lead out of the frame.
        """
        rows, counts = self.rows(index, frame)
        if self.array == POSITIONS:
            return rows, counts
        positions = gaps.decode(rows, *self.frame[index, frame].tolist())
        return positions, np.array([len(positions)])

    def rows(self, index: int, frame: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the keypoints of one frame of an image as stored: rows of the array, and their counts uint32 [G]."""
        start, total = self._start[index, frame], self._total[index, frame]
        return self._rows.rows(int(start), int(total)), self._counts[index, frame]

    def addresses(self, indices: np.ndarray, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns (addresses uint64 [n], counts uint32 [n, G]) for images `indices` (int [n]) on `frames` (int [n]).

        An address points to the rows that `rows` returns, and is valid as long as this object exists. Raises
        IndexError if the store is damaged and rows lie outside its files.
        """
        totals = self._total[indices, frames]
        return self._rows.addresses(self._start[indices, frames], totals), self._counts[indices, frames]

    def will_need(self, indices: np.ndarray) -> None:
        """Announces that the keypoints of images (int [n]), on all frames, will be read soon. See read_ahead."""
        self._rows.will_need(self._start[indices], self._total[indices])

    def in_range(self) -> np.ndarray:
        """Returns whether each image's rows lie within the files: bool [N]."""
        return np.asarray(self._rows.holds(self._start, self._total).all(axis=1))


def keypoint_faults(keypoints: Keypoints) -> dict[str, np.ndarray]:
    """Returns the possible faults of the keypoints of single images and which images have them, bool [N]."""
    outside = np.asarray((keypoints.frame < 1) | (keypoints.frame > MAX_FRAME_SIDE))
    return {
        "lies outside its file": ~keypoints.in_range(),
        f"has a frame that is not 1 to {MAX_FRAME_SIDE} px a side": np.asarray(outside.any(axis=(1, 2))),
    }


def write_keypoints(
    path: Path,
    detector: str,
    array: KeypointArray,
    images: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]],
    total_rows: int,
) -> None:
    """Writes keypoints.zarr/<detector> from (rows, counts, frames) of every image.

    rows: of the array, one frame after the other; counts: int64 [V, G], of rows; frames: uint16 [V, 2].
    """
    group = mmap_array.create_group(path / detector)
    writer = mmap_array.ArrayWriter(
        group, array.name, array.row_shape, array.dtype, mmap_array.page_rows(total_rows, KEYPOINT_PAGE_ROWS)
    )
    starts, all_counts, all_frames = [], [], []
    for rows, counts, frames in images:
        ends = np.cumsum(counts.sum(axis=1))
        starts.append([writer.append(part) for part in np.split(rows, ends[:-1])])
        all_counts.append(counts)
        all_frames.append(frames)
    writer.close()
    mmap_array.create(group, "start", np.array(starts, np.int64))
    mmap_array.create(group, "counts", np.stack(all_counts).astype(np.uint32))
    mmap_array.create(group, "frame", np.stack(all_frames).astype(np.uint16))


class Store:
    """A published store, opened read-only. Any number of processes may open the same store.

    Components are opened when they are first used, and only if the store at `path` still is the one that was opened.
    """

    def __init__(self, path: Path | str):
        """Raises KamimError if there is no store at `path`, or one of another schema version."""
        self.path = Path(path)
        content = manifest_bytes(self.path)
        self.manifest = parse_manifest(content, self.path)
        self._digest = hashlib.sha256(content).digest()

    def __len__(self) -> int:
        return len(self.images.sizes)

    @property
    def detectors(self) -> tuple[str, ...]:
        """Names of the detectors whose keypoints the store holds."""
        return tuple(self.manifest.rules)

    @cached_property
    def images(self) -> ImageReader:
        """The images, from either backend. Raises KamimError, naming the file and the fault, if they are damaged."""
        self.check_files(IMAGES)
        reader = self.open_images()
        self._check(IMAGES, image_faults(reader, len(self.manifest.classes)))
        return reader

    def class_of(self, index: int) -> str:
        """Returns the name of an image's class, "" for an image without a label."""
        label = int(self.images.labels[index])
        return self.manifest.classes[label] if label >= 0 else ""

    def check_detector(self, detector: str) -> None:
        """Raises KamimError, with the remedy, if the store has no keypoints of `detector`."""
        if detector not in self.manifest.rules:
            raise KamimError(
                f"{self.path}: has no {detector!r} keypoints, only {', '.join(self.detectors) or 'images'}; "
                f"the command that made it, with --detectors {detector}, adds them"
            )

    def keypoints(self, detector: str) -> Keypoints:
        """Opens the keypoints of `detector`. Raises KamimError, with the remedy, if they are missing or damaged."""
        self.check_detector(detector)
        self.check_files(detector)
        reader = self.open_keypoints(detector)
        self._check(detector, keypoint_faults(reader))
        return reader

    def check(self) -> None:
        """Opens all components. Raises KamimError, naming the file and the fault, if one is damaged."""
        _ = self.images, *map(self.keypoints, self.detectors)

    def check_files(self, component: str | None = None) -> None:
        """Raises KamimError if a file of the component (None: of any) is missing, or if the store contains a link."""
        files, others = entries(self.path)
        for name in sorted(others):
            raise KamimError(f"{self.path / name}: is a link or a special file; {NO_LINKS}")
        for name in self.manifest.checksums:
            if name not in files and component in (None, component_of(name)):
                raise KamimError(f"{self.path / name}: is missing; {self._remedy()}")

    def open_images(self) -> ImageReader:
        """Opens the images without checking single ones. Raises KamimError if the component is damaged as a whole."""
        path = self._file(IMAGES)
        self._check_same()
        reader: ImageReader = beton.Beton(path) if self.manifest.job.images == "ffcv" else ZarrImages(path)
        self._check_count(path, len(reader.sizes))
        if reader.encoding != (expected := self.manifest.job.format):
            raise KamimError(f"{path}: its images are {reader.encoding}, but {MANIFEST} says {expected}")
        self._check_same()
        return reader

    def open_keypoints(self, detector: str) -> Keypoints:
        """Opens keypoints without checking single images. Raises KamimError if the component is damaged as a whole."""
        path = self._file(detector)
        rules = self.manifest.rules[detector]
        self._check_same()
        job = self.manifest.job
        reader = Keypoints(path.parent, detector, rules, job.keypoint_array(rules), job)
        self._check_count(path, len(reader.frame))
        self._check_same()
        return reader

    def _check_same(self) -> None:
        """Raises KamimError if another store has replaced this one: files opened by their paths would be of both."""
        if hashlib.sha256(manifest_bytes(self.path)).digest() != self._digest:
            raise KamimError(f"{self.path}: was replaced by another store since it was opened; open it again")

    def _file(self, component: str) -> Path:
        """Returns the file or folder of a component."""
        if component == IMAGES:
            return self.path / ("images.beton" if self.manifest.job.images == "ffcv" else "images.zarr")
        return self.path / "keypoints.zarr" / component

    def _check_count(self, path: Path, held: int) -> None:
        if held != self.manifest.count:
            raise KamimError(f"{path}: holds {held} images, but {MANIFEST} has count {self.manifest.count}")

    def _check(self, component: str, faults: dict[str, np.ndarray]) -> None:
        """Raises KamimError if any image has one of the faults."""
        for fault, faulty in faults.items():
            if faulty.any():
                others = f", and {faulty.sum() - 1} more" if faulty.sum() > 1 else ""
                raise KamimError(f"{self._file(component)}: image {faulty.argmax()} {fault}{others}; {self._remedy()}")

    def _remedy(self) -> str:
        return f"put it right with `kamim store verify {self.path} --repair`"


def read_manifest(path: Path) -> Manifest:
    """Reads manifest.json of the store at `path`. Raises KamimError, naming the fault."""
    return parse_manifest(manifest_bytes(path), path)


def manifest_bytes(path: Path) -> bytes:
    """Returns the content of manifest.json of the store at `path`. Raises KamimError if there is none, or a link."""
    file = path / MANIFEST
    if not file.is_file() and (path / BACKUP).is_file():
        raise KamimError(f"{file}: is missing; put it back with `kamim store verify {path} --repair`")
    if not file.is_file():
        raise KamimError(f"{path}: not a kamim store (no manifest.json); {_how_to_make(path)}")
    if file.is_symlink():
        raise KamimError(f"{file}: is a link; {NO_LINKS}")
    if file.stat().st_size > MANIFEST_BYTES:
        raise KamimError(f"{file}: is larger than {MANIFEST_BYTES} bytes")
    return file.read_bytes()


def _how_to_make(path: Path) -> str:
    partial = path.with_name(f"{path.name}.partial")
    if partial.is_dir():
        return f"{partial} is unfinished: rerun the `kamim preprocess` command that writes it"
    if path.is_dir():
        return (
            f"if it holds images, make a store of them with `kamim preprocess imagefolder --source {path} --out STORE`"
        )
    return "make one with `kamim preprocess`"


def parse_manifest(content: bytes, path: Path) -> Manifest:
    """Parses the bytes of the manifest of the store at `path`. Raises KamimError, naming the fault."""
    file = path / MANIFEST
    try:
        fields: dict[str, Any] = json.loads(content)
        version = fields["schema_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise KamimError(f"{file}: not a manifest: {error}") from error
    if version not in READABLE:
        raise KamimError(
            f"{path}: store of schema version {version!r:.40}, this kamim reads {READABLE[0]} to {READABLE[-1]}; "
            "preprocess it again, or use the kamim that wrote it"
        )
    try:
        return Manifest.model_validate_json(content)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise KamimError(": ".join(filter(None, (str(file), key, message)))) from error


def seal(path: Path, content: bytes) -> None:
    """Writes the manifest and its backup, the last files of a store."""
    write_whole(path / BACKUP, backup_of(content))
    write_whole(path / MANIFEST, content)


def backup_of(manifest: bytes) -> bytes:
    """Returns the content of manifest.backup."""
    return hashlib.sha256(manifest).hexdigest().encode() + b"\n" + manifest


def agreed_manifest(path: Path) -> bytes | None:
    """Returns the manifest's bytes by majority of the file, its copy and the sha256, or None if no two agree.

    If one of the two files is missing, the other one counts.
    """
    manifest, backup = (sealed_file(path / name) for name in (MANIFEST, BACKUP))
    copy = backup.partition(b"\n")[2]
    if backup == backup_of(copy):
        return copy
    trusted = not backup or manifest == copy or backup.startswith(backup_of(manifest)[:64])
    return manifest if manifest and trusted else None


def sealed_file(file: Path) -> bytes:
    """Reads the manifest or its backup; returns b"" if it is missing, not a regular file, or too large."""
    plain = file.is_file() and not file.is_symlink() and file.stat().st_size <= 2 * MANIFEST_BYTES
    return file.read_bytes() if plain else b""


def checksums(path: Path, besides: Collection[str] = ()) -> dict[str, str]:
    """Returns the sha256 of every file below `path` by relative path, except the manifest, its backup and `besides`."""
    return {name: checksum(path / name) for name in sorted(entries(path)[0] - {MANIFEST, BACKUP, *besides})}


def entries(path: Path) -> tuple[set[str], set[str]]:
    """Returns the relative paths below `path`: (regular files, everything else except folders, such as links)."""
    files: set[str] = set()
    others: set[str] = set()
    for folder, folders, names in os.walk(path):
        for entry in (Path(folder, name) for name in (*folders, *names)):
            mode = entry.lstat().st_mode
            if not stat.S_ISDIR(mode):
                (files if stat.S_ISREG(mode) else others).add(entry.relative_to(path).as_posix())
    return files, others
