"""What every training loop shares: optimiser steps, metrics, checkpoints, resuming, stopping when asked.

A loop is a model, an optimiser and a generator of gradients; what a step's loss is, only the generator knows.
"""

import math
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from kamim.training import checkpoint, machine, schedule
from kamim.training.config import Compute, Log, Optim
from kamim.training.distributed import World
from kamim.training.metrics import Metrics, refuse, sinks, warn
from kamim.training.nonfinite import Guard, NonFinite
from pipelines.batch import Batch

Batches = Callable[[int, int], Iterable[Batch]]  # steps first .. stop - 1, on the device
Progress = Callable[[int, int, dict[str, float]], None]  # steps done, steps in all, newest metrics
# Steps first .. stop - 1: leaves a step's gradients in place, then yields it and what to log: "loss" at least, and
# "samples" where steps differ in them.
Steps = Iterator[tuple[int, dict[str, Tensor | float]]]
Gradients = Callable[[int, int], Steps]


@dataclass(frozen=True)
class Observer:
    """What looks at a run every so many steps, and at its last: look(steps done, where to say what it saw).

    It runs in the first process alone, and must leave the model, its gradients and its mode as they were.
    """

    every: int
    look: Callable[[int, Metrics], None]


@dataclass(frozen=True)
class Run:
    """Where a loop keeps its state, and for how long it runs.

    kind and config say in every checkpoint what was trained, and how; every: steps between two checkpoints.
    """

    out: Path
    kind: checkpoint.Kind
    config: Mapping[str, Any]
    optim: Optim
    steps_per_epoch: int
    every: int
    keep: checkpoint.Keep
    log: Log = field(default_factory=Log)
    observers: Sequence[Observer] = ()

    def saves_at(self, step: int) -> bool:
        """Whether there is to be a checkpoint after so many steps."""
        return step % self.every == 0 or (self.keep.every is not None and step % self.keep.every == 0)


@dataclass(frozen=True)
class Outcome:
    """From which step to which a run went. finished is false where a signal stopped it; it can then be resumed."""

    first: int
    step: int
    finished: bool


def train(
    run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, gradients: Gradients, world: World,
    progress: Progress, after_step: Callable[[], None] = lambda: None, guard: Guard | None = None,
) -> Outcome:  # fmt: skip
    """Trains from the newest checkpoint in run.out, or from the model as it is, to the last epoch.

    A checkpoint that cannot be written (a full disk) is left out; only the last one's absence is an error, OSError.
    Raises FloatingPointError for a loss that is not finite; with a guard NonFinite, the state of before it saved, or
    the step is skipped.
    """
    scheduler = schedule.cosine(optimizer, run.optim, run.steps_per_epoch)
    first = resume(run.out, model, optimizer, world)
    if world.is_main:
        checkpoint.tidy(run.out, first, run.keep)
    total, _, _ = run.optim.schedule(run.steps_per_epoch)
    if first == total:
        return Outcome(first, first, True)
    if first > total:
        raise ValueError(f"{run.out}: its newest checkpoint is of step {first}, but the run has {total} steps")
    if world.is_main:
        machine.note_start(run.out, first, total, world)
    step = first

    def check(step: int, values: Mapping[str, float]) -> None:
        if guard is None:
            refuse(step, values)
        elif (said := guard.check(step, values)) and world.is_main:
            warn(run.out, said)

    def save(step: int, last: bool) -> None:
        try:
            metrics.flush()  # a checkpoint stands on the lines before it
            if world.is_main:
                checkpoint.save(run.out, step, run.kind, run.config, model, optimizer, run.keep)
        except OSError as error:
            if last:
                raise
            warn(run.out, f"step {step}: no checkpoint, the run goes on: {error}")

    said = sinks(run.out, first, run.log, run.config) if world.is_main else ()
    with _stop_asked() as stopped, Metrics(said, check) as metrics:
        try:
            for step, values in gradients(first, total):
                scheduler.step_update(step)
                updated = update(model, optimizer, run.optim.clip_grad, values["loss"], guard)
                after_step()
                rate = scheduler.optimizer.param_groups[-1]["lr"]  # of the last layer, where layers differ
                metrics.add(step, rate, {"samples": run.optim.batch_size, **values, **updated})
                step += 1
                progress(step, total, metrics.newest)
                stop = world.any(stopped())  # one answer for all ranks, or some would wait for the others for ever
                if world.is_main:
                    _observe(run.observers, step, total, metrics)
                if run.saves_at(step) or step == total or stop:
                    save(step, last=step == total or stop)
                    world.barrier()
                    metrics.restart()
                if stop:
                    break
        except NonFinite as error:
            if world.is_main and error.step not in checkpoint.saved(run.out):
                save(error.step, last=False)
            world.barrier()  # or the others' end would be the first's, too
            raise
    return Outcome(first, step, step == total)


def resume(run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, world: World, most: int | None = None) -> int:
    """Restores the newest whole checkpoint (of at most `most` steps), if there is one: how many steps are done.

    The first process chooses for all, who may not see the same files.
    """
    found = checkpoint.latest(run, most) if world.is_main else None
    step = torch.tensor(-1 if found is None else found.step, device=world.device)
    world.share(step)
    if step < 0:
        return 0
    checkpoint.restore(found or checkpoint.at(run, int(step)), model, optimizer)
    world.barrier()  # before the first process drops any
    return int(step)


def autocast(compute: Compute, device: torch.device) -> AbstractContextManager[None]:
    """bf16 autocast, or nothing. Raises ValueError where bf16 is asked for on a GPU that has none."""
    lacks = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    if lacks and compute.precision == "bf16":
        raise ValueError("compute.precision = 'bf16': this GPU does not compute in bf16; use compute.precision=fp32")
    auto = "bf16" if device.type == "cuda" and not lacks else "fp32"
    precision = auto if compute.precision == "auto" else compute.precision
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def should_compile(compute: Compute, device: torch.device) -> bool:
    """Whether to torch.compile on this device."""
    return device.type == "cuda" if compute.compile == "auto" else compute.compile


def synchronised(network: nn.Module, batch: Batch, world: World) -> AbstractContextManager[None]:
    """Inside, a backward pass adds up gradients over ranks only where `batch` ends its step."""
    return nullcontext() if batch.last or world.size == 1 else network.no_sync()  # type: ignore[operator]


def _observe(observers: Sequence[Observer], step: int, total: int, metrics: Metrics) -> None:
    for observer in observers:
        if step % observer.every == 0 or step == total:
            observer.look(step, metrics)
            metrics.restart()


def update(
    model: nn.Module, optimizer: torch.optim.Optimizer, clip_grad: float | None, loss: Tensor | float,
    guard: Guard | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """An optimiser step with the gradients there are, clipped; drops them and returns what to log of it."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip_grad or math.inf)
    skipped = {} if guard is None else guard.gate(torch.as_tensor(loss), norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"grad_norm": norm, **skipped}


@contextmanager
def _stop_asked() -> Iterator[Callable[[], bool]]:
    """SIGINT, SIGTERM and SIGUSR1, inside the block, only set a flag: the step ends, the state is saved.

    A second SIGINT, which a person sends, ends it at once; batch systems and torchrun may say the same thing twice.
    """
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
