"""Images per second of the loader, beside what it is measured against, interleaved in one run.

Every rate is images over wall time on all cores, in batches, after one unmeasured pass; the table holds the
median of the rounds, and of the ratios within each round. On a shared machine only the ratios mean anything.
"""

import importlib.util
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from kamim.bench import peers, startup
from kamim.bench.originals import accepted, check_jpeg, read
from kamim.bench.planes import planes_quality, write_planes
from kamim.bench.rounds import Run, even_batch, interleaved, paired
from kamim.bench.small import SIDE, kernels_only, processor_us, write_small
from kamim.bench.startup import Bare
from kamim.method.weighting import counts_to_weights
from kamim.storage import beton
from kamim.storage.store import Images, Keypoints, Store
from pipelines import turbojpeg
from pipelines.counts import CachedCounts
from pipelines.loader import Crop, Loader
from pipelines.plan import Plan
from preprocess.sources import Item, Source

RESOLUTION, PATCH_SIZE, TEMPERATURE = 192, 8, 0.25
EPOCHS, STOCK_EPOCHS = 32, 2  # in a measured pass, so that starting it does not weigh in; of the reference, 1
# What keypoints cost is a few per cent, less than two passes of the same differ by on a shared machine: so there are
# shorter ones, and more.
FINER, FINER_EPOCHS = 6, 4
SHORT_SIDE = 256
SMALL_BATCH = 256


class ReferenceDataset(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Samples as the released code's data loader makes them: Pillow, torchvision v2, FAST and drawKeypoints."""

    def __init__(self, source: Source):
        self._source = source
        self._transform = v2.Compose(
            [
                v2.RandomResizedCrop(RESOLUTION, scale=(0.67, 1.0), antialias=False),
                v2.RandomVerticalFlip(0.5),
                v2.RandomHorizontalFlip(0.5),
            ]
        )

    def __len__(self) -> int:
        return len(self._source.items)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        item: Item = self._source.items[index]
        image = Image.open(Path(self._source.location, item.key)).convert("RGB")
        crop = self._transform(F.pil_to_tensor(image))
        pixels = np.ascontiguousarray(crop.permute(1, 2, 0).numpy())
        found = cv2.FastFeatureDetector_create().detect(pixels, None)  # type: ignore[attr-defined]
        canvas = cv2.drawKeypoints(np.zeros_like(pixels), found, None, color=(255, 255, 255))  # type: ignore[call-overload]
        bitmap = torch.from_numpy(canvas[..., 0] > 0).float()[None]
        counts = torch.nn.functional.avg_pool2d(bitmap, PATCH_SIZE)[0] * PATCH_SIZE**2
        return crop, counts_to_weights(counts, PATCH_SIZE, TEMPERATURE)


class StoredDataset(torch.utils.data.Dataset[torch.Tensor]):
    """Crops of a store's JPEGs, decoded by torchvision: uint8 [3, R, R]."""

    def __init__(self, store: Store):
        self._images = store.images
        self._crop = v2.RandomResizedCrop(RESOLUTION, scale=(0.67, 1.0), antialias=False)

    def __len__(self) -> int:
        return len(self._images.sizes)

    def __getitem__(self, index: int) -> torch.Tensor:
        data = torch.from_numpy(self._images.data(index).copy())
        crop: torch.Tensor = self._crop(decode_jpeg(data, ImageReadMode.RGB))
        return crop


def one_thread(_: int) -> None:
    """For the worker processes of a DataLoader."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)


def reference(source: Source, batch: int, workers: int) -> Run:
    """The released code's way, from the original files, one worker process per core."""
    loader = torch.utils.data.DataLoader(
        ReferenceDataset(source), even_batch(len(source.items), batch, workers), shuffle=True, num_workers=workers,
        persistent_workers=True, worker_init_fn=one_thread,
    )  # fmt: skip
    return lambda: sum(len(images) for images, _ in loader)


def torchvision_jpeg(store: Store, batch: int, workers: int) -> Run:
    """torchvision's decode_jpeg and RandomResizedCrop in a DataLoader, one worker process per core, no keypoints."""
    loader = torch.utils.data.DataLoader(
        StoredDataset(store), even_batch(len(store), batch, workers), shuffle=True, num_workers=workers,
        persistent_workers=True, worker_init_fn=one_thread,
    )  # fmt: skip
    return lambda: sum(len(images) for images in loader)


def decode_only(store: Store, workers: int) -> Run:
    """Decoding the store's own JPEGs with as many threads, and nothing else."""

    def part(first: int) -> int:
        indices = range(first, len(store), workers)
        for _ in range(EPOCHS):
            for index in indices:
                simplejpeg.decode_jpeg(store.images.data(index))
        return EPOCHS * len(indices)

    def run() -> int:
        with ThreadPoolExecutor(workers) as pool:
            return sum(pool.map(part, range(workers)))

    return run


def ours(
    store: Images, keypoints: Keypoints | None, batch: int, workers: int, epochs: int, resolution: int = RESOLUTION
) -> Run:
    """kamim's loader; keypoints None: images alone, as SimMIM needs them."""
    counter = None if keypoints is None else CachedCounts(keypoints, "ring", PATCH_SIZE)
    plan = Plan(len(store.images.labels), batch, batch, seed=0, drop_last=False)
    loader = Loader(store, plan, resolution, crop=Crop(), counter=counter, workers=workers)
    passes: Iterator[int] = iter(range(1 << 30))

    def run() -> int:
        first = next(passes) * epochs * plan.steps_per_epoch
        return sum(len(made) for made in loader.steps(first, first + epochs * plan.steps_per_epoch))

    return run


def write_short_side(source: Source, file: Path) -> Bare:
    """The source as people make FFCV files: short side SHORT_SIDE px, JPEG of quality 90. Needs the ffcv package."""

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
    """The store's images without JPEG. Needs the ffcv package."""

    def images() -> Iterator[tuple[np.ndarray, int, int, int, bool]]:
        for index, label in enumerate(store.images.labels):
            rgb = simplejpeg.decode_jpeg(store.images.data(index))
            yield rgb.reshape(-1), *rgb.shape[:2], int(label), True

    beton.write(file, len(store), images())
    return Bare(file, beton.Beton(file))


def stock_ffcv(process: ProcessPoolExecutor, file: Path, batch: int, workers: int) -> Run:
    """ffcv's own loader on a file of images, without keypoints, in a process of its own.

    Its OSCacheManager.state_type (ffcv 1.0.2) makes numba's type of uint8 arrays read-only for the whole process,
    after which no kernel that writes to one compiles.
    """
    return lambda: process.submit(_stock_pass, str(file), batch, workers).result()


def _stock_pass(file: str, batch: int, workers: int) -> int:
    loader = _stock_loader(file, batch, workers)
    return sum(len(images) for _ in range(STOCK_EPOCHS) for images, _ in loader)


@cache
def _stock_loader(file: str, batch: int, workers: int) -> Any:
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader as FfcvLoader
    from ffcv.loader import OrderOption
    from ffcv.transforms import ToTensor

    decoder = RandomResizedCropRGBImageDecoder((RESOLUTION, RESOLUTION), scale=(0.67, 1.0), ratio=(3 / 4, 4 / 3))
    return FfcvLoader(
        file, batch_size=batch, num_workers=workers, order=OrderOption.RANDOM, os_cache=True,
        pipelines={"image": [decoder, ToTensor()], "label": [IntDecoder(), ToTensor()]},
    )  # fmt: skip


def bench(
    store: Store, source: Source, batch: int, rounds: int, progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Rates (images per second, medians) and ratios. batch: the store's images at most.

    small_images_per_thread: of 32 px images, in a second of the processor, on one thread. python_us_per_image: the
    processor's time for one of them, less that of the compiled loops alone. decoder: planes, or pixels without
    libturbojpeg. pixels: see planes_quality.

    Raises KamimError for a store without JPEGs or without FAST's keypoints.
    """
    check_jpeg(store)
    store.keypoints("fast")  # which startup.measure needs
    source, batch = accepted(source, store), min(batch, len(store))
    cv2.setNumThreads(1)  # OpenCV's threads do not survive the DataLoader's fork
    workers = len(os.sched_getaffinity(0))
    keypoints = {name: store.keypoints(name) for name in store.detectors}
    first = next(iter(keypoints.values()), None)
    runs: dict[str, Run] = {"reference": reference(source, batch, workers), "jpeg_decode": decode_only(store, workers)}
    runs["torchvision_jpeg"] = torchvision_jpeg(store, batch, workers)
    with_and_without = {"simmim": None, **keypoints}
    runs |= {name: ours(store, found, batch, workers, EPOCHS) for name, found in with_and_without.items()}
    finer = {name: ours(store, found, batch, workers, FINER_EPOCHS) for name, found in with_and_without.items()}
    spawn = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        process = stack.enter_context(ProcessPoolExecutor(1, mp_context=spawn))
        if importlib.util.find_spec("ffcv"):
            short, raw = write_short_side(source, Path(folder, "short")), write_raw(store, Path(folder, "raw"))
            runs["short_side"] = ours(short, None, batch, workers, EPOCHS)
            runs["short_side_stock_ffcv"] = stock_ffcv(process, short.path, batch, workers)
            runs["raw"] = ours(raw, first, batch, workers, EPOCHS)
        runs |= stack.enter_context(peers.peer_runs(store, Path(folder, "peers"), batch, workers))
        planes, small = write_planes(store, Path(folder, "planes")), write_small(source, Path(folder, "small"))
        runs["yuv420"] = ours(planes, first, batch, workers, EPOCHS)
        small_runs = {f"small_{n}": ours(small.images, small.keypoints, SMALL_BATCH, n, 1, SIDE) for n in (1, 2)}
        coarse, fine = len(runs) * (rounds + 1), len(finer) * (FINER * rounds + 1)
        total = coarse + fine + len(small_runs) * (FINER * rounds + 1)
        rates = interleaved(runs, rounds, lambda done, _: progress(done, total))
        small_rates = interleaved(small_runs, FINER * rounds, lambda done, _: progress(coarse + done, total))
        timed = (small_runs["small_1"], kernels_only(small))
        processor = np.array([[processor_us(run) for run in timed] for _ in range(FINER * rounds)])
        quality = planes_quality(store, planes, RESOLUTION)
    finer_rates = interleaved(finer, FINER * rounds, lambda done, _: progress(total - fine + done, total))
    best = next(iter(keypoints), "simmim")
    pairs = {
        "ratio_to_reference": (best, "reference"), "ratio_to_jpeg_decode": (best, "jpeg_decode"),
        "ratio_to_torchvision_jpeg": ("simmim", "torchvision_jpeg"),
        "ratio_to_stock_ffcv": (best, "short_side_stock_ffcv"), "raw_over_jpeg": ("raw", best),
        "yuv420_over_jpeg": ("yuv420", best),
        "ratio_to_stock_ffcv_same_file": ("short_side", "short_side_stock_ffcv"),
    }  # fmt: skip
    pairs |= {f"ratio_to_{name}": ("simmim", name) for name in peers.PEERS}
    medians = {name: statistics.median(made) for name, made in rates.items()}
    ratios = {name: paired(rates[a], rates[b]) for name, (a, b) in pairs.items() if {a, b} <= rates.keys()}
    ratios |= {f"{name}_over_simmim": paired(finer_rates[name], finer_rates["simmim"]) for name in keypoints}
    ratios["two_threads_over_one"] = paired(small_rates["small_2"], small_rates["small_1"])
    medians |= {name: statistics.median(made) for name, made in small_rates.items()}
    return {
        "small_images_per_thread": float(1e6 / np.median(processor[:, 0])),
        "python_us_per_image": float(np.median(processor[:, 0] - processor[:, 1])),
        "decoder": "planes" if turbojpeg.library() else "pixels", "pixels": quality, "small_rounds": small_rates,
        "images_per_second": medians, "ratios": ratios, "rounds": rates, "finer_rounds": finer_rates,
        "workers": workers, "batch": batch, "startup": startup.measure(store),
    }  # fmt: skip
