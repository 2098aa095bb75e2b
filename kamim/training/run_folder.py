"""What a run finds on the disk: its store's keypoints, and its folder, which holds one run of one configuration."""

from kamim import KamimError
from kamim.storage.store import MANIFEST, Store, write_whole
from kamim.training.config import Pretrain
from kamim.training.settings import dump, load

CONFIG = "config.yaml"


def check_keypoints(config: Pretrain, store: Store) -> None:
    """Raises KamimError if a run needs keypoints that the store does not have, or has for other crops."""
    weighting, job, data = config.weighting, store.manifest.job, config.data
    if weighting is None or weighting.keypoints == "online":
        return
    store.check_detector(weighting.detector)
    if (job.resolution, job.crop_scale) != (data.resolution, data.crop_scale):
        raise KamimError(
            f"data.store = {store.path}: its keypoints are for resolution {job.resolution} and crop scale "
            f"{list(job.crop_scale)}, the run asks for {data.resolution} and {list(data.crop_scale)}; preprocess "
            "with --resolution and --crop-scale to match, or set weighting.keypoints=online"
        )


def check_free(config: Pretrain, fresh: bool) -> None:
    """Raises KamimError if config.out holds a store, a run of another configuration, or (if `fresh`) any run."""
    file = config.out / CONFIG
    if (config.out / MANIFEST).is_file():
        raise KamimError(f"out = {config.out}: is a store; choose another out=...")
    if not file.is_file():
        return
    if fresh:
        raise KamimError(
            f"out = {config.out}: holds a run already; choose another out=..., or --resume auto to continue it"
        )
    if difference := _difference(load(Pretrain, file), config):
        raise KamimError(
            f"out = {config.out}: holds a run of another configuration ({difference}); choose another out=..., "
            "or remove it"
        )


def claim(config: Pretrain) -> None:
    """Writes the configuration into config.out."""
    config.out.mkdir(parents=True, exist_ok=True)
    write_whole(config.out / CONFIG, dump(config).encode())


# Keys that a resumed run may change: none of them affects which samples are trained on, or how.
_FREE = {"out": True, "checkpoint_epochs": True, "keep_checkpoints": True, "keep_every_epochs": True, "compute": True,
         "on_nonfinite": True, "log": True, "panel_epochs": True, "probe": True,
         "label_free": True, "data": {"workers"}, "optim": {"micro_batch"}}  # fmt: skip


def _difference(existing: Pretrain, requested: Pretrain) -> str:
    """Returns the first key in which the configurations differ, with both values, or ""."""
    old, new = (dump(config, exclude=_FREE).splitlines() for config in (existing, requested))
    pairs = zip(old, new, strict=False)
    changed = next((f"{a.strip()} there, {b.strip()} requested" for a, b in pairs if a != b), "")
    return changed or ("other keys" if len(old) != len(new) else "")
