"""Detects changes of a source since a store was built from it, by a hash of 64 bits per item."""

import hashlib
import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from kamim import KamimError
from kamim.storage.manifest import Fingerprint
from preprocess.decode import Undecodable
from preprocess.sources import Item, Read, Source, printable

CHUNK = 256  # items per task of the pool
Progress = Callable[[int, int], None]  # images done, images in all


def source_hashes(
    source: Source, kind: Fingerprint, threads: int, progress: Progress = lambda done, total: None
) -> np.ndarray:
    """Returns a hash of each item, uint64 [items].

    kind: stat hashes its key, label, size and time; content its key, label and bytes.
    """
    if kind == "stat":
        hashes = b"".join(_digest(item, f"{item.size}\0{item.time}".encode()) for item in source.items)
    else:
        parts = [source.items[at : at + CHUNK] for at in range(0, len(source.items), CHUNK)]
        with ThreadPoolExecutor(threads) as pool:
            digests = []
            for digest in pool.map(partial(_of_contents, source.read), parts):
                digests.append(digest)
                progress(min(len(digests) * CHUNK, len(source.items)), len(source.items))
        hashes = b"".join(digests)
    return np.frombuffer(hashes, "<u8")


def _of_contents(read: Read, items: Sequence[Item]) -> bytes:
    return b"".join(_of_content(read, item) for item in items)


def _of_content(read: Read, item: Item) -> bytes:
    try:
        content = read(item)
    except (OSError, Undecodable):
        return _digest(item, b"unreadable")
    if isinstance(content, np.ndarray):
        content = str(content.shape).encode() + content.tobytes()
    return _digest(item, hashlib.sha256(content).digest())


def _digest(item: Item, rest: bytes) -> bytes:
    name = f"{item.key}\0{item.label}\0".encode(errors="surrogateescape")
    return hashlib.blake2b(name + rest, digest_size=8).digest()


def to_bytes(array: np.ndarray) -> bytes:
    """Returns the content of stamps.npy."""
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def from_file(file: Path) -> np.ndarray:
    """Returns the hashes in a stamps.npy, uint64 [items]. Raises KamimError for a file that to_bytes does not write."""
    content, header = file.read_bytes(), len(to_bytes(np.empty(0, "<u8")))
    source_hashes = np.frombuffer(content[header : len(content) // 8 * 8], "<u8")
    if to_bytes(source_hashes) != content:
        raise KamimError(f"{file}: is damaged: does not hold a list of source hashes")
    return source_hashes


def check_unchanged(before: np.ndarray, now: np.ndarray, source: Source, built: Path, kind: Fingerprint) -> None:
    """Raises KamimError if the source differs from the one that `built` was built from, naming the first difference.

    before, now: hashes of the given kind, uint64 [items].
    """
    common = min(len(before), len(now))
    differs = np.flatnonzero(before[:common] != now[:common])
    if len(before) == len(now) == common and not len(differs):
        return
    first = int(differs[0]) if len(differs) else common
    what = printable(source.items[first].key) if first < len(now) else "which is gone"
    remedy = "restore the source, or choose another out=..."
    if kind == "stat" and len(differs) == len(before) == len(now):
        remedy = (
            "as all differ, perhaps only the files' times do, which a copy keeps if made by `cp -a`, `rsync -a` or "
            "`tar`: restore the times, or choose another out=... with fingerprint=content, which ignores times"
        )
    raise KamimError(
        f"source = {source.location}: changed since {built} was begun ({len(before)} items then, {len(now)} now); "
        f"the first that differs is number {first}, {what}; {remedy}"
    )
