"""Store -> batches, in worker threads.

Each thread decodes with libjpeg-turbo and runs compiled kernels, both without the GIL, straight into the
batch's slot of a ring of buffers. Everything random is a function of (seed, epoch, index), so batches do not
depend on the number of threads, and any step can be computed alone.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import simplejpeg
import torch

from kamim import geometry
from kamim.batch import Batch
from kamim.store import Store
from pipelines.counts import Counter, Scratch, View
from pipelines.crop import crop_resize, pack
from pipelines.plan import Part, Plan

PREFETCH = 3  # micro-batches under way beside the one in use
CHUNK = 16  # samples a thread takes at a time


Augment = Callable[[np.ndarray, int, int, int], None]  # (image, seed, epoch, index), in place


class SampleError(RuntimeError):
    """A sample of the store could not be loaded; the message names the store and the sample."""


@dataclass(frozen=True)
class Crop:
    """RandomResizedCrop and flips. scale: share of the image's area; ratio: width / height.

    flip_v: whether images are turned upside down, too, as the released code's pretraining does.
    """

    scale: tuple[float, float] = (0.67, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip_v: bool = True


@dataclass
class _Slot:
    images: torch.Tensor
    counts: torch.Tensor | None


class Loader:
    """Batches of resolution x resolution crops.

    crop: random crops and flips, or None for the whole image resized (evaluation). counter: where the keypoint
    counts come from, or None for none. augment: what changes an image in the end; runs in the worker threads.
    pin: buffers in pinned memory, for copies to a GPU.

        store = Store("stores/imagenet-train")
        plan = Plan(len(store), batch_size=256, micro_batch=256, seed=0)
        for batch in Loader(store, plan, 192, crop=Crop()).steps(0, plan.steps_per_epoch):
            train_on(batch.images, batch.labels)

    A batch's memory is reused once the next one is asked for.
    """

    def __init__(
        self, store: Store, plan: Plan, resolution: int, *, crop: Crop | None = None, counter: Counter | None = None,
        augment: Augment | None = None, workers: int | None = None, pin: bool = False,
    ):  # fmt: skip
        self.plan = plan
        self._store = store
        self._images = store.images
        self._resolution = resolution
        self._crop = crop
        self._counter = counter
        self._augment = augment
        self._workers = workers or len(os.sched_getaffinity(0))
        self._pin = pin
        self._largest = int(self._images.sizes.astype(np.int64).prod(axis=1).max())
        self._thread = threading.local()

    def steps(self, first: int, stop: int) -> Iterator[Batch]:
        """The micro-batches of optimiser steps first .. stop - 1.

        Raises SampleError where a sample cannot be loaded. Leaving the iteration early stops the threads.
        """
        slots = deque(self._slot() for _ in range(PREFETCH + 1))
        pending: deque[tuple[Part, _Slot, list[Future[None]]]] = deque()
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="kamim-loader")
        parts = self.plan.parts(first, stop)
        try:
            while True:
                while slots and (part := next(parts, None)) is not None:
                    slot = slots.popleft()
                    chunks = range(0, len(part.indices), CHUNK)
                    pending.append((part, slot, [pool.submit(self._fill, slot, part, at) for at in chunks]))
                if not pending:
                    return
                part, slot, futures = pending.popleft()
                for future in futures:
                    future.result()
                yield self._batch(part, slot)
                slots.append(slot)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _slot(self) -> _Slot:
        n, side = self.plan.largest_part, self._resolution
        images = torch.empty((n, side, side, 3), dtype=torch.uint8, pin_memory=self._pin)
        if self._counter is None:
            return _Slot(images, None)
        cells = side // self._counter.patch_size
        return _Slot(images, torch.empty((n, cells, cells), dtype=torch.int16, pin_memory=self._pin))

    def _batch(self, part: Part, slot: _Slot) -> Batch:
        n = len(part.indices)
        return Batch(
            images=slot.images[:n], counts=None if slot.counts is None else slot.counts[:n],
            labels=torch.from_numpy(self._images.labels[part.indices]), indices=part.indices,
            epoch=part.epoch, step=part.step, last=part.last, share=part.share,
        )  # fmt: skip

    def _fill(self, slot: _Slot, part: Part, start: int) -> None:
        """Samples start .. start + CHUNK - 1 of a part, into their rows of the slot."""
        images = slot.images.numpy()
        counts = None if slot.counts is None else slot.counts.numpy()
        for row in range(start, min(start + CHUNK, len(part.indices))):
            index = int(part.indices[row])
            try:
                self._load(index, part.epoch, images[row], None if counts is None else counts[row])
            except Exception as error:
                raise SampleError(f"{self._store.path}: sample {index}: {error}") from error

    def _load(self, index: int, epoch: int, crop: np.ndarray, counts: np.ndarray | None) -> None:
        """One sample, from its stored bytes to its row of the batch."""
        scratch = self._scratch()
        height, width = (int(side) for side in self._images.sizes[index])
        image = self._decode(index, height, width, scratch)
        view = self._view(index, epoch, height, width)
        crop_resize(image, view.box, view.flip_v, view.flip_h, crop)
        if self._counter is not None and counts is not None:
            self._counter.count(index, view, crop, scratch, counts)
        if self._augment is not None:
            self._augment(crop, self.plan.seed, epoch, index)

    def _decode(self, index: int, height: int, width: int, scratch: "_ThreadScratch") -> np.ndarray:
        """Pixels of an image as crop_resize takes them: uint32 [H, W]."""
        data = self._images.data(index)
        if self._images.raw:
            pixels = scratch.pixels.view(np.uint32)[: height * width].reshape(height, width)
            pack(data.reshape(height, width, 3), pixels)
            return pixels
        image = simplejpeg.decode_jpeg(data, colorspace="RGBX", buffer=scratch.pixels)
        if image.shape != (height, width, 4):
            raise ValueError(f"JPEG of {image.shape[1]}x{image.shape[0]} px, the store says {width}x{height}")
        return image.view(np.uint32)[..., 0]

    def _view(self, index: int, epoch: int, height: int, width: int) -> View:
        if self._crop is None:
            return View((0, 0, height, width), (height, width), False, False)
        box = geometry.crop_box(height, width, *self._crop.scale, *self._crop.ratio, self.plan.seed, epoch, index)
        flip_v, flip_h = geometry.flips(self.plan.seed, epoch, index)
        return View(box, (height, width), flip_v and self._crop.flip_v, flip_h)

    def _scratch(self) -> "_ThreadScratch":
        if not hasattr(self._thread, "scratch"):
            self._thread.scratch = _ThreadScratch(self._resolution, self._largest)
        return self._thread.scratch  # type: ignore[no-any-return]


class _ThreadScratch(Scratch):
    """A thread's working memory; largest: pixels of the largest image."""

    def __init__(self, resolution: int, largest: int):
        super().__init__(resolution)
        self.pixels = np.empty(4 * largest, np.uint8)


def feed(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches on `device`, each copied while the one before it is being used."""
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)
    ahead: Batch | None = None
    for batch in batches:
        with torch.cuda.stream(stream):
            copied = batch.to(device)
        done = stream.record_event()
        if ahead is not None:
            yield ahead
        done.synchronize()  # of the copy alone; from here the loader may reuse its buffer
        torch.cuda.current_stream(device).wait_event(done)
        for tensor in (copied.images, copied.counts, copied.labels):
            if tensor is not None:
                tensor.record_stream(torch.cuda.current_stream(device))
        ahead = copied
    if ahead is not None:
        yield ahead
