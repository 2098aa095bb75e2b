"""Callbacks of pretraining: a panel of reconstructions, a kNN probe of the features, and measures without labels.

They train nothing, use no random generator and leave the model unchanged, so they do not change a run.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from kamim import KamimError
from kamim.config.pretrain import Compute, Pretrain
from kamim.method.keypoints import map_counts
from kamim.method.weighting import keypoint_weights
from kamim.models.attention import selectivity
from kamim.models.knn import knn
from kamim.models.label_free import measures
from kamim.models.readout import Readout, blocks, fixed, resolve
from kamim.runtime.device import autocast
from kamim.runtime.distributed import World
from kamim.storage.store import Store
from kamim.training.data import check_area, shown_samples, whole_images
from kamim.training.metrics import Metrics
from kamim.training.model import Model
from kamim.training.objective import masked_error, reconstruct
from kamim.training.trainer import Callback, Trainer
from pipelines.batch import Batch, normalise
from pipelines.labels import check_labels
from pipelines.samples import Samples, all_samples, n_per_class

NEIGHBOURS = 20
SHOWN = 8  # samples in a panel
BATCH = 256  # images per batch of the probe


@dataclass(frozen=True)
class Probe:
    """The labelled samples of the online probe."""

    train: Samples
    val: Samples

    @property
    def majority_top1(self) -> float:
        """top1, in per cent, of always answering the most frequent class of train's store."""
        majority = np.bincount(self.train.store.images.labels).argmax()
        return 100 * float((self.val.labels == int(majority)).double().mean())


def open_probe(config: Pretrain) -> Probe | None:
    """Opens the stores of config.probe, if it is set. Raises KamimError if they do not suit a probe."""
    if config.probe is None:
        return None
    train, val = Store(config.probe.train), Store(config.probe.val)
    for store in (train, val):
        check_area(store, config.data.resolution, smallest_crop=1.0)
    samples, per_class = all_samples(train), config.probe.per_class
    if per_class is not None and (train.images.labels >= 0).all():
        samples = Samples(train, n_per_class(train.images.labels, per_class, config.seed))
    try:
        check_labels(train, val)
    except KamimError as error:
        raise KamimError(f"probe: {error}") from None
    return Probe(samples, all_samples(val))


def build_callbacks(config: Pretrain, trainer: Trainer, store: Store, probe: Probe | None) -> list[Callback]:
    """Returns the callbacks that the configuration of a run enables."""
    model, device, per_epoch = trainer.model, trainer.world.device, trainer.run.steps_per_epoch
    assert isinstance(model, Model)
    requested = []
    if probe is not None and config.probe is not None:
        requested.append(knn_probe(config, model, config.probe.every_epochs * per_epoch, probe, device))
    if config.label_free is not None:
        requested.append(label_free_metrics(config, model, config.label_free.every_epochs * per_epoch, store, device))
    if config.plateau is not None:
        requested.append(plateau(config, model, config.plateau.every_epochs * per_epoch, store, device))
    if config.panel_epochs is not None:
        samples = partial(shown_samples, config, store, SHOWN, device)
        requested.append(panel(config, model, config.panel_epochs * per_epoch, samples))
    return requested


def panel(config: Pretrain, model: Model, every: int, samples: Callable[[], Batch]) -> Callback:
    """Returns a callback that draws samples: masked, reconstructed, and for KAMIM with keypoints and weights.

    every: steps between two panels. samples: returns the same samples at each call, on the model's device, with counts
    (if any) in cells of one pixel, which form the map F.
    """

    def run(step: int, metrics: Metrics) -> None:
        from kamim.reporting import plots  # takes a second to import

        batch, weighting = samples(), config.weighting
        with _eval_mode(model):  # the uncompiled model: torch.compile would recompile for this batch size
            reconstruction = reconstruct(model, batch, config.mask, config.seed, 0, config.compute)
        bitmaps = weights = None
        if weighting is not None and batch.counts is not None:
            bitmaps = batch.counts.cpu().numpy() > 0
            counts = np.stack([map_counts(f, weighting.patch_size) for f in bitmaps])
            weights = keypoint_weights(counts, weighting.patch_size, weighting.temperature, weighting.normalize)
        figure = plots.panel_sheet(
            batch.images.cpu().numpy(),
            reconstruction.masked_pixels.cpu().numpy(),
            reconstruction.pixels(config.normalised_patches).cpu().numpy(),
            bitmaps,
            weights,
            f"after {step} steps",
        )
        metrics.panel(step, plots.pixels(figure))

    return Callback(every, run)


def knn_probe(config: Pretrain, model: Model, every: int, probe: Probe, device: torch.device) -> Callback:
    """Returns a callback that logs knn_top1: the top-1 accuracy (%) on val of a vote of NEIGHBOURS samples of train.

    It also logs knn_low and knn_high, its Wilson interval, and knn_majority (Probe.majority_top1).
    every: steps between two probes. Features are those of `kamim eval --mode knn`, before it rounds them to bf16.
    """
    alone = World(0, 1, device)  # only the first process computes the probe
    readout = Readout(resolve(model.encoder, "paper"), "mean", "none")

    def features(samples: Samples) -> tuple[Tensor, Tensor]:
        loader = whole_images(samples, config.data.resolution, BATCH, config.data.workers, alone, config.data.on_error)
        return _features(model, readout, loader.micro_batches(0, loader.plan.steps_per_epoch), config.compute)

    def run(step: int, metrics: Metrics) -> None:
        from kamim.reporting.intervals import wilson  # scipy takes a second to import

        with _eval_mode(model):
            train, train_labels = features(probe.train)
            val, val_labels = features(probe.val)
        k = min(NEIGHBOURS, len(train))
        accuracies = knn(
            train,
            train_labels,
            val,
            val_labels,
            len(probe.train.classes),
            train.device,
            lambda done, total: None,
            ks=(k,),
        )
        top1 = accuracies[str(k)]["top1"]
        low, high = wilson(top1, len(val))
        metrics.log({"knn_top1": top1, "knn_low": low, "knn_high": high, "knn_majority": probe.majority_top1})

    return Callback(every, run)


def label_free_metrics(config: Pretrain, model: Model, every: int, store: Store, device: torch.device) -> Callback:
    """Returns a callback that logs kamim.models.label_free.measures of config.label_free.images images of the store.

    every: steps between two measurements. The images are evenly spaced and whole; features are those of the kNN probe.
    """
    assert config.label_free is not None
    count = min(config.label_free.images, len(store))
    samples = Samples(store, np.linspace(0, len(store) - 1, count).astype(np.int64))
    readout = Readout(resolve(model.encoder, "paper"), "mean", "none")

    def run(step: int, metrics: Metrics) -> None:
        loader = whole_images(
            samples, config.data.resolution, BATCH, config.data.workers, World(0, 1, device), config.data.on_error
        )
        with _eval_mode(model):
            features, _ = _features(
                model, readout, loader.micro_batches(0, loader.plan.steps_per_epoch), config.compute
            )
            metrics.log(measures(features))

    return Callback(every, run)


def plateau(config: Pretrain, model: Model, every: int, store: Store, device: torch.device) -> Callback:
    """Returns a callback that logs attention_selectivity (px, see kamim.models.attention) and loss_mean_colour.

    every: steps between two measurements. Attention is that to whole images, evenly spaced in the store, in float32.
    loss_mean_colour is the loss without W of painting SHOWN crops in the mean of each crop's target: a model on the
    plateau does no better. With norm_pix_loss that mean is 0.
    """
    assert config.plateau is not None
    count = min(config.plateau.images, len(store))
    samples = Samples(store, np.linspace(0, len(store) - 1, count).astype(np.int64))
    patch = float(config.model.patch_size)

    def run(step: int, metrics: Metrics) -> None:
        loader = whole_images(
            samples, config.data.resolution, count, config.data.workers, World(0, 1, device), config.data.on_error
        )
        (batch,) = loader.micro_batches(0, 1)
        with _eval_mode(model):
            selective = selectivity(model.encoder, normalise(batch.images), patch)
            shown = reconstruct(
                model, shown_samples(config, store, SHOWN, device), config.mask, config.seed, 0, config.compute
            )
        target = shown.target(config.normalised_patches)
        colour = target.mean(dim=(2, 3), keepdim=True).expand_as(target)
        painted = masked_error(config.method)(target, colour, shown.mask)
        metrics.log({"attention_selectivity": selective, "loss_mean_colour": float(painted)})

    return Callback(every, run)


def _features(model: Model, readout: Readout, batches: Iterable[Batch], compute: Compute) -> tuple[Tensor, Tensor]:
    """Returns features float32 [N, D] and labels int64 [N]."""
    features, labels = [], []
    for batch in batches:
        with autocast(compute, batch.images.device):
            *_, (_, tokens) = blocks(model.encoder, normalise(batch.images), readout.block)
            features.append(fixed(model.encoder, tokens, readout).float())
        labels.append(batch.labels.clone())  # the loader reuses its memory
    return torch.cat(features), torch.cat(labels)


@contextmanager
def _eval_mode(model: Model) -> Iterator[None]:
    """Sets eval mode without gradients in the context, and restores the model's mode after it."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
