"""One step of a run again, sample by sample: from the newest checkpoint before it, through the steps in between."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kamim.method.objective import masked_l1
from kamim.models.masked_image_model import MaskedImageModel, expand_mask
from kamim.training import schedule
from kamim.training.config import Pretrain
from kamim.training.distributed import World
from kamim.training.nonfinite import Guard
from kamim.training.pretrain import initialise, prepare, reconstruct, steps, to_pixels
from kamim.training.trainer import Batches, resume, update
from pipelines.batch import Batch, normalise


@dataclass(frozen=True)
class Sample:
    """One sample of a step. index: its number in the store; weight_max: its largest W, None for SimMIM.

    image, made: uint8 [R, R, 3], what the model saw and made of it; masked: bool [R, R].
    """

    index: int
    loss: float
    weight_max: float | None
    image: np.ndarray
    made: np.ndarray
    masked: np.ndarray


@dataclass(frozen=True)
class Replayed:
    """A step's samples in their order, its loss, and the step of the checkpoint that the replay began at."""

    step: int
    began: int
    loss: float
    samples: tuple[Sample, ...]

    @property
    def worst(self) -> list[Sample]:
        """Samples by falling loss, those that are not finite first."""
        return sorted(self.samples, key=lambda sample: (np.isfinite(sample.loss), -sample.loss))


def replay(
    config: Pretrain, run: Path, step: int, batches: Batches, ranks: Sequence[Batches], steps_per_epoch: int,
    device: torch.device,
) -> Replayed:  # fmt: skip
    """What `step` of the run computed. batches: of all ranks as one; ranks: of each of those that trained.

    On a CPU the numbers are the run's, bit by bit, if the steps in between were computed by one process.
    """
    world = World(0, 1, device)
    model, _, optimizer = prepare(config, world)
    began = resume(run, model, optimizer, world, most=step)
    if began == 0 and config.init_from is not None:
        initialise(model, config)
    guard = Guard(optimizer, "skip", run, config.seed, world)
    scheduler = schedule.cosine(optimizer, config.optim, steps_per_epoch)
    for at, values in steps(config, model, batches(began, step), world):
        scheduler.step_update(at)
        update(model, optimizer, config.optim.clip_grad, values["loss"], guard)
    model.train()
    loss, samples = torch.zeros((), device=device), []
    for its in ranks:
        for batch in its(step, step + 1):
            if not len(batch):  # a rank may have none of a short step
                continue
            whole, parts = _samples(config, model, batch, device)
            loss += whole * batch.share
            samples += parts
    return Replayed(step, began, float(loss), tuple(samples))


def _samples(
    config: Pretrain, model: MaskedImageModel, batch: Batch, device: torch.device
) -> tuple[Tensor, list[Sample]]:
    """The loss of a micro-batch, and of each of its samples."""
    with torch.no_grad():
        target, made, mask, weights = reconstruct(config, model, batch, device)
        rows = [slice(i, i + 1) for i in range(len(batch))]
        losses = [masked_l1(target[i], made[i], mask[i], None if weights is None else weights[i]) for i in rows]
        whole = masked_l1(target, made, mask, weights)
    images, pixels = batch.images.cpu().numpy(), to_pixels(config, made, normalise(batch.images)).cpu().numpy()
    masked = expand_mask(mask, target.shape[-1]).cpu().numpy()
    return whole, [
        Sample(
            int(batch.indices[i]), float(losses[i]), None if weights is None else float(weights[i].max()),
            images[i].copy(), pixels[i], masked[i],
        )
        for i in range(len(batch))
    ]  # fmt: skip
