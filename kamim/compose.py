"""Wires stores, loaders and loops together. The one module besides the CLI that knows every room."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

from kamim import checkpoint, distributed, evaluate, plots
from kamim import keypoints as kp
from kamim.analysis.request import Request
from kamim.analysis.run import analyse
from kamim.analysis.subjects import Subject, timm_encoder
from kamim.batch import Batch
from kamim.config import Pretrain, Probe, Weighting
from kamim.detectors import detector
from kamim.models import MaskedImageModel, probe_block
from kamim.pretrain import Outcome, Progress, pretrain
from kamim.store import Store
from kamim.weighting import counts_to_weights, density, weights
from pipelines.augment import probe_augment
from pipelines.counts import CachedCounts, Counter, OnlineCounts
from pipelines.loader import Crop, Loader, feed
from pipelines.plan import Plan


def run_pretrain(config: Pretrain, progress: Progress) -> Outcome:
    """`kamim pretrain`: checks the store against the configuration, then trains on it."""
    world = distributed.start(config.compute.device)
    try:
        store = Store(config.data.store)
        counter = _counter(config, store)
        _check_area(store, config.data.resolution, config.data.crop_scale[0])
        optim, data = config.optim, config.data
        plan = Plan(len(store), optim.batch_size, optim.micro_batch, config.seed, rank=world.rank, world=world.size)
        loader = Loader(
            store, plan, data.resolution, crop=Crop(data.crop_scale, data.crop_ratio), counter=counter,
            workers=data.workers, pin=world.device.type == "cuda",
        )  # fmt: skip

        def batches(first: int, stop: int) -> Iterator[Batch]:
            return feed(loader.steps(first, stop), world.device)

        return pretrain(config, batches, plan.steps_per_epoch, world, progress)
    finally:
        distributed.stop()


def _check_area(store: Store, resolution: int, smallest_crop: float) -> None:
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


def load_model(name: str) -> tuple[MaskedImageModel, dict[str, Any]]:
    """A model by checkpoint, or random:CHECKPOINT for its architecture and seed untrained; and what it is."""
    random, path = name.startswith("random:"), name.removeprefix("random:")
    found = checkpoint.read(Path(path))
    about = {
        "checkpoint": str(found.path), "architecture": found.config.model.name, "step": found.step,
        "reconstructs": found.has_head,
    }  # fmt: skip
    if not random:
        return found.build_model(), about
    torch.manual_seed(found.config.seed)
    model = MaskedImageModel(found.config.model.name, found.config.data.resolution)
    return model, {**about, "checkpoint": name, "step": 0}


def run_linprobe(config: Probe, progress: Progress) -> dict[str, Any]:
    """`kamim eval --mode linprobe`: top1 and top5 in per cent, with all that led to them."""
    train, val = Store(config.train), Store(config.val)
    classes = _shared_classes(train, val)
    model, about = load_model(config.checkpoint)
    encoder: VisionTransformer | SwinTransformer = model.encoder
    for store in (train, val):
        _check_area(store, model.resolution, smallest_crop=1.0)
    block = probe_block(encoder, config.block)
    device = distributed.start(config.compute.device).device
    if torch.distributed.is_initialized():
        distributed.stop()
        raise ValueError("kamim eval: runs in one process; start it without torchrun")
    plan = Plan(len(train), config.optim.batch_size, config.optim.micro_batch, config.seed)
    pin = device.type == "cuda"
    loader = Loader(train, plan, model.resolution, workers=config.workers, pin=pin)
    batch = min(config.optim.micro_batch, 512, len(val))
    val_plan = Plan(len(val), batch, batch, config.seed, shuffle=False, drop_last=False)
    val_loader = Loader(val, val_plan, model.resolution, workers=config.workers, pin=pin)
    accuracy = evaluate.linprobe(
        encoder, config, lambda first, stop: feed(loader.steps(first, stop), device),
        feed(val_loader.steps(0, val_plan.steps_per_epoch), device),
        lambda batch: probe_augment(batch, len(classes), config.seed), len(classes), plan.steps_per_epoch, device,
        progress,
    )  # fmt: skip
    return {
        "mode": "linprobe", "protocol": "paper", **about, **accuracy, "block": block, "pooling": "mean",
        "epochs": config.optim.epochs, "seed": config.seed, "classes": len(classes),
        "train": _about(train), "val": _about(val),
    }  # fmt: skip


def _shared_classes(train: Store, val: Store) -> tuple[str, ...]:
    for option, store in (("--train", train), ("--val", val)):
        if not store.manifest.classes:
            raise ValueError(f"{option} {store.path}: has no labels; a linear probe needs class folders")
    if len(train.manifest.classes) < 2:
        raise ValueError(f"--train {train.path}: has one class; a probe needs two or more")
    if train.manifest.classes != val.manifest.classes:
        odd = sorted(set(train.manifest.classes) ^ set(val.manifest.classes))
        raise ValueError(
            f"--val {val.path}: its {len(val.manifest.classes)} classes are not the {len(train.manifest.classes)} of "
            f"{train.path} (for one, {odd[0]!r} is in one of them only)"
        )
    return train.manifest.classes


def _about(store: Store) -> dict[str, Any]:
    return {"store": str(store.path), "images": len(store), "fingerprint": store.manifest.job.fingerprint}


@dataclass(frozen=True)
class ImageWeights:
    """What KAMIM sees in one image: keypoints found, map F bool [H, W], Omega and W float32 [g, g]."""

    rgb: np.ndarray
    keypoints: int
    bitmap: np.ndarray
    omega: np.ndarray
    weights: np.ndarray


def image_weights(rgb: np.ndarray, weighting: Weighting) -> ImageWeights:
    """Keypoints and weights of an image (uint8 [H, W, 3]) as it is.

    A last row or column of cells that the image fills only in part is left out, as Eq. 2's convolution does.
    Raises ValueError for an image smaller than one cell.
    """
    height, width = rgb.shape[:2]
    patch = weighting.patch_size
    if min(height, width) < patch:
        raise ValueError(f"the image is {width}x{height} px, smaller than one cell of --patch-size {patch}")
    found = detector(weighting.detector).detect(rgb)
    bitmap = kp.keypoint_map(found.xy, height, width, weighting.footprint)
    omega = density(torch.from_numpy(kp.map_counts(bitmap, patch)), patch)
    return ImageWeights(rgb, len(found.xy), bitmap, omega.numpy(), weights(omega, weighting.temperature).numpy())


def plot_weights(images: Mapping[str, ImageWeights], weighting: Weighting, file: Path) -> None:
    """One row per image: as it is, its keypoints, its weights."""
    rows = [(name, image.rgb, image.bitmap, image.weights) for name, image in images.items()]
    plots.weights_sheet(rows, weighting.patch_size, _caption(weighting), file)


def _caption(weighting: Weighting) -> str:
    return f"{weighting.detector}, {weighting.footprint}, w_ps {weighting.patch_size}, T {weighting.temperature}"


def preview(store: Store, weighting: Weighting, count: int, seed: int, file: Path) -> None:
    """A sheet of `count` random crops as training sees them: image, remapped keypoints, weights."""
    job = store.manifest.job
    patch = weighting.patch_size
    if job.resolution % patch:
        raise ValueError(f"--patch-size {patch}: must divide the store's resolution {job.resolution}")
    count = min(count, len(store))
    fine = CachedCounts(store.keypoints(weighting.detector), weighting.footprint, 1)  # cells of one pixel: F itself
    plan = Plan(len(store), count, count, seed)
    batch = next(iter(Loader(store, plan, job.resolution, crop=Crop(job.crop_scale), counter=fine).steps(0, 1)))
    assert batch.counts is not None
    rows = []
    for i in range(count):
        bitmap = batch.counts[i].numpy() > 0
        counts = torch.from_numpy(kp.map_counts(bitmap, patch))
        weights = counts_to_weights(counts, patch, weighting.temperature).numpy()
        label = int(batch.labels[i])
        name = store.manifest.classes[label] if label >= 0 else ""
        rows.append((f"{batch.indices[i]} {name}", batch.images[i].numpy(), bitmap, weights))
    plots.weights_sheet(rows, patch, f"{store.path.name}: {_caption(weighting)}", file)


@dataclass(frozen=True)
class _Listed(Plan):
    """A plan over `listed` samples, in their order."""

    listed: tuple[int, ...] = ()

    def step_indices(self, step: int) -> np.ndarray:
        return np.array(self.listed[step * self.batch_size : (step + 1) * self.batch_size], np.int64)


class _StoreImages:
    """kamim.analysis.request.Source, of a store. Keypoints are found online, on the very pixels the model sees."""

    def __init__(self, store: Store):
        self.name = str(store.path)
        self.labels = store.images.labels
        self.classes = store.manifest.classes
        self._store = store

    def batches(self, indices: np.ndarray, resolution: int, size: int, cell: int | None) -> Iterable[Batch]:
        size = min(size, len(indices))
        plan = _Listed(len(indices), size, size, seed=0, drop_last=False, listed=tuple(int(i) for i in indices))
        counter = None if cell is None else OnlineCounts("fast", "ring", cell)
        return Loader(self._store, plan, resolution, counter=counter).steps(0, plan.steps_per_epoch)


def load_subject(spec: str, seed: int) -> Subject:
    """NAME=CHECKPOINT, with what load_model takes, timm:MODEL or timm:MODEL@FILE. Raises ValueError for another."""
    name, equals, source = spec.partition("=")
    if not (name and equals and source):
        raise ValueError(f"--checkpoint {spec}: must be NAME=CHECKPOINT, such as KAMIM=runs/demo/kamim")
    if source.startswith("timm:"):
        encoder = timm_encoder(source.removeprefix("timm:"), seed)
        about = {"checkpoint": source, "architecture": source.removeprefix("timm:").partition("@")[0]}
        return Subject(name, encoder, encoder.patch_embed.img_size[0], None, about)
    model, about = load_model(source)
    return Subject(name, model.encoder, model.resolution, model if about["reconstructs"] else None, about)


def run_analysis(
    specs: Sequence[str], store: Store, request: Request, out: Path, progress: Callable[[int, int], None]
) -> list[str]:
    """`kamim analyze`: figures, numbers and a page in `out`; returns what to say."""
    names = [spec.partition("=")[0] for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--checkpoint {name}=...: given twice; every checkpoint needs a name of its own")
    return analyse([load_subject(spec, request.seed) for spec in specs], _StoreImages(store), request, out, progress)
