"""What the evaluation modes share: samples of stores, their batches and features, and what a task is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kamim.evaluation.features import extract
from kamim.evaluation.subject import Subject
from kamim.models.readout import Readout
from kamim.storage.store import Store
from kamim.training.config import Evaluation
from kamim.training.distributed import World
from kamim.training.trainer import Batches, Progress
from pipelines.loader import Augment, Crop, Loader, feed
from pipelines.plan import Plan

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
            "fingerprint": self.store.manifest.source,
        }  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What all modes share."""

    config: Evaluation
    world: World
    train: Samples | None
    val: Samples

    def batches(
        self, samples: Samples, resolution: int, plan: Plan, crop: Crop | None = None, augment: Augment | None = None
    ) -> Batches:
        """On the device."""
        loader = Loader(
            samples.store, plan, resolution, crop=crop, augment=augment, workers=self.config.workers,
            pin=self.world.device.type == "cuda",
        )  # fmt: skip
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
        unlabelled = int((samples.labels < 0).sum())
        if unlabelled or not samples.classes:
            which = "no labels" if unlabelled == len(samples.numbers) else f"{unlabelled} images without a label"
            raise ValueError(f"{option} {samples.store.path}: has {which}; this mode needs the class of every image")
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


def task(
    mode: str, setting: Setting, subject: Subject, about: dict[str, Any], run: Work,
) -> Task:  # fmt: skip
    """Settings: the checkpoint, the stores, the seed and `about`, what the mode adds, or has another of."""
    settings = {
        "mode": mode, "name": subject.name, **subject.about, "resolution": subject.resolution,
        "seed": setting.config.seed, "batch_size": setting.config.batch_size,
        "train": None if setting.train is None else setting.train.about, "val": setting.val.about,
        "classes": len(setting.val.classes), **about,
    }  # fmt: skip
    return Task(mode, subject, settings, run)


def features_of(
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
