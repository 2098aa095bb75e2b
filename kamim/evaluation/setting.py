"""What the evaluation modes share: loaders and features of samples, and what a task is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from kamim.evaluation.config import ClassifierOptim, Evaluation
from kamim.evaluation.features import extract
from kamim.evaluation.subject import Subject
from kamim.models.readout import Readout
from kamim.training.data import whole_images
from kamim.training.distributed import World
from kamim.training.trainer import Progress
from pipelines.loader import Augment, Crop, Loader
from pipelines.plan import Plan
from pipelines.samples import Samples, check_labels

Work = Callable[[Path, Progress], dict[str, Any]]  # in its folder; what it adds to the settings


@dataclass(frozen=True)
class Setting:
    """What all modes share."""

    config: Evaluation
    world: World
    train: Samples | None
    val: Samples

    def training(
        self, samples: Samples, resolution: int, optim: ClassifierOptim, crop: Crop | None = None,
        augment: Augment | None = None,
    ) -> Loader:  # fmt: skip
        """Shuffled samples in steps of optim.batch_size."""
        plan = Plan(
            len(samples.numbers), optim.batch_size, optim.micro_batch, self.config.seed, rank=self.world.rank,
            world=self.world.size, listed=samples.numbers,
        )  # fmt: skip
        return Loader(
            samples.store, plan, resolution, crop=crop, augment=augment, workers=self.config.workers,
            device=self.world.device,
        )  # fmt: skip

    def in_order(self, samples: Samples, resolution: int) -> Loader:
        """Every sample once, whole."""
        return whole_images(samples, resolution, self.config.batch_size, self.config.workers, self.world)

    def labelled(self) -> Samples:
        """The training samples. Raises ValueError where there are none, or their classes are not the validation's."""
        return check_labels(self.train, self.val)


@dataclass(frozen=True)
class Task:
    """One mode on one checkpoint, checked. settings: all that its result depends on."""

    mode: str
    subject: Subject
    settings: dict[str, Any]
    run: Work


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
    for name, samples in (("train", setting.labelled()), ("val", setting.val)):
        loader = setting.in_order(samples, subject.resolution)
        found.append(
            extract(
                subject.encoder, readouts, loader, samples.numbers, setting.config.compute, setting.world,
                folder / name, progress,
            )
        )  # fmt: skip
    return found
