"""Pretraining: SimMIM (Eq. 1) and KAMIM (Eq. 3)."""

import logging

import torch

from kamim.config.pretrain import Pretrain
from kamim.runtime import lock, machine
from kamim.runtime.device import parallel
from kamim.runtime.distributed import World
from kamim.storage import log_file
from kamim.training import callbacks, checkpoint, run_folder
from kamim.training.data import cautions
from kamim.training.initialise import initialise
from kamim.training.model import build_model, build_optimizer
from kamim.training.nonfinite import NonFiniteGuard
from kamim.training.objective import MaskedReconstruction
from kamim.training.prepare import Prepared, prepare
from kamim.training.trainer import Outcome, Progress, Run, Trainer
from pipelines.loader import Loader

_LOG = logging.getLogger(__name__)


def pretrain(config: Pretrain, progress: Progress, fresh: bool = False) -> Outcome:
    """Trains from the newest checkpoint in config.out, or from random weights or config.init_from, to the last step.

    fresh: config.out must not hold a run. Raises KamimError, before anything is written, for what prepare refuses, if
    another process trains there, or if init_from does not fit. Raises NonFinite if a loss is not finite.
    """
    with prepare(config, fresh) as prepared:
        return train(prepared, progress)


def train(prepared: Prepared, progress: Progress) -> Outcome:
    """Trains a prepared run. See pretrain."""
    config, store, world = prepared.config, prepared.store, prepared.world
    for line in cautions(config, store) if world.is_main else ():
        _LOG.warning(line)
    with lock.alone(config.out, "out", world):
        run_folder.check_free(config, store, prepared.fresh)  # another process may have trained there meanwhile
        trainer = build_trainer(config, prepared.loader, world)
        if config.init_from is not None and not checkpoint.saved(config.out):
            initialise(trainer.model, config)
        trainer.callbacks = callbacks.build_callbacks(config, trainer, store, prepared.probe)
        world.barrier()  # every rank has read the folder
        if world.is_main and prepared.steps not in checkpoint.saved(config.out):
            run_folder.claim(config, store)
        world.barrier()
        outcome = _fit(trainer, progress, prepared.steps)
    if world.is_main:
        _report(config, outcome)
    world.barrier()  # torchrun ends the other ranks once one exits with a code for resuming
    return outcome


def _fit(trainer: Trainer, progress: Progress, total: int) -> Outcome:
    """Trains to step `total`. The first process logs the beginning and the end in RUN/log.txt, unless all is done."""
    out, world = trainer.run.out, trainer.world
    saved = checkpoint.saved(out)
    if not world.is_main or total in saved:
        return trainer.fit(progress)
    line = f"training from step {saved[-1] if saved else 0} of {total} on {world.size} x {world.device.type}"
    with log_file.logged(out / run_folder.LOG, line):
        outcome = trainer.fit(progress)
        log_file.write_line(
            out / run_folder.LOG,
            f"step {outcome.step} is done{'' if outcome.finished else ', and a signal stopped the run'}",
        )
    return outcome


def _report(config: Pretrain, outcome: Outcome) -> None:
    """Writes report.html unless it is up to date."""
    from kamim.training import report  # imports matplotlib, which takes a second

    if outcome.first < outcome.step or not report.is_current(config.out):
        report.save_report(config.out)


def build_trainer(config: Pretrain, loader: Loader, world: World) -> Trainer:
    """Returns a trainer of a new model with random weights from the seed, AdamW and a NonFiniteGuard."""
    machine.use_threads(config.compute.threads)
    if world.device.type == "cpu":
        machine.keep_memory()
    torch.manual_seed(config.seed)
    model = build_model(config).to(world.device)
    forward_model = parallel(model, config.compute, world)
    optimizer = build_optimizer(config.optim, model)
    per_epoch = loader.plan.steps_per_epoch
    run = Run(
        config.out,
        "pretrain",
        config.model_dump(mode="json"),
        config.optim,
        per_epoch,
        every=config.checkpoint_epochs * per_epoch,
        keep=checkpoint.Keep(config.keep_checkpoints, (config.keep_every_epochs or 0) * per_epoch or None),
        log=config.log,
    )
    guard = NonFiniteGuard(optimizer, config.on_nonfinite, config.out, config.seed, world)
    objective = MaskedReconstruction(config, forward_model)
    return Trainer(run, model, forward_model, optimizer, objective, loader.micro_batches, world, guard=guard)
