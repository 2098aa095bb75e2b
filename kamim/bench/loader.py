"""Images per second of the loader, beside what it is measured against, interleaved in one run.

Every rate is images over wall time on all cores, in batches, after one unmeasured pass; the table holds the
median of the rounds, and of the ratios within each round. On a shared machine only the ratios mean anything.
"""

import importlib.util
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg

from kamim.bench import baselines, peers, startup
from kamim.bench.crops import PATCH_SIZE, RESOLUTION, for_any_crops
from kamim.bench.originals import accepted, check_jpeg, read
from kamim.bench.planes import planes_quality, write_planes
from kamim.bench.rounds import Run, in_turn, paired
from kamim.bench.small import SIDE, kernels_only, processor_us, write_small
from kamim.bench.startup import Bare
from kamim.storage import beton
from kamim.storage.images import Images
from kamim.storage.keypoints import Keypoints
from kamim.storage.store import Store
from pipelines import turbojpeg
from pipelines.counts import CachedCounts
from pipelines.loader import Crop, Loader
from pipelines.plan import Plan
from preprocess.sources import Source

# What keypoints cost is a few per cent, less than two passes of the same differ by on a shared machine: so there are
# shorter ones, and more.
FINER, FINER_EPOCHS = 6, 4
SHORT_SIDE = 256
SMALL_BATCH = 256


def bench(
    store: Store, source: Source, batch: int, rounds: int, progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Returns rates (images per second, medians) and ratios. batch: the store's images at most.

    small_images_per_thread: of 32 px images, in a second of the processor, on one thread. python_us_per_image: the
    processor's time for one of them, less that of the compiled loops alone. decoder: planes, or pixels without
    libturbojpeg. pixels: see planes_quality.

    Raises KamimError for a store without JPEGs or without FAST's keypoints.
    """
    check_jpeg(store)
    fast = store.keypoints("fast")
    source, batch = accepted(source, store), min(batch, len(store))
    cv2.setNumThreads(1)  # OpenCV's threads do not survive the DataLoader's fork
    workers = len(os.sched_getaffinity(0))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        planes, small = write_planes(store, folder / "planes"), write_small(source, folder / "small")
        of_methods = {"simmim": None, **{name: store.keypoints(name) for name in store.detectors}}
        runs = {
            **baseline_runs(stack, store, source, folder, batch, workers),
            **{name: ours(store, used, batch, workers, baselines.EPOCHS) for name, used in of_methods.items()},
            "yuv420": ours(planes, fast, batch, workers, baselines.EPOCHS),
        }
        finer = {name: ours(store, used, batch, workers, FINER_EPOCHS) for name, used in of_methods.items()}
        small_runs = {f"small_{n}": ours(small.images, small.keypoints, SMALL_BATCH, n, 1, SIDE) for n in (1, 2)}
        groups = ((runs, rounds), (small_runs, FINER * rounds), (finer, FINER * rounds))
        rates, small_rates, finer_rates = in_turn(groups, progress)
        timed = (small_runs["small_1"], kernels_only(small))
        processor = np.array([[processor_us(run) for run in timed] for _ in range(FINER * rounds)])
        quality = planes_quality(store, planes, RESOLUTION)
    medians = {name: statistics.median(of_rounds) for name, of_rounds in (rates | small_rates).items()}
    return {
        "small_images_per_thread": float(1e6 / np.median(processor[:, 0])),
        "python_us_per_image": float(np.median(processor[:, 0] - processor[:, 1])),
        "decoder": "planes" if turbojpeg.library() else "pixels",
        "pixels": quality,
        "small_rounds": small_rates,
        "images_per_second": medians,
        "ratios": ratios(rates, small_rates, finer_rates),
        "rounds": rates,
        "finer_rounds": finer_rates,
        "workers": workers,
        "batch": batch,
        "startup": startup.measure(store),
    }


def baseline_runs(
    stack: ExitStack, store: Store, source: Source, folder: Path, batch: int, workers: int
) -> dict[str, Run]:
    """Returns the runs of other methods, and ours on FFCV's files with ffcv; `stack` ends their processes."""
    runs = {
        "reference": baselines.reference(source, batch, workers),
        "jpeg_decode": baselines.decode_only(store, workers),
        "torchvision_jpeg": baselines.torchvision_jpeg(store, batch, workers),
    }
    if importlib.util.find_spec("ffcv"):
        spawn = multiprocessing.get_context("spawn")
        process = stack.enter_context(ProcessPoolExecutor(1, mp_context=spawn))
        short, raw = write_short_side(source, folder / "short"), write_raw(store, folder / "raw")
        runs["short_side"] = ours(short, None, batch, workers, baselines.EPOCHS)
        runs["short_side_stock_ffcv"] = baselines.stock_ffcv(process, short.path, batch, workers)
        runs["raw"] = ours(raw, store.keypoints("fast"), batch, workers, baselines.EPOCHS)
    return runs | stack.enter_context(peers.peer_runs(store, folder / "peers", batch, workers))


def ratios(
    rates: Mapping[str, Sequence[float]], small: Mapping[str, Sequence[float]], finer: Mapping[str, Sequence[float]]
) -> dict[str, float]:
    """Returns the ratios of the runs that took part: the median of the rounds' ratios, from rates by round."""
    pairs = {
        "ratio_to_reference": ("fast", "reference"),
        "ratio_to_jpeg_decode": ("fast", "jpeg_decode"),
        "ratio_to_torchvision_jpeg": ("simmim", "torchvision_jpeg"),
        "ratio_to_stock_ffcv": ("fast", "short_side_stock_ffcv"),
        "raw_over_jpeg": ("raw", "fast"),
        "yuv420_over_jpeg": ("yuv420", "fast"),
        "ratio_to_stock_ffcv_same_file": ("short_side", "short_side_stock_ffcv"),
        **{f"ratio_to_{name}": ("simmim", name) for name in peers.PEERS},
    }
    return {
        **{name: paired(rates[a], rates[b]) for name, (a, b) in pairs.items() if {a, b} <= rates.keys()},
        **{f"{name}_over_simmim": paired(finer[name], finer["simmim"]) for name in finer if name != "simmim"},
        "two_threads_over_one": paired(small["small_2"], small["small_1"]),
    }


def ours(
    store: Images, keypoints: Keypoints | None, batch: int, workers: int, epochs: int, resolution: int = RESOLUTION
) -> Run:
    """Returns passes of kamim's loader. keypoints: None for images alone, as SimMIM needs them."""
    counter = None if keypoints is None else CachedCounts(for_any_crops(keypoints), "ring", PATCH_SIZE)
    plan = Plan(len(store.images.labels), batch, batch, seed=0, drop_last=False)
    loader = Loader(store, plan, resolution, crop=Crop(), counter=counter, workers=workers)
    passes: Iterator[int] = iter(range(1 << 30))

    def run() -> int:
        first = next(passes) * epochs * plan.steps_per_epoch
        return sum(len(crops) for crops in loader.micro_batches(first, first + epochs * plan.steps_per_epoch))

    return run


def write_short_side(source: Source, file: Path) -> Bare:
    """Writes the source as FFCV files are usually made: short side SHORT_SIDE px, JPEG of quality 90."""

    def images() -> Iterator[tuple[np.ndarray, int, int, int, bool]]:
        for item in source.items:
            rgb = read(source, item)[1]
            scale = min(SHORT_SIDE / min(rgb.shape[:2]), 1)
            small = cv2.resize(rgb, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
            jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(small), 90, colorsubsampling="420")
            yield np.frombuffer(jpeg, np.uint8), *small.shape[:2], item.label, False

    beton.write(file, len(source.items), images())
    return Bare(file, beton.Beton(file))


def write_raw(store: Store, file: Path) -> Bare:
    """Writes the store's images without JPEG, as an FFCV file."""

    def images() -> Iterator[tuple[np.ndarray, int, int, int, bool]]:
        for index, label in enumerate(store.images.labels):
            rgb = simplejpeg.decode_jpeg(store.images.data(index))
            yield rgb.reshape(-1), *rgb.shape[:2], int(label), True

    beton.write(file, len(store), images())
    return Bare(file, beton.Beton(file))
