"""Estimates the time left of a command that has many tasks of several kinds."""

from collections.abc import Callable
from datetime import timedelta
from statistics import fmean

from kamim.evaluation.task_progress import Position


class TimeLeft:
    """Estimates a task by the mean of the earlier ones of its kind. now: returns the time in seconds.

    As long as a kind has no earlier task, the result is a lower bound, and its text says so: such a task counts as far
    as the current task tells. A task may report several phases, each with its own total.
    """

    def __init__(self, now: Callable[[], float]):
        self._now = now
        self._seconds: dict[str, list[float]] = {}  # of tasks that were done from start to end, by kind
        self._position: Position | None = None
        self._start = self._phase = 0.0  # when the task and its phase began
        self._done = self._first = 0  # the last and the first step that the phase reported
        self._from_start = False

    def begin(self, position: Position) -> str:
        """Begins a task, and returns the time left as text, "" if nothing is known."""
        if self._position is not None and self._from_start:
            self._seconds.setdefault(self._position.kind, []).append(self._now() - self._start)
        self._position, self._start, self._done, self._from_start = position, self._now(), 0, False
        return self._text(position, 0.0)

    def move(self, done: int, total: int) -> str:
        """Returns the time left as text after `done` of `total` steps of the current phase of the current task."""
        assert self._position is not None
        if self._done == 0:  # a resumed task begins with a later step
            self._from_start = done == 1
        if done <= self._done or self._done == 0:
            self._phase, self._first = self._now(), done
        self._done = done
        rate = (self._now() - self._phase) / max(done - self._first, 1)
        return self._text(self._position, rate * (total - done))

    def _text(self, position: Position, phase: float) -> str:
        """phase: the seconds that the current phase still takes."""
        known, elapsed = {kind: fmean(seconds) for kind, seconds in self._seconds.items()}, self._now() - self._start
        bound = not {position.kind, *position.ahead} <= known.keys()
        whole = known.setdefault(position.kind, elapsed + phase)
        left = round(max(whole - elapsed, 0.0) + sum(known.get(kind, 0.0) for kind in position.ahead))
        return "" if bound and not left else f"{'at least ' * bound}{timedelta(seconds=left)} left"
