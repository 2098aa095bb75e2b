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
from functools import cached_property
from pathlib import Path

import numpy as np

from kamim import KamimError
from kamim.storage import beton
from kamim.storage.images import ImageReader, ZarrImages, image_faults
from kamim.storage.keypoints import Keypoints, keypoint_array, keypoint_faults
from kamim.storage.manifest import (
    IMAGES,
    MANIFEST,
    NO_LINKS,
    component_of,
    manifest_bytes,
    parse_manifest,
    tree_entries,
)


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
        files, others = tree_entries(self.path)
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
        reader = Keypoints(path.parent, detector, rules, keypoint_array(job, rules), job)
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
