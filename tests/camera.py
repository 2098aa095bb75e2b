"""Simulates kills at every change of the file system, like SQLite's crash tests, but in a single run.

A kill leaves the files on the disk at that moment, so the tree is copied before every change.
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate")
_watchers: list[Callable[[], None]] = []


def _hear(event: str, arguments: tuple[object, ...]) -> None:
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if _watchers and (writes or event in CHANGES):
        _watchers[0]()


sys.addaudithook(_hear)


@contextmanager
def watched(watcher: Callable[[], None]) -> Iterator[None]:
    """Calls `watcher` before every change of the file system in the context."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.clear()


def tree(path: Path) -> dict[Path, bytes]:
    """Every file's content by its path, except logs."""
    files = (file for file in path.rglob("*") if file.suffix != ".log")
    return {file.relative_to(path): file.read_bytes() if file.is_file() else b"" for file in files}


class Camera:
    """Copies a tree before every change that a job makes to it, once for every state.

    A file about to be fsynced is copied without the second half of its new bytes, as after a power cut.
    """

    def __init__(self, world: Path, copies: Path, patch: pytest.MonkeyPatch):
        self.world, self.copies, self.changes = world, copies, 0
        self._seen: set[int] = set()
        self._durable: dict[int, int] = {}  # by inode: bytes
        patch.setattr(os, "fsync", self._fsync)

    @property
    def killed(self) -> list[Path]:
        """The copies, in order."""
        return sorted(self.copies.iterdir(), key=lambda copy: int(copy.name))

    def state(self) -> dict[Path, bytes]:
        """The state that identifies a copy."""
        return tree(self.world)

    def __call__(self) -> None:
        _watchers.clear()
        self.changes += 1
        key = hash(frozenset(self.state().items()))
        if key not in self._seen:
            self._seen.add(key)
            shutil.copytree(self.world, self.copies / str(self.changes))
        _watchers.append(self)

    def _fsync(self, descriptor: int) -> None:
        if not _watchers:
            return
        file = Path(f"/proc/self/fd/{descriptor}").resolve()
        if file.is_file() and self.world in file.parents and file.stat().st_nlink == 1:  # linked: durable before
            whole = file.read_bytes()
            durable = self._durable.get(file.stat().st_ino, 0)
            _watchers.clear()
            os.truncate(file, (durable + len(whole)) // 2)
            self()
            _watchers.clear()
            file.write_bytes(whole)
            self._durable[file.stat().st_ino] = len(whole)
            _watchers.append(self)
