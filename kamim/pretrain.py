"""Pretraining: SimMIM and KAMIM. It takes any iterable of Batch and knows nothing of where batches come from."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kamim import checkpoint, interop, lock, machine
from kamim.batch import Batch, denormalise, normalise, upload
from kamim.config import Pretrain, dump, load
from kamim.distributed import World
from kamim.loop import (
    Batches,
    Observer,
    Outcome,
    Progress,
    Run,
    Steps,
    autocast,
    should_compile,
    synchronised,
    train,
)
from kamim.masking import block_masks
from kamim.metrics import Waits
from kamim.models import ARCHITECTURES, MaskedImageModel
from kamim.nonfinite import Guard
from kamim.objective import denormalise_patches, masked_l1, normalise_patches
from kamim.stochastic_depth import draw_paths
from kamim.store import MANIFEST, write_whole
from kamim.weighting import counts_to_weights

CONFIG = "config.yaml"  # of a run
Observe = Callable[[MaskedImageModel], Sequence[Observer]]


def pretrain(
    config: Pretrain, batches: Batches, steps_per_epoch: int, world: World, progress: Progress,
    observe: Observe = lambda model: (), fresh: bool = False,
) -> Outcome:  # fmt: skip
    """Trains from the newest checkpoint in config.out, or from random weights or config.init_from, to the last epoch.

    observe: what looks at the model meanwhile. fresh: there must be no run in config.out. Raises ValueError where there
    is, or one of another configuration, or one that another process trains now, and for an init_from that does not fit;
    kamim.nonfinite.NonFinite for a loss that is not finite.
    """
    total, _, _ = config.optim.schedule(steps_per_epoch)  # what does not fit is told before anything is written
    autocast(config.compute, world.device)
    with lock.alone(config.out, "out =", world):
        _check_place(config, fresh)
        model, network, optimizer = prepare(config, world)
        if config.init_from is not None and not checkpoint.saved(config.out):
            initialise(model, config)
        world.barrier()  # everyone has looked
        if world.is_main and total not in checkpoint.saved(config.out):
            _claim(config)
        world.barrier()
        run = Run(
            config.out, "pretrain", config.model_dump(mode="json"), config.optim, steps_per_epoch,
            every=config.checkpoint_epochs * steps_per_epoch,
            keep=checkpoint.Keep(config.keep_checkpoints, (config.keep_every_epochs or 0) * steps_per_epoch or None),
            log=config.log, observers=observe(model),
        )  # fmt: skip
        guard = Guard(optimizer, config.on_nonfinite, config.out, config.seed, world)

        def made(first: int, stop: int) -> Steps:
            return steps(config, network, batches(first, stop), world, guard)

        return train(run, model, optimizer, made, world, progress, guard=guard)


def prepare(config: Pretrain, world: World) -> tuple[MaskedImageModel, nn.Module, torch.optim.Optimizer]:
    """A new model, the network that computes its gradients (compiled, over all ranks), and its optimiser."""
    machine.use_threads(config.compute.threads)
    if world.device.type == "cpu":
        machine.keep_memory()
    torch.manual_seed(config.seed)
    model = MaskedImageModel(config.model.name, config.data.resolution, config.model.drop_path).to(world.device)
    network: nn.Module = DistributedDataParallel(model) if world.size > 1 else model
    if should_compile(config.compute, world.device):
        network.compile()
    return model, network, build_optimizer(config, model)


def initialise(model: MaskedImageModel, config: Pretrain) -> None:
    """Loads config.init_from, positions interpolated for another resolution; what it lacks stays random.

    Raises ValueError where it cannot be read or is of another architecture.
    """
    path = config.init_from
    assert path is not None
    try:
        state = interop.read_file(path) if path.is_file() else checkpoint.read(path).model_state()
        made = interop.convert(state, config.data.resolution, config.model.name)
    except ValueError as error:
        raise ValueError(f"init_from = {path}: {str(error).removeprefix(f'{path}: ')}") from error
    model.load_state_dict(made.state, strict=made.has_head)


def build_optimizer(config: Pretrain, model: MaskedImageModel) -> torch.optim.Optimizer:
    """Fused AdamW; with optim.decay_all false, vectors, positions and tokens have no weight decay."""
    optim = config.optim
    kept = {f"encoder.{name}" for name in model.encoder.no_weight_decay()}

    def decays(name: str, parameter: nn.Parameter) -> bool:
        return optim.decay_all or not (parameter.ndim < 2 or name in kept or name.endswith("bias_table"))

    named = list(model.named_parameters())
    groups = [
        {"params": [p for name, p in named if decays(name, p) == decayed], "weight_decay": decayed * optim.weight_decay}
        for decayed in (True, False)
    ]  # fmt: skip
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=optim.lr, betas=optim.betas, fused=True
    )  # fmt: skip


def steps(
    config: Pretrain, network: nn.Module, batches: Iterable[Batch], world: World, guard: Guard | None = None
) -> Steps:
    """Gradients of one optimiser step at a time: yields it and its samples, loss, mean and largest W over all ranks."""
    network.train()
    sums = torch.zeros(3, device=world.device)  # of samples, of loss and of mean W
    largest = torch.zeros((), device=world.device)
    waits = Waits(batches)
    for batch in waits:
        taken = batch if len(batch) else batch.stand_in()
        with synchronised(network, batch, world):
            loss, weights = batch_loss(config, network, taken, world.device)
            (loss * (taken.share * world.size)).backward()  # DDP averages over ranks
        if guard is not None:
            guard.see(batch, loss.detach())
        sums[0] += len(batch)
        sums[1] += loss.detach() * taken.share
        if weights is not None:
            sums[2] += weights.mean() * taken.share
            largest = torch.maximum(largest, weights.max())
        if batch.last:
            total = world.sum(sums.clone())
            parts = {"weight_mean": total[2], "weight_max": world.largest(largest)} if weights is not None else {}
            yield batch.step, {"samples": total[0], "loss": total[1], **parts, "data_wait": waits.take()}
            sums.zero_()
            largest = torch.zeros_like(largest)


def batch_loss(
    config: Pretrain, network: nn.Module, batch: Batch, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Eq. 1 or Eq. 3 of one batch, and the weights W [B, c, c] if there are any."""
    target, reconstruction, mask, weights = reconstruct(config, network, batch, device)
    return masked_l1(target, reconstruction, mask, weights), weights


def reconstruct(
    config: Pretrain, network: nn.Module, batch: Batch, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What masked_l1 takes: target and reconstruction [B, 3, R, R], mask bool [B, g, g], W [B, c, c] or None."""
    grid = config.data.resolution // config.mask.patch_size
    mask = upload(block_masks(config.seed, batch.epoch, batch.indices, grid, config.mask.ratio), device)
    weights = None
    if config.weighting is not None:
        assert batch.counts is not None, "KAMIM needs keypoint counts"
        w = config.weighting
        weights = counts_to_weights(batch.counts, w.patch_size, w.temperature, w.normalize)
    images = normalise(batch.images)
    draw_paths(network, config.seed, batch.epoch, batch.indices, device)
    with autocast(config.compute, device):
        reconstruction = network(images, mask)
    target = normalise_patches(images, ARCHITECTURES[config.model.name].stride) if config.norm_pix_loss else images
    return target, reconstruction, mask, weights


def to_pixels(config: Pretrain, reconstruction: Tensor, images: Tensor) -> Tensor:
    """What the model makes of normalised images, to look at: uint8 [B, R, R, 3].

    With norm_pix_loss it makes no pixels; the patches then have the mean and deviation of the images'.
    """
    if config.norm_pix_loss:
        reconstruction = denormalise_patches(reconstruction, images, ARCHITECTURES[config.model.name].stride)
    return denormalise(reconstruction.float().nan_to_num())


def _check_place(config: Pretrain, fresh: bool) -> None:
    """Raises ValueError where another run lives in config.out, or any, if it must be fresh, or a store."""
    file = config.out / CONFIG
    if (config.out / MANIFEST).is_file():
        raise ValueError(f"out = {config.out}: is a store; choose another out=...")
    if not file.is_file():
        return
    if fresh:
        raise ValueError(f"out = {config.out}: holds a run already; choose another out=..., or --resume auto goes on")
    if difference := _difference(load(Pretrain, file), config):
        raise ValueError(
            f"out = {config.out}: holds a run of another configuration ({difference}); choose another out=..., "
            "or remove it"
        )


def _claim(config: Pretrain) -> None:
    """Writes the configuration into config.out."""
    config.out.mkdir(parents=True, exist_ok=True)
    write_whole(config.out / CONFIG, dump(config).encode())


# What a resumed run may change: none of it says which samples are trained on, or how.
_FREE = {"out": True, "checkpoint_epochs": True, "keep_checkpoints": True, "keep_every_epochs": True, "compute": True,
         "on_nonfinite": True, "log": True, "panel_epochs": True, "probe": True,
         "data": {"workers"}, "optim": {"micro_batch"}}  # fmt: skip


def _difference(there: Pretrain, asked: Pretrain) -> str:
    """The first key on which the runs differ, with both values, or nothing."""
    old, new = (dump(config, exclude=_FREE).splitlines() for config in (there, asked))
    pairs = zip(old, new, strict=False)
    changed = next((f"{a.strip()} there, {b.strip()} asked for" for a, b in pairs if a != b), "")
    return changed or ("other keys" if len(old) != len(new) else "")
