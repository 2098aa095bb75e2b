"""The manifest of a store: the job that shaped its bytes, counts, and the checksum of every file.

Manifest holds the limits of its numbers and the allowed paths of files. Two files hold the same bytes, so that either
one can be repaired from the other.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from kamim import KamimError
from kamim.method.keypoints import Rules
from kamim.storage.files import checksum, write_whole

SCHEMA_VERSION = 5
READABLE = (3, 4, 5)  # versions below 5 have no gaps, version 3 has no `resize` and no originals
MANIFEST, BACKUP = "manifest.json", "manifest.backup"
STAMPS, REJECTS = "stamps.npy", "rejects.csv"
NO_LINKS = "a store has files and folders only; `cp -rL` copies one with what its links lead to"
IMAGES = "images"  # the component of the images; the others are named after detectors
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


def file_checksums(path: Path, besides: Collection[str] = ()) -> dict[str, str]:
    """Returns the sha256 of every file below `path` by relative path, except the manifest, its backup and `besides`."""
    return {name: checksum(path / name) for name in sorted(tree_entries(path)[0] - {MANIFEST, BACKUP, *besides})}


def tree_entries(path: Path) -> tuple[set[str], set[str]]:
    """Returns the relative paths below `path`: (regular files, everything else except folders, such as links)."""
    files: set[str] = set()
    others: set[str] = set()
    for folder, folders, names in os.walk(path):
        for entry in (Path(folder, name) for name in (*folders, *names)):
            mode = entry.lstat().st_mode
            if not stat.S_ISDIR(mode):
                (files if stat.S_ISREG(mode) else others).add(entry.relative_to(path).as_posix())
    return files, others
