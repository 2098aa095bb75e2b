"""Stores and loaders for the pretraining loop."""

from pathlib import Path

from kamim import distributed, nonfinite
from kamim.config import Pretrain, load
from kamim.distributed import World
from kamim.loop import Batches, Outcome, Progress
from kamim.pretrain import CONFIG, pretrain
from kamim.replay import Replayed, replay
from kamim.store import Store
from pipelines.counts import CachedCounts, Counter, OnlineCounts
from pipelines.loader import Crop, Loader, feed
from pipelines.plan import Plan


def run_pretrain(config: Pretrain, progress: Progress, fresh: bool = False) -> Outcome:
    """`kamim pretrain`: checks the store against the configuration, then trains on it. fresh: see pretrain."""
    world = distributed.start(config.compute.device)
    try:
        store = Store(config.data.store)
        plan, batches = training_batches(config, store, world)
        return pretrain(config, batches, plan.steps_per_epoch, world, progress, fresh)
    finally:
        distributed.stop()


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
    size = recorded.get(step, 1)
    ranks = [training_batches(config, store, World(rank, size, one.device))[1] for rank in range(size)]
    return replay(config, run, step, batches, ranks, plan.steps_per_epoch, one.device)


def training_batches(config: Pretrain, store: Store, world: World) -> tuple[Plan, Batches]:
    """What a process of a run trains on. Raises ValueError where the store cannot give it."""
    optim, data = config.optim, config.data
    counter = _counter(config, store)
    check_area(store, data.resolution, data.crop_scale[0])
    plan = Plan(len(store), optim.batch_size, optim.micro_batch, config.seed, rank=world.rank, world=world.size)
    loader = Loader(
        store, plan, data.resolution, crop=Crop(data.crop_scale, data.crop_ratio), counter=counter,
        workers=data.workers, pin=world.device.type == "cuda",
    )  # fmt: skip
    return plan, lambda first, stop: feed(loader.steps(first, stop), world.device)


def check_area(store: Store, resolution: int, smallest_crop: float) -> None:
    """Raises ValueError where the store's images were made too small, so that crops would be enlarged."""
    if store.manifest.stored_area < 0.99 * resolution**2 / smallest_crop:
        raise ValueError(
            f"{store.path}: its images were stored for {store.manifest.job.resolution} px, too small for "
            f"{resolution} px; preprocess with --resolution {resolution}"
        )


def _counter(config: Pretrain, store: Store) -> Counter | None:
    """Where the counts of a run come from. Raises ValueError where the store cannot give them."""
    weighting = config.weighting
    if weighting is None:
        return None
    if weighting.keypoints == "online":
        return OnlineCounts(weighting.detector, weighting.footprint, weighting.patch_size)
    job, data = store.manifest.job, config.data
    keypoints = store.keypoints(weighting.detector)
    if (job.resolution, job.crop_scale) != (data.resolution, data.crop_scale):
        raise ValueError(
            f"data.store = {store.path}: its keypoints are for resolution {job.resolution} and crop scale "
            f"{list(job.crop_scale)}, the run asks for {data.resolution} and {list(data.crop_scale)}; preprocess "
            "with --resolution and --crop-scale to match, or set weighting.keypoints=online"
        )
    return CachedCounts(keypoints, weighting.footprint, weighting.patch_size)
