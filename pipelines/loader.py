"""Store -> batches, in worker threads.

Each thread takes a chunk of samples at a time and fills their rows of the batch's slot in a ring of buffers: one
compiled call decodes, crops and resizes all of them (pipelines.chunk), another counts keypoints (pipelines.counts),
both without the GIL. `Loader._crop_alone` processes one by one the images that the first cannot: damaged images, which
it reports, JPEGs of rare kinds, and every JPEG if libturbojpeg is not installed. Randomness is a function of (seed,
epoch, index), so batches do not depend on the number of threads, and any step can be computed alone.
"""

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Literal

import numpy as np
import simplejpeg
import torch

from kamim import KamimError
from kamim.method import geometry
from kamim.storage import read_ahead
from kamim.storage.images import Images
from kamim.storage.jpeg import check_scans, read_markers
from kamim.storage.manifest import FORMATS
from pipelines import turbojpeg
from pipelines.batch import Batch
from pipelines.chunk import Crops, Scratch, Stored, decode_and_crop
from pipelines.counts import Counter
from pipelines.crop import crop_resize
from pipelines.plan import MicroBatch, Plan

_LOG = logging.getLogger(__name__)

CPU = torch.device("cpu")
PREFETCH = 3  # micro-batches in flight besides the one in use
# Samples that the kernel is asked to read before any of them is loaded, at least; so many requests can wait for a disk.
READ_AHEAD = 1024
# Samples a thread takes at a time: many, since going from decoding to counting and back empties the processor's caches;
# few enough for every thread to have two chunks to come.
CHUNKS = (16, 128)


def default_workers() -> int:
    """Returns the number of loader threads: the cores, divided among the processes that torchrun started here."""
    return max(len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


class SampleError(KamimError, RuntimeError):
    """A sample of the store cannot be loaded; the message names the store and the sample."""


@dataclass(frozen=True)
class Crop:
    """RandomResizedCrop and flips. scale: share of the image's area; ratio: width / height.

    flip_v, flip_h: whether half of the images are flipped vertically and horizontally; the released code's pretraining
    does both.
    """

    scale: tuple[float, float] = (0.67, 1.0)
    ratio: tuple[float, float] = geometry.CROP_RATIO
    flip_v: bool = True
    flip_h: bool = True


OnError = Literal["stop", "skip"]
# Changes images in place: (uint8 [n, R, R, 3]; seed, epoch; their samples, int64 [n]).
Augment = Callable[[np.ndarray, int, int, np.ndarray], None]


@dataclass
class _Slot:
    images: torch.Tensor
    counts: torch.Tensor | None
    stopped: np.ndarray  # bool [1], of all slots of an iteration: whether it has ended, and no thread should continue
    bad: dict[int, SampleError] = field(default_factory=dict)  # by row


class Loader:
    """Batches of resolution x resolution crops.

    crop: random crops and flips, or None for the whole image resized (evaluation). counter: the source of the keypoint
    counts, or None for no counts. augment: changes images after they are cropped, in the worker threads; its errors
    are raised unchanged. device: where batches are delivered; copies to a GPU overlap with the use of the batch before.
    on_error: whether a sample that cannot be loaded stops the iteration, or is left out of its micro-batch, logged,
    and counted in `skipped`. Raises KamimError if the counter's cells do not divide the crop, or its keypoints are for
    other crops or of another store.

    Iterating gives the batches of one epoch after the other, each from `step` to its end:

        loader = Loader(store, Plan(len(store), batch_size=256, micro_batch=256, seed=0), 192, crop=Crop())
        loader.step = 1234  # resumes a run: the step after that of the last batch seen
        for batch in loader:
            train_on(batch.images, batch.labels)

    A batch's memory is reused once the next one is requested.
    """

    def __init__(
        self,
        store: Images,
        plan: Plan,
        resolution: int,
        *,
        crop: Crop | None = None,
        counter: Counter | None = None,
        augment: Augment | None = None,
        workers: int | None = None,
        device: torch.device = CPU,
        on_error: OnError = "stop",
    ):
        self.plan = plan
        self.step = 0
        self.skipped = 0
        self._store = store
        self._images = store.images
        self._resolution = resolution
        self._crop = crop
        self._counter = counter
        self._augment = augment
        self._workers = workers or default_workers()
        self._device = device
        self._on_error = on_error
        if counter is not None:
            if resolution % counter.patch_size:
                raise KamimError(f"patch_size = {counter.patch_size}: must divide resolution = {resolution}")
            counter.check_crops(len(self._images.sizes), resolution, None if crop is None else crop.scale)
        self._largest = turbojpeg.room_for(self._images.sizes), int(self._images.sizes[:, 0].max())
        self._thread = threading.local()

    def __iter__(self) -> Iterator[Batch]:
        """Yields the micro-batches from self.step to the end of its epoch; self.step follows them."""
        epoch_end = (self.step // self.plan.steps_per_epoch + 1) * self.plan.steps_per_epoch
        for batch in self.micro_batches(self.step, epoch_end):
            if batch.last:
                self.step = batch.step + 1
            yield batch

    def micro_batches(self, first: int, stop: int) -> Iterator[Batch]:
        """Yields the micro-batches of optimiser steps first .. stop - 1, on the device.

        Raises SampleError if a sample cannot be loaded (with on_error skip, if a whole micro-batch cannot).
        Leaving the iteration early stops the threads.
        """
        return _copied(self._on_host(first, stop), self._device)

    def _on_host(self, first: int, stop: int) -> Iterator[Batch]:
        """Yields the micro-batches in the ring of buffers."""
        stopped = np.zeros(1, np.bool_)
        slots = deque(self._slot(stopped) for _ in range(PREFETCH + 1))
        pending: deque[tuple[MicroBatch, _Slot, list[Future[None]]]] = deque()
        chunk = min(max(PREFETCH * self.plan.largest_micro_batch // (2 * self._workers), CHUNKS[0]), CHUNKS[1])
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="kamim-loader")
        reader = ThreadPoolExecutor(1, thread_name_prefix="kamim-reader")
        parts = self._read_ahead(self.plan.micro_batches(first, stop), reader)
        try:
            while True:
                while slots and (part := next(parts, None)) is not None:
                    slot = slots.popleft()
                    rows = [slice(at, at + chunk) for at in range(0, len(part.indices), chunk)]
                    pending.append((part, slot, [pool.submit(self._fill, slot, part, some) for some in rows]))
                if not pending:
                    return
                part, slot, futures = pending.popleft()
                for future in futures:
                    future.result()
                yield self._batch(part, slot)
                slots.append(slot)
        finally:
            stopped[0] = True
            for threads in (reader, pool):
                threads.shutdown(wait=True, cancel_futures=True)

    def _read_ahead(self, parts: Iterable[MicroBatch], reader: Executor) -> Iterator[MicroBatch]:
        """Yields the micro-batches. While a group of them is loaded, `reader` requests the bytes of the next group.

        A group begins once all its bytes are requested: a thread that touches others makes the kernel read 128 KiB or
        more around them.
        """
        requests: list[Future[None]] = []
        for group, following in pairwise(chain([[]], _groups(parts), [[]])):
            for request in requests:
                request.result()
            wanted = np.sort(np.concatenate([np.empty(0, np.int64), *(part.indices for part in following)]))
            pieces = (wanted[at : at + READ_AHEAD] for at in range(0, len(wanted), READ_AHEAD))  # can be cancelled
            requests = [reader.submit(self._will_need, piece) for piece in pieces]
            yield from group

    def _will_need(self, indices: np.ndarray) -> None:
        read_ahead.will_need(self._images.addresses(indices), self._images.lengths[indices])
        if self._counter is not None:
            self._counter.will_need(indices)

    def _slot(self, stopped: np.ndarray) -> _Slot:
        n, side = self.plan.largest_micro_batch, self._resolution
        images = torch.empty((n, side, side, 3), dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        if self._counter is None:
            return _Slot(images, None, stopped)
        cells = side // self._counter.patch_size
        counts = torch.empty((n, cells, cells), dtype=torch.int16, pin_memory=self._device.type == "cuda")
        return _Slot(images, counts, stopped)

    def _batch(self, part: MicroBatch, slot: _Slot) -> Batch:
        indices = part.indices
        if slot.bad:
            indices = self._without_bad(indices, slot)
        n = len(indices)
        return Batch(
            images=slot.images[:n],
            counts=None if slot.counts is None else slot.counts[:n],
            labels=torch.from_numpy(self._images.labels[indices]),
            indices=indices,
            epoch=part.epoch,
            step=part.step,
            last=part.last,
            loss_weight=part.loss_weight,
        )

    def _without_bad(self, indices: np.ndarray, slot: _Slot) -> np.ndarray:
        """Moves the rows of the samples that could be loaded to the front, and returns their numbers."""
        good = [row for row in range(len(indices)) if row not in slot.bad]
        for _, error in sorted(slot.bad.items()):
            if not good:
                raise error
            _LOG.warning("%s; left out", error)
        self.skipped += len(slot.bad)
        slot.bad = {}
        for tensor in (slot.images, slot.counts):
            if tensor is not None:
                tensor[: len(good)] = tensor[good]
        return indices[good]

    def _fill(self, slot: _Slot, part: MicroBatch, rows: slice) -> None:
        """Loads some samples of a micro-batch into their rows of the slot."""
        indices, scratch = part.indices[rows], self._scratch()
        sizes = self._images.sizes[indices]
        crops = Crops(
            indices, sizes, self._views(indices, part.epoch, sizes), slot.images.numpy()[rows][: len(indices)]
        )
        for i in np.flatnonzero(self._decode_and_crop(crops, scratch, slot.stopped)).tolist():
            if slot.stopped[0]:
                return
            try:
                self._crop_alone(crops.only(i), scratch)
            except Exception as error:  # noqa: BLE001 - any error is attributed to the sample
                self._failed(slot, rows.start + i, int(indices[i]), error)
        if self._augment is not None:
            self._augment(crops.pixels, self.plan.seed, part.epoch, indices)
        if self._counter is not None and slot.counts is not None:
            self._count(self._counter, crops, scratch, slot, rows.start)

    def _decode_and_crop(self, crops: Crops, scratch: Scratch, stopped: np.ndarray) -> np.ndarray:
        """Makes the crops, until stopped, and returns which of them failed: bool [n]."""
        images, indices, failed = self._images, crops.indices, np.zeros(len(crops.indices), np.bool_)
        stored = Stored(FORMATS.index(images.encoding), images.addresses(indices), images.lengths[indices])
        decode_and_crop(stored, crops, scratch.crops, failed, stopped)
        return failed

    def _crop_alone(self, crops: Crops, scratch: Scratch) -> None:
        """Makes one crop of a JPEG that is decoded as a whole to RGB. Raises the decoder's or the file's error."""
        (height, width), data = crops.sizes[0].tolist(), self._images.data(int(crops.indices[0]))
        if (encoding := self._images.encoding) != "jpeg":
            raise KamimError(f"{len(data)} bytes are not {width}x{height} px in the encoding {encoding}")
        check_scans(read_markers(data).scans, height, width)
        image = simplejpeg.decode_jpeg(data, buffer=scratch.room[: 3 * height * width])  # refuses a larger image
        if image.shape != (height, width, 3):
            raise KamimError(f"JPEG of {image.shape[1]}x{image.shape[0]} px, the store lists {width}x{height} px")
        crop_resize(image, crops.views[0], crops.pixels[0])

    def _count(self, counter: Counter, crops: Crops, scratch: Scratch, slot: _Slot, start: int) -> None:
        """Counts all crops at once, which is fast, or one by one if that fails, to identify the sample."""
        assert slot.counts is not None
        counts = slot.counts.numpy()[start : start + len(crops.indices)]
        try:
            counter.count(crops, scratch, counts)
        except Exception:  # noqa: BLE001 - it is raised again below
            for i, index in enumerate(crops.indices.tolist()):
                try:
                    counter.count(crops.only(i), scratch, counts[i : i + 1])
                except Exception as error:  # noqa: BLE001 - any error is attributed to the sample
                    self._failed(slot, start + i, index, error)

    def _failed(self, slot: _Slot, row: int, index: int, error: Exception) -> None:
        """Records that a sample cannot be loaded, or raises SampleError. MemoryError is raised unchanged."""
        if isinstance(error, MemoryError):
            raise error
        named = SampleError(f"{self._store.path}: sample {index}: {error}")
        if self._on_error == "stop":
            raise named from error
        named.__cause__ = error
        slot.bad[row] = named

    def _views(self, indices: np.ndarray, epoch: int, sizes: np.ndarray) -> np.ndarray:
        sizes = np.maximum(sizes, 1)  # an image without pixels, which cannot be decoded, must not prevent others
        if self._crop is None:
            return geometry.whole_views(sizes)
        crop = self._crop
        views = geometry.crop_views(sizes, crop.scale, crop.ratio, self.plan.seed, epoch, indices)
        views[:, 4:] *= crop.flip_v, crop.flip_h
        return views

    def _scratch(self) -> Scratch:
        if not hasattr(self._thread, "scratch"):
            self._thread.scratch = Scratch(self._resolution, *self._largest)
        return self._thread.scratch  # type: ignore[no-any-return]


def _groups(parts: Iterable[MicroBatch]) -> Iterator[list[MicroBatch]]:
    """Divides micro-batches into groups of at least READ_AHEAD samples that end where a window of the plan does."""
    group: list[MicroBatch] = []
    samples = 0
    for part in parts:
        if samples >= READ_AHEAD and part.window != group[-1].window:
            yield group
            group, samples = [], 0
        group.append(part)
        samples += len(part.indices)
    yield group


def _copied(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Yields the same batches on `device`, each copied while the one before it is in use."""
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
        done.synchronize()  # waits for the copy alone; from here the loader may reuse its buffer
        torch.cuda.current_stream(device).wait_event(done)
        for tensor in (copied.images, copied.counts, copied.labels):
            if tensor is not None:
                tensor.record_stream(torch.cuda.current_stream(device))
        ahead = copied
    if ahead is not None:
        yield ahead
