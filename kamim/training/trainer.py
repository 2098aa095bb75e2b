"""The training loop. Pretraining, probes and fine-tuning use it; only their objectives differ.

for step in range(first, total):
    for batch in the step's micro-batches:
        loss = objective(batch)                # Eq. 1, Eq. 3, or a classifier's cross entropy
        (loss * batch.loss_weight).backward()
    clip; optimiser; schedule; metrics; callbacks; checkpoint; stop
"""

import math
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from kamim import KamimError
from kamim.config.pretrain import Log, Optim
from kamim.runtime.distributed import World
from kamim.storage.log_file import write_line
from kamim.training import checkpoint, schedule, starts
from kamim.training.metrics import Metrics, TimedBatches, check_finite, sinks, warn
from kamim.training.nonfinite import NonFinite, NonFiniteGuard
from kamim.training.run_folder import LOG
from pipelines.batch import Batch

Batches = Callable[[int, int], Iterable[Batch]]  # (first, stop): the micro-batches of these steps, on the device
Progress = Callable[[int, int, Mapping[str, float]], None]  # (steps done, steps in all, newest metrics)


@dataclass(frozen=True)
class Losses:
    """The losses of a micro-batch: scalars on the device.

    loss: the mean over the micro-batch's samples, which is minimised. means: logged as means over the step's samples.
    largest: logged as maxima over them.
    """

    loss: Tensor
    means: Mapping[str, Tensor] = field(default_factory=dict)
    largest: Mapping[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """The function to minimise."""

    def __call__(self, batch: Batch) -> Losses:
        """Returns the losses of a micro-batch of one sample or more."""
        ...


@dataclass(frozen=True)
class Callback:
    """A function run(steps done, metrics) that the first process calls every `every` steps and after the last.

    It must not change the model, its gradients or its mode.
    """

    every: int
    run: Callable[[int, Metrics], None]


@dataclass(frozen=True)
class Run:
    """The folder, schedule and checkpoints of a training run.

    kind and config are written to every checkpoint. every: steps between two checkpoints.
    """

    out: Path
    kind: checkpoint.Kind
    config: Mapping[str, Any]
    optim: Optim
    steps_per_epoch: int
    every: int
    keep: checkpoint.Keep
    log: Log = field(default_factory=Log)

    def saves_at(self, step: int) -> bool:
        """Returns whether a checkpoint is due after `step` steps."""
        return step % self.every == 0 or (self.keep.every is not None and step % self.keep.every == 0)


@dataclass(frozen=True)
class Outcome:
    """The steps of a call of fit: first .. step - 1. If finished is False, the run can be resumed."""

    first: int
    step: int
    finished: bool


@dataclass
class Trainer:
    """Trains `model` on `batches` for the steps of `run`.

    model: the module in checkpoints. forward_model: the module that the objective calls: the model, or DDP around (a
    part of) it. guard: the policy for steps that are not finite; None raises Diverged. after_update: called after every
    update of the weights, for moving averages.
    """

    run: Run
    model: nn.Module
    forward_model: nn.Module
    optimizer: Optimizer
    objective: Objective
    batches: Batches
    world: World
    callbacks: Sequence[Callback] = ()
    guard: NonFiniteGuard | None = None
    after_update: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.scheduler: CosineLRScheduler = schedule.cosine(self.optimizer, self.run.optim, self.run.steps_per_epoch)

    def fit(self, progress: Progress) -> Outcome:
        """Trains from the newest checkpoint in run.out, or from the current weights, to the last step.

        On SIGINT, SIGTERM or SIGUSR1 it stops after the current step, with a checkpoint. If a checkpoint cannot be
        written (a full disk), it logs a warning and continues. Raises OSError if the last checkpoint cannot be written,
        and Diverged if a step is not finite; with a guard that is NonFinite, after saving the state before that step.
        """
        run, world = self.run, self.world
        total, _, _ = run.optim.schedule(run.steps_per_epoch)
        first = done = self.resume(log=True)
        if world.is_main:
            checkpoint.tidy(run.out, first, run.keep)
        if first == total:
            return Outcome(first, first, True)
        if first > total:
            raise KamimError(f"{run.out}: its newest checkpoint is of step {first}, but the run has {total} steps")
        if world.is_main:
            starts.log(run.out, first, total, world)
        logs = sinks(run.out, first, run.log, run.config) if world.is_main else ()
        with stop_requested() as stop, Metrics(logs, self._check) as metrics, self._saved_if_not_finite(metrics):
            batches = TimedBatches(self.batches(first, total))
            for step, micro_batches in by_step(batches):
                logged = self.train_step(step, micro_batches)
                metrics.add(step, self._rate(), {**logged, "data_wait": batches.pop_seconds()})
                done = step + 1
                progress(done, total, metrics.newest)
                last = done == total or world.any(stop())  # one answer for all ranks: none may wait for the others
                self._call_back(done, total, metrics)
                if last or run.saves_at(done):
                    self._save(done, metrics, last)
                    world.barrier()
                    metrics.restart()
                if last:
                    break
        return Outcome(first, done, done == total)

    def train_step(self, step: int, micro_batches: Iterable[Batch]) -> dict[str, Tensor | float]:
        """Does one optimiser step on the step's micro-batches of this rank. Returns the numbers to log."""
        self.scheduler.step_update(step)
        self.forward_model.train()
        numbers = StepMetrics(self.world)
        for batch in micro_batches:
            trained = batch if len(batch) else batch.stand_in()  # a rank without samples takes part in collectives
            with self._gradients_averaged(batch.last):
                losses = self.objective(trained)
                (losses.loss * (trained.loss_weight * self.world.size)).backward()  # DDP averages over the ranks
            numbers.add(len(batch), trained.loss_weight, losses)
            if self.guard is not None:
                self.guard.record(batch, losses.loss.detach())
        logged = numbers.over_ranks()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.run.optim.clip_grad or math.inf)
        if self.run.optim.clip_grad is not None:
            logged["clipped"] = (norm > self.run.optim.clip_grad).float()
        if self.guard is not None:
            logged |= self.guard.suppress_update(logged["loss"], norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.after_update()
        return {**logged, "grad_norm": norm}

    def resume(self, at_most: int | None = None, log: bool = False) -> int:
        """Restores the newest undamaged checkpoint (of at most `at_most` steps), if any. Returns the steps done.

        log: whether the log of run.out is to name newer, damaged ones. The first process chooses for all, since they
        may not see the same files.
        """
        out, world = self.run.out, self.world
        newest = checkpoint.latest(out, at_most) if world.is_main else None
        for line in newest.damaged if newest is not None and log else ():
            write_line(out / LOG, line)
        step = torch.tensor(-1 if newest is None else newest.step, device=world.device)
        world.broadcast(step)
        if step < 0:
            return 0
        checkpoint.restore(newest or checkpoint.at(out, int(step)), self.model, self.optimizer)
        world.barrier()  # before the first process removes any
        return int(step)

    def _gradients_averaged(self, last: bool) -> AbstractContextManager[None]:
        """Averages gradients over the ranks in the context's backward pass if it is the step's last micro-batch."""
        return nullcontext() if last or self.world.size == 1 else self.forward_model.no_sync()  # type: ignore[operator]

    def _rate(self) -> float:
        """Returns the learning rate, of the last layer if layers differ."""
        return float(self.optimizer.param_groups[-1]["lr"])

    def _check(self, step: int, values: Mapping[str, float]) -> None:
        if self.guard is None:
            check_finite(step, values)
        elif (line := self.guard.check_step(step, values)) and self.world.is_main:
            warn(self.run.out, line)

    def _call_back(self, done: int, total: int, metrics: Metrics) -> None:
        for callback in self.callbacks if self.world.is_main else ():
            if done % callback.every == 0 or done == total:
                callback.run(done, metrics)
                metrics.restart()

    def _save(self, step: int, metrics: Metrics, last: bool) -> None:
        """Saves a checkpoint, after making the metrics of its steps durable."""
        run = self.run
        try:
            metrics.flush()
            if self.world.is_main:
                checkpoint.save(run.out, step, run.kind, run.config, self.model, self.optimizer, run.keep)
        except OSError as error:
            if last:
                raise
            warn(run.out, f"step {step}: no checkpoint, the run continues: {error}")

    @contextmanager
    def _saved_if_not_finite(self, metrics: Metrics) -> Iterator[None]:
        """Saves the state before a step that is not finite, which the guard has kept, when that step ends the run."""
        try:
            yield
        except NonFinite as error:
            if self.world.is_main and error.step not in checkpoint.saved(self.run.out):
                self._save(error.step, metrics, last=False)
            self.world.barrier()  # otherwise the exit of the other ranks would end the first one
            raise


class StepMetrics:
    """Sums over the micro-batches of a step."""

    def __init__(self, world: World):
        self._world = world
        self._samples = 0
        self._means: dict[str, Tensor] = {}
        self._largest: dict[str, Tensor] = {}

    def add(self, samples: int, share: float, losses: Losses) -> None:
        """Adds a micro-batch. share: its share of the step's samples on all ranks."""
        self._samples += samples
        for name, value in {"loss": losses.loss, **losses.means}.items():
            part = value.detach() * share
            self._means[name] = self._means[name] + part if name in self._means else part
        for name, value in losses.largest.items():
            self._largest[name] = torch.maximum(self._largest[name], value) if name in self._largest else value

    def over_ranks(self) -> dict[str, Tensor]:
        """Returns the numbers to log, over all ranks: samples, loss and the objective's other numbers."""
        samples = torch.tensor(float(self._samples), device=self._world.device)
        sums = self._world.sum(torch.stack([samples, *self._means.values()]))
        logged = dict(zip(("samples", *self._means), sums, strict=True))
        return logged | {name: self._world.largest(value) for name, value in self._largest.items()}


def by_step(batches: Iterable[Batch]) -> Iterator[tuple[int, Iterator[Batch]]]:
    """Yields (step, its micro-batches) in order, without requesting batches of the next step ahead."""
    batches = iter(batches)

    def until_last(batch: Batch) -> Iterator[Batch]:
        yield batch
        while not batch.last:
            batch = next(batches)
            yield batch

    for batch in batches:
        yield batch.step, until_last(batch)


@contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """In the context, SIGINT, SIGTERM and SIGUSR1 only set a flag, which the yielded function returns.

    A second SIGINT, sent by a person, raises KeyboardInterrupt at once. A repeated SIGTERM or SIGUSR1 does not: batch
    systems and torchrun may send a signal twice.
    """
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
