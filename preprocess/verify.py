"""Verifies that a store is intact."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from kamim import KamimError
from kamim.method.geometry import POSITION_UNIT
from kamim.storage.images import ImageReader, image_faults
from kamim.storage.jpeg import SCAN_BYTES, check_scans, read_markers, takes_long
from kamim.storage.keypoints import Keypoints, keypoint_faults
from kamim.storage.manifest import (
    BACKUP,
    IMAGES,
    MANIFEST,
    NO_LINKS,
    STAMPS,
    Manifest,
    agreed_manifest,
    backup_of,
    file_checksums,
    parse_manifest,
    read_manifest,
    sealed_file,
    tree_entries,
)
from kamim.storage.store import Store
from preprocess import fingerprint
from preprocess.assemble import DAMAGE, stored_rejects, take_apart
from preprocess.decode import Undecodable, decode_plain_jpeg

SEALED = (MANIFEST, BACKUP)
DAMAGED, MISSING, STRANGE, LINK = "damaged", "missing", "not in the manifest", "a link or a special file"


@dataclass(frozen=True)
class Problem:
    """A fault of a file of a store (its path within it), or of a component."""

    where: str
    what: str


def problems(path: Path, deep: bool = False) -> list[Problem]:
    """Returns all faults of the store at `path`.

    deep: every image is decoded, every keypoint checked, and every shard compared with its checksum in the manifest.
    Raises KamimError if there is no store, or one that this version cannot read.
    """
    content = agreed_manifest(path)
    if content is None:
        if not any((path / name).exists() for name in SEALED):
            read_manifest(path)  # raises if there is no store
        if links := [name for name in SEALED if (path / name).is_symlink()]:
            return [Problem(name, f"{LINK}; {NO_LINKS}") for name in links]
        return [Problem(name, f"{DAMAGED}, and so is the other: nothing can be checked") for name in SEALED]
    manifest = parse_manifest(content, path)
    faults = [*_of_manifest(path, content), *_of_files(path, manifest)]
    return faults or [*_of_contents(Store(path), deep)]


def _of_manifest(path: Path, content: bytes) -> Iterator[Problem]:
    for name, expected in zip(SEALED, (content, backup_of(content)), strict=True):
        if (path / name).is_symlink():
            yield Problem(name, LINK)
        elif not (path / name).exists():
            yield Problem(name, MISSING)
        elif sealed_file(path / name) != expected:
            yield Problem(name, DAMAGED)


def _of_files(path: Path, manifest: Manifest) -> Iterator[Problem]:
    expected, actual = manifest.checksums, file_checksums(path)
    actual |= dict.fromkeys(tree_entries(path)[1] - {*SEALED}, LINK)
    for name in sorted(expected.keys() | actual.keys()):
        if name not in actual:
            yield Problem(name, MISSING)
        elif name not in expected:
            yield Problem(name, STRANGE)
        elif actual[name] != expected[name]:
            yield Problem(name, LINK if actual[name] == LINK else DAMAGED)


def _of_contents(opened: Store, deep: bool) -> Iterator[Problem]:
    """Yields the faults of a store whose files all match their checksums."""
    classes = len(opened.manifest.classes)
    try:
        images, keypoints = opened.open_images(), {name: opened.open_keypoints(name) for name in opened.detectors}
        fingerprint.from_file(opened.path / STAMPS)
        stored_rejects(opened.path, opened.manifest)
    except DAMAGE as error:
        yield Problem("", f"cannot be opened: {' '.join(str(error).split())}")
        return
    faults = {IMAGES: image_faults(images, classes)}
    faults |= {name: keypoint_faults(reader) for name, reader in keypoints.items()}
    for component, kinds in faults.items():
        for what, wrong in kinds.items():
            yield from (Problem(component, f"image {i} {what}") for i in np.flatnonzero(wrong))
            deep &= not wrong.any()
    if deep:
        shards = {component: take_apart(opened, component) for component in faults}
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
            numbers = range(opened.manifest.job.shards)
            for damage in threads.map(partial(_of_shard, opened.manifest, images, keypoints, shards), numbers):
                yield from damage
    elif images.encoding == "jpeg":
        yield from _of_long_scans(images)


def _of_long_scans(images: ImageReader) -> Iterator[Problem]:
    """Yields the JPEGs that the loader refuses as too long to decode; reads only those with bytes for so many scans."""
    height, width = images.sizes.astype(np.int64).T
    possible = takes_long(images.lengths // SCAN_BYTES, height, width) & images.in_range()
    for index in np.flatnonzero(possible).tolist():
        try:
            check_scans(read_markers(images.data(index)).scans, int(height[index]), int(width[index]))
        except KamimError as error:
            yield Problem(IMAGES, f"image {index}: {error}")


def _of_shard(
    manifest: Manifest,
    images: ImageReader,
    keypoints: Mapping[str, Keypoints],
    shards: Mapping[str, Callable[[int], bytes]],
    number: int,
) -> list[Problem]:
    """Returns the faults of a shard's images, and of components whose shard does not match its recorded checksum."""
    first = sum(manifest.shard_counts[:number])
    damage = [
        problem
        for index in range(first, first + manifest.shard_counts[number])
        for problem in _of_image(images, keypoints, index)
    ]
    for component in shards.keys() - {problem.where for problem in damage}:
        if hashlib.sha256(shards[component](number)).hexdigest() != manifest.shards[component][number]:
            damage.append(Problem(component, f"shard {number + 1} does not hold what the store was made of"))
    return damage


def _of_image(images: ImageReader, keypoints: Mapping[str, Keypoints], index: int) -> Iterator[Problem]:
    if images.encoding == "jpeg":
        yield from jpeg_problems(images, index)
    for name, of_detector in keypoints.items():
        for number, frame in enumerate(of_detector.frame[index]):
            try:
                positions, _ = of_detector.image(index, number)
                outside = (positions > frame[::-1].astype(np.int64) * POSITION_UNIT).any()
            except IndexError:
                outside = True
            if outside:
                yield Problem(name, f"image {index} has a keypoint outside frame {number}")


def jpeg_problems(images: ImageReader, index: int) -> Iterator[Problem]:
    """Yields the faults that prevent the loader, which is as strict, from decoding an image."""
    try:
        pixels = decode_plain_jpeg(images.data(index).tobytes())
    except Undecodable as error:
        yield Problem(IMAGES, f"image {index}: {error}")
        return
    expected = (*map(int, images.sizes[index]), 3)
    if pixels is None:
        yield Problem(IMAGES, f"image {index} is not a JPEG that can be decoded")
    elif pixels.shape != expected:
        yield Problem(IMAGES, f"image {index} is of shape {pixels.shape}, the store says {expected}")
