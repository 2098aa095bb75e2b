"""Stores, loaders and checkpoints for the evaluation loops."""

from pathlib import Path
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

from kamim import checkpoint, distributed, evaluate
from kamim.compose.training import check_area
from kamim.config import Probe
from kamim.models import MaskedImageModel, probe_block
from kamim.pretrain import Progress
from kamim.store import Store
from pipelines.augment import probe_augment
from pipelines.loader import Loader, feed
from pipelines.plan import Plan


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
        check_area(store, model.resolution, smallest_crop=1.0)
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
    return {"store": str(store.path), "images": len(store), "fingerprint": store.manifest.source}
