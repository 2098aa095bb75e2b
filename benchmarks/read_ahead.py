"""Compares the loader with and without read-ahead, shuffled and chunked, on a disk with latency, from a cold cache.

    python benchmarks/read_ahead.py STORE --json read_ahead.json

STORE, of schema version 5 or later, has JPEGs and FAST's keypoints; its samples are repeated to make a store of
--samples samples. Each run is a process of its own, and the runs of all settings alternate. The disk is
benchmarks/slow_disk.py; if it cannot be mounted here, the benchmark prints the reason and ends. --memory-mb limits
memory, with the page cache and the process itself, by a cgroup, if one can be made. Processor time, requests and bytes
do not depend on other load on the machine.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from kamim.bench.startup import Bare
from kamim.detectors import detector
from kamim.storage import mmap_array, read_ahead
from kamim.storage.images import ZarrImages, write_zarr_images
from kamim.storage.keypoints import GAPS, Keypoints, write_keypoints
from kamim.storage.store import Store
from pipelines.counts import CachedCounts
from pipelines.loader import Crop, Loader
from pipelines.plan import CHUNK, Plan

SETTINGS = {  # order and whether samples are announced
    "shuffled, no read-ahead": ("shuffled", False),
    "shuffled": ("shuffled", True),
    "chunked, no read-ahead": ("chunked", False),
    "chunked": ("chunked", True),
}
RESOLUTION, BATCH = 192, 256
CLASSES, IMAGENET = 1000, 1_281_167


def repeat(store: Store, samples: int, folder: Path) -> None:
    """Writes images.zarr and keypoints.zarr with the store's samples over and over, each with bytes of its own."""
    images, keypoints = store.images, store.keypoints("fast")
    chosen = (np.arange(samples) % len(store)).tolist()
    data = ((images.data(i), *images.sizes[i].tolist(), 0, False) for i in chosen)
    write_zarr_images(folder / "images.zarr", data, int(images.lengths[chosen].sum()), "jpeg")
    mmap_array.create_group(folder / "keypoints.zarr")
    frames = range(keypoints.frame.shape[1])
    parts = [[keypoints.rows(i, frame) for frame in frames] for i in range(len(store))]
    every = [(np.concatenate([r for r, _ in of]), np.stack([c for _, c in of]).astype(np.int64)) for of in parts]
    total = sum(len(every[i][0]) for i in chosen)
    rows = ((*every[i], keypoints.frame[i]) for i in chosen)
    write_keypoints(folder / "keypoints.zarr", "fast", keypoints.array, rows, total)


def load(folder: Path, order: str, announced: bool, seconds: float) -> dict[str, float]:
    """Loads batches for some seconds, in this process."""
    if not announced:
        read_ahead.madvise = lambda: 0
    images = ZarrImages(folder / "images.zarr")
    keypoints = Keypoints(folder / "keypoints.zarr", "fast", detector("fast").rules, GAPS)
    counter = CachedCounts(keypoints, "ring", 8)

    def loader(samples: int) -> Loader:
        plan = Plan(samples, min(BATCH, samples), BATCH, 0, order)
        return Loader(Bare(folder, images), plan, RESOLUTION, crop=Crop(), counter=counter)

    for _ in loader(1).micro_batches(0, 1):  # compiles
        pass
    before, start, processor = reads(folder), time.perf_counter(), time.process_time()
    faults, count, first = resource.getrusage(resource.RUSAGE_SELF).ru_majflt, 0, 0.0
    for batch in loader(len(images.labels)).micro_batches(0, len(images.labels) // BATCH):
        count += len(batch)
        first = first or time.perf_counter() - start
        if (elapsed := time.perf_counter() - start) > seconds:
            break
    requests, loaded = (after - earlier for after, earlier in zip(reads(folder), before, strict=True))
    return {
        "images_per_second": count / elapsed,
        "first_batch_seconds": first,
        "images": count,
        "processor_us": (time.process_time() - processor) / count * 1e6,
        "major_faults_per_image": (resource.getrusage(resource.RUSAGE_SELF).ru_majflt - faults) / count,
        "requests_per_image": requests / count,
        "kb_per_image": loaded / count / 1e3,
    }


def reads(folder: Path) -> tuple[int, int]:
    """Returns the disk's requests and bytes so far."""
    requests, loaded = os.getxattr(folder / "images.zarr/zarr.json", "user.reads").split()
    return int(requests), int(loaded)


def forget(folder: Path) -> None:
    """Drops a folder's files from the page cache."""
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


@contextmanager
def slow_disk(folder: Path, latency_ms: float, mb_per_s: float) -> Iterator[Path]:
    """Mounts the folder anew, so that nothing of it is cached. Exits with the reason if it cannot."""
    script, options = Path(__file__).with_name("slow_disk.py"), ("--latency-ms", latency_ms, "--mb-per-s", mb_per_s)
    with tempfile.TemporaryDirectory() as mount:
        command = [sys.executable, script, folder, mount, *options]
        disk = subprocess.Popen([*map(str, command)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert disk.stdin is not None and disk.stdout is not None
        if disk.stdout.readline() != "mounted\n":
            sys.exit(0)  # it has printed the reason
        try:
            yield Path(mount)
        finally:
            disk.stdin.close()
            disk.wait()


@contextmanager
def limited(megabytes: int | None) -> Iterator[Path | None]:
    """Makes a memory cgroup within that of this process, or prints why it cannot. Yields its list of processes."""
    group = None
    if megabytes is not None:
        own = dict(line.split(":")[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
        name = f"read-ahead-{os.getpid()}"
        if "memory" in own:
            group, limit = Path(f"/sys/fs/cgroup/memory{own['memory']}", name), "memory.limit_in_bytes"
        else:
            group, limit = Path(f"/sys/fs/cgroup{own['']}", name), "memory.max"
        try:
            group.mkdir()
            (group / limit).write_text(str(megabytes << 20))
        except OSError as error:
            sys.exit(f"--memory-mb: no cgroup can be made here: {error}")
    try:
        yield group and group / "cgroup.procs"
    finally:
        if group is not None:
            group.rmdir()


def mixing(order: str) -> dict[str, float]:
    """Distinct chunks and classes in batches of an epoch of ImageNet, stored by class: means, and the fewest."""
    result = {}
    for batch in (256, 2048):
        plan = Plan(IMAGENET, batch, batch, 0, order)
        steps = [plan.step_indices(step) for step in range(plan.steps_per_epoch)]
        for name, size in (("chunks", CHUNK), ("classes", IMAGENET / CLASSES)):
            distinct = [len(np.unique(samples // size)) for samples in steps]
            result |= {f"{name}_of_{batch}": statistics.mean(distinct), f"fewest_{name}_of_{batch}": min(distinct)}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--latency-ms", type=float, default=20)
    parser.add_argument("--mb-per-s", type=float, default=200)
    parser.add_argument("--memory-mb", type=int)
    parser.add_argument("--seconds", type=float, default=20, help="length of a run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        setting, group = given.child
        if group:
            Path(group).write_text(str(os.getpid()))
        print(json.dumps(load(given.store, *SETTINGS[setting], given.seconds)))
        return
    runs: dict[str, list[dict[str, Any]]] = {setting: [] for setting in SETTINGS}
    with tempfile.TemporaryDirectory() as made, limited(given.memory_mb) as group:
        folder = Path(made)
        repeat(Store(given.store), given.samples, folder)
        for _ in range(given.rounds):
            for setting, of in runs.items():
                forget(folder)
                with slow_disk(folder, given.latency_ms, given.mb_per_s) as mount:
                    child = [
                        __file__,
                        str(mount),
                        "--seconds",
                        str(given.seconds),
                        "--child",
                        setting,
                        str(group or ""),
                    ]
                    of.append(json.loads(subprocess.check_output([sys.executable, *child])))
                print(setting, {key: round(value, 2) for key, value in of[-1].items()}, flush=True)
    median = {
        setting: {key: statistics.median(run[key] for run in of) for key in of[0]} for setting, of in runs.items()
    }
    mixed = {order: mixing(order) for order in ("shuffled", "chunked")}
    print(json.dumps({"median": median, "mixing": mixed}, indent=1))
    if given.json:
        options = {key: value for key, value in vars(given).items() if isinstance(value, int | float)}
        given.json.write_text(json.dumps({"options": options, "median": median, "runs": runs, "mixing": mixed}))


if __name__ == "__main__":
    main()
