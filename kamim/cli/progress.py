"""Progress bars of commands, and the lines that replace them without a terminal."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.text import Text

from kamim.cli.console import err_console, is_main, say
from kamim.storage.escape import printable

if TYPE_CHECKING:
    from kamim.evaluation.task_progress import Position


class _Rate(ProgressColumn):
    """The rate of recent images per second."""

    def render(self, task: Task) -> Text:
        rate = (task.finished_speed or task.speed or 0) * task.fields["images"]
        return Text(f"{rate:,.0f} images/s" if rate >= 1 else "")


class _Position(ProgressColumn):
    """The task of many, and steps done of all; no steps before the first."""

    def render(self, task: Task) -> Text:
        steps = f"{task.completed:g}/{task.total:g}" if task.completed else ""
        return Text(", ".join(filter(None, (task.fields["position"], steps))))


class _Left(ProgressColumn):
    """The time left of the current task, by the recent rate of its steps."""

    def render(self, task: Task) -> Text:
        seconds = task.time_remaining
        return Text("" if seconds is None else f"{timedelta(seconds=round(seconds))} left")


@contextmanager
def bar(title: str, images: int = 0) -> Iterator["Update"]:
    """Shows a progress bar; images: per step, 0 if steps do not consist of images.

    Without a terminal, it prints a line at every tenth, and at the beginning of every task of many.
    """
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        _Position(),
        _Rate(),
        _Left(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=err_console, disable=not (err_console.is_terminal and is_main())) as progress:
        yield Update(progress, add_bar(progress, title, images))


def add_bar(progress: Progress, title: str, images: int) -> TaskID:
    """Adds the bar that an Update moves."""
    return progress.add_task(printable(title), total=None, note="", position="", images=images)


class Update:
    """Moves a bar: update(done, total, note) for tasks one after the other, of_task for one of a known number."""

    def __init__(self, progress: Progress, task: TaskID):
        self._progress, self._task, self._tenths = progress, task, 0

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Moves it to `done` of `total`; after the end of a task, or backwards, it starts the next task."""
        shown = self._progress.tasks[self._task]
        if shown.finished or done < shown.completed:  # rich never resumes a finished task, and averages over both
            self._progress.reset(self._task)
            self._tenths = 0
        self._progress.update(self._task, completed=done, total=total, note=printable(note))
        if self._progress.disable and done * 10 // total > self._tenths:
            say(self._line())
        self._tenths = done * 10 // total

    def of_task(self, position: "Position") -> Callable[[int, int, Mapping[str, float]], None]:
        """Begins a task of many, and returns a function that moves the bar over its steps."""
        self._progress.reset(self._task)
        self._progress.update(self._task, position=str(position), note="")
        self._tenths = 0
        if self._progress.disable:
            say(self._line())
        return lambda done, total, metrics: self(done, total, metrics_line(metrics))

    def _line(self) -> str:
        task = self._progress.tasks[self._task]
        position, rate, left = (column.render(task).plain for column in (_Position(), _Rate(), _Left()))
        return ", ".join(filter(None, (f"{task.description}: {position}", rate, left, task.fields["note"])))


def metrics_line(metrics: Mapping[str, float]) -> str:
    """Returns the text of a training step for a bar: the loss, and the share of time spent waiting for data."""
    parts = []
    if metrics:
        parts.append(f"loss {metrics['loss']:.4f}")
    if "data_wait_share" in metrics:
        parts.append(f"data-wait {metrics['data_wait_share']:.1%}")
    return ", ".join(parts)
