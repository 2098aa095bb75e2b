"""Stores and loaders for the pretraining loop."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from kamim.evaluation.setting import Samples, Setting, labelled
from kamim.models.masked_image_model import MaskedImageModel
from kamim.storage.store import Store
from kamim.training import callbacks, distributed, machine, metrics, nonfinite, report
from kamim.training.config import Evaluation, OnlineProbe, Pretrain, load
from kamim.training.distributed import World
from kamim.training.pretrain import CONFIG, Observe, pretrain
from kamim.training.replay import Replayed, replay
from kamim.training.trainer import Batches, Observer, Outcome, Progress, autocast
from pipelines.batch import Batch
from pipelines.counts import CachedCounts, Counter, OnlineCounts
from pipelines.loader import Crop, Loader, feed
from pipelines.plan import Plan
from pipelines.subset import n_per_class

SHOWN = 8  # samples in a panel


def run_pretrain(config: Pretrain, progress: Progress, fresh: bool = False) -> Outcome:
    """`kamim pretrain`: checks the store against the configuration, then trains on it. fresh: see pretrain."""
    world = distributed.start(config.compute.device)
    try:
        plan, batches, observe = _checked(config, world)
        outcome = pretrain(config, batches, plan.steps_per_epoch, world, progress, observe, fresh)
        if world.is_main and not report.is_current(config.out):
            report.save_report(config.out)
        world.barrier()  # torchrun ends all that are left once one leaves to be resumed
        return outcome
    finally:
        distributed.stop()


def check_pretrain(config: Pretrain) -> None:
    """Raises ValueError for what run_pretrain would, but for what lies in config.out."""
    world = distributed.start(config.compute.device)
    try:
        _checked(config, world)
    finally:
        distributed.stop()


def _checked(config: Pretrain, world: World) -> tuple[Plan, Batches, Observe]:
    """What a run trains on and is seen by. Raises ValueError for what cannot be."""
    metrics.check(config.log)
    store = Store(config.data.store)
    plan, batches = training_batches(config, store, world)
    config.optim.schedule(plan.steps_per_epoch)
    autocast(config.compute, world.device)
    if world.is_main and (line := online_differs(config, store)):
        metrics.log.warning(line)
    return plan, batches, _observers(config, store, plan.steps_per_epoch, world)


def run_replay(run: Path, step: int | None, device: str) -> Replayed:
    """`kamim replay`: a step of a run again; None for the newest that was not finite. Raises ValueError for no such."""
    if not (run / CONFIG).is_file():
        raise ValueError(f"{run}: not a run of `kamim pretrain` (no {CONFIG})")
    config = load(Pretrain, run / CONFIG)
    recorded = nonfinite.recorded(run)
    if step is None and not recorded:
        raise ValueError(f"{run}: had no step whose loss was not finite; name another with --step")
    step = max(recorded) if step is None else step
    one = distributed.start(device)
    store = Store(config.data.store)
    plan, batches = training_batches(config, store, one)
    total, _, _ = config.optim.schedule(plan.steps_per_epoch)
    if not 0 <= step < total:
        raise ValueError(f"--step {step}: the run has steps 0 to {total - 1}")
    size = recorded.get(step) or next((s["processes"] for s in reversed(machine.starts(run)) if s["step"] <= step), 1)
    ranks = [training_batches(config, store, World(rank, size, one.device))[1] for rank in range(size)]
    return replay(config, run, step, batches, ranks, plan.steps_per_epoch, one.device)


def training_batches(config: Pretrain, store: Store, world: World) -> tuple[Plan, Batches]:
    """What a process of a run trains on. Raises ValueError where the store cannot give it."""
    optim, data = config.optim, config.data
    counter = _counter(config, store, config.weighting.patch_size if config.weighting else 1)
    check_area(store, data.resolution, data.crop_scale[0])
    plan = Plan(
        len(store), optim.batch_size, optim.micro_batch, config.seed, drop_last=data.drop_last, rank=world.rank,
        world=world.size,
    )  # fmt: skip
    loader = Loader(
        store, plan, data.resolution, crop=Crop(data.crop_scale, data.crop_ratio), counter=counter,
        workers=data.workers, on_error=data.on_error, pin=world.device.type == "cuda",
    )  # fmt: skip
    return plan, lambda first, stop: feed(loader.steps(first, stop), world.device)


def online_differs(config: Pretrain, store: Store) -> str:
    """What to know of a run that detects keypoints online on images that are not the originals, else ''."""
    online = config.weighting is not None and config.weighting.keypoints == "online"
    if not online or store.manifest.job.encoding == "original":
        return ""
    return (
        f"weighting.keypoints = online: {store.path} holds resized images, on which detectors find other "
        "keypoints than on the originals (docs/fidelity.md); the released code's way needs a store of "
        "`kamim preprocess --images-as original`"
    )


def _observers(config: Pretrain, store: Store, steps_per_epoch: int, world: World) -> Observe:
    """The panels and the probe that a run asks for. Raises ValueError for stores that cannot be probed on."""
    probe = None if config.probe is None else _probe(config, config.probe, steps_per_epoch, world.device)

    def made(model: MaskedImageModel) -> list[Observer]:
        watching = [] if probe is None else [probe(model)]
        if config.panel_epochs is not None:
            samples = partial(_samples, config, store, world.device)
            watching.append(callbacks.panel(config, model, config.panel_epochs * steps_per_epoch, samples))
        return watching

    return made


def _samples(config: Pretrain, store: Store, device: torch.device) -> Batch:
    """A few samples from all over the store, cropped as in the first epoch; counts in cells of one pixel."""
    count = min(SHOWN, len(store))
    chosen = np.linspace(0, len(store) - 1, count).astype(np.int64)
    plan = Plan(count, count, count, config.seed, shuffle=False, listed=chosen)
    crop = Crop(config.data.crop_scale, config.data.crop_ratio)
    loader = Loader(
        store, plan, config.data.resolution, crop=crop, counter=_counter(config, store, 1), workers=1,
        on_error=config.data.on_error,
    )  # fmt: skip
    return next(iter(loader.steps(0, 1))).to(device)


def _probe(
    config: Pretrain, asked: OnlineProbe, steps_per_epoch: int, device: torch.device
) -> Callable[[MaskedImageModel], Observer]:
    """Of features of whole images, in one process. Raises ValueError for stores that cannot be probed on."""
    train, val = Store(asked.train), Store(asked.val)
    for store in (train, val):
        check_area(store, config.data.resolution, smallest_crop=1.0)
    known = np.arange(len(train))
    if asked.per_class is not None and (train.images.labels >= 0).all():
        smallest = int(np.bincount(train.images.labels).min())
        known = n_per_class(train.images.labels, min(asked.per_class, smallest), config.seed)
    evaluation = Evaluation(checkpoint=(str(config.out),), val=asked.val, workers=config.data.workers)
    setting = Setting(
        evaluation, World(0, 1, device), Samples(train, known, train.manifest.classes),
        Samples(val, np.arange(len(val)), val.manifest.classes),
    )  # fmt: skip
    try:
        samples = labelled(setting)
    except ValueError as error:
        raise ValueError(f"probe: {error}") from None

    def whole(samples: Samples) -> Iterable[Batch]:
        plan = setting.in_order(samples)
        return setting.batches(samples, config.data.resolution, plan)(0, plan.steps_per_epoch)

    return lambda model: callbacks.knn_probe(
        config.compute, model, asked.every_epochs * steps_per_epoch, len(samples.classes),
        partial(whole, samples), partial(whole, setting.val),
    )  # fmt: skip


def check_area(store: Store, resolution: int, smallest_crop: float) -> None:
    """Raises ValueError where the store's images were made too small, so that crops would be enlarged."""
    area = store.manifest.stored_area
    if area is not None and area < 0.99 * resolution**2 / smallest_crop:
        raise ValueError(
            f"{store.path}: its images were stored for {store.manifest.job.resolution} px, too small for "
            f"{resolution} px; preprocess with --resolution {resolution}"
        )


def _counter(config: Pretrain, store: Store, patch_size: int) -> Counter | None:
    """Where the counts of a run come from, in cells of patch_size px. Raises ValueError where the store has none."""
    weighting = config.weighting
    if weighting is None:
        return None
    if weighting.keypoints == "online":
        return OnlineCounts(weighting.detector, weighting.footprint, patch_size)
    job, data = store.manifest.job, config.data
    keypoints = store.keypoints(weighting.detector)
    if (job.resolution, job.crop_scale) != (data.resolution, data.crop_scale):
        raise ValueError(
            f"data.store = {store.path}: its keypoints are for resolution {job.resolution} and crop scale "
            f"{list(job.crop_scale)}, the run asks for {data.resolution} and {list(data.crop_scale)}; preprocess "
            "with --resolution and --crop-scale to match, or set weighting.keypoints=online"
        )
    return CachedCounts(keypoints, weighting.footprint, patch_size)
