"""The current task of a command with many tasks."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Position:
    """A task of a command: the number-th (from 1) of `count`, and its name."""

    number: int
    count: int
    name: str

    def __str__(self) -> str:
        return f"task {self.number} of {self.count}: {self.name}"
