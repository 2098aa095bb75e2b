"""Images per second of preprocessing, step by step and as a whole, beside plain JPEG decoding of the same files.

Every step is done to every image by one thread. A rate is images over that thread's processor time, which other
programs on a shared machine disturb least, so it is a rate per core. The whole is the job's own shard task: in this
thread, and in 1 and in 2 worker processes; their rates are of wall time, and of the busiest worker's processor time,
which is what wall time would be if nothing else ran. All of it is interleaved, after one unmeasured round; the table
holds the medians of the rounds.
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
from kamim.detectors import detector
from kamim.storage.store import Job
from kamim.training import machine
from preprocess.decode import Undecodable, decode, decode_plain_jpeg
from preprocess.plan import make_job
from preprocess.record import encoded, frame_sizes, keypoints, stored_pixels
from preprocess.resize import resize_plain
from preprocess.shards import ShardTask, run_shard
from preprocess.sources import Item, Read, Source

PARTS = 16  # equal shards, which 1 and 2 workers share evenly
LIBRARIES = ("numba", "numpy", "opencv-python", "simplejpeg")
WORKERS = (1, 2)
Seconds = dict[str, float]


def bench(
    source: Source, detectors: Sequence[str], rounds: int, progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Rates (images per second, medians) and the ratios that matter. Raises ValueError for a source of few JPEGs."""
    cv2.setNumThreads(1)
    items = [item for item in source.items if _is_plain_jpeg(source.read(item))]
    size = len(items) // PARTS
    if not size:
        raise KamimError(
            f"--source {source.location}: has {len(items)} readable RGB or grey JPEGs, the benchmark needs {PARTS}"
        )
    shards = [items[part * size : (part + 1) * size] for part in range(PARTS)]
    job = make_job(
        "imagefolder", "train", source, detectors=("fast",), images="zarr", encoding="jpeg", quality=90,
        resolution=192, crop_scale=(0.67, 1.0),
    )  # fmt: skip
    made: list[Seconds] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for component in job.components:
            (folder / component).mkdir()
        spawn = get_context("spawn")
        pools = {n: stack.enter_context(ProcessPoolExecutor(n, mp_context=spawn)) for n in WORKERS}
        for turn in range(rounds + 1):  # the first compiles and warms, and is not counted
            seconds = _steps(job, source, list(chain(*shards)), detectors)
            for shard in shards:
                _shard(job, source, shard, folder, seconds)
            for n, pool in pools.items():
                pooled = _pooled(pool, job, source, shards, folder)
                seconds |= {f"workers_{n}_{kind}": value for kind, value in pooled.items()}
            made += [seconds] if turn else []
            progress(turn + 1, rounds + 1)
    return _report(made, PARTS * size)


def _is_plain_jpeg(data: bytes | np.ndarray) -> bool:
    """Whether libjpeg-turbo decodes it, and nothing else has to."""
    try:
        return isinstance(data, bytes) and decode_plain_jpeg(data) is not None
    except Undecodable:
        return False


def _steps(job: Job, source: Source, items: Sequence[Item], detectors: Sequence[str]) -> Seconds:
    """Processor time of each step over all items; a step is handed what the one before it made."""
    spent: Seconds = {}

    def timed(name: str, step: Callable[..., Any], *given: Any) -> Any:
        start = time.thread_time()
        made = step(*given)
        spent[name] = spent.get(name, 0) + time.thread_time() - start
        return made

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
                timed(name, keypoints, job, name, frames[size])
        timed("fast_found", detector("fast").detect, frames[sizes["fast"][0]])
        timed("fast_found_by_opencv", _opencv_fast, frames[sizes["fast"][0]])
    return spent


def _opencv_fast(frame: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What kamim.detectors.fast stands in for: OpenCV's detector, and its keypoints as arrays."""
    found = cv2.FastFeatureDetector_create().detect(frame)  # type: ignore[attr-defined]
    return np.asarray(cv2.KeyPoint_convert(found)), np.array([k.response for k in found], np.float32)  # type: ignore[attr-defined]


def _shard(job: Job, source: Source, items: Sequence[Item], folder: Path, spent: Seconds) -> None:
    """Adds processor time of the job's task for these items: `whole_fast`, of which `write` comes after the last image.

    Waiting for the disk is not processor time.
    """
    last = Item("", -1, 0)  # cannot be read, so the task goes on to write
    written_from = 0.0

    def read(item: Item) -> bytes | np.ndarray:
        nonlocal written_from
        if item is last:
            written_from = time.thread_time()
            raise FileNotFoundError
        return source.read(item)

    start = time.thread_time()
    run_shard(_made(job, read, [*items, last], 0, folder, strict=False))
    end = time.thread_time()
    for name, begun in (("whole_fast", start), ("write", written_from)):
        spent[name] = spent.get(name, 0) + end - begun


def _pooled(pool: Executor, job: Job, source: Source, shards: Sequence[Sequence[Item]], folder: Path) -> Seconds:
    """Wall time of the shards, made by a pool of workers, and the processor time of the worker that used most."""
    start = time.perf_counter()
    tasks = [pool.submit(_task, job, source.read, shard, number, folder) for number, shard in enumerate(shards)]
    busy: Seconds = {}
    for task in tasks:
        worker, seconds = task.result()
        busy[worker] = busy.get(worker, 0) + seconds
    return {"wall": time.perf_counter() - start, "busiest": max(busy.values())}


def _made(job: Job, read: Read, items: Sequence[Item], number: int, folder: Path, strict: bool) -> ShardTask:
    return ShardTask(job, number, items, read, {component: folder / component for component in job.components}, strict)


def _task(job: Job, read: Read, items: Sequence[Item], number: int, folder: Path) -> tuple[str, float]:
    start = time.process_time()
    run_shard(_made(job, read, items, number, folder, strict=True))
    return str(os.getpid()), time.process_time() - start


def _report(made: Sequence[Seconds], images: int) -> dict[str, Any]:
    rounds = {name: [images / seconds[name] for seconds in made] for name in made[0]}
    medians = {name: statistics.median(rates) for name, rates in rounds.items()}

    def ratio(over: str, under: str) -> float:
        return statistics.median(a / b for a, b in zip(rounds[over], rounds[under], strict=True))

    ratios = {
        "whole_fast_over_jpeg_decode": ratio("whole_fast", "jpeg_decode"),
        "fast_over_opencv": ratio("fast_found", "fast_found_by_opencv"),
        "two_workers_over_one": ratio("workers_2_wall", "workers_1_wall"),
        "two_workers_over_one_busiest": ratio("workers_2_busiest", "workers_1_busiest"),
    }
    return {
        "images_per_second": medians, "ratios": ratios, "rounds": rounds, "images": images,
        "machine": machine.describe(LIBRARIES),
    }  # fmt: skip
