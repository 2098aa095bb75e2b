"""What a loader costs before it is fast: the time to its first batch, and the memory it holds."""

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zarr

from kamim import paged
from kamim.detectors import detector
from kamim.store import ImageReader, Keypoints, Store, ZarrImages, write_keypoints, write_zarr_images
from pipelines.counts import CachedCounts
from pipelines.loader import Crop, Loader
from pipelines.plan import Plan

RESOLUTION, BATCH, PATCH_SIZE = 192, 256, 8
MILLION = 1_000_000


@dataclass(frozen=True)
class Bare:
    """Images without a store around them, for the loader."""

    path: Path
    images: ImageReader


def measure(store: Store) -> dict[str, float]:
    """Both, each in processes of their own: seconds to the first batch, megabytes at a million images."""
    made = {}
    for name in ("first_batch_seconds", "resident_mb"):
        code = f"from kamim.bench import startup; print(startup.{name}({str(store.path)!r}, {time.time()}))"
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        made[name] = float(done.stdout)
    return made


def first_batch_seconds(path: str, started: float) -> float:
    """From `started` (time.time()) to the first batch of a store, with counts where it has keypoints."""
    store = Store(path)
    counter = next((CachedCounts(store.keypoints(name), "ring", PATCH_SIZE) for name in store.detectors), None)
    batch = min(BATCH, len(store))
    next(Loader(store, Plan(len(store), batch, batch, seed=0), RESOLUTION, crop=Crop(), counter=counter).steps(0, 1))
    return time.time() - started


def resident_mb(path: str, started: float) -> float:
    """What a loader of a million images holds in memory, mapped files left out: all of them the store's first."""
    store = Store(path)
    with tempfile.TemporaryDirectory() as folder:
        images, keypoints = _million(store, Path(folder))
        before = _anonymous_mb()
        opened = Bare(Path(folder), ZarrImages(images))
        of_detector = Keypoints(keypoints, "fast", detector("fast").rules)
        loader = Loader(
            opened, Plan(MILLION, BATCH, BATCH, seed=0), RESOLUTION, crop=Crop(),
            counter=CachedCounts(of_detector, "ring", PATCH_SIZE),
        )  # fmt: skip
        for _ in loader.steps(0, 20):
            held = _anonymous_mb() - before
    return held


def _million(store: Store, folder: Path) -> tuple[Path, Path]:
    """images.zarr and keypoints.zarr of a million images that share the bytes of one."""
    keypoints = store.keypoints("fast")
    data, (height, width) = store.images.data(0), store.images.sizes[0].tolist()
    every = range(keypoints.frame.shape[1])
    positions, counts = zip(*(keypoints.image(0, frame) for frame in every), strict=True)
    write_zarr_images(folder / "images.zarr", [(data, height, width, 0, False)], len(data), "jpeg")
    zarr.create_group(folder / "keypoints.zarr")
    one = (np.concatenate(positions), np.stack(counts).astype(np.int64), keypoints.frame[0])
    write_keypoints(folder / "keypoints.zarr", "fast", [one], len(one[0]))
    for name in ("images.zarr", "keypoints.zarr/fast"):
        group = zarr.open_group(folder / name)
        for array in ("start", "length", "size", "label", "frame", "counts"):
            if array in group:
                values = np.asarray(group[array])
                del group[array]
                paged.create(group, array, np.repeat(values, MILLION, axis=0))
    return folder / "images.zarr", folder / "keypoints.zarr"


def _anonymous_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024
