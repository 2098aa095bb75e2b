"""The folder of a run: its layout, and the one run of one configuration that it holds."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kamim import KamimError
from kamim.config.pretrain import Pretrain
from kamim.config.schema import dump, load
from kamim.storage.escape import one_line
from kamim.storage.files import write_whole
from kamim.storage.manifest import IMAGES, MANIFEST
from kamim.storage.ownership import names_in, refuse_links
from kamim.storage.store import Store

if TYPE_CHECKING:
    from kamim.runtime.distributed import World

CONFIG = "config.yaml"
TRAINED_ON = "store.json"  # what a run's store held when the run began
METRICS, LOG, STARTS, REPORT = "metrics.jsonl", "log.txt", "starts.jsonl", "report.html"
WANDB, WANDB_ID = "wandb", "wandb-id"
CHECKPOINTS, PANELS, TENSORBOARD = "checkpoints", "panels", "tensorboard"
NONFINITE = "nonfinite"  # holds the records of steps that were not finite


def check_keypoints(config: Pretrain, store: Store) -> None:
    """Raises KamimError if a run needs keypoints that the store does not have, or has for other crops."""
    weighting, data = config.weighting, config.data
    if weighting is None or weighting.keypoints == "online":
        return
    store.check_detector(weighting.detector)
    if difference := store.manifest.job.other_crops(data.resolution, data.crop_scale):
        raise KamimError(
            f"data.store = {store.path}: its keypoints are for {difference}; preprocess with --resolution and "
            "--crop-scale to match, or set weighting.keypoints=online"
        )


def check_links(run: Path) -> None:
    """Raises KamimError if a file or folder that kamim writes in a run's folder is a link. Other files may be links."""
    files = (CONFIG, TRAINED_ON, METRICS, LOG, STARTS, REPORT, WANDB_ID)
    refuse_links(run / name for name in (*files, WANDB, CHECKPOINTS, PANELS, TENSORBOARD, NONFINITE))


def check_free(config: Pretrain, store: Store, fresh: bool) -> None:
    """Raises KamimError if config.out is not empty and holds no run, or a run of another configuration, of other images
    or with links, or (if `fresh`) any run."""
    file = config.out / CONFIG
    if (config.out / MANIFEST).is_file():
        raise KamimError(f"out = {config.out}: is a store; choose another out=...")
    check_links(config.out)
    if not file.is_file():
        if names := names_in(config.out):
            raise KamimError(f"out = {config.out}: holds {names[0]} and no run; choose another out=...")
        return
    if fresh:
        raise KamimError(
            f"out = {config.out}: holds a run already; choose another out=..., or --resume auto to continue it"
        )
    if difference := _difference(configuration(config.out), config):
        raise KamimError(
            f"out = {config.out}: holds a run of another configuration ({difference}); choose another out=..., "
            f"or remove it{_how_to_train_on(load(Pretrain, file), config)}"
        )
    check_same_images(config.out, store)


def check_same_images(run: Path, store: Store) -> None:
    """Raises KamimError if the run's store was rebuilt with other images. A run without a record passes."""
    file = run / TRAINED_ON
    if not file.is_file():
        return
    try:
        recorded = dict(json.loads(file.read_bytes()))
    except (ValueError, TypeError, RecursionError) as error:
        raise KamimError(f"{file}: not the record of a run's store; remove it") from error
    for key, now in _contents(store).items():
        if recorded.get(key) != now:
            raise KamimError(
                f"data.store = {store.path}: was rebuilt since {run} began ({key}: {one_line(recorded.get(key))[:16]} "
                f"then, {str(now)[:16]} now); rebuild it as it was, or train in another out=..."
            )


def configuration(run: Path) -> Pretrain:
    """Returns the configuration of a run. Raises KamimError if its file is missing or not a run's."""
    try:
        return load(Pretrain, run / CONFIG)
    except KamimError as error:
        raise KamimError(f"{run / CONFIG}: not the configuration of a run: {error}; choose another out=...") from error


def is_run(folder: Path) -> bool:
    """Returns whether a folder holds the configuration of a run."""
    try:
        return bool(configuration(folder))
    except (KamimError, OSError):
        return False


def check_ranks(config: Pretrain, store: Store, world: "World") -> None:
    """Raises KamimError, on all ranks, if one of them has another configuration or another store's content.

    Paths of stores and numbers of threads may differ between machines.
    """
    weighting, content = config.weighting, _contents(store)
    if weighting is not None and weighting.keypoints == "store":
        shards = "".join(store.manifest.shards[weighting.detector]).encode()
        content["keypoints_sha256"] = hashlib.sha256(shards).hexdigest()
    machines: Any = {"data": {"store", "workers"}, "compute": {"threads"}, "probe": True, "log": True}
    world.check_same({"store": content, **config.model_dump(mode="json", exclude=machines)})


def claim(config: Pretrain, store: Store) -> None:
    """Writes the configuration, and what the store holds, into config.out."""
    config.out.mkdir(parents=True, exist_ok=True)
    write_whole(config.out / CONFIG, dump(config).encode())
    write_whole(config.out / TRAINED_ON, (json.dumps(_contents(store), indent=2) + "\n").encode())


def _contents(store: Store) -> dict[str, Any]:
    """Returns what identifies the images of a store, whichever detectors it has."""
    manifest = store.manifest
    shards = "".join(manifest.shards[IMAGES]).encode()
    return {
        "images": manifest.count,
        "encoding": manifest.job.encoding,
        "resolution": manifest.job.resolution,
        "crop_scale": list(manifest.job.crop_scale),
        "images_sha256": hashlib.sha256(shards).hexdigest(),
    }


# Keys that a resumed run may change. compute and optim.micro_batch change rounding and precision, on_nonfinite what
# follows a step that is not finite; the others change nothing of what is trained.
_FREE = {
    "out": True,
    "checkpoint_epochs": True,
    "keep_checkpoints": True,
    "keep_every_epochs": True,
    "compute": True,
    "on_nonfinite": True,
    "log": True,
    "panel_epochs": True,
    "probe": True,
    "label_free": True,
    "plateau": True,
    "data": {"workers"},
    "optim": {"micro_batch"},
}


def _how_to_train_on(existing: Pretrain, requested: Pretrain) -> str:
    """Returns what a user can do who asks for another length or schedule of the same run, otherwise ""."""
    if dump(existing, exclude={**_FREE, "optim": True}) != dump(requested, exclude={**_FREE, "optim": True}):
        return ""
    return (
        "; a schedule is fixed from a run's first step, so to train its weights further, begin another run from them "
        f"with init_from={requested.out} out=..., whose optimiser, warm-up and cosine begin anew"
    )


def _difference(existing: Pretrain, requested: Pretrain) -> str:
    """Returns the first key in which the configurations differ, with both values, or ""."""
    old, new = (dump(config, exclude=_FREE).splitlines() for config in (existing, requested))
    pairs = zip(old, new, strict=False)
    changed = next((f"{a.strip()} there, {b.strip()} requested" for a, b in pairs if a != b), "")
    return changed or ("other keys" if len(old) != len(new) else "")
