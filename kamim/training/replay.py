"""Replays one step of a run sample by sample, from the newest checkpoint before it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kamim.config.pretrain import Pretrain
from kamim.runtime import distributed
from kamim.runtime.distributed import World
from kamim.storage.store import Store
from kamim.training import starts
from kamim.training.data import training_loader
from kamim.training.initialise import initialise
from kamim.training.objective import loss_weights, masked_error, reconstruct
from kamim.training.pretrain import build_trainer
from kamim.training.recorded_steps import nonfinite_steps, step_to_replay
from kamim.training.trainer import Trainer, by_step
from pipelines.batch import Batch


@dataclass(frozen=True)
class Sample:
    """One sample of a step. index: its index in the store; weight_max: its largest W, None for SimMIM.

    image, reconstruction: uint8 [R, R, 3], the model's input and its reconstruction; masked: bool [R, R].
    """

    index: int
    loss: float
    weight_max: float | None
    image: np.ndarray
    reconstruction: np.ndarray
    masked: np.ndarray


@dataclass(frozen=True)
class Replayed:
    """The samples of a step in order, its loss, and the step of the checkpoint at which the replay began."""

    step: int
    began: int
    loss: float
    samples: tuple[Sample, ...]

    @property
    def worst(self) -> list[Sample]:
        """The samples by descending loss, those with a loss that is not finite first."""
        return sorted(self.samples, key=lambda sample: (np.isfinite(sample.loss), -sample.loss))


def replay(run: Path, step: int | None, device: str) -> Replayed:
    """Recomputes `step` of a run; None is the newest step that was not finite. device: auto, cuda or cpu.

    On a CPU the numbers equal the run's bit by bit if one process computed the steps since the checkpoint. Raises
    KamimError if there is no such run or step.
    """
    config, store, step = step_to_replay(run, step)
    with distributed.joined(device) as world:
        loader = training_loader(config, store, world)
        trainer = build_trainer(config.model_copy(update={"on_nonfinite": "skip", "out": run}), loader, world)
        began = _bring_to(step, trainer, config)
        ranks = nonfinite_steps(run).get(step) or next(
            (s["processes"] for s in reversed(starts.read(run)) if s["step"] <= step), 1
        )
        loss, samples = torch.zeros((), device=world.device), []
        for batch in _of_ranks(config, store, step, ranks, world.device):
            whole, parts = _samples(config, trainer, batch)
            loss += whole * batch.loss_weight
            samples += parts
        return Replayed(step, began, float(loss), tuple(samples))


def _bring_to(step: int, trainer: Trainer, config: Pretrain) -> int:
    """Brings the model to its state before `step`. Returns the step of the checkpoint it starts from."""
    began = trainer.resume(at_most=step)
    if began == 0 and config.init_from is not None:
        initialise(trainer.model, config)
    for at, micro_batches in by_step(trainer.batches(began, step)):
        trainer.train_step(at, micro_batches)
    trainer.forward_model.train()
    return began


def _of_ranks(config: Pretrain, store: Store, step: int, ranks: int, device: torch.device) -> Iterator[Batch]:
    """Yields the non-empty micro-batches of a step, of every rank that trained."""
    for rank in range(ranks):
        loader = training_loader(config, store, World(rank, ranks, device))
        yield from (batch for batch in loader.micro_batches(step, step + 1) if len(batch))


def _samples(config: Pretrain, trainer: Trainer, batch: Batch) -> tuple[Tensor, list[Sample]]:
    """Returns the loss of a micro-batch, and its samples with their losses."""
    error, weights = masked_error(config.method), loss_weights(batch, config.weighting)
    with torch.no_grad():
        result = reconstruct(trainer.forward_model, batch, config.mask, config.seed, batch.epoch, config.compute)
        target = result.target(config.normalised_patches)
        rows = [slice(i, i + 1) for i in range(len(batch))]
        losses = [
            error(target[i], result.output[i], result.mask[i], None if weights is None else weights[i]) for i in rows
        ]
        whole = error(target, result.output, result.mask, weights)
    images, pixels = batch.images.cpu().numpy(), result.pixels(config.normalised_patches).cpu().numpy()
    masked = result.masked_pixels.cpu().numpy()
    return whole, [
        Sample(
            int(batch.indices[i]),
            float(losses[i]),
            None if weights is None else float(weights[i].max()),
            images[i].copy(),
            pixels[i],
            masked[i],
        )
        for i in range(len(batch))
    ]
