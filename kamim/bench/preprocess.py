"""Benchmarks preprocessing, step by step and as a whole, against plain JPEG decoding of the same files.

One thread applies every step to every image. A rate is images per second of that thread's processor time, which other
programs on a shared machine disturb least, so it is a rate per core. The whole is the job's own shard task, in this
thread and in 1 and 2 worker processes. Workers have two rates: by wall time, and by the busiest worker's processor
time, which would be the wall time on an idle machine. Everything is interleaved, after one unmeasured round; reported
rates are medians of the rounds.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg

from kamim import KamimError
from kamim.bench.crops import RESOLUTION, SCALE
from kamim.bench.rounds import paired
from kamim.detectors import detector, opencv
from kamim.runtime import machine
from kamim.storage.manifest import Job
from preprocess.decode import Undecodable, decode, decode_plain_jpeg
from preprocess.plan import make_job
from preprocess.record import encoded, frame_sizes, stored_keypoints, stored_pixels
from preprocess.resize import resize_plain
from preprocess.shards import ShardTask, run_shard
from preprocess.sources import Item, Read, Source

PARTS = 16  # equal shards, so that 1 and 2 workers share them evenly
LIBRARIES = ("numba", "numpy", "opencv-python", "simplejpeg")
WORKERS = (1, 2)
Seconds = dict[str, float]


def bench(
    source: Source, detectors: Sequence[str], rounds: int, progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Returns rates (images per second, medians) and ratios. Raises KamimError if the source has too few JPEGs."""
    cv2.setNumThreads(1)
    items = [item for item in source.items if _is_plain_jpeg(source.read(item))]
    size = len(items) // PARTS
    if not size:
        raise KamimError(
            f"source = {source.location}: has {len(items)} readable RGB or grey JPEGs, the benchmark needs {PARTS}"
        )
    shards = [items[part * size : (part + 1) * size] for part in range(PARTS)]
    job = make_job(
        "imagefolder",
        "train",
        source,
        detectors=("fast",),
        container="zarr",
        pixels="jpeg",
        quality=90,
        resolution=RESOLUTION,
        crop_scale=SCALE,
    )
    measured: list[Seconds] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for component in job.components:
            (folder / component).mkdir()
        spawn = get_context("spawn")
        pools = {n: stack.enter_context(ProcessPoolExecutor(n, mp_context=spawn)) for n in WORKERS}
        for turn in range(rounds + 1):  # the first round compiles and warms up, and is not counted
            seconds = _steps(job, source, list(chain(*shards)), detectors)
            for shard in shards:
                _shard(job, source, shard, folder, seconds)
            for n, pool in pools.items():
                pooled = _pooled(pool, job, source, shards, folder)
                seconds |= {f"workers_{n}_{kind}": value for kind, value in pooled.items()}
            measured += [seconds] if turn else []
            progress(turn + 1, rounds + 1)
    return _report(measured, PARTS * size)


def _is_plain_jpeg(data: bytes | np.ndarray) -> bool:
    """Returns whether libjpeg-turbo alone decodes the data."""
    try:
        return isinstance(data, bytes) and decode_plain_jpeg(data) is not None
    except Undecodable:
        return False


def _steps(job: Job, source: Source, items: Sequence[Item], detectors: Sequence[str]) -> Seconds:
    """Returns the processor time of each step over all items. Each step gets the result of the step before."""
    spent: Seconds = {}

    def timed(name: str, step: Callable[..., Any], *arguments: Any) -> Any:
        start = time.thread_time()
        result = step(*arguments)
        spent[name] = spent.get(name, 0) + time.thread_time() - start
        return result

    for item in items:
        data = timed("read", source.read, item)
        timed("jpeg_decode", simplejpeg.decode_jpeg, data)
        rgb = timed("decode", decode, data)
        stored = timed("resize", stored_pixels, job, rgb)
        sizes = {name: frame_sizes(job, name, rgb) for name in ("fast", *detectors)}
        frames = {
            size: timed("resize", resize_plain, rgb, size) for size in {size for of in sizes.values() for size in of}
        }
        timed("encode", encoded, job, stored)
        for name in detectors:
            for size in sizes[name]:
                timed(name, stored_keypoints, job, name, frames[size])
        timed("fast_found", detector("fast").detect, frames[sizes["fast"][0]])
        timed("fast_found_by_opencv", opencv.fast, frames[sizes["fast"][0]])
    return spent


def _shard(job: Job, source: Source, items: Sequence[Item], folder: Path, spent: Seconds) -> None:
    """Adds processor time of the shard task of these items: `whole_fast`, and `write`, its part after the last image.

    Waiting for the disk is not processor time.
    """
    last = Item("", -1, 0)  # cannot be read, and marks the end of the images
    write_start = 0.0

    def read(item: Item) -> bytes | np.ndarray:
        nonlocal write_start
        if item is last:
            write_start = time.thread_time()
            raise FileNotFoundError
        return source.read(item)

    start = time.thread_time()
    run_shard(_shard_task(job, read, [*items, last], 0, folder, strict=False))
    end = time.thread_time()
    for name, begin in (("whole_fast", start), ("write", write_start)):
        spent[name] = spent.get(name, 0) + end - begin


def _pooled(pool: Executor, job: Job, source: Source, shards: Sequence[Sequence[Item]], folder: Path) -> Seconds:
    """Returns the wall time of the shards in a pool of workers, and the processor time of the busiest worker."""
    start = time.perf_counter()
    tasks = [pool.submit(_task, job, source.read, shard, number, folder) for number, shard in enumerate(shards)]
    busy: Seconds = {}
    for task in tasks:
        worker, seconds = task.result()
        busy[worker] = busy.get(worker, 0) + seconds
    return {"wall": time.perf_counter() - start, "busiest": max(busy.values())}


def _shard_task(job: Job, read: Read, items: Sequence[Item], number: int, folder: Path, strict: bool) -> ShardTask:
    return ShardTask(job, number, items, read, {component: folder / component for component in job.components}, strict)


def _task(job: Job, read: Read, items: Sequence[Item], number: int, folder: Path) -> tuple[str, float]:
    start = time.process_time()
    run_shard(_shard_task(job, read, items, number, folder, strict=True))
    return str(os.getpid()), time.process_time() - start


def _report(measured: Sequence[Seconds], images: int) -> dict[str, Any]:
    rounds = {name: [images / seconds[name] for seconds in measured] for name in measured[0]}
    medians = {name: statistics.median(rates) for name, rates in rounds.items()}

    ratios = {
        "whole_fast_over_jpeg_decode": paired(rounds["whole_fast"], rounds["jpeg_decode"]),
        "fast_over_opencv": paired(rounds["fast_found"], rounds["fast_found_by_opencv"]),
        "two_workers_over_one": paired(rounds["workers_2_wall"], rounds["workers_1_wall"]),
        "two_workers_over_one_busiest": paired(rounds["workers_2_busiest"], rounds["workers_1_busiest"]),
    }
    return {
        "images_per_second": medians,
        "ratios": ratios,
        "rounds": rounds,
        "images": images,
        "machine": machine.describe(LIBRARIES),
    }
