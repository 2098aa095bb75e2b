"""Whether a store is what was written."""

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from kamim.method.geometry import POSITION_UNIT
from kamim.storage import store
from kamim.storage.store import IMAGES, Keypoints, Manifest, Store
from preprocess.assemble import DAMAGE
from preprocess.decode import Undecodable, decode

SEALED = (store.MANIFEST, store.BACKUP)
DAMAGED, MISSING, STRANGE = "damaged", "missing", "not in the manifest"


@dataclass(frozen=True)
class Problem:
    """What is wrong with a file of a store (its path within it), or with a component."""

    where: str
    what: str


def problems(path: Path, deep: bool = False) -> list[Problem]:
    """Everything that is wrong with the store at `path`; deep: every image is decoded, every keypoint looked at.

    Raises ValueError where there is no store, or one of another schema version.
    """
    content = store.agreed_manifest(path)
    if content is None:
        if not any((path / name).exists() for name in SEALED):
            store.read_manifest(path)  # says that there is no store
        return [Problem(name, f"{DAMAGED}, and so is the other: nothing can be checked") for name in SEALED]
    manifest = store.parse_manifest(content, path)
    found = [*_of_manifest(path, content), *_of_files(path, manifest)]
    return found or [*_of_contents(Store(path), deep)]


def _of_manifest(path: Path, content: bytes) -> Iterator[Problem]:
    for name, expected in zip(SEALED, (content, store.backup_of(content)), strict=True):
        file = path / name
        if not file.is_file():
            yield Problem(name, MISSING)
        elif file.read_bytes() != expected:
            yield Problem(name, DAMAGED)


def _of_files(path: Path, manifest: Manifest) -> Iterator[Problem]:
    expected, found = manifest.checksums, store.checksums(path)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            yield Problem(name, MISSING if name not in found else STRANGE if name not in expected else DAMAGED)


def _of_contents(opened: Store, deep: bool) -> Iterator[Problem]:
    """What is wrong although every file is as written."""
    try:
        images, keypoints = opened.images, {name: opened.keypoints(name) for name in opened.detectors}
        ranges = {IMAGES: images.in_range(), **{name: reader.in_range() for name, reader in keypoints.items()}}
    except DAMAGE as error:
        yield Problem("", f"cannot be opened: {' '.join(str(error).split())}")
        return
    frames = [reader.frame for reader in keypoints.values()]
    held = {len(array) for array in (images.labels, images.sizes, *frames, *ranges.values())}
    if held != {len(opened)}:
        yield Problem(store.MANIFEST, f"says {len(opened)} images, but the arrays hold {', '.join(map(str, held))}")
        return
    for component, in_range in ranges.items():
        yield from (Problem(component, f"image {i} lies outside its file") for i in np.flatnonzero(~in_range))
        deep &= bool(in_range.all())
    wrong = (images.labels < -1) | (images.labels >= len(opened.manifest.classes))
    yield from (Problem(IMAGES, f"image {i} has a label without a class") for i in np.flatnonzero(wrong))
    if deep:
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
            for found in threads.map(partial(_of_image, opened, keypoints), range(len(opened))):
                yield from found


def _of_image(opened: Store, keypoints: Mapping[str, Keypoints], index: int) -> list[Problem]:
    found = []
    expected = (*map(int, opened.images.sizes[index]), 3)
    data = opened.images.data(index)
    try:
        shape = expected if opened.images.raw and data.size == np.prod(expected) else decode(data.tobytes()).shape
        if shape != expected:
            found.append(Problem(IMAGES, f"image {index} is of shape {shape}, the store says {expected}"))
    except Undecodable as error:
        found.append(Problem(IMAGES, f"image {index}: {error}"))
    for name, of_detector in keypoints.items():
        for number, frame in enumerate(of_detector.frame[index]):
            positions, _ = of_detector.image(index, number)
            if (positions > frame[::-1].astype(np.int64) * POSITION_UNIT).any():
                found.append(Problem(name, f"image {index} has a keypoint outside frame {number}"))
    return found
