"""Benchmarks the start of a loader: opening a store, the time to the first batch, and memory."""

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kamim.bench.crops import PATCH_SIZE, RESOLUTION, for_any_crops
from kamim.detectors import detector
from kamim.storage import gaps, mmap_array
from kamim.storage.images import ImageReader, ZarrImages, image_faults, write_zarr_images
from kamim.storage.keypoints import GAPS, Keypoints, keypoint_faults, write_keypoints
from kamim.storage.store import Store
from pipelines.counts import CachedCounts
from pipelines.loader import Crop, Loader
from pipelines.plan import Plan

BATCH = 256
MILLION = 1_000_000


@dataclass(frozen=True)
class Bare:
    """Images without a store, for the loader."""

    path: Path
    images: ImageReader


def measure(store: Store) -> dict[str, float]:
    """Returns the seconds to the first batch and, for a million images, the seconds to open them and the megabytes.

    Each is measured in a process of its own.
    """
    with tempfile.TemporaryDirectory() as folder:
        _elsewhere(f"write_images({str(store.path)!r}, {folder!r}, {MILLION})")
        return {
            "first_batch_seconds": _elsewhere(f"first_batch_seconds({str(store.path)!r}, {time.time()})"),
            "open_seconds": _elsewhere(f"open_seconds({folder!r})"),
            "resident_mb": _elsewhere(f"resident_mb({folder!r})"),
        }


def _elsewhere(call: str) -> float:
    """Calls a function of this module in a new process and returns its result."""
    code = f"from kamim.bench import startup; print(startup.{call})"
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def first_batch_seconds(path: str, started: float) -> float:
    """Returns the seconds from `started` (time.time()) to a store's first batch, with counts if it has keypoints."""
    store = Store(path)
    keypoints = (for_any_crops(store.keypoints(name)) for name in store.detectors)
    counter = next((CachedCounts(of_detector, "ring", PATCH_SIZE) for of_detector in keypoints), None)
    batch = min(BATCH, len(store))
    next(
        Loader(store, Plan(len(store), batch, batch, seed=0), RESOLUTION, crop=Crop(), counter=counter).micro_batches(
            0, 1
        )
    )
    return time.time() - started


def write_images(path: str, folder: str, images: int) -> int:
    """Writes images.zarr and keypoints.zarr to `folder`, with the first image of the store `images` times."""
    store, out = Store(path), Path(folder)
    keypoints = store.keypoints("fast")
    data, (height, width) = store.images.data(0), store.images.sizes[0].tolist()
    codes = [gaps.encode(keypoints.image(0, i)[0], *size) for i, size in enumerate(keypoints.frame[0].tolist())]
    write_zarr_images(out / "images.zarr", [(data, height, width, 0, False)], len(data), "jpeg")
    mmap_array.create_group(out / "keypoints.zarr")
    one = (np.concatenate(codes), np.array([[len(code)] for code in codes]), keypoints.frame[0])
    write_keypoints(out / "keypoints.zarr", "fast", GAPS, [one], len(one[0]))
    repeat(out, np.zeros(images, np.int64))
    return images


def repeat(folder: Path, samples: np.ndarray) -> None:
    """Makes sample i of images.zarr and keypoints.zarr/fast in a folder the one that was samples[i] (int [n])."""
    import zarr

    for name in ("images.zarr", "keypoints.zarr/fast"):
        group = zarr.open_group(folder / name)
        for array in {"start", "length", "size", "label", "frame", "counts"} & set(group.array_keys()):
            values = np.asarray(group[array])
            del group[array]
            mmap_array.create(group, array, values[samples])


def open_seconds(folder: str) -> float:
    """Returns the seconds it takes to open and check all images and keypoints of write_images."""
    start = time.perf_counter()
    keypoints = Keypoints(Path(folder, "keypoints.zarr"), "fast", detector("fast").rules, GAPS)
    for faults in (image_faults(ZarrImages(Path(folder, "images.zarr")), 1), keypoint_faults(keypoints)):
        assert not any(wrong.any() for wrong in faults.values())
    return time.perf_counter() - start


def resident_mb(folder: str) -> float:
    """Returns the memory in MB of a loader of the images of write_images, without mapped files."""
    before = _anonymous_mb()
    images = ZarrImages(Path(folder, "images.zarr"))
    keypoints = Keypoints(Path(folder, "keypoints.zarr"), "fast", detector("fast").rules, GAPS)
    plan = Plan(len(images.labels), BATCH, BATCH, seed=0)
    counter = CachedCounts(keypoints, "ring", PATCH_SIZE)
    for _ in Loader(Bare(Path(folder), images), plan, RESOLUTION, crop=Crop(), counter=counter).micro_batches(0, 20):
        held = _anonymous_mb() - before
    return held


def _anonymous_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024
