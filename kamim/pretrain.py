"""Pretraining: SimMIM and KAMIM. It takes any iterable of Batch and knows nothing of where batches come from."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kamim import machine, rng
from kamim.batch import Batch, normalise, upload
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
from kamim.models import MaskedImageModel
from kamim.objective import masked_l1
from kamim.weighting import counts_to_weights

Observe = Callable[[MaskedImageModel], Sequence[Observer]]


def pretrain(
    config: Pretrain, batches: Batches, steps_per_epoch: int, world: World, progress: Progress,
    observe: Observe = lambda model: (),
) -> Outcome:  # fmt: skip
    """Trains from the newest checkpoint in config.out, or from random weights, to the last epoch.

    observe: what looks at the model meanwhile.

    Raises ValueError where config.out holds a run of another configuration, FloatingPointError for a loss
    that is not finite.
    """
    _claim(config, world)
    model, network, optimizer = prepare(config, world)
    run = Run(
        config.out, "pretrain", config.model_dump(mode="json"), config.optim, steps_per_epoch,
        every=config.checkpoint_epochs * steps_per_epoch, keep=config.keep_checkpoints,
        log=config.log, observers=observe(model),
    )  # fmt: skip
    return train(
        run, model, optimizer, lambda first, stop: steps(config, network, batches(first, stop), world), world, progress
    )


def prepare(config: Pretrain, world: World) -> tuple[MaskedImageModel, nn.Module, torch.optim.Optimizer]:
    """A new model, the network that computes its gradients (compiled, over all ranks), and its optimiser."""
    if world.device.type == "cpu":
        machine.keep_memory()
    torch.manual_seed(config.seed)
    model = MaskedImageModel(config.model.name, config.data.resolution, config.model.drop_path).to(world.device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.optim.lr, betas=config.optim.betas, weight_decay=config.optim.weight_decay,
        fused=True,
    )  # fmt: skip
    network: nn.Module = DistributedDataParallel(model) if world.size > 1 else model
    if should_compile(config.compute, world.device):
        network.compile()
    return model, network, optimizer


def steps(config: Pretrain, network: nn.Module, batches: Iterable[Batch], world: World) -> Steps:
    """Gradients of one optimiser step at a time: yields (step, its loss, mean and largest W, over all ranks)."""
    network.train()
    sums = torch.zeros(2, device=world.device)  # of loss and of mean W
    largest = torch.zeros((), device=world.device)
    step = -1
    waits = Waits(batches)
    for batch in waits:
        if batch.step != step:  # what draws inside the model (stochastic depth) is a function of the step
            step = batch.step
            torch.manual_seed(rng.step_seed(config.seed, step, world.rank))
        with synchronised(network, batch, world):
            loss, weights = batch_loss(config, network, batch, world.device)
            (loss * (batch.share * world.size)).backward()  # DDP averages over ranks
        sums[0] += loss.detach() * batch.share
        if weights is not None:
            sums[1] += weights.mean() * batch.share
            largest = torch.maximum(largest, weights.max())
        if batch.last:
            total = world.sum(sums.clone())
            parts = {"weight_mean": total[1], "weight_max": world.largest(largest)} if weights is not None else {}
            yield batch.step, {"loss": total[0], **parts, "data_wait": waits.take()}
            sums.zero_()
            largest = torch.zeros_like(largest)


def batch_loss(
    config: Pretrain, network: nn.Module, batch: Batch, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Eq. 1 or Eq. 3 of one batch, and the weights W [B, c, c] if there are any."""
    grid = config.data.resolution // config.mask.patch_size
    mask = upload(block_masks(config.seed, batch.epoch, batch.indices, grid, config.mask.ratio), device)
    weights = None
    if config.weighting is not None:
        assert batch.counts is not None, "KAMIM needs keypoint counts"
        weights = counts_to_weights(batch.counts, config.weighting.patch_size, config.weighting.temperature)
    images = normalise(batch.images)
    with autocast(config.compute, device):
        reconstruction = network(images, mask)
    return masked_l1(images, reconstruction, mask, weights), weights


def _claim(config: Pretrain, world: World) -> None:
    """Writes the configuration into config.out, or raises ValueError where another run lives there."""
    file = config.out / "config.yaml"
    if file.is_file() and (difference := _difference(load(Pretrain, file), config)):
        raise ValueError(
            f"out = {config.out}: holds a run of another configuration ({difference}); choose another out=..., "
            "or remove it"
        )
    world.barrier()  # everyone has looked
    if world.is_main:
        config.out.mkdir(parents=True, exist_ok=True)
        staged = file.with_suffix(".tmp")
        staged.write_text(dump(config))
        staged.rename(file)
    world.barrier()


# What a resumed run may change: none of it says which samples are trained on, or how.
_FREE = {"out": True, "checkpoint_epochs": True, "keep_checkpoints": True, "compute": True,
         "log": True, "panel_epochs": True, "probe": True,
         "data": {"workers"}, "optim": {"micro_batch"}}  # fmt: skip


def _difference(there: Pretrain, asked: Pretrain) -> str:
    """The first key on which the runs differ, with both values, or nothing."""
    old, new = (dump(config, exclude=_FREE).splitlines() for config in (there, asked))
    pairs = zip(old, new, strict=False)
    changed = next((f"{a.strip()} there, {b.strip()} asked for" for a, b in pairs if a != b), "")
    return changed or ("other keys" if len(old) != len(new) else "")
