"""The pretraining loop. It takes any iterable of Batch and knows nothing of where batches come from."""

import json
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kamim import checkpoint, rng, schedule
from kamim.batch import Batch, normalise
from kamim.config import Compute, Pretrain, dump, load
from kamim.distributed import World
from kamim.masking import block_masks
from kamim.models import MaskedImageModel
from kamim.objective import masked_l1
from kamim.weighting import counts_to_weights

Batches = Callable[[int, int], Iterable[Batch]]  # steps first .. stop - 1, on the device
Progress = Callable[[int, int, dict[str, float]], None]  # steps done, steps in all, newest metrics


@dataclass(frozen=True)
class Outcome:
    """Where a run ended. finished is false where a signal asked it to stop; it can then be resumed."""

    step: int
    finished: bool
    model: MaskedImageModel


def autocast(compute: Compute, device: torch.device) -> AbstractContextManager[None]:
    """bf16 autocast, or nothing."""
    precision = ("bf16" if device.type == "cuda" else "fp32") if compute.precision == "auto" else compute.precision
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def should_compile(compute: Compute, device: torch.device) -> bool:
    """Whether to torch.compile on this device."""
    return device.type == "cuda" if compute.compile == "auto" else compute.compile


def pretrain(config: Pretrain, batches: Batches, steps_per_epoch: int, world: World, progress: Progress) -> Outcome:
    """Trains from the newest checkpoint in config.out, or from random weights, to the last epoch.

    Raises ValueError where config.out holds a run of another configuration, FloatingPointError for a loss
    that is not finite.
    """
    torch.manual_seed(config.seed)
    model = MaskedImageModel(config.model.name, config.data.resolution, config.model.drop_path).to(world.device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.optim.lr, betas=config.optim.betas, weight_decay=config.optim.weight_decay,
        fused=True,
    )  # fmt: skip
    scheduler = schedule.cosine(optimizer, config.optim, steps_per_epoch)
    first = _resume(config, model, optimizer, world)
    network: nn.Module = DistributedDataParallel(model) if world.size > 1 else model
    if should_compile(config.compute, world.device):
        network.compile()
    total = config.optim.epochs * steps_per_epoch
    every = config.checkpoint_epochs * steps_per_epoch
    step = first
    with _stop_asked() as stopped, _Metrics(config.out, first, world) as metrics:
        for step, loss, parts in _steps(config, network, batches(first, total), world):
            scheduler.step_update(step)
            norm = _update(model, optimizer, config.optim.clip_grad)
            metrics.add(step, loss, norm, scheduler.optimizer.param_groups[0]["lr"], config.optim.batch_size, parts)
            step += 1
            progress(step, total, metrics.newest)
            stop = world.any(stopped())  # one answer for all ranks, or some would wait for the others for ever
            if step % every == 0 or step == total or stop:
                metrics.flush()
                if world.is_main:
                    checkpoint.save(config.out, step, config, model, optimizer, config.keep_checkpoints)
                world.barrier()
            if stop:
                break
    return Outcome(step, step == total, model)


def _steps(
    config: Pretrain, network: nn.Module, batches: Iterable[Batch], world: World
) -> Iterator[tuple[int, Tensor, dict[str, Tensor]]]:
    """Gradients of one optimiser step at a time: yields (step, its loss, mean and largest W), over all ranks."""
    network.train()
    sums = torch.zeros(2, device=world.device)  # of loss and of mean W
    largest = torch.zeros((), device=world.device)
    step = -1
    for batch in batches:
        if batch.step != step:  # what draws inside the model (stochastic depth) is a function of the step
            step = batch.step
            torch.manual_seed(rng.step_seed(config.seed, step, world.rank))
        synchronise = nullcontext() if batch.last or world.size == 1 else network.no_sync()  # type: ignore[operator]
        with synchronise:
            loss, weights = batch_loss(config, network, batch, world.device)
            (loss * (batch.share * world.size)).backward()  # DDP averages over ranks
        sums[0] += loss.detach() * batch.share
        if weights is not None:
            sums[1] += weights.mean() * batch.share
            largest = torch.maximum(largest, weights.max())
        if batch.last:
            total = world.sum(sums.clone())
            parts = {"weight_mean": total[1], "weight_max": world.largest(largest)} if weights is not None else {}
            yield batch.step, total[0], parts
            sums.zero_()
            largest = torch.zeros_like(largest)


def batch_loss(
    config: Pretrain, network: nn.Module, batch: Batch, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Eq. 1 or Eq. 3 of one batch, and the weights W [B, c, c] if there are any."""
    grid = config.data.resolution // config.mask.patch_size
    mask = torch.from_numpy(block_masks(config.seed, batch.epoch, batch.indices, grid, config.mask.ratio)).to(device)
    weights = None
    if config.weighting is not None:
        assert batch.counts is not None, "KAMIM needs keypoint counts"
        weights = counts_to_weights(batch.counts, config.weighting.patch_size, config.weighting.temperature)
    images = normalise(batch.images)
    with autocast(config.compute, device):
        reconstruction = network(images, mask)
    return masked_l1(images, reconstruction, mask, weights), weights


def _update(model: nn.Module, optimizer: torch.optim.Optimizer, clip_grad: float | None) -> Tensor:
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip_grad or math.inf)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def _resume(config: Pretrain, model: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> int:
    """Loads the newest checkpoint, if any; claims the run directory. Returns the first step to do."""
    file = config.out / "config.yaml"
    if file.is_file() and (difference := _difference(load(Pretrain, file), config)):
        raise ValueError(
            f"out = {config.out}: holds a run of another configuration ({difference}); choose another out=..., "
            "or remove it"
        )
    found = checkpoint.latest(config.out)
    world.barrier()  # everyone has looked
    if world.is_main:
        config.out.mkdir(parents=True, exist_ok=True)
        staged = file.with_suffix(".tmp")
        staged.write_text(dump(config))
        staged.rename(file)
    world.barrier()
    if found is None:
        return 0
    checkpoint.restore(found, model, optimizer)
    return found.step


# What a resumed run may change: none of it says which samples are trained on, or how.
_FREE = {"out": True, "checkpoint_epochs": True, "keep_checkpoints": True, "compute": True,
         "data": {"workers"}, "optim": {"micro_batch"}}  # fmt: skip


def _difference(there: Pretrain, asked: Pretrain) -> str:
    """The first key on which the runs differ, with both values, or nothing."""
    old, new = (dump(config, exclude=_FREE).splitlines() for config in (there, asked))
    pairs = zip(old, new, strict=False)
    changed = next((f"{a.strip()} there, {b.strip()} asked for" for a, b in pairs if a != b), "")
    return changed or ("other keys" if len(old) != len(new) else "")


@contextmanager
def _stop_asked() -> Iterator[Callable[[], bool]]:
    """SIGINT and SIGTERM, inside the block, only set a flag: the step ends, the state is saved."""
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt  # asked twice: at once
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Metrics:
    """metrics.jsonl, one line per step. Reads a step's numbers when the next one has been queued."""

    def __init__(self, run: Path, first: int, world: World):
        self.newest: dict[str, float] = {}
        self._world = world
        self._waiting: tuple[int, float, dict[str, Tensor]] | None = None
        self._clock = time.perf_counter()
        self._file = run / "metrics.jsonl"
        if world.is_main:
            lines = self._file.read_text().splitlines(keepends=True) if self._file.exists() else []
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < first]
            self._file.write_text("".join(kept))

    def __enter__(self) -> "_Metrics":
        self._stream = self._file.open("a") if self._world.is_main else None
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._stream.close()

    def add(
        self, step: int, loss: Tensor, norm: Tensor, lr: float, samples: int, parts: dict[str, Tensor]
    ) -> None:  # fmt: skip
        """Takes one step's numbers; writes those of the step before."""
        self.flush()
        now = time.perf_counter()
        rate = samples / (now - self._clock)
        self._clock = now
        values = {"loss": loss, "grad_norm": norm, **parts}
        self._waiting = (step, lr, {**values, "images_per_second": torch.tensor(rate)})

    def flush(self) -> None:
        """Writes what is waiting. Raises FloatingPointError for a loss that is not finite."""
        if self._waiting is None:
            return
        step, lr, tensors = self._waiting
        self._waiting = None
        self.newest = {"step": step, "lr": lr, **{name: round(float(v), 6) for name, v in tensors.items()}}
        for name, value in (("loss", self.newest["loss"]), ("gradient's norm", self.newest["grad_norm"])):
            if not math.isfinite(value):
                raise FloatingPointError(f"step {step}: the {name} is {value}; the newest checkpoint is sound")
        if self._stream is not None:
            self._stream.write(json.dumps(self.newest) + "\n")
            self._stream.flush()
