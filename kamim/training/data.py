"""Builds the loaders of a run and checks that its store and its configuration match."""

from typing import Literal

import numpy as np
import torch

from kamim import KamimError
from kamim.config.pretrain import Pretrain
from kamim.method.keypoints import map_counts
from kamim.method.weighting import keypoint_weights
from kamim.runtime.distributed import World
from kamim.storage import overlap
from kamim.storage.store import Store
from kamim.training.run_folder import check_keypoints
from pipelines.batch import Batch
from pipelines.counts import CachedCounts, Counter, OnlineCounts
from pipelines.loader import CPU, Crop, Loader
from pipelines.plan import Plan, largest_batch
from pipelines.samples import Samples

COARSE = 3  # blocks per side below which a mask has too few variants
LOOKED_AT = 64  # crops whose weights are looked at before a run
DIFFERS, FEW_CELLS = 1.01, 0.01  # W from which a cell counts as weighted, and the share of them below which few are


def training_loader(config: Pretrain, store: Store, world: World) -> Loader:
    """Returns the loader of the random crops and keypoint counts that a process of a run trains on.

    Raises KamimError if the store does not have them.
    """
    optim, data = config.optim, config.data
    counter = _counter(config, store, config.weighting.patch_size if config.weighting else 1)
    check_area(store, data.resolution, data.crop_scale[0])
    if data.drop_last and optim.batch_size > len(store):
        raise KamimError(
            f"optim.batch_size = {optim.batch_size}: is more than the store's {len(store)} samples, so that an epoch "
            f"has no complete batch; set optim.batch_size={largest_batch(len(store))} or less"
        )
    plan = Plan(
        len(store),
        optim.batch_size,
        optim.micro_batch,
        config.seed,
        data.order,
        drop_last=data.drop_last,
        rank=world.rank,
        world=world.size,
    )
    return Loader(
        store,
        plan,
        data.resolution,
        crop=_crop(config),
        counter=counter,
        workers=data.workers,
        on_error=data.on_error,
        device=world.device,
    )


def shown_samples(config: Pretrain, store: Store, count: int, device: torch.device) -> Batch:
    """Returns samples spread evenly over the store, cropped as in the first epoch, with counts in cells of one pixel
    (the map F)."""
    count = min(count, len(store))
    chosen = np.linspace(0, len(store) - 1, count).astype(np.int64)
    plan = Plan(count, count, count, config.seed, order="stored", listed=chosen)
    loader = Loader(
        store,
        plan,
        config.data.resolution,
        crop=_crop(config),
        counter=_counter(config, store, 1),
        workers=1,
        on_error=config.data.on_error,
        device=device,
    )
    return next(iter(loader.micro_batches(0, 1)))


def whole_images(
    samples: Samples,
    resolution: int,
    batch_size: int,
    workers: int | None,
    world: World,
    on_error: Literal["stop", "skip"] = "stop",
) -> Loader:
    """Returns the loader of evaluation: every sample once, in order, as a whole image of resolution x resolution px."""
    size = max(min(batch_size, len(samples.indices)), world.size)
    plan = Plan(
        len(samples.indices),
        size,
        size,
        seed=0,
        order="stored",
        drop_last=False,
        rank=world.rank,
        world=world.size,
        listed=samples.indices,
    )
    return Loader(samples.store, plan, resolution, workers=workers, on_error=on_error, device=world.device)


def check_area(store: Store, resolution: int, smallest_crop: float) -> None:
    """Raises KamimError if the store's images are so small that crops would be enlarged."""
    area = store.manifest.stored_area
    if area is not None and area < 0.99 * resolution**2 / smallest_crop:
        job = store.manifest.job
        scale = f" --crop-scale {smallest_crop:g},1.0" if smallest_crop < job.crop_scale[0] else ""
        raise KamimError(
            f"{store.path}: its images were stored for crops of {job.resolution} px of {job.crop_scale[0]:g} of the "
            f"area and more, too small for {resolution} px of {smallest_crop:g}; "
            f"preprocess with --resolution {resolution}{scale}"
        )


def cautions(config: Pretrain, store: Store) -> list[str]:
    """Returns warnings about a run that is possible, but probably not what is meant."""
    lines = [online_differs(config, store), coarse_mask(config), few_weights(config, store)]
    if config.probe is not None:
        lines.append(overlap.caution(Store(config.probe.train), Store(config.probe.val)))
    return [line for line in lines if line]


def few_weights(config: Pretrain, store: Store) -> str:
    """Returns a warning if W is 1 nearly everywhere in half of some crops or more, otherwise ""."""
    if (weighting := config.weighting) is None:
        return ""
    counts = shown_samples(config, store, LOOKED_AT, CPU).counts
    assert counts is not None
    cells = np.stack([map_counts(bitmap > 0, weighting.patch_size) for bitmap in counts.numpy()])
    weighted = keypoint_weights(cells, weighting.patch_size, weighting.temperature) > DIFFERS
    flat = int((weighted.mean(axis=(1, 2)) < FEW_CELLS).sum())
    if 2 * flat < len(cells):
        return ""
    return (
        f"weighting: W is 1 nearly everywhere in {flat} of {len(cells)} crops, so that KAMIM trains as SimMIM on them; "
        f"`kamim store preview {store.path} --out W.png` shows their {weighting.detector} keypoints and W"
    )


def coarse_mask(config: Pretrain) -> str:
    """Returns a warning if an image has so few mask blocks that most of its masks are alike, otherwise ""."""
    resolution, block, patch = config.data.resolution, config.mask.patch_size, config.model.patch_size
    side = resolution // block
    if side >= COARSE:
        return ""
    finer = max((size for size in range(patch, block, patch) if resolution % size == 0), default=None)
    remedy = "train at a larger data.resolution"
    if finer is not None:
        remedy = f"mask.patch_size={finer} gives {resolution // finer} x {resolution // finer}"
    return (
        f"mask.patch_size = {block}: an image of {resolution} px has only {side} x {side} mask blocks (the paper: "
        f"6 x 6); {remedy}"
    )


def online_differs(config: Pretrain, store: Store) -> str:
    """Returns a warning if a run detects keypoints online on images that are not the originals, otherwise ""."""
    online = config.weighting is not None and config.weighting.keypoints == "online"
    if not online or store.manifest.job.encoding == "original":
        return ""
    return (
        f"weighting.keypoints = online: {store.path} holds resized images, on which detectors find other "
        "keypoints than on the originals (docs/fidelity.md); to reproduce the released code, use a store of "
        "`kamim preprocess --pixels original`"
    )


def _crop(config: Pretrain) -> Crop:
    data = config.data
    return Crop(data.crop_scale, data.crop_ratio, data.flip_v, data.flip_h)


def _counter(config: Pretrain, store: Store, patch_size: int) -> Counter | None:
    """Returns the source of a run's counts in cells of patch_size px. Raises KamimError if the store has none."""
    weighting = config.weighting
    if weighting is None:
        return None
    if weighting.keypoints == "online":
        return OnlineCounts(weighting.detector, weighting.footprint, patch_size)
    check_keypoints(config, store)
    return CachedCounts(store.keypoints(weighting.detector), weighting.footprint, patch_size)
