"""Images and masks -> batches: one random resized crop of both, in worker threads.

A crop is a pure function of (seed, epoch, index), the same one that pipelines.loader would take of such an image.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch

from kamim import KamimError
from kamim.method import geometry
from pipelines.batch import Batch, upload
from pipelines.crop import crop_resize
from pipelines.loader import CPU, Crop, SampleError, default_workers
from pipelines.plan import Plan

T = TypeVar("T")
R = TypeVar("R")
AHEAD = 2  # micro-batches that are loaded while one is in use


class DenseSource(Protocol):
    """Images with a class for every pixel. A mask may have another size than image() gives; it shows the same scene."""

    def image(self, index: int, area: float) -> np.ndarray:
        """Returns RGB uint8 [H, W, 3], downsampled to `area` px^2 if it has more."""
        ...

    def mask(self, index: int) -> np.ndarray:
        """Returns int16 [H, W], -1 for pixels without a class."""
        ...


@dataclass(frozen=True)
class DenseLoader:
    """Batches of resolution x resolution crops whose labels are int64 [B, R, R], -1 for pixels without a class.

    Images are resized bilinearly, masks by nearest neighbour. crop: random crops and flips, or None for whole images.
    workers: threads; None is one per core, divided among the processes of a machine.
    """

    source: DenseSource
    plan: Plan
    resolution: int
    crop: Crop | None = None
    workers: int | None = None
    device: torch.device = CPU

    def micro_batches(self, first: int, stop: int) -> Iterator[Batch]:
        """Yields the micro-batches of optimiser steps first .. stop - 1, on the device.

        Raises SampleError if a sample cannot be loaded. Leaving the iteration early stops the threads.
        """
        parts, side = self.plan.micro_batches, self.resolution
        places = ((part.epoch, index) for part in parts(first, stop) for index in part.indices.tolist())
        workers = self.workers or default_workers()
        with closing(_in_order(self._load, places, AHEAD * self.plan.largest_micro_batch, workers)) as samples:
            for part in parts(first, stop):
                images = np.empty((len(part.indices), side, side, 3), np.uint8)
                labels = np.empty((len(part.indices), side, side), np.int64)
                for row in range(len(part.indices)):
                    images[row], labels[row] = next(samples)
                yield Batch(
                    upload(images, self.device),
                    None,
                    upload(labels, self.device),
                    part.indices,
                    part.epoch,
                    part.step,
                    part.last,
                    part.loss_weight,
                )

    def _load(self, place: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the crop of (epoch, sample): uint8 [R, R, 3] and int16 [R, R]."""
        epoch, index = place
        scale = (1.0, 1.0) if self.crop is None else self.crop.scale
        try:
            image = self.source.image(index, geometry.stored_area(self.resolution, scale))
            view = self._view(image.shape[:2], epoch, index)
            pixels = np.empty((self.resolution, self.resolution, 3), np.uint8)
            crop_resize(np.ascontiguousarray(image), view, pixels)
            return pixels, crop_nearest(self.source.mask(index), image.shape[:2], view, self.resolution)
        except KamimError as error:
            raise SampleError(str(error)) from error

    def _view(self, size: tuple[int, int], epoch: int, index: int) -> np.ndarray:
        sizes = np.array([size])
        if self.crop is None:
            return geometry.whole_views(sizes)[0]
        crop = self.crop
        views = geometry.crop_views(sizes, crop.scale, crop.ratio, self.plan.seed, epoch, np.array([index]))
        views[:, 4:] *= crop.flip_v, crop.flip_h
        return views[0]


def crop_nearest(values: np.ndarray, size: tuple[int, int], view: np.ndarray, side: int) -> np.ndarray:
    """Takes the view of an image from an array that shows the same scene, by nearest neighbour: [side, side].

    values: [H, W]. size: (height, width) of the image, which the view (int64 [6], see kamim.method.geometry) refers to.
    An output pixel has the value of the input pixel that contains its centre, as with torch's "nearest-exact".
    """
    top, left, height, width, flip_v, flip_h = view.tolist()
    odd = 2 * np.arange(side) + 1  # centres, in halves of an output pixel; the division is exact
    rows = (2 * side * top + odd * height) * values.shape[0] // (2 * side * size[0])
    columns = (2 * side * left + odd * width) * values.shape[1] // (2 * side * size[1])
    return values[np.ix_(rows[::-1] if flip_v else rows, columns[::-1] if flip_h else columns)]


def _in_order(work: Callable[[T], R], items: Iterable[T], ahead: int, workers: int) -> Generator[R, None, None]:
    """Yields work(item) of every item, in order, computed in threads at most `ahead` items in advance."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="kamim-dense")
    pending: deque[Future[R]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
