"""What a run says while it goes: metrics.jsonl and TensorBoard always, Weights & Biases where asked for.

RUN/metrics.jsonl   one line per optimiser step
RUN/panels/         pictures, as step-<steps done>.png
RUN/tensorboard/    the same numbers and pictures
"""

import importlib.util
import json
import math
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kamim.config import Log

Values = Mapping[str, float]
T = TypeVar("T")


class Sink(Protocol):
    """Where numbers and pictures go. A step comes once, steps come in order."""

    def numbers(self, step: int, values: Values) -> None:
        """Of one step."""

    def panel(self, step: int, rgb: np.ndarray) -> None:
        """A picture, uint8 [H, W, 3]."""

    def flush(self) -> None:
        """Makes what came so far outlive this process."""

    def close(self) -> None:
        """After the last step."""


class Files:
    """metrics.jsonl and panels/. Lines of steps from `first` on, of a run that got further before, are dropped."""

    def __init__(self, run: Path, first: int):
        self._panels = run / "panels"
        file = run / "metrics.jsonl"
        kept = [json.dumps(line) + "\n" for line in read(run) if line["step"] < first]
        staged = file.with_suffix(".tmp")
        staged.write_text("".join(kept))
        staged.rename(file)
        self._stream = file.open("a")

    def numbers(self, step: int, values: Values) -> None:
        """See Sink."""
        self._stream.write(json.dumps({"step": step, **values}) + "\n")
        self._stream.flush()

    def panel(self, step: int, rgb: np.ndarray) -> None:
        """See Sink."""
        self._panels.mkdir(exist_ok=True)
        Image.fromarray(rgb).save(self._panels / f"step-{step:08d}.png")

    def flush(self) -> None:
        """See Sink."""
        self._stream.flush()

    def close(self) -> None:
        """See Sink."""
        self._stream.close()


class TensorBoard:
    """Event files. TensorBoard leaves out what a run before this one said of steps from `first` on."""

    def __init__(self, run: Path, first: int):
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=first)

    def numbers(self, step: int, values: Values) -> None:
        """See Sink."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def panel(self, step: int, rgb: np.ndarray) -> None:
        """See Sink."""
        self._writer.add_image("panel", rgb, step, dataformats="HWC")

    def flush(self) -> None:
        """See Sink."""
        self._writer.flush()

    def close(self) -> None:
        """See Sink."""
        self._writer.close()


class Wandb:
    """Weights & Biases, which ignores steps that it has. RUN/wandb-id tells it that a resumed run is the same one."""

    def __init__(self, run: Path, project: str, config: Mapping[str, Any]):
        import wandb

        file = run / "wandb-id"
        if not file.exists():
            file.write_text(secrets.token_hex(8))
        self._image = wandb.Image
        self._run = wandb.init(
            project=project, name=run.name, id=file.read_text(), resume="allow", dir=str(run), config=dict(config)
        )

    def numbers(self, step: int, values: Values) -> None:
        """See Sink."""
        self._run.log(dict(values), step=step)

    def panel(self, step: int, rgb: np.ndarray) -> None:
        """See Sink."""
        self._run.log({"panel": self._image(rgb)}, step=step)

    def flush(self) -> None:
        """It keeps its own files."""

    def close(self) -> None:
        """See Sink."""
        self._run.finish()


def check(log: Log) -> None:
    """Before any work. Raises ValueError for a sink that is not installed."""
    if log.wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError(f"log.wandb = {log.wandb}: needs the wandb package; pip install 'kamim[wandb]'")


def sinks(run: Path, first: int, log: Log, config: Mapping[str, Any]) -> list[Sink]:
    """Of a run that begins at step `first`, and whose folder is there."""
    made: list[Sink] = [Files(run, first), TensorBoard(run, first)]
    if log.wandb:
        made.append(Wandb(run, "kamim" if log.wandb is True else log.wandb, config))
    return made


def read(run: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl, less one that was cut short; none where there is no file."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


class Metrics:
    """Numbers of steps on their way to the sinks. Nothing here waits for a step before the next one is queued.

    newest: what was written last.
    """

    def __init__(self, sinks: Iterable[Sink]):
        self.newest: dict[str, float] = {}
        self._sinks = list(sinks)
        self._waiting: _Waiting | None = None
        self.restart()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        for sink in self._sinks:
            sink.close()

    def restart(self) -> None:
        """What has passed since the last step is not the next one's."""
        self._clock = time.perf_counter()

    def add(self, step: int, lr: float, samples: int, values: Mapping[str, Tensor | float]) -> None:
        """Takes the numbers of a step that has just been queued; writes those of the step before.

        Adds images_per_second and, where values has data_wait (seconds), data_wait_share of the step's time.
        """
        waiting = _Waiting(step, values)
        self._write()
        seconds = time.perf_counter() - self._clock
        self.restart()
        waiting.plain |= {"lr": lr, "images_per_second": samples / seconds}
        if "data_wait" in waiting.plain:
            waiting.plain["data_wait_share"] = waiting.plain["data_wait"] / seconds
        self._waiting = waiting

    def note(self, values: Values) -> None:
        """Adds to the step that was taken last."""
        assert self._waiting is not None
        self._waiting.plain.update(values)

    def panel(self, step: int, rgb: np.ndarray) -> None:
        """Shows a picture, uint8 [H, W, 3]."""
        for sink in self._sinks:
            sink.panel(step, rgb)

    def flush(self) -> None:
        """Writes all there is, to stay. Raises FloatingPointError for a loss that is not finite."""
        self._write()
        for sink in self._sinks:
            sink.flush()

    def _write(self) -> None:
        if self._waiting is None:
            return
        step, values = self._waiting.step, self._waiting.read()
        self._waiting = None
        self.newest = {"step": step, **values}
        for name, value in (("loss", values["loss"]), ("gradient's norm", values["grad_norm"])):
            if not math.isfinite(value):
                raise FloatingPointError(f"step {step}: the {name} is {value}; the newest checkpoint is sound")
        for sink in self._sinks:
            sink.numbers(step, values)


class _Waiting:
    """A step's numbers, those on the device on their way to the host, behind the step's own work and no other."""

    def __init__(self, step: int, values: Mapping[str, Tensor | float]):
        self.step = step
        self.plain = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        self._names = list(tensors)
        stacked = torch.stack([value.detach().float() for value in tensors.values()])
        self._copied = stacked.to("cpu", non_blocking=True)  # pinned there, where it comes from a GPU
        self._done = torch.cuda.current_stream(stacked.device).record_event() if stacked.is_cuda else None

    def read(self) -> dict[str, float]:
        """Waits for the step, not for what was queued behind it."""
        if self._done is not None:
            self._done.synchronize()
        numbers = {**dict(zip(self._names, self._copied.tolist(), strict=True)), **self.plain}
        return {name: value if name == "lr" else round(value, 6) for name, value in numbers.items()}


class Waits(Generic[T]):
    """The same batches, and the seconds that their user has waited for them."""

    def __init__(self, batches: Iterable[T]):
        self._batches = batches
        self._seconds = 0.0

    def __iter__(self) -> Iterator[T]:
        batches = iter(self._batches)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self._seconds += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def take(self) -> float:
        """Seconds since they were asked for last."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds
