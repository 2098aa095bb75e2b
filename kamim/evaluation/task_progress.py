"""The current task of a command with many tasks."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Position:
    """A task of a command: its number (from 1), its name, and the number of all tasks."""

    number: int
    name: str
    count: int

    def __str__(self) -> str:
        return f"task {self.number} of {self.count}: {self.name}"
