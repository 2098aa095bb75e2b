"""Estimates a job's disk space and duration from a few of its images, which are processed immediately."""

import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import cv2
import numpy as np

from kamim.detectors import detector
from kamim.storage import beton, images, keypoints, mmap_array
from kamim.storage.keypoints import keypoint_array
from kamim.storage.manifest import IMAGES, Job
from preprocess import executors
from preprocess.decode import Undecodable, decode
from preprocess.plan import BuildPlan, plan_build
from preprocess.record import record
from preprocess.shards import finished
from preprocess.sources import Item, Read, Source
from preprocess.workspace import Workspace

PLACES, RUN = 4, 8  # the sample: PLACES runs of RUN neighbours, which may share the cost of reading


@dataclass(frozen=True)
class Estimate:
    """The bytes of one image by component, its seconds in one process, and the number of processed images."""

    bytes: Mapping[str, float]
    seconds: float
    images: int


def sample(plan: BuildPlan) -> list[Item]:
    """Returns a few items, spread over the source."""
    starts = np.linspace(0, max(plan.job.items - RUN, 0), PLACES).astype(int)
    return [plan.source.items[at] for at in np.unique(starts[:, None] + np.arange(RUN)) if at < plan.job.items]


def estimate(job: Job, components: Sequence[str], read: Read, items: Sequence[Item]) -> Estimate:
    """Processes the items. An unreadable one counts as empty."""
    cv2.setNumThreads(1)  # as in shards
    _sizes(job, components, read, items[0])  # compiles or loads the loops
    start = time.perf_counter()
    sizes = [_sizes(job, components, read, item) for item in items]
    seconds = (time.perf_counter() - start) / len(items)
    return Estimate({c: sum(of_item[c] for of_item in sizes) / len(items) for c in components}, seconds, len(items))


def _sizes(job: Job, components: Sequence[str], read: Read, item: Item) -> dict[str, int]:
    """Returns the bytes of each component of one image."""
    try:
        data = read(item)
        rows = record(job, data, decode(data), item.label, components, item.key)
    except (OSError, Undecodable):
        return dict.fromkeys(components, 0)
    return {component: sum(array.nbytes for array in arrays.values()) for component, arrays in rows.items()}


def size_in_store(job: Job, component: str, size: float) -> int:
    """Returns the bytes on disk of a component whose rows are `size` bytes: a store's files consist of whole pages."""
    if component != IMAGES:
        row = keypoint_array(job, detector(component).rules).row_bytes
        page = row * mmap_array.page_rows(int(size) // row, keypoints.PAGE_ROWS)
    elif job.images == "zarr":
        page = mmap_array.page_rows(int(size), images.PAGE_BYTES)
    else:
        page = beton.PAGE_SIZE
    return -(-int(size) // page) * page


def disk_needed(
    job: Job, shards: Mapping[str, Collection[Path]], images: Mapping[str, int], one: Estimate
) -> tuple[int, dict[str, int]]:
    """Returns the bytes still to be written, and of these the bytes of each component in the store.

    shards: files that exist, by component. images: how many images each component still lacks. The rest of the bytes
    are shards, which are removed when the store is complete.
    """
    missing = {component: one.bytes[component] * count for component, count in images.items()}
    sizes = {
        component: size_in_store(job, component, sum(file.stat().st_size for file in files) + missing[component])
        for component, files in shards.items()
    }
    return round(sum(missing.values())) + sum(sizes.values()), sizes


def describe(job: Job, source: Source, out: Path, workers: int) -> list[str]:
    """Describes a build in lines, without writing anything.

    The duration includes the start of a worker process and the compilation of loops, which are measured, but not the
    joining of the shards.
    """
    space = Workspace(out)
    plan = plan_build(job, source, space)
    if plan.done:
        return [f"{out} is complete already"]
    begun = time.perf_counter()
    with executors.local(1) as (executor, _):
        one = executor.submit(estimate, plan.job, plan.make, source.read, sample(plan)).result()
    start = time.perf_counter() - begun  # a job also estimates before it builds shards
    numbers = range(plan.job.shards)
    shard_files = {component: finished(folder, numbers) for component, folder in plan.folders(space).items()}
    missing = {component: [n for n in numbers if n not in files] for component, files in shard_files.items()}
    images = {component: sum(len(plan.items(n)) for n in left) for component, left in missing.items()}
    needed, sizes = disk_needed(plan.job, {c: list(files.values()) for c, files in shard_files.items()}, images, one)
    lines = [*source.summary(), f"{out}: {plan.summary()}", *(f"keep {component}: as it is" for component in plan.keep)]
    lines += [
        f"make {component}: {len(left):,} of {len(numbers):,} shards are still to be made; "
        f"about {sizes[component] / 1e6:,.1f} MB in the store"
        for component, left in missing.items()
    ]
    rest = one.seconds * sum(len(plan.items(n)) for n in set().union(*missing.values())) / workers
    duration = timedelta(seconds=math.ceil(start + rest))
    lines.append(
        f"estimate, from {one.images} images processed now: {duration} (h:mm:ss) with "
        f"{workers} workers, of which {start:.1f} s to start processes and to load or compile loops; "
        f"{needed / 1e6:,.1f} MB of disk while it runs, {sum(sizes.values()) / 1e6:,.1f} MB when it is done"
    )
    return lines
