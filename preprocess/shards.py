"""One shard: an idempotent task that reads its images and writes one file per component, named by its own checksum."""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from kamim import KamimError
from kamim.storage.escape import one_line
from kamim.storage.files import checksum, write_whole
from kamim.storage.manifest import Job
from preprocess.decode import Undecodable, decode
from preprocess.record import Rows, join, no_rows, record
from preprocess.sources import Item, Read, printable

Reject = Sequence[str]  # a file, and the reason why it could not be read


@dataclass(frozen=True)
class ShardTask:
    """A shard to build, as sent to a worker process or another machine."""

    job: Job
    number: int
    items: Sequence[Item]
    read: Read
    folders: Mapping[str, Path]  # folders of the components to build
    strict: bool


def run_shard(task: ShardTask) -> dict[str, str]:
    """Builds the shard and returns its files' names, by component.

    Raises KamimError if OpenCV's version is not the job's and, with strict, for an unreadable image.
    """
    cv2.setNumThreads(1)
    if cv2.__version__ != task.job.opencv:
        raise KamimError(f"OpenCV {cv2.__version__} here, but the job is of OpenCV {task.job.opencv}; install the same")
    parts: dict[str, list[Rows]] = {component: [] for component in task.folders}
    rejects: list[Reject] = []
    for item in task.items:
        try:
            data = task.read(item)
            rgb = decode(data)
        except (OSError, Undecodable) as error:
            name, reason = printable(item.key), unreadable(error)
            if task.strict:
                raise KamimError(f"{name}: {reason} (--strict)") from error
            rejects.append((name, reason))
            continue
        for component, rows in record(task.job, data, rgb, item.label, tuple(task.folders), item.key).items():
            parts[component].append(rows)
    joined = {component: join(rows, no_rows(task.job, component)) for component, rows in parts.items()}
    return {
        component: write_shard(folder, task.number, encode(joined[component], rejects))
        for component, folder in task.folders.items()
    }


def unreadable(error: OSError | Undecodable) -> str:
    """Returns the reason why an image could not be read, in one line."""
    return one_line(f"cannot be read: {error.strerror or error}" if isinstance(error, OSError) else error)


def encode(rows: Rows, rejects: Sequence[Reject]) -> bytes:
    """Returns a shard file's bytes. Equal shards have equal bytes."""
    return save(rows, metadata={"rejects": json.dumps(rejects)})


def write_shard(folder: Path, number: int, content: bytes) -> str:
    """Writes folder/<number>-<sha256>.safetensors; returns its name."""
    name = f"{number:06d}-{hashlib.sha256(content).hexdigest()}.safetensors"
    write_whole(folder / name, content)
    return name


def checksum_of(file: Path) -> str:
    """Returns the sha256 in a shard file's name."""
    return file.stem.partition("-")[2]


def finished(folder: Path, numbers: Collection[int]) -> dict[int, Path]:
    """Returns the shard files of `numbers` that exist and match their checksum."""
    listed = {file: int(file.name.partition("-")[0]) for file in sorted(folder.glob("[0-9]*-*.safetensors"))}
    requested = [file for file, number in listed.items() if number in numbers]
    with ThreadPoolExecutor() as threads:
        checksums = threads.map(checksum, requested)
    return {
        listed[file]: file for file, digest in zip(requested, checksums, strict=True) if digest == checksum_of(file)
    }


def rejects_of(file: Path) -> list[Reject]:
    """Returns the files that a shard could not read, in order."""
    with safe_open(file, framework="numpy") as tensors:
        rejects: list[Reject] = json.loads(tensors.metadata()["rejects"])
        return rejects


def column(files: Sequence[Path], name: str) -> np.ndarray:
    """Joins one small array of every shard."""
    parts = []
    for file in files:
        with safe_open(file, framework="numpy") as tensors:
            parts.append(tensors.get_tensor(name))
    return np.concatenate(parts)
