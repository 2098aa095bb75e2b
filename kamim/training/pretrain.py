"""Pretraining: SimMIM (Eq. 1) and KAMIM (Eq. 3)."""

import logging
from dataclasses import replace

import torch
from torch import Tensor, nn

from kamim import KamimError
from kamim.config.pretrain import Decoder, Pretrain
from kamim.method.weighting import counts_to_weights
from kamim.models import interop
from kamim.models.architectures import architecture
from kamim.models.positions import fix_sincos
from kamim.runtime import distributed, lock, machine
from kamim.runtime.distributed import World
from kamim.storage import log_file
from kamim.storage.store import Store
from kamim.training import callbacks, checkpoint, metrics, run_folder
from kamim.training.data import cautions, training_loader
from kamim.training.model import Model, build_model
from kamim.training.nonfinite import NonFiniteGuard
from kamim.training.objective import Reconstruction, masked_error, reconstruct
from kamim.training.trainer import Losses, Outcome, Progress, Run, Trainer, autocast, parallel
from pipelines.batch import Batch
from pipelines.loader import Loader

_LOG = logging.getLogger(__name__)


def pretrain(config: Pretrain, progress: Progress, fresh: bool = False) -> Outcome:
    """Trains from the newest checkpoint in config.out, or from random weights or config.init_from, to the last step.

    fresh: config.out must not hold a run. Raises KamimError, before anything is written, if the configuration does not
    fit its store or this machine, config.out holds a run of another configuration, another process trains there, or
    init_from does not fit. Raises NonFinite if a loss is not finite.
    """
    with distributed.joined(config.compute.device) as world:
        store, loader, probe = _checked(config, world)
        run_folder.check_ranks(config, store, world)
        for line in cautions(config, store) if world.is_main else ():
            _LOG.warning(line)
        with lock.alone(config.out, "out", world):
            run_folder.check_free(config, store, fresh)
            trainer = build_trainer(config, loader, world)
            if config.init_from is not None and not checkpoint.saved(config.out):
                initialise(trainer.model, config)
            trainer.callbacks = callbacks.build_callbacks(config, trainer, store, probe)
            world.barrier()  # every rank has read the folder
            total, _, _ = config.optim.schedule(loader.plan.steps_per_epoch)
            if world.is_main and total not in checkpoint.saved(config.out):
                run_folder.claim(config, store)
            world.barrier()
            outcome = _fit(trainer, progress, total)
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


def check(config: Pretrain) -> None:
    """Runs the same validation as pretrain, except the checks of config.out. Raises KamimError."""
    with distributed.joined(config.compute.device) as world:
        _checked(config, world)


def _checked(config: Pretrain, world: World) -> tuple[Store, Loader, callbacks.Probe | None]:
    """Opens the store, loader and probe of a run. Raises KamimError if the configuration does not fit them."""
    metrics.check(config.log)
    store = Store(config.data.store)
    loader = training_loader(config, store, world)
    config.optim.schedule(loader.plan.steps_per_epoch)
    autocast(config.compute, world.device)
    if world.is_main:
        metrics.log_in(config.log)
    return store, loader, callbacks.open_probe(config)


def build_trainer(config: Pretrain, loader: Loader, world: World) -> Trainer:
    """Returns a trainer of a new model with random weights from the seed, AdamW and a NonFiniteGuard."""
    machine.use_threads(config.compute.threads)
    if world.device.type == "cpu":
        machine.keep_memory()
    torch.manual_seed(config.seed)
    model = build_model(config).to(world.device)
    network = parallel(model, config.compute, world)
    optimizer = build_optimizer(config, model)
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
    objective = MaskedReconstruction(config, network)
    return Trainer(run, model, network, optimizer, objective, loader.micro_batches, world, guard=guard)


class MaskedReconstruction:
    """The objective of pretraining: Eq. 1, Eq. 3 or MAE's loss of a micro-batch."""

    def __init__(self, config: Pretrain, network: nn.Module):
        self._config = config
        self._network = network

    def __call__(self, batch: Batch) -> Losses:
        """Returns the loss and, to log, the loss without weights and, if there are any, the mean and largest W."""
        target, reconstruction, weights = self.reconstruct(batch)
        error = masked_error(self._config.method)
        loss = error(target, reconstruction.output, reconstruction.mask, weights)
        if weights is None:
            return Losses(loss, {"loss_unweighted": loss})
        unweighted = error(target, reconstruction.output.detach(), reconstruction.mask)
        return Losses(
            loss, {"loss_unweighted": unweighted, "weight_mean": weights.mean()}, {"weight_max": weights.max()}
        )

    def reconstruct(self, batch: Batch) -> tuple[Tensor, Reconstruction, Tensor | None]:
        """Returns the target [B, 3, R, R], its reconstruction, and the weights W [B, c, c] or None."""
        config, weighting = self._config, self._config.weighting
        reconstruction = reconstruct(self._network, batch, config.mask, config.seed, batch.epoch, config.compute)
        weights = None
        if weighting is not None:
            assert batch.counts is not None, "KAMIM needs keypoint counts"
            weights = counts_to_weights(batch.counts, weighting.patch_size, weighting.temperature, weighting.normalize)
        return reconstruction.target(config.normalised_patches), reconstruction, weights


def initialise(model: nn.Module, config: Pretrain) -> None:
    """Loads config.init_from, with position embeddings interpolated to the resolution. Missing weights stay random.

    Raises KamimError if it cannot be read or is of another architecture.
    """
    path = config.init_from
    assert path is not None
    try:
        if interop.weights_file(path) is not None:
            converted = interop.load(path, config.data.resolution, config.model.name)
        else:
            saved = checkpoint.read(path)
            hints = replace(interop.hints_of(saved.config.model.name), architecture=config.model.name)
            converted = interop.convert(saved.model_state(), config.data.resolution, hints)
    except KamimError as error:
        raise KamimError(f"init_from = {path}: {str(error).removeprefix(f'{path}: ')}") from error
    own = architecture(converted.architecture, converted.positions).positions
    if (own == "relative") != (architecture(config.model.name, config.model.positions).positions == "relative"):
        raise KamimError(
            f"init_from = {path}: its positions are {own or 'absolute'}; set model.positions={own or 'null'}"
        )
    state, method = converted.state, "simmim" if converted.decoder is None else "mae"
    whole = converted.has_head and method == config.method
    if not whole:
        state = {name: value for name, value in state.items() if name.startswith("encoder.")}
    if whole and converted.decoder is not None:
        theirs, ours = converted.decoder, config.decoder or Decoder()
        if (theirs.width, theirs.depth) != (ours.width, ours.depth):
            raise KamimError(
                f"init_from = {path}: its decoder has width {theirs.width} and depth {theirs.depth}; set decoder.width "
                "and decoder.depth so"
            )
    model.load_state_dict(state, strict=whole)
    if config.model.positions == "sincos":
        assert isinstance(model, Model)
        fix_sincos(model.encoder)  # they stay what they are, whatever positions the weights came with


def build_optimizer(config: Pretrain, model: Model) -> torch.optim.Optimizer:
    """Returns fused AdamW. If optim.decay_all is false, vectors, positions and tokens have no weight decay."""
    optim = config.optim
    exempt = {"mask_token", *(f"encoder.{name}" for name in model.encoder.no_weight_decay())}

    def decays(name: str, parameter: nn.Parameter) -> bool:
        return optim.decay_all or not (parameter.ndim < 2 or name in exempt or name.endswith("bias_table"))

    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for name, p in named if decays(name, p) == decayed], "weight_decay": decayed * optim.weight_decay}
        for decayed in (True, False)
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=optim.lr, betas=optim.betas, fused=True)
