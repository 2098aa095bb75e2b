"""Keeps steps whose loss or gradient is not finite from changing the weights, and records them for replay.

Numbers are read one step late, so that the host never waits for the device. The decision is therefore made on the
device: the fused optimiser changes nothing while its `found_inf` is 1. With the policy stop, it stays 1 from the first
such step on, so weights and optimiser still have the state before that step when the host reads the numbers.
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
from kamim.runtime.distributed import World
from kamim.storage.files import write_whole
from kamim.training.run_folder import NONFINITE
from pipelines.batch import Batch

IN_A_ROW = 20  # after this many consecutive skipped steps the weights themselves have diverged


class Diverged(KamimError, FloatingPointError):
    """A loss or a gradient is not finite, which ends the run."""


class NonFinite(Diverged):
    """The run stops before `step`, with the state before that step."""

    def __init__(self, step: int, message: str):
        super().__init__(message)
        self.step = step


class NonFiniteGuard:
    """Guards the updates of a fused optimiser. policy: stop the run, or skip the step's update and continue."""

    def __init__(self, optimizer: Optimizer, policy: Literal["stop", "skip"], run: Path, seed: int, world: World):
        self._optimizer: Any = optimizer
        self._policy = policy
        self._run, self._seed, self._world = run, seed, world
        self._found_inf = torch.zeros((), device=world.device)
        self._skipped = 0  # consecutive steps
        self._recent: deque[tuple[int, int, np.ndarray, Tensor]] = deque()  # step, epoch, indices, loss

    def record(self, batch: Batch, loss: Tensor) -> None:
        """Remembers a micro-batch and its loss until the step after next."""
        self._recent.append((batch.step, batch.epoch, batch.indices, loss))
        while self._recent[0][0] < batch.step - 1:
            self._recent.popleft()

    def suppress_update(self, loss: Tensor, norm: Tensor) -> dict[str, Tensor]:
        """Suppresses the next update if the loss or the norm is not finite.

        With the policy skip, returns the number to log: skipped, 1 or 0.
        """
        bad = (~(loss.isfinite() & norm.isfinite())).float()
        self._found_inf = torch.maximum(self._found_inf, bad) if self._policy == "stop" else bad
        self._optimizer.found_inf = self._found_inf
        return {"skipped": bad} if self._policy == "skip" else {}

    def check_step(self, step: int, values: Mapping[str, float]) -> str | None:
        """Returns None if the numbers are finite; otherwise records the step and returns a message. Call on all ranks.

        Raises NonFinite if the policy is stop, and Diverged after IN_A_ROW consecutive skipped steps.
        """
        name, value = next(((n, values[n]) for n in ("loss", "grad_norm") if not math.isfinite(values[n])), ("", 0.0))
        if not name:
            self._skipped = 0
            return None
        file = self._run / NONFINITE / f"step-{step:08d}.json"
        parts = self._world.gather(
            [
                {"epoch": epoch, "indices": indices.tolist(), "loss": float(loss)}
                for recent, epoch, indices, loss in self._recent
                if recent == step
            ]
        )
        message = f"step {step}: {'the loss' if name == 'loss' else 'the norm of the gradient'} is {value}"
        if self._world.is_main:
            record = {"step": step, "seed": self._seed, **values, "ranks": parts}
            try:
                file.parent.mkdir(exist_ok=True)
                write_whole(file, (json.dumps(_strict(record), indent=2) + "\n").encode())
            except OSError as error:  # a full disk; replay does not need the record
                message += f" (unrecorded: {error})"
        if self._policy == "stop":
            raise NonFinite(
                step, f"{message}; stopped before it, see {file}; `kamim replay {self._run}` shows its samples"
            )
        self._skipped += 1
        if self._skipped == IN_A_ROW:
            raise Diverged(f"{message}, as were {IN_A_ROW - 1} before it; stopped, see {file.parent}")
        return f"{message}; skipped, see {file}"


def _strict(value: Any) -> Any:
    """Returns the value with numbers that are not finite as text, since JSON cannot represent them."""
    if isinstance(value, dict):
        return {key: _strict(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_strict(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
