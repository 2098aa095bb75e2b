"""The evaluation modes: each checks what it is given, then says how its work is done."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.optim import Lars
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.nn.parallel import DistributedDataParallel

from kamim.batch import Batch, normalise
from kamim.compose.checkpoints import Subject
from kamim.config import ClassifierOptim, Evaluation
from kamim.distributed import World
from kamim.evaluation import classify, finetune, probe
from kamim.evaluation.features import extract
from kamim.evaluation.knn import knn
from kamim.evaluation.readout import Pixels, Readout, check, resolve
from kamim.loop import Batches, Progress, Run, should_compile, train
from kamim.models import build_encoder
from kamim.store import Store
from pipelines.augment import probe_augment
from pipelines.loader import Crop, Loader, feed
from pipelines.plan import Plan

CROP = Crop(scale=(0.08, 1.0), flip_v=False)  # torchvision's defaults, which MAE's and DINOv2's probes use


Work = Callable[[Path, Progress], dict[str, Any]]  # in its folder; what it adds to the settings


@dataclass(frozen=True)
class Samples:
    """Some samples of a store, for a model: numbers int64 [N], ascending."""

    store: Store
    numbers: np.ndarray
    classes: tuple[str, ...]

    @property
    def labels(self) -> Tensor:
        """int64 [N]."""
        return torch.from_numpy(self.store.images.labels[self.numbers])

    @property
    def about(self) -> dict[str, Any]:
        """What a result says of them."""
        job = self.store.manifest.job
        return {
            "store": str(self.store.path), "dataset": job.dataset, "images": len(self.numbers),
            "fingerprint": job.fingerprint,
        }  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What all modes share."""

    config: Evaluation
    world: World
    train: Samples | None
    val: Samples

    def batches(self, samples: Samples, resolution: int, plan: Plan, crop: Crop | None = None) -> Batches:
        """On the device."""
        pin = self.world.device.type == "cuda"
        loader = Loader(samples.store, plan, resolution, crop=crop, workers=self.config.workers, pin=pin)
        return lambda first, stop: feed(loader.steps(first, stop), self.world.device)

    def in_order(self, samples: Samples) -> Plan:
        """Every sample once."""
        size = max(min(self.config.batch_size, len(samples.numbers)), self.world.size)
        return self.plan(samples, size, size, shuffle=False, drop_last=False)

    def plan(self, samples: Samples, batch_size: int, micro_batch: int, **options: bool) -> Plan:
        """See Plan."""
        return Plan(
            len(samples.numbers), batch_size, micro_batch, self.config.seed, rank=self.world.rank,
            world=self.world.size, listed=samples.numbers, **options,
        )  # fmt: skip


@dataclass(frozen=True)
class Task:
    """One mode on one checkpoint, checked. settings: all that its result depends on."""

    mode: str
    subject: Subject
    settings: dict[str, Any]
    run: Work


def labelled(setting: Setting) -> Samples:
    """The training samples. Raises ValueError where there are none, or classes do not fit the validation's."""
    if setting.train is None:
        raise ValueError("--train: is missing; this mode needs a store to train on")
    for option, samples in (("--train", setting.train), ("--val", setting.val)):
        if not samples.classes:
            raise ValueError(f"{option} {samples.store.path}: has no labels; this mode needs class folders")
    ours, theirs = setting.train.classes, setting.val.classes
    if len(ours) < 2:
        raise ValueError(f"--train {setting.train.store.path}: has one class; a classifier needs two or more")
    if ours != theirs:
        odd = sorted(set(ours) ^ set(theirs))
        raise ValueError(
            f"--val {setting.val.store.path}: its {len(theirs)} classes are not the {len(ours)} of "
            f"{setting.train.store.path} ("
            + (f"for one, {odd[0]!r} is in one of them only)" if odd else "they are in another order)")
        )
    return setting.train


def linprobe_task(setting: Setting, subject: Subject) -> Task:
    """One linear layer on a frozen encoder."""
    config, options, samples = setting.config, setting.config.linprobe, labelled(setting)
    readout = Readout(resolve(subject.encoder, options.block), options.pooling, options.norm)
    check(subject.encoder, readout)
    plan = setting.plan(samples, options.optim.batch_size, options.optim.micro_batch)

    def run(folder: Path, progress: Progress) -> dict[str, Any]:
        device = setting.world.device
        frozen = probe.Frozen(subject.encoder, readout, config.compute, device)
        torch.manual_seed(config.seed)
        head = probe.build_head(frozen, readout, subject.resolution, len(samples.classes), device)
        run = Run(
            folder, "linprobe", {}, options.optim, plan.steps_per_epoch,
            every=options.checkpoint_epochs * plan.steps_per_epoch, keep=1,
        )  # fmt: skip
        batches = setting.batches(samples, subject.resolution, plan, CROP if options.augment == "crop" else None)
        augment = _augment(options.augment, len(samples.classes), config.seed)
        network = _parallel(head, setting.world)
        made = classify.gradients(network, frozen, batches, augment, config.compute, config.seed, setting.world)
        groups = [{"params": list(head.parameters()), "weight_decay": options.optim.weight_decay}]
        _train(run, head, _optimizer(groups, options.optim), made, setting.world, progress)
        return _accuracy(setting, subject, head, frozen)

    about = {
        "protocol": options.protocol, "block": readout.block, "pooling": readout.pooling, "norm": readout.norm,
        "epochs": options.optim.epochs, "options": options.model_dump(mode="json"),
    }  # fmt: skip
    return _task("linprobe", setting, subject, about, run)


def finetune_task(setting: Setting, subject: Subject) -> Task:
    """Everything trains."""
    config, options, samples = setting.config, setting.config.finetune, labelled(setting)
    if isinstance(subject.encoder, Pixels):
        raise ValueError(f"--checkpoint {subject.name}: pixels have nothing to fine-tune")
    plan = setting.plan(samples, options.optim.batch_size, options.optim.micro_batch)

    def run(folder: Path, progress: Progress) -> dict[str, Any]:
        torch.manual_seed(config.seed)
        encoder = build_encoder(subject.about["architecture"], subject.resolution, options.drop_path)
        encoder.load_state_dict(subject.encoder.state_dict())
        model = finetune.Classifier(encoder, len(samples.classes)).to(setting.world.device)
        groups = finetune.parameter_groups(model, options.optim.weight_decay, options.layer_decay)
        averaged = finetune.Averaged(model, options.ema)
        run = Run(
            folder, "finetune", {}, options.optim, plan.steps_per_epoch,
            every=options.checkpoint_epochs * plan.steps_per_epoch, keep=options.keep_checkpoints,
        )  # fmt: skip
        network = _parallel(model, setting.world)
        if should_compile(config.compute, setting.world.device):
            network.compile()
        batches = setting.batches(samples, subject.resolution, plan)
        augment = _augment("paper", len(samples.classes), config.seed)
        made = classify.gradients(network, _as_it_is, batches, augment, config.compute, config.seed, setting.world)
        optimizer = _optimizer(groups, options.optim)
        _train(run, averaged, optimizer, made, setting.world, progress, averaged.update)
        return _accuracy(setting, subject, averaged.best, _as_it_is)

    about = {"protocol": "paper", "epochs": options.optim.epochs, "options": options.model_dump(mode="json")}
    return _task("finetune", setting, subject, about, run)


def knn_task(setting: Setting, subject: Subject) -> Task:
    """Nearest neighbours among the training samples."""
    options, samples = setting.config.knn, labelled(setting)
    readout = Readout(resolve(subject.encoder, options.block), options.pooling, options.norm)
    check(subject.encoder, readout)
    if max(options.k) > len(samples.numbers):
        raise ValueError(f"knn.k = {list(options.k)}: more than the {len(samples.numbers)} training samples")

    def run(folder: Path, progress: Progress) -> dict[str, Any]:
        features = _features(setting, subject, [readout], folder, progress)
        found = knn(
            features[0][readout], samples.labels, features[1][readout], setting.val.labels, len(samples.classes),
            setting.world.device, lambda done, total: progress(done, total, {}), options.k, options.temperature,
        )  # fmt: skip
        return {"k": found}

    about = {
        "protocol": "dino", "block": readout.block, "pooling": readout.pooling, "norm": readout.norm,
        "options": options.model_dump(mode="json"),
    }  # fmt: skip
    return _task("knn", setting, subject, about, run)


def _task(
    mode: str, setting: Setting, subject: Subject, about: dict[str, Any], run: Work,
) -> Task:  # fmt: skip
    settings = {
        "mode": mode, "name": subject.name, **subject.about, **about, "seed": setting.config.seed,
        "train": None if setting.train is None else setting.train.about, "val": setting.val.about,
        "classes": len(setting.val.classes),
    }  # fmt: skip
    return Task(mode, subject, settings, run)


def _features(
    setting: Setting, subject: Subject, readouts: Sequence[Readout], folder: Path, progress: Progress
) -> list[dict[Readout, Tensor]]:
    """Of the training and the validation samples."""
    found = []
    for name, samples in (("train", labelled(setting)), ("val", setting.val)):
        plan = setting.in_order(samples)
        found.append(
            extract(
                subject.encoder,
                readouts,
                setting.batches(samples, subject.resolution, plan),
                plan.steps_per_epoch,
                samples.numbers,
                setting.config.compute,
                setting.world,
                folder / name,
                progress,
            )
        )
    return found


def _augment(kind: str, classes: int, seed: int) -> classify.Augment:
    if kind == "paper":
        return partial(probe_augment, num_classes=classes, seed=seed)

    def hard(batch: Batch) -> tuple[Tensor, Tensor]:
        return normalise(batch.images), one_hot(batch.labels, classes).float()

    return hard


def _as_it_is(images: Tensor) -> Tensor:
    return images


def _parallel(model: nn.Module, world: World) -> nn.Module:
    return DistributedDataParallel(model) if world.size > 1 else model


def _optimizer(groups: list[dict[str, Any]], optim: ClassifierOptim) -> torch.optim.Optimizer:
    if optim.algorithm == "adamw":
        return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, fused=True)
    kind = Lars if optim.algorithm == "lars" else torch.optim.SGD
    made: torch.optim.Optimizer = kind(groups, lr=optim.lr, momentum=0.9)
    return made


def _train(
    run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, made: Any, world: World, progress: Progress,
    after_step: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    if not train(run, model, optimizer, made, world, progress, after_step).finished:
        raise KeyboardInterrupt


def _accuracy(setting: Setting, subject: Subject, network: nn.Module, read: classify.Read) -> dict[str, float]:
    plan = setting.in_order(setting.val)
    batches = setting.batches(setting.val, subject.resolution, plan)(0, plan.steps_per_epoch)
    return classify.accuracy(network, read, batches, len(setting.val.classes), setting.config.compute, setting.world)


TASKS: Mapping[str, Callable[[Setting, Subject], Task]] = {
    "linprobe": linprobe_task, "knn": knn_task, "finetune": finetune_task,
}  # fmt: skip
