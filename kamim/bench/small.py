"""Photographs shrunk to 32 px, with which the loader shows what it takes beside decoding, cropping and counting."""

import time
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from kamim.bench.crops import PATCH_SIZE
from kamim.bench.originals import read
from kamim.bench.rounds import Run
from kamim.bench.startup import Bare, repeat
from kamim.detectors import detector
from kamim.storage import mmap_array
from kamim.storage.images import ZarrImages, write_zarr_images
from kamim.storage.keypoints import GAPS, Keypoints, write_keypoints
from kamim.storage.manifest import IMAGES
from pipelines.chunk import Crops
from pipelines.counts import CachedCounts
from pipelines.loader import Crop, Loader
from pipelines.plan import Plan
from preprocess.plan import make_job
from preprocess.record import record
from preprocess.sources import Source

SIDE = 32  # px
SAMPLES = 10_000


@dataclass(frozen=True)
class SmallStore:
    """Images without a store around them, and FAST's keypoints of them."""

    images: Bare
    keypoints: Keypoints


def write_small(source: Source, folder: Path) -> SmallStore:
    """Writes SAMPLES samples of SIDE x SIDE px: the source's photographs, JPEG of quality 90, over and over."""
    job = make_job(
        "imagefolder",
        "train",
        source,
        detectors=("fast",),
        container="zarr",
        pixels="jpeg",
        quality=90,
        resolution=SIDE,
    )
    images, keypoints, count = [], [], 0
    for item in source.items[:SAMPLES]:
        small = cv2.resize(read(source, item)[1], (SIDE, SIDE), interpolation=cv2.INTER_AREA)
        rows = record(job, small, small, item.label, (IMAGES, "fast"))
        images.append((rows[IMAGES]["data"], SIDE, SIDE, item.label, False))
        keypoints.append((rows["fast"][GAPS.name], rows["fast"]["counts"][0], rows["fast"]["frame"][0]))
        count += len(rows["fast"][GAPS.name])
    again = np.arange(SAMPLES) % len(images)
    write_zarr_images(folder / "images.zarr", images, sum(len(image[0]) for image in images), "jpeg")
    mmap_array.create_group(folder / "keypoints.zarr")
    write_keypoints(folder / "keypoints.zarr", "fast", GAPS, keypoints, count)
    repeat(folder, again)
    return SmallStore(
        Bare(folder, ZarrImages(folder / "images.zarr")),
        Keypoints(folder / "keypoints.zarr", "fast", detector("fast").rules, GAPS),
    )


def kernels_only(small: SmallStore) -> Run:
    """Returns a pass of the loader's compiled loops over a SmallStore, in one thread and one call each."""
    images, counter = small.images.images, CachedCounts(small.keypoints, "ring", PATCH_SIZE)
    indices = np.arange(len(images.labels))
    loader = Loader(small.images, Plan(len(indices), 1, 1, seed=0), SIDE, crop=Crop(), workers=1)
    sizes, scratch, cells = images.sizes[indices], loader._scratch(), SIDE // PATCH_SIZE
    out, counts = np.empty((len(indices), SIDE, SIDE, 3), np.uint8), np.empty((len(indices), cells, cells), np.int16)
    stopped = np.zeros(1, np.bool_)

    def run() -> int:
        crops = Crops(indices, sizes, loader._views(indices, 0, sizes), out)
        loader._decode_and_crop(crops, scratch, stopped)
        counter.count(crops, scratch, counts)
        return len(indices)

    return run


def processor_us(run: Run) -> float:
    """Returns the processor's microseconds, of all threads, per image of a pass; other processes hardly disturb it."""
    start = time.process_time()
    images = run()
    return (time.process_time() - start) / images * 1e6
