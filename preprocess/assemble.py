"""Joins shards into a store, and extracts a store's shards again, byte for byte."""

import csv
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

import kamim
from kamim import KamimError
from kamim.detectors import detector
from kamim.method import geometry
from kamim.storage import beton, escape, mmap_array
from kamim.storage.images import write_zarr_images
from kamim.storage.keypoints import keypoint_array, write_keypoints
from kamim.storage.manifest import IMAGES, REJECTS, SCHEMA_VERSION, STAMPS, Manifest, component_of, file_checksums
from kamim.storage.store import Store
from preprocess import fingerprint
from preprocess.plan import BuildPlan
from preprocess.record import Rows, image_rows, join, keypoint_rows, no_images, no_keypoints
from preprocess.shards import Reject, checksum_of, column, encode, rejects_of

Files = Mapping[str, Sequence[Path]]  # every shard's file, in order, by component


class Disagreement(KamimError, RuntimeError):
    """Components differ on which images could be read; numbers: those of the shards concerned."""

    def __init__(self, file: str, numbers: Sequence[int]):
        super().__init__(f"{file}: could be read for one component and not for another")
        self.numbers = numbers


def assemble(plan: BuildPlan, shards: Files, out: Path, folder: Path) -> Manifest:
    """Joins the shards, and what is kept of the store `out`, into a store at `folder` that lacks only its manifest.

    Raises KamimError if no image is readable.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    rejects = [rejects_of(file) for file in shards[plan.make[0]]]
    counts = [len(plan.items(number)) - len(listed) for number, listed in enumerate(rejects)]
    if not sum(counts):
        raise KamimError(
            f"source = {plan.source.location}: none of its {plan.job.items} files is a readable image; "
            f"{rejects[0][0][0]}: {rejects[0][0][1]}"
        )
    for component in plan.job.components:  # images first: it creates the groups of the others
        if component in plan.keep:
            _take_over(plan, component, out, folder)
        elif component == IMAGES:
            _write_images(plan, shards[IMAGES], folder)
            _write_rejects(folder / REJECTS, rejects)
        else:
            array = keypoint_array(plan.job, detector(component).rules)
            total = int(column(shards[component], "counts").sum())
            images = _keypoints(shards[component], array.name)
            write_keypoints(folder / "keypoints.zarr", component, array, images, total)
    return _manifest(plan, shards, counts, folder)


def check_agreement(plan: BuildPlan, shards: Files, out: Path) -> None:
    """Raises Disagreement unless every component, built or kept from the store `out`, read the same files."""
    rejects = [[rejects_of(file) for file in shards[component]] for component in plan.make]
    if plan.keep:
        assert plan.store is not None
        rejects.insert(0, stored_rejects(out, plan.store))
    for other in rejects[1:]:
        pairs = enumerate(zip(rejects[0], other, strict=True))
        differ = {number: {row[0] for row in a} ^ {row[0] for row in b} for number, (a, b) in pairs}
        numbers = [number for number, names in differ.items() if names]
        if numbers:
            raise Disagreement(min(differ[numbers[0]]), numbers)


def _take_over(plan: BuildPlan, component: str, out: Path, folder: Path) -> None:
    """Links a component's files from the store `out`; copies them if the file system has no links.

    Overwrites nothing: raises FileExistsError if a file exists.
    """
    assert plan.store is not None
    for name in filter(lambda name: component_of(name) == component, plan.store.checksums):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(out / name, folder / name)
        except OSError:
            with (out / name).open("rb") as source, (folder / name).open("xb") as copy:
                shutil.copyfileobj(source, copy)


def _write_images(plan: BuildPlan, shards: Sequence[Path], folder: Path) -> None:
    """Writes all files of the component `images` except the list of rejects."""
    raw, lengths = plan.job.encoding == "raw", column(shards, "length")
    largest = int(lengths.max())
    if plan.job.images == "ffcv":
        beton.write(folder / "images.beton", len(lengths), _images(shards, raw), largest)
    else:
        write_zarr_images(folder / "images.zarr", _images(shards, raw), int(lengths.sum()), plan.job.format, largest)
    mmap_array.create_group(folder / "keypoints.zarr")
    (folder / STAMPS).write_bytes(fingerprint.to_bytes(plan.source_hashes))


def _images(shards: Sequence[Path], raw: bool) -> Iterator[tuple[np.ndarray, int, int, int, bool]]:
    for shard in shards:
        rows = load_file(shard)
        end = np.cumsum(rows["length"])
        for i, (height, width) in enumerate(rows["size"]):
            data = rows["data"][end[i] - rows["length"][i] : end[i]]
            yield data, int(height), int(width), int(rows["label"][i]), raw


def _keypoints(shards: Sequence[Path], array: str) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    for shard in shards:
        rows = load_file(shard)
        ends = np.cumsum(rows["counts"].sum(axis=(1, 2)))
        yield from zip(np.split(rows[array], ends)[:-1], rows["counts"], rows["frame"], strict=True)


def _write_rejects(file: Path, rejects: Sequence[Sequence[Reject]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(("file", "reason"))
        for listed in rejects:
            writer.writerows(map(escape.cell, row) for row in listed)


def stored_rejects(path: Path, manifest: Manifest) -> list[list[Reject]]:
    """Returns the rejects.csv of a store, by shard. Raises KamimError if its length is not the manifest's."""
    file = path / REJECTS
    try:
        with file.open(newline="", encoding="utf-8", errors="replace") as stream:
            rows: list[Reject] = [list(map(escape.text_of, row)) for row in islice(csv.reader(stream), 1, None)]
    except csv.Error as error:
        raise KamimError(f"{file}: {error}") from error
    if len(rows) != manifest.rejects or any(len(row) != 2 for row in rows):
        raise KamimError(f"{file}: is not a list of {manifest.rejects} files and reasons")
    size, items = manifest.job.shard_size, manifest.job.items
    sizes = [min(size, items - at) for at in range(0, items, size)]
    ends = np.cumsum([size - count for size, count in zip(sizes, manifest.shard_counts, strict=True)])
    return [rows[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _manifest(plan: BuildPlan, shards: Files, counts: Sequence[int], folder: Path) -> Manifest:
    """Returns the manifest of the store at `folder`. Entries of kept components are those of the earlier manifest."""
    job = plan.job
    opencv = dict.fromkeys(plan.make, job.opencv)
    hashes = {component: tuple(map(checksum_of, files)) for component, files in shards.items()}
    rules = {name: detector(name).rules for name in plan.make if name != IMAGES}
    checksums: dict[str, str] = {}
    if plan.store is not None:
        rules |= {name: plan.store.rules[name] for name in plan.keep if name != IMAGES}
        opencv |= {component: plan.store.opencv[component] for component in plan.keep}
        hashes |= {component: plan.store.shards[component] for component in plan.keep}
        checksums = {n: sha for n, sha in plan.store.checksums.items() if component_of(n) in plan.keep}
    return Manifest(
        schema_version=SCHEMA_VERSION,
        kamim_version=kamim.__version__,
        job=job,
        count=sum(counts),
        classes=plan.source.classes,
        rejects=job.items - sum(counts),
        stored_area=None if job.encoding == "original" else geometry.stored_area(job.resolution, job.crop_scale),
        rules={name: rules[name] for name in job.detectors},
        opencv={component: opencv[component] for component in job.components},
        shard_counts=tuple(counts),
        shards={component: hashes[component] for component in job.components},
        checksums=dict(sorted((checksums | file_checksums(folder, besides=checksums)).items())),
    )


def take_apart(opened: Store, component: str) -> Callable[[int], bytes]:
    """Returns a function that extracts a component's shard from the store, as bytes.

    A damaged store may raise DAMAGE. Damage to single images does not prevent reading the others.
    """
    manifest = opened.manifest
    ends = np.cumsum(manifest.shard_counts)
    rejects = stored_rejects(opened.path, manifest)
    rows, none = _image_reader(opened) if component == IMAGES else _keypoint_reader(opened, component)

    def shard(number: int) -> bytes:
        indices = range(ends[number] - manifest.shard_counts[number], ends[number])
        return encode(join([rows(index) for index in indices], none), rejects[number])

    return shard


# Errors of reading a store whose files differ from what was written.
DAMAGE = (ValueError, OSError, LookupError)


def _image_reader(opened: Store) -> tuple[Callable[[int], Rows], Rows]:
    """Returns a function that reads an image's rows, and the rows of zero images."""
    images = opened.open_images()
    inside = images.in_range()

    def read(i: int) -> Rows:
        if not inside[i]:
            raise IndexError(f"image {i} lies outside its file")
        return image_rows(images.data(i), images.sizes[i], int(images.labels[i]))

    return read, no_images()


def _keypoint_reader(opened: Store, name: str) -> tuple[Callable[[int], Rows], Rows]:
    """Like _image_reader, by the rules in the manifest: the detector may have changed, or not be installed."""
    keypoints = opened.open_keypoints(name)
    inside = keypoints.in_range()

    def read(i: int) -> Rows:
        if not inside[i]:
            raise IndexError(f"the keypoints of image {i} lie outside their file")
        per_frame = [keypoints.rows(i, frame) for frame in range(keypoints.frame.shape[1])]
        return keypoint_rows(keypoints.array, per_frame, keypoints.frame[i])

    return read, no_keypoints(keypoints.array, len(keypoints.rules.groups), keypoints.frame.shape[1])
