"""How much disk and time a job will take, from a few of its images made now."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np

from kamim.storage.store import Job
from preprocess.decode import Undecodable, decode
from preprocess.plan import BuildPlan, plan_build
from preprocess.record import record
from preprocess.shards import finished
from preprocess.sources import Item, Read, Source
from preprocess.workspace import Workspace

PLACES, RUN = 4, 8  # the sample: so many runs of neighbours, which may share the cost of reading


@dataclass(frozen=True)
class Estimate:
    """Of one image: bytes by component, and seconds of one process; and of how many it was taken."""

    bytes: Mapping[str, float]
    seconds: float
    images: int


def sample(plan: BuildPlan) -> list[Item]:
    """A few items, spread over the source."""
    starts = np.linspace(0, max(plan.job.items - RUN, 0), PLACES).astype(int)
    return [plan.source.items[at] for at in np.unique(starts[:, None] + np.arange(RUN)) if at < plan.job.items]


def estimate(job: Job, components: Sequence[str], read: Read, items: Sequence[Item]) -> Estimate:
    """Makes the components of the items. An unreadable one counts, as empty."""
    _made(job, components, read, items[0])  # what only the first image costs
    start = time.perf_counter()
    made = [_made(job, components, read, item) for item in items]
    seconds = (time.perf_counter() - start) / len(items)
    return Estimate({c: sum(sizes[c] for sizes in made) / len(items) for c in components}, seconds, len(items))


def _made(job: Job, components: Sequence[str], read: Read, item: Item) -> dict[str, int]:
    """Bytes of each component of one image."""
    try:
        data = read(item)
        made = record(job, data, decode(data), item.label, components)
    except (OSError, Undecodable):
        return dict.fromkeys(components, 0)
    return {component: sum(array.nbytes for array in rows.values()) for component, rows in made.items()}


def disk_needed(found: Mapping[str, Mapping[int, Path]], images: Mapping[str, int], one: Estimate) -> int:
    """Bytes still to be written: shards of so many `images` of each component, and the store joined from all shards."""
    there = sum(file.stat().st_size for files in found.values() for file in files.values())
    return there + round(sum(2 * one.bytes[component] * count for component, count in images.items()))


def describe(job: Job, source: Source, out: Path, workers: int) -> list[str]:
    """What a build would do, in lines. Touches nothing."""
    space = Workspace(out)
    plan = plan_build(job, source, space)
    if plan.done:
        return [f"{out} is complete already"]
    one = estimate(plan.job, plan.make, source.read, sample(plan))
    numbers = range(plan.job.shards)
    found = {component: finished(folder, numbers) for component, folder in plan.folders(space).items()}
    lines = [f"{out}: {plan.summary()}", *(f"keep {component}: as it is" for component in plan.keep)]
    missing = set()
    images = {}
    for component, files in found.items():
        left = [n for n in numbers if n not in files]
        missing.update(left)
        images[component] = sum(len(plan.items(n)) for n in left)
        size = one.bytes[component] * plan.job.items
        lines.append(
            f"make {component}: {len(left):,} of {len(numbers):,} shards are still to be made; "
            f"about {size / 1e6:,.1f} MB in the store"
        )
    seconds = one.seconds * sum(len(plan.items(n)) for n in missing) / workers
    lines.append(
        f"estimate, from {one.images} images made just now: {timedelta(seconds=round(seconds))} (h:mm:ss) with "
        f"{workers} workers, and {disk_needed(found, images, one) / 1e6:,.1f} MB of disk while it is made"
    )
    return lines
