"""What is kamim's own: commands replace, delete and append to nothing else, and write nothing through a link.

A store is known by its manifest, a run by its configuration, a checkpoint by its files, and a folder of results by
MARKER or, if an earlier version wrote it, by its content. Locks and unfinished outputs have names of their own.
"""

import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from kamim import KamimError
from kamim.storage.files import write_whole

MARKER = ".kamim"  # in a folder of results; holds the name of the command that writes there
LOCK, UNFINISHED = ".kamim-lock", ".kamim-unfinished"
# Locks, files of write_whole and of safetensors that a killed command left behind, files that NFS keeps while open.
_LEFTOVER = re.compile(rf"\..+\.[0-9a-f]{{32}}|\..+({re.escape(LOCK)}|{re.escape(UNFINISHED)})|\.tmp\w+|\.nfs\w+")


def lock_file(out: Path) -> Path:
    """Returns the file beside `out` that is locked while a command writes there."""
    return out.with_name(f".{out.name}{LOCK}")


def unfinished(out: Path) -> Path:
    """Returns the path beside `out` at which it is written before it is renamed. The lock of `out` protects it."""
    return out.with_name(f".{out.name}{UNFINISHED}")


def discard_unfinished(out: Path) -> None:
    """Removes what a command that was killed left at unfinished(out); of a link, the link."""
    path = unfinished(out)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def everything(folder: Path) -> Iterator[Path]:
    """Yields a folder and everything below it, without following links. What disappears meanwhile is left out."""
    yield folder
    for parent, folders, files in os.walk(folder):
        yield from (Path(parent, name) for name in (*folders, *files))


def refuse_links(paths: Iterable[Path]) -> None:
    """Raises KamimError for the first path that is a symbolic link, dangling or not."""
    for path in paths:
        if path.is_symlink():
            raise KamimError(f"{path}: is a link, and kamim follows none inside of its folders; put its target here")


def open_own(file: Path, flags: int) -> int:
    """Returns a descriptor of a regular file, which is created if flags has O_CREAT.

    Raises KamimError if the file is a link or not a regular file, and OSError if it cannot be opened.
    """
    refuse_links([file])
    descriptor = os.open(file, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise KamimError(f"{file}: is not a regular file; remove it")
    return descriptor


def append(file: Path, text: str) -> None:
    """Appends text to a file, which is created if it is missing. Raises what open_own raises."""
    with open(open_own(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "a", encoding="utf-8") as stream:
        stream.write(text)


def is_leftover(name: str) -> bool:
    """Returns whether a file of this name is temporary: a lock, an unfinished file, or one deleted while it is open."""
    return _LEFTOVER.fullmatch(name) is not None


def names_in(folder: Path) -> list[str]:
    """Returns the names in a folder in order, except leftovers of commands that were killed; [] if there is none."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted(path.name for path in paths if not is_leftover(path.name))


def holds_only(folder: Path, names: Iterable[str]) -> bool:
    """Returns whether a directory, not a link to one, holds no file but these (or leftovers) and no folder."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    return not {*names_in(folder)} - {*names} and not any(path.is_dir() for path in folder.iterdir())


def check_results(folder: Path, command: str, earlier: Callable[[Path], bool]) -> None:
    """Raises KamimError if a folder holds anything and does not belong to `command`, such as "eval".

    earlier: returns whether a folder without MARKER was written by a version that made none.
    """
    if folder.exists() and not folder.is_dir():
        raise KamimError(f"out = {folder}: is a file; choose a folder")
    marker = folder / MARKER
    refuse_links([marker])
    if marker.is_file():
        writer = marker.read_text(errors="replace")[:100].strip()
        if writer != command:
            raise KamimError(f"out = {folder}: belongs to kamim {writer}; choose another folder for kamim {command}")
    elif (names := names_in(folder)) and not earlier(folder):
        raise KamimError(
            f"out = {folder}: holds {names[0]} and was not written by kamim {command}; choose a new or an empty folder"
        )


def mark_results(folder: Path, command: str) -> None:
    """Creates a folder and marks it as the command's. Call check_results first."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / MARKER).exists():
        write_whole(folder / MARKER, f"{command}\n".encode())
