"""A step whose loss or gradient is not finite never reaches the weights, and leaves what it takes to replay it.

Numbers are read one step late, so that nobody waits for the device. So it is the device that decides: the fused
optimiser leaves everything as it is where its `found_inf` is 1. To stop, that stays 1 from the first such step on: when
the host hears of it, weights and optimiser are still what they were before it.
"""

import json
import math
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from kamim import KamimError
from kamim.storage.store import write_whole
from kamim.training.distributed import World
from pipelines.batch import Batch

FOLDER = "nonfinite"  # of a run
IN_A_ROW = 20  # so many steps skipped one after the other mean that the weights themselves are beyond help


class Diverged(KamimError, FloatingPointError):
    """A loss or a gradient is not finite, and the run ends."""


class NonFinite(Diverged):
    """The run stops before `step`, in the state of before it."""

    def __init__(self, step: int, message: str):
        super().__init__(message)
        self.step = step


class NonFiniteGuard:
    """Of a fused optimiser. policy: stop, or skip the step's update and go on."""

    def __init__(self, optimizer: Optimizer, policy: Literal["stop", "skip"], run: Path, seed: int, world: World):
        self._optimizer: Any = optimizer
        self._policy = policy
        self._run, self._seed, self._world = run, seed, world
        self._held = torch.zeros((), device=world.device)
        self._skipped = 0  # in a row
        self._seen: deque[tuple[int, int, np.ndarray, Tensor]] = deque()  # step, epoch, indices, loss

    def see(self, batch: Batch, loss: Tensor) -> None:
        """Remembers a micro-batch and its loss until the step after next."""
        self._seen.append((batch.step, batch.epoch, batch.indices, loss))
        while self._seen[0][0] < batch.step - 1:
            self._seen.popleft()

    def gate(self, loss: Tensor, norm: Tensor) -> dict[str, Tensor]:
        """Before an update: lets it through, or not. What to log of it where the run goes on: 1 where not, else 0."""
        bad = (~(loss.isfinite() & norm.isfinite())).float()
        self._held = torch.maximum(self._held, bad) if self._policy == "stop" else bad
        self._optimizer.found_inf = self._held
        return {"skipped": bad} if self._policy == "skip" else {}

    def check(self, step: int, values: Mapping[str, float]) -> str | None:
        """On all ranks: None for finite numbers; else records the step and returns what there is to say.

        Raises NonFinite where the run is to stop, FloatingPointError where it has skipped IN_A_ROW steps in a row.
        """
        name, value = next(((n, values[n]) for n in ("loss", "grad_norm") if not math.isfinite(values[n])), ("", 0.0))
        if not name:
            self._skipped = 0
            return None
        file = self._run / FOLDER / f"step-{step:08d}.json"
        parts = self._world.gather([
            {"epoch": epoch, "indices": indices.tolist(), "loss": float(loss)}
            for seen, epoch, indices, loss in self._seen if seen == step
        ])  # fmt: skip
        said = f"step {step}: {'the loss' if name == 'loss' else 'the norm of the gradient'} is {value}"
        if self._world.is_main:
            record = {"step": step, "seed": self._seed, **values, "ranks": parts}
            try:
                file.parent.mkdir(exist_ok=True)
                write_whole(file, (json.dumps(_strict(record), indent=2) + "\n").encode())
            except OSError as error:  # a full disk; the step can be replayed without
                said += f" (unrecorded: {error})"
        if self._policy == "stop":
            raise NonFinite(
                step, f"{said}; stopped before it, see {file}; `kamim replay {self._run}` shows its samples"
            )
        self._skipped += 1
        if self._skipped == IN_A_ROW:
            raise Diverged(f"{said}, as were {IN_A_ROW - 1} before it; no use to go on, see {file.parent}")
        return f"{said}; skipped, see {file}"


def recorded(run: Path) -> dict[int, int]:
    """Steps of a run that were not finite, ascending, and how many ranks each had. Raises ValueError for no record."""
    return dict(map(_recorded, sorted((run / FOLDER).glob("step-*.json"))))


def _recorded(file: Path) -> tuple[int, int]:
    try:
        return int(file.stem.removeprefix("step-")), len(json.loads(file.read_bytes())["ranks"])
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise KamimError(f"{file}: not the record of a step that was not finite; remove it") from error


def _strict(value: Any) -> Any:
    """JSON has no word for what is not finite: text instead."""
    if isinstance(value, dict):
        return {key: _strict(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_strict(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
