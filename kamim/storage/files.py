"""Writes files and folders so that a final name always stands for complete, durable content; and their checksums."""

import hashlib
import os
import uuid
from pathlib import Path


def checksum(path: Path) -> str:
    """Returns the sha256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Flushes a file or a directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(file: Path, content: bytes) -> None:
    """Writes a file atomically and durably, replacing an existing one. Raises OSError if it cannot be written."""
    staged = file.with_name(f".{file.name}.{uuid.uuid4().hex}")  # other hosts may write the same file
    try:
        staged.write_bytes(content)
        fsync(staged)
        staged.replace(file)
    except OSError as error:  # for a full disk, the system names no file
        raise OSError(error.errno, error.strerror, str(file)) from error
    finally:
        staged.unlink(missing_ok=True)
    fsync(file.parent)


def publish(partial: Path, final: Path) -> None:
    """Flushes everything below `partial` to disk, then renames it to `final`, so that `final` is always complete."""
    make_durable(partial)
    partial.rename(final)
    fsync(final.parent)


def make_durable(path: Path) -> None:
    """Flushes a directory and everything below it to disk."""
    for entry in (*path.rglob("*"), path):
        fsync(entry)
