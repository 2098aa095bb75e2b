"""Logs the metrics of a run to metrics.jsonl and TensorBoard, and to Weights & Biases if it is enabled.

RUN/metrics.jsonl   one line per optimiser step
RUN/panels/         pictures, as step-<steps done>.png
RUN/tensorboard/    the same numbers and pictures
"""

import importlib.util
import io
import json
import logging
import math
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kamim import KamimError
from kamim.config.pretrain import Log
from kamim.storage.escape import one_line
from kamim.storage.files import write_whole
from kamim.storage.log_file import write_line
from kamim.training.nonfinite import Diverged
from kamim.training.run_folder import LOG, METRICS, PANELS, TENSORBOARD, WANDB_ID

Values = Mapping[str, float]
T = TypeVar("T")
LOGIN_TIMEOUT = 30  # seconds
_LOG = logging.getLogger(__name__)


class Sink(Protocol):
    """A logger of numbers and pictures. Each step is logged once, in order."""

    def numbers(self, step: int, values: Values) -> None:
        """Logs the numbers of one step."""

    def panel(self, step: int, rgb: np.ndarray) -> None:
        """Logs a picture, uint8 [H, W, 3]."""

    def flush(self) -> None:
        """Makes everything logged so far durable."""

    def close(self) -> None:
        """Ends the log, after the last step."""


class Files:
    """Writes metrics.jsonl and panels/. Lines of steps from `first` on, left by a longer run, are removed.

    If the disk is full, lines are written with a later one, and panels are left out.
    """

    def __init__(self, run: Path, first: int):
        self._run = run
        self._panels = run / PANELS
        file = run / METRICS
        write_whole(file, b"".join(line for line, values in _lines(file) if values["step"] < first))
        self._stream = file.open("ab", buffering=0)
        self._unwritten = b""

    def numbers(self, step: int, values: Values) -> None:
        """See Sink. Values that are not finite are written as null."""
        late = bool(self._unwritten)
        line = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._unwritten += json.dumps({"step": step, **line}).encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            if not late:
                warn(self._run, f"step {step}: {METRICS} is behind, the run continues: {error}")

    def panel(self, step: int, rgb: np.ndarray) -> None:
        """See Sink."""
        try:
            self._panels.mkdir(exist_ok=True)
            stream = io.BytesIO()
            Image.fromarray(rgb).save(stream, "png")
            write_whole(self._panels / f"step-{step:08d}.png", stream.getvalue())
        except OSError as error:
            warn(self._run, f"step {step}: no panel, the run continues: {error}")

    def flush(self) -> None:
        """See Sink. Raises OSError if a line cannot be written (a full disk)."""
        self._write()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """See Sink."""
        self._stream.close()

    def _write(self) -> None:
        while self._unwritten:
            self._unwritten = self._unwritten[self._stream.write(self._unwritten) :]


class TensorBoard:
    """Writes TensorBoard event files. TensorBoard hides earlier events of steps from `first` on."""

    def __init__(self, run: Path, first: int):
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self._writer = SummaryWriter(str(run / TENSORBOARD), purge_step=first)

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
    """Logs to Weights & Biases, which ignores steps that it has. RUN/wandb-id identifies a run when it is resumed."""

    def __init__(self, run: Path, project: str, config: Mapping[str, Any]):
        import wandb

        file = run / WANDB_ID
        if not file.exists():
            write_whole(file, secrets.token_hex(8).encode())
        self._image = wandb.Image
        try:
            self._run = wandb.init(
                project=project, name=run.name, id=file.read_text(), resume="allow", dir=str(run), config=dict(config)
            )
        except wandb.Error as error:
            raise KamimError(f"log.wandb = {project}: {one_line(error)}") from error

    def numbers(self, step: int, values: Values) -> None:
        """See Sink."""
        self._run.log(dict(values), step=step)

    def panel(self, step: int, rgb: np.ndarray) -> None:
        """See Sink."""
        # The numbers of step - 1 are logged after it, and W&B drops those of a step before the newest.
        self._run.log({"panel": self._image(rgb)}, step=step - 1)

    def flush(self) -> None:
        """Does nothing: Weights & Biases writes its own files."""

    def close(self) -> None:
        """See Sink."""
        self._run.finish()


def check_installed(log: Log) -> None:
    """Raises KamimError if an enabled logger is not installed."""
    if log.wandb and importlib.util.find_spec("wandb") is None:
        raise KamimError(f"log.wandb = {log.wandb}: needs the wandb package; pip install 'kamim[wandb]'")


def log_in(log: Log) -> None:
    """Logs in to Weights & Biases if it is enabled, so that a run without a login or network ends before it begins.

    Raises KamimError. With WANDB_MODE=offline or disabled the package asks no server.
    """
    if not log.wandb:
        return
    import wandb

    try:
        wandb.login(verify=True, timeout=LOGIN_TIMEOUT)
    except (wandb.Error, ValueError) as error:  # ValueError: a key of another form
        raise KamimError(
            f"log.wandb = {log.wandb}: {one_line(error).rstrip('.')}; WANDB_MODE=offline logs to files, "
            "log.wandb=false does not log there"
        ) from error


def sinks(run: Path, first: int, log: Log, config: Mapping[str, Any]) -> list[Sink]:
    """Returns the sinks of a run that starts at step `first`. Its folder must exist."""
    enabled: list[Sink] = [Files(run, first), TensorBoard(run, first)]
    if log.wandb:
        enabled.append(Wandb(run, "kamim" if log.wandb is True else log.wandb, config))
    return enabled


def read(run: Path) -> list[dict[str, float]]:
    """Reads metrics.jsonl up to the first damaged line, null as nan; returns [] if there is no file."""
    return [
        {name: math.nan if value is None else value for name, value in values.items()}
        for _, values in _lines(run / METRICS)
    ]


def _lines(file: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yields lines and their values up to the first damaged line, which a crashed machine may leave."""
    for line in file.read_bytes().splitlines(keepends=True) if file.is_file() else ():
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            return
        if not line.endswith(b"\n") or not isinstance(values, dict) or type(values.get("step")) is not int:
            return
        if not all(value is None or isinstance(value, float) or _is_int64(value) for value in values.values()):
            return
        yield line, values


def _is_int64(value: object) -> bool:
    return isinstance(value, int) and -(2**63) <= value < 2**63


def warn(run: Path, line: str) -> None:
    """Logs a warning, and appends it to RUN/log.txt unless the disk is full."""
    line = one_line(line)
    _LOG.warning("%s", line)
    write_line(run / LOG, line)


def check_finite(step: int, values: Values) -> None:
    """Raises Diverged, a FloatingPointError, if the loss or the gradient is not finite."""
    for name, value in (("loss", values["loss"]), ("gradient's norm", values["grad_norm"])):
        if not math.isfinite(value):
            raise Diverged(f"step {step}: the {name} is {value}; the newest checkpoint is sound")


class Metrics:
    """Passes the numbers of steps to the sinks one step late, so that the host never waits for a step it just queued.

    newest: the numbers written last. check(step, numbers): raises an exception to stop the run. A sink other than Files
    that raises OSError (a full disk) is dropped.
    """

    def __init__(self, sinks: Iterable[Sink], check: Callable[[int, Values], None] = check_finite):
        self._check = check
        self.newest: dict[str, float] = {}
        self._sinks = list(sinks)
        self._pending: _PendingStep | None = None
        self.restart()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        self._for_each(lambda sink: sink.close())

    def restart(self) -> None:
        """Restarts the clock: the time since the last step is not counted for the next one."""
        self._clock = time.perf_counter()

    def add(self, step: int, lr: float, values: Mapping[str, Tensor | float]) -> None:
        """Takes the numbers of a step that has just been queued, and writes those of the step before.

        values: samples, loss and grad_norm at least. Adds images_per_second and, if data_wait (seconds) is given,
        data_wait_share, its share of the step's time.
        """
        pending = _PendingStep(step, {**values, "lr": lr})
        self._write()
        pending.seconds = time.perf_counter() - self._clock
        self.restart()
        self._pending = pending

    def log(self, values: Values) -> None:
        """Adds numbers to the newest step."""
        assert self._pending is not None
        self._pending.plain.update(values)

    def panel(self, step: int, rgb: np.ndarray) -> None:
        """Logs a picture, uint8 [H, W, 3]."""
        self._for_each(lambda sink: sink.panel(step, rgb))

    def flush(self) -> None:
        """Writes all numbers durably. Raises what check raises, and OSError if metrics.jsonl cannot be written."""
        self._write()
        self._for_each(lambda sink: sink.flush())

    def _for_each(self, action: Callable[[Sink], None]) -> None:
        for sink in list(self._sinks):
            try:
                action(sink)
            except OSError as error:
                if isinstance(sink, Files):
                    raise
                _LOG.warning("%s is left out, the run continues: %s", type(sink).__name__, error)
                self._sinks.remove(sink)

    def _write(self) -> None:
        if self._pending is None:
            return
        step, values = self._pending.step, self._pending.read()
        self._pending = None
        self.newest = {"step": step, **values}
        self._check(step, self.newest)
        self._for_each(lambda sink: sink.numbers(step, values))


class _PendingStep:
    """The numbers of a queued step. Those on the device are copied to the host right after the step's own work.

    seconds: the duration of the step.
    """

    seconds: float

    def __init__(self, step: int, values: Mapping[str, Tensor | float]):
        self.step = step
        self.plain = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        self._names = list(tensors)
        stacked = torch.stack([value.detach().float() for value in tensors.values()])
        self._copied = stacked.to("cpu", non_blocking=True)  # in pinned memory if it comes from a GPU
        self._done = torch.cuda.current_stream(stacked.device).record_event() if stacked.is_cuda else None

    def read(self) -> dict[str, float]:
        """Waits for the step, but not for work that was queued after it, and returns its numbers."""
        if self._done is not None:
            self._done.synchronize()
        numbers = {**dict(zip(self._names, self._copied.tolist(), strict=True)), **self.plain}
        numbers["images_per_second"] = numbers["samples"] / self.seconds
        if "data_wait" in numbers:
            numbers["data_wait_share"] = numbers["data_wait"] / self.seconds
        return {name: value if name == "lr" else round(value, 6) for name, value in numbers.items()}


class TimedBatches(Generic[T]):
    """Iterates over batches and measures how long the caller waits for them."""

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

    def pop_seconds(self) -> float:
        """Returns the seconds waited since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds
