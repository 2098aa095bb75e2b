"""Shared parts of the evaluation modes: loaders and features of samples, and the type of a task."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from kamim import KamimError
from kamim.config.schema import Section
from kamim.evaluation.evaluated_model import EvaluatedModel
from kamim.evaluation.features import extract
from kamim.evaluation.mask_folder import CLASSES, MaskFolder, open_mask_folder
from kamim.evaluation.options import ClassifierOptim, Evaluation
from kamim.evaluation.results import EvalSettings, Measured, SampleSet
from kamim.models.readout import Readout
from kamim.runtime.distributed import World
from kamim.storage import overlap
from kamim.training.data import whole_images
from kamim.training.trainer import Progress
from pipelines.labels import check_labels
from pipelines.loader import Augment, Crop, Loader
from pipelines.plan import Plan
from pipelines.samples import Samples

_LOG = logging.getLogger(__name__)
Work = Callable[[Path, Progress], Measured]  # called with its folder


@dataclass(frozen=True)
class EvalContext:
    """State shared by all modes and checkpoints of one evaluation. train, measured: None if no such store is given."""

    config: Evaluation
    world: World
    train: Samples | None
    measured: Samples | None

    @property
    def val(self) -> Samples:
        """The samples to measure on. Raises KamimError if there are none."""
        if self.measured is None:
            raise KamimError("val: is missing; this mode needs a store to evaluate on")
        return self.measured

    @cached_property
    def mask_folders(self) -> tuple[MaskFolder, MaskFolder]:
        """The folders for training and measuring segmentation, read once for all checkpoints.

        Raises KamimError if one is missing or invalid, or if their classes differ.
        """
        options = self.config.segment
        if options.train is None or options.val is None:
            missing = "train" if options.train is None else "val"
            raise KamimError(f"segment.{missing}: is missing; give a folder of images and masks, segment.{missing}=DIR")
        train, val = (
            open_mask_folder(path, options.ignore_index, self.config.workers) for path in (options.train, options.val)
        )
        if train.classes != val.classes:
            raise KamimError(f"{val.path / CLASSES}: names other classes than {train.path / CLASSES}")
        lines = [*train.cautions(), *val.cautions()]
        if shared := len({*val.digests} & {*train.digests}):
            lines.append(overlap.text(shared, len(val), f"{val.path} and {train.path}"))
        for line in lines if self.world.is_main else ():
            _LOG.warning("%s", line)
        return train, val

    def training(
        self,
        samples: Samples,
        resolution: int,
        optim: ClassifierOptim,
        crop: Crop | None = None,
        augment: Augment | None = None,
    ) -> Loader:
        """Loads shuffled samples in steps of optim.batch_size."""
        plan = Plan(
            len(samples.indices),
            optim.batch_size,
            optim.micro_batch,
            self.config.seed,
            rank=self.world.rank,
            world=self.world.size,
            listed=samples.indices,
        )
        return Loader(
            samples.store,
            plan,
            resolution,
            crop=crop,
            augment=augment,
            workers=self.config.workers,
            device=self.world.device,
        )

    def in_order(self, samples: Samples, resolution: int) -> Loader:
        """Loads every sample once, as a whole image."""
        return whole_images(samples, resolution, self.config.batch_size, self.config.workers, self.world)

    def labelled(self) -> Samples:
        """Returns the training samples. Raises KamimError as check_labels does."""
        check_labels(None if self.train is None else self.train.store, self.val.store)
        assert self.train is not None
        return self.train

    @cached_property
    def majority_top1(self) -> float:
        """top1, in per cent, of always answering the most frequent training class, the first of equally frequent."""
        majority = torch.bincount(self.labelled().labels).argmax()
        return 100 * float((self.val.labels == majority).double().mean())


@dataclass(frozen=True)
class Task:
    """A validated mode on a checkpoint. run(folder, progress) measures and keeps its state in the folder.

    majority_top1: as in Result.
    """

    settings: EvalSettings
    run: Work
    majority_top1: float | None = None


def task(
    mode: str,
    context: EvalContext,
    evaluated: EvaluatedModel,
    run: Work,
    *,
    protocol: str,
    options: Section,
    readout: Readout | None = None,
    epochs: int | None = None,
    mask_ratio: float | None = None,
    trains: bool = True,
) -> Task:
    """Builds a task whose settings are the checkpoint, the stores, the seed, and those of the mode.

    options: the mode's section of the configuration. trains: whether the result depends on the training store.
    """
    trained = context.train if trains else None
    train = None if trained is None else SampleSet(**trained.about)
    settings = EvalSettings(
        mode=mode,
        name=evaluated.name,
        **asdict(evaluated.origin),
        resolution=evaluated.resolution,
        seed=context.config.seed,
        batch_size=context.config.batch_size,
        train=train,
        val=SampleSet(**context.val.about),
        classes=len((trained or context.val).classes),
        protocol=protocol,
        **({} if readout is None else asdict(readout)),
        epochs=epochs,
        mask_ratio=mask_ratio,
        options=options.model_dump(mode="json"),
    )
    return Task(settings, run, context.majority_top1 if trains else None)


def features_of(
    context: EvalContext, evaluated: EvaluatedModel, readouts: Sequence[Readout], folder: Path, progress: Progress
) -> list[dict[Readout, Tensor]]:
    """Returns the features of the training samples and of the validation samples, by readout."""
    features = []
    for name, samples in (("train", context.labelled()), ("val", context.val)):
        loader = context.in_order(samples, evaluated.resolution)
        features.append(
            extract(
                evaluated.encoder,
                readouts,
                loader,
                samples.indices,
                context.config.compute,
                context.world,
                folder / name,
                progress,
            )
        )
    return features
