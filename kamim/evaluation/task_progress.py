"""The current task of a command with many tasks."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Position:
    """A task of a command: its number (from 1), its name, its kind (a mode, or pretrain), and the kinds of those after.

    Tasks of a kind take about as long as each other.
    """

    number: int
    name: str
    kind: str
    ahead: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """The number of all tasks."""
        return self.number + len(self.ahead)

    def __str__(self) -> str:
        return f"task {self.number} of {self.count}: {self.name}"
