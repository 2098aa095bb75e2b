"""What every training loop shares: optimiser steps, metrics, checkpoints, resuming, stopping when asked.

A loop is a model, an optimiser and a generator of gradients; what a step's loss is, only the generator knows.
"""

import json
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from kamim import checkpoint, schedule
from kamim.batch import Batch
from kamim.config import Compute, Optim
from kamim.distributed import World
from kamim.nonfinite import Guard, NonFinite
from kamim.store import write_whole

log = logging.getLogger(__name__)
Batches = Callable[[int, int], Iterable[Batch]]  # steps first .. stop - 1, on the device
Progress = Callable[[int, int, dict[str, float]], None]  # steps done, steps in all, newest metrics
# Steps first .. stop - 1: leaves a step's gradients in place, then yields it and what to log, "loss" at least.
Steps = Iterator[tuple[int, dict[str, Tensor]]]
Gradients = Callable[[int, int], Steps]


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

    def saves_at(self, step: int) -> bool:
        """Whether there is to be a checkpoint after so many steps."""
        return step % self.every == 0 or (self.keep.every is not None and step % self.keep.every == 0)


@dataclass(frozen=True)
class Outcome:
    """Where a run ended. finished is false where a signal asked it to stop; it can then be resumed."""

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
    step = first

    def save(step: int, last: bool) -> None:
        try:
            metrics.make_durable()  # a checkpoint stands on the lines before it
            if world.is_main:
                checkpoint.save(run.out, step, run.kind, run.config, model, optimizer, run.keep)
        except OSError as error:
            if last:
                raise
            _note(run.out, f"step {step}: no checkpoint, the run goes on: {error}")
        world.barrier()

    with (
        _stop_asked() as stopped,
        _Metrics(run.out, first, world, _refuse if guard is None else guard.check) as metrics,
    ):
        try:
            for step, values in gradients(first, total):
                scheduler.step_update(step)
                values = {**values, **update(model, optimizer, run.optim.clip_grad, values["loss"], guard)}
                after_step()
                rate = scheduler.optimizer.param_groups[-1]["lr"]  # of the last layer, where layers differ
                metrics.add(step, rate, run.optim.batch_size, values)
                step += 1
                progress(step, total, metrics.newest)
                stop = world.any(stopped())  # one answer for all ranks, or some would wait for the others for ever
                if run.saves_at(step) or step == total or stop:
                    metrics.flush()
                    save(step, last=step == total or stop)
                if stop:
                    break
        except NonFinite as error:
            if error.step not in checkpoint.saved(run.out):
                save(error.step, last=False)
            raise
    return Outcome(step, step == total)


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


def update(
    model: nn.Module, optimizer: torch.optim.Optimizer, clip_grad: float | None, loss: Tensor, guard: Guard | None
) -> dict[str, Tensor]:
    """One optimiser step with the gradients that are there; returns what to log of it."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip_grad or math.inf)
    skipped = {} if guard is None else guard.gate(loss, norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"grad_norm": norm, **skipped}


def _refuse(step: int, values: dict[str, float]) -> None:
    for name, value in (("loss", values["loss"]), ("gradient's norm", values["grad_norm"])):
        if not math.isfinite(value):
            raise FloatingPointError(f"step {step}: the {name} is {value}; the newest checkpoint is sound")


def _note(run: Path, line: str) -> None:
    """A line on stderr, and in RUN/log.txt where there is room for it."""
    log.warning(line)
    with suppress(OSError), (run / "log.txt").open("a") as file:
        file.write(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {line}\n")


@contextmanager
def _stop_asked() -> Iterator[Callable[[], bool]]:
    """SIGINT, SIGTERM and SIGUSR1, inside the block, only set a flag: the step ends, the state is saved."""
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt  # asked twice: at once
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Metrics:
    """metrics.jsonl, one line per step. Reads a step's numbers when the next one has been queued.

    check(step, numbers): raises for what must stop the run, or returns what there is to say. A line that finds no room
    on the disk waits for the next.
    """

    def __init__(self, run: Path, first: int, world: World, check: Callable[[int, dict[str, float]], str | None]):
        self.newest: dict[str, float] = {}
        self._run, self._world, self._check = run, world, check
        self._waiting: tuple[int, float, dict[str, Tensor]] | None = None
        self._clock = time.perf_counter()
        self._file = run / "metrics.jsonl"
        self._unwritten = b""
        if world.is_main:
            write_whole(self._file, b"".join(_lines_before(self._file, first)))

    def __enter__(self) -> "_Metrics":
        self._stream = self._file.open("ab", buffering=0) if self._world.is_main else None
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._stream.close()

    def add(self, step: int, lr: float, samples: int, values: dict[str, Tensor]) -> None:
        """Takes one step's numbers; writes those of the step before."""
        self.flush()
        now = time.perf_counter()
        rate = samples / (now - self._clock)
        self._clock = now
        self._waiting = (step, lr, {**values, "images_per_second": torch.tensor(rate)})

    def flush(self) -> None:
        """Writes what is waiting. Raises what check does."""
        if self._waiting is None:
            return
        step, lr, tensors = self._waiting
        self._waiting = None
        self.newest = {"step": step, "lr": lr, **{name: round(float(v), 6) for name, v in tensors.items()}}
        said = self._check(step, self.newest)
        if self._stream is None:
            return
        if said is not None:
            _note(self._run, said)
        line = {name: value if math.isfinite(value) else None for name, value in self.newest.items()}
        late = bool(self._unwritten)
        self._unwritten += json.dumps(line).encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            if not late:
                _note(self._run, f"step {step}: {self._file.name} is behind, the run goes on: {error}")

    def make_durable(self) -> None:
        """Raises OSError where a line cannot be written."""
        if self._stream is not None:
            self._write()
            os.fsync(self._stream.fileno())

    def _write(self) -> None:
        assert self._stream is not None
        while self._unwritten:
            self._unwritten = self._unwritten[self._stream.write(self._unwritten) :]


def _lines_before(file: Path, first: int) -> Iterator[bytes]:
    """Lines of the steps before `first`; after them, a machine that went down may have left anything."""
    for line in file.read_bytes().splitlines(keepends=True) if file.exists() else ():
        try:
            if not line.endswith(b"\n") or json.loads(line)["step"] >= first:
                return
        except (ValueError, KeyError, TypeError):
            return
        yield line
