"""Plans a job: the components that a finished store already has, and those that must be built from shards."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import cv2
import numpy as np

import kamim
from kamim import KamimError
from kamim.detectors import detector, origin
from kamim.method import geometry
from kamim.storage import beton
from kamim.storage.files import checksum
from kamim.storage.manifest import (
    BACKUP,
    IMAGES,
    MANIFEST,
    REJECTS,
    STAMPS,
    Backend,
    Encoding,
    Job,
    Manifest,
    tree_entries,
)
from kamim.storage.ownership import is_leftover
from kamim.storage.store import Store
from preprocess import fingerprint
from preprocess.decode import Undecodable, decode
from preprocess.sources import Item, Source
from preprocess.sources.base import plural
from preprocess.workspace import Workspace

SHARD_SIZE = 128
SMALL = 96  # px: images whose sides are all shorter are stored raw by default
LOOKED_AT = 8  # images that are decoded to detect whether a source has small images
DEFAULTS: dict[str, Any] = {
    "images": "zarr",  # which holds all kinds of pixels
    "fingerprint": "stat",
    "quality": 90,
    "resize": "bicubic",
    "resolution": 192,
    "crop_scale": (0.67, 1.0),
    "whole_pixels": "gaps",
}
IDENTITY = ("dataset", "split", "fingerprint", "shard_size")  # these never change in a store
REMEDY = "put it right with `kamim store verify {} --repair`"


def make_job(
    dataset: str,
    split: str,
    source: Source,
    *,
    detectors: Sequence[str],
    out: Path | None = None,
    container: Backend | None = None,
    fingerprint: str | None = None,
    pixels: Encoding | Literal["auto"] | None = None,
    quality: int | None = None,
    resolution: int | None = None,
    crop_scale: tuple[float, float] | None = None,
) -> Job:
    """Checks the parameters; missing ones come from `out`, begun or finished, or from DEFAULTS.

    container: ffcv or zarr; None means as in `out`, else zarr, and zarr for yuv420, which ffcv does not hold.
    pixels: None means as in `out`, else auto; auto is raw for small images (see is_small), else jpeg.
    The job, and the manifest with it, calls them `images` and `encoding`.
    Raises KamimError naming the parameter, its value and the allowed values.
    """
    before = None if out is None else _job_at(Workspace(out))
    given = {
        "fingerprint": fingerprint,
        "encoding": pixels,
        "quality": quality,
        "resolution": resolution,
        "crop_scale": crop_scale,
        "images": container,
    }
    defaults = DEFAULTS | {"encoding": "auto", "shard_size": SHARD_SIZE}
    fixed = before.model_dump(include=set(defaults)) if before else defaults
    fixed |= {name: value for name, value in given.items() if value is not None}
    if container is None and fixed["encoding"] == "yuv420":
        fixed["images"] = "zarr"
    _check(fixed, detectors)
    if fixed["encoding"] == "auto":
        small = is_small(source, geometry.stored_area(fixed["resolution"], fixed["crop_scale"]))
        fixed["encoding"] = "raw" if small else "jpeg"
    return Job(
        dataset=dataset,
        split=split,
        items=len(source.items),
        detectors=tuple(detectors),
        opencv=cv2.__version__,
        **fixed,
    )


def is_small(source: Source, stored_area: float) -> bool:
    """Returns whether the source's images, judged by a few of them, are below SMALL and not shrunk in the store.

    Such images lose much as JPEG: CIFAR-10's come back at 28 to 32 dB, and the weights W of their crops correlate by
    0.63 with those of the originals.
    """
    sizes = []
    for at in np.unique(np.linspace(0, len(source.items) - 1, LOOKED_AT).astype(int)):
        try:
            sizes.append(decode(source.read(source.items[at])).shape[:2])
        except (OSError, Undecodable):
            continue
    return bool(sizes) and all(max(size) < SMALL and size[0] * size[1] <= stored_area for size in sizes)


def _job_at(space: Workspace) -> Job | None:
    """Returns the unfinished job of the workspace, or else that of the finished store."""
    space.check_ownership()
    finished = space.finished()
    return space.begun() or (finished.job if finished else None)


def _check(fixed: dict[str, Any], detectors: Sequence[str]) -> None:
    """Raises KamimError for the first invalid parameter."""
    for name in detectors:
        detector(name)
        if name == IMAGES or not name.isidentifier():
            raise KamimError(f"detectors = {name}: a store cannot hold a detector of that name")
    if len(set(detectors)) != len(detectors):
        raise KamimError(f"detectors = {','.join(detectors)}: names one twice")
    if fixed["images"] not in get_args(Backend):
        raise KamimError(f"container = {fixed['images']}: must be {' or '.join(get_args(Backend))}")
    if fixed["encoding"] not in ("auto", *get_args(Encoding)):
        raise KamimError(f"pixels = {fixed['encoding']}: must be one of {', '.join(get_args(Encoding))}")
    if fixed["images"] == "ffcv" and fixed["encoding"] == "yuv420":
        raise KamimError("container = ffcv: holds no images with pixels = yuv420; take container=zarr, or other pixels")
    if fixed["fingerprint"] not in ("stat", "content"):
        raise KamimError(f"fingerprint = {fixed['fingerprint']}: must be stat or content")
    resolution, crop_scale = fixed["resolution"], fixed["crop_scale"]
    if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
        raise KamimError(f"crop_scale = {crop_scale[0]},{crop_scale[1]}: needs 0 < smallest <= largest <= 1")
    if not 16 <= resolution <= 1024:
        raise KamimError(f"resolution = {resolution}: must be 16 to 1024")
    if not 1 <= fixed["quality"] <= 100:
        raise KamimError(f"quality = {fixed['quality']}: must be 1 to 100")
    if fixed["encoding"] == "raw" and 3.1 * geometry.stored_area(resolution, crop_scale) > beton.PAGE_SIZE:
        raise KamimError(
            f"pixels = raw: images for resolution = {resolution} and crop_scale = {crop_scale[0]},{crop_scale[1]} "
            f"are larger than a page of the store, {beton.PAGE_SIZE} bytes; take pixels=jpeg, or smaller images"
        )


@dataclass(frozen=True)
class BuildPlan:
    """A job on its source, and the components that a finished store already has."""

    job: Job
    source: Source
    source_hashes: np.ndarray  # of the source, see preprocess.fingerprint
    store: Manifest | None  # the finished store
    changed: str  # parameters that differ from the finished store's or the begun job's, as text
    keep: tuple[str, ...]  # components taken over unchanged
    make: tuple[str, ...]  # components to join from shards

    @property
    def done(self) -> bool:
        """Whether the finished store is that of this job."""
        return self.store is not None and not self.make

    def items(self, number: int) -> Sequence[Item]:
        """Returns the items of a shard."""
        return self.source.items[number * self.job.shard_size : (number + 1) * self.job.shard_size]

    def folders(self, space: Workspace) -> dict[str, Path]:
        """Returns the folders of shards of the components to build."""
        return {component: space.shards / f"{component}-{self._key(component)}" for component in self.make}

    def _key(self, component: str) -> str:
        """Returns a digest of everything that shapes the component's shards."""
        code = [kamim.__version__, self.job.opencv, "" if component == IMAGES else origin(component)]
        shaping = [*(getattr(self.job, name) for name in IDENTITY), *code, self.job.recipe(component)]
        return hashlib.sha256(json.dumps(shaping).encode() + self.source_hashes.tobytes()).hexdigest()[:16]

    def summary(self) -> str:
        """Returns the plan as one line."""
        changed = f"{self.changed}: " if self.changed else ""
        keeps = f"; keeps {', '.join(self.keep)}" if self.keep else ""
        return (
            f"{changed}makes {', '.join(self.make) or 'nothing'} of {self.job.items:,} "
            f"{plural(self.job.items, 'image')} in {self.job.shards:,} {plural(self.job.shards, 'shard')}{keeps}"
        )


def plan_build(
    job: Job, source: Source, space: Workspace, progress: fingerprint.Progress = lambda done, total: None
) -> BuildPlan:
    """Compares the job with the finished store and the unfinished job, whose detectors are kept.

    Raises KamimError if `space` belongs to another data set, and if the source has changed.
    """
    finished, begun = space.finished(), space.begun()
    before = [existing for existing in (finished.job if finished else None, begun) if existing is not None]
    for existing in before:
        _check_same_job(existing, job, space.out)
    if finished is not None:
        Store(space.out).check_files()
        for file in (space.out / REJECTS, space.out / STAMPS):  # a plan relies on them
            if checksum(file) != finished.checksums[file.name]:
                raise KamimError(f"{file}: damaged; {REMEDY.format(space.out)}")
    source_hashes = fingerprint.source_hashes(source, job.fingerprint, len(os.sched_getaffinity(0)), progress)
    if finished is not None:
        stored = fingerprint.from_file(space.out / STAMPS)
        fingerprint.check_unchanged(stored, source_hashes, source, space.out, job.fingerprint)
    if (earlier := space.begun_source_hashes()) is not None:
        fingerprint.check_unchanged(earlier, source_hashes, source, space.partial, job.fingerprint)
    detectors = [*(name for existing in before for name in existing.detectors), *job.detectors]
    job = job.model_copy(update={"detectors": tuple(dict.fromkeys(detectors))})
    keep = tuple(c for c in job.components if finished and _has(finished.job, c, job))
    make = tuple(c for c in job.components if c not in keep)
    if finished is not None and make:
        _check_only(finished, space.out)
    return BuildPlan(job, source, source_hashes, finished, _changes(before, job), keep, make)


def _check_only(manifest: Manifest, out: Path) -> None:
    """Raises KamimError if a store that is about to be replaced holds files that are not its own."""
    own = {MANIFEST, BACKUP, *manifest.checksums}
    for name in sorted(tree_entries(out)[0] - own):
        if not is_leftover(Path(name).name):
            raise KamimError(f"{out / name}: is not the store's, which is replaced as a whole; move it elsewhere")


def _has(existing: Job, component: str, job: Job) -> bool:
    return component in existing.components and existing.recipe(component) == job.recipe(component)


def _check_same_job(existing: Job, job: Job, out: Path) -> None:
    differences = [
        f"{name} {getattr(existing, name)!r}, requested {getattr(job, name)!r}"
        for name in IDENTITY
        if getattr(existing, name) != getattr(job, name)
    ]
    if differences:
        raise KamimError(
            f"out = {out}: exists already, from another job ({'; '.join(differences)}); "
            "remove it or choose another out=..."
        )


def _changes(before: Sequence[Job], job: Job) -> str:
    """Returns the changed parameters of components as text."""
    now = {name: value for component in job.components for name, value in job.recipe(component).items()}
    changes = [
        f"{name} {getattr(existing, name)} becomes {value}"
        for existing in before
        for name, value in now.items()
        if getattr(existing, name) != value
    ]
    return ", ".join(dict.fromkeys(changes))
