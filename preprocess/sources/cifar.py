"""CIFAR-10 and CIFAR-100 (fine labels), https://www.cs.toronto.edu/~kriz/cifar.html, binary version.

The source is an archive or its unpacked folder; val is the official test set. Images are 32x32 pixels, not files. A
process that reads them holds the split's pixels, 154 MB for train, as archives are not seekable. The python version
is not read: it consists of pickles, which can run code or hang their reader.
"""

import hashlib
import http.client
import os
import urllib.request
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from kamim import KamimError
from preprocess.sources.base import Item, Member, Source, existing, printable, read_whole
from preprocess.sources.tars import unpacked

URL = "https://www.cs.toronto.edu/~kriz/"
IMAGES = {"train": 50_000, "val": 10_000}
SIDE = 32
PIXELS = 3 * SIDE * SIDE
_TIMEOUT = 60  # seconds without a byte


@dataclass(frozen=True)
class Cifar:
    """One of the two data sets, in its binary version."""

    classes: int
    archive: str
    md5: str
    folder: str  # in the archive
    names: str  # the file of class names
    batches: Mapping[str, tuple[str, ...]]  # by split
    label_bytes: int  # bytes before an image's pixels; the last one is the label


CIFARS = {
    "cifar10": Cifar(
        classes=10,
        archive="cifar-10-binary.tar.gz",
        md5="c32a1d4ab5d03f1284b67883e8d87530",
        folder="cifar-10-batches-bin",
        names="batches.meta.txt",
        batches={"train": tuple(f"data_batch_{n}.bin" for n in range(1, 6)), "val": ("test_batch.bin",)},
        label_bytes=1,
    ),
    "cifar100": Cifar(
        classes=100,
        archive="cifar-100-binary.tar.gz",
        md5="03b5dce01913d631647c71ecec9e9cb8",
        folder="cifar-100-binary",
        names="fine_label_names.txt",
        batches={"train": ("train.bin",), "val": ("test.bin",)},
        label_bytes=2,
    ),
}


def list_images(dataset: str, source: Path | None, split: str) -> Source:
    """Lists the archive in SOURCE or its unpacked folder; both give the same source.

    Raises KamimError if neither exists, and for one that is damaged or not the published one.
    """
    root = existing(source, dataset)
    what = CIFARS[dataset]
    place = next((root / name for name in (what.folder, what.archive) if (root / name).exists()), None)
    if place is None:
        raise KamimError(
            f"source = {printable(str(root))}: has neither {what.folder} nor {what.archive}, which --download fetches; "
            "the python version is not read, as pickles can run code"
        )
    classes, labels, _ = _load(dataset, str(place), split)
    time = place.stat().st_mtime_ns
    items = [Member(f"{split}/{n:05d}", int(label), PIXELS, time, str(place), n) for n, label in enumerate(labels)]
    return Source(printable(str(root)), classes, items, partial(_read, dataset, split))


def _md5(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "md5").hexdigest()


def _read(dataset: str, split: str, item: Item) -> np.ndarray:
    assert isinstance(item, Member)
    return _load(dataset, item.file, split)[2][item.at]


@lru_cache(maxsize=1)
def _load(dataset: str, place: str, split: str) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """Returns class names, labels [N] and pixels uint8 [N, 32, 32, 3] of a split."""
    what = CIFARS[dataset]
    batches = what.batches[split]
    try:
        files = _files(Path(place), what, (what.names, *batches))
        names = files[what.names].decode().split()
        records = np.concatenate([_records(files[name], name, what, IMAGES[split] // len(batches)) for name in batches])
    except (OSError, KeyError, ValueError) as error:
        raise KamimError(f"{printable(place)}: cannot be read as {dataset}: {error}") from error
    labels, pixels = records[:, what.label_bytes - 1], records[:, what.label_bytes :]
    if len(names) != what.classes or labels.max() >= what.classes:
        raise KamimError(f"{printable(place)}: labels or class names are not those of {dataset}")
    pixels = pixels.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
    return tuple(map(printable, names)), labels, np.ascontiguousarray(pixels)


def _files(place: Path, what: Cifar, names: tuple[str, ...]) -> dict[str, bytes]:
    if place.is_dir():
        return {name: read_whole(place / name) for name in names}
    if not place.is_file() or _md5(place) != what.md5:
        raise KamimError("has not the checksum of the published archive; fetch it again")
    held = unpacked(place)
    return {name: bytes(held[f"{what.folder}/{name}"]) for name in names}


def _records(data: bytes, name: str, what: Cifar, count: int) -> np.ndarray:
    """Returns a batch's records: label bytes, then pixels channel by channel, uint8 [count, bytes of a record]."""
    size = what.label_bytes + PIXELS
    if len(data) != count * size:
        raise KamimError(f"{name} has {len(data)} bytes, not {count} records of {size}")
    return np.frombuffer(data, np.uint8).reshape(count, size)


def download(dataset: str, folder: Path) -> None:
    """Downloads the archive into a folder, unless it or its unpacked folder exists.

    Raises KamimError if the download fails or is not the published archive.
    """
    what = CIFARS[dataset]
    if any((folder / name).exists() for name in (what.folder, what.archive)):
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / what.archive
    staged = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        with urllib.request.urlopen(URL + file.name, timeout=_TIMEOUT) as stream, open(staged, "xb") as out:
            while part := stream.read(1 << 20):
                out.write(part)
            out.flush()
            os.fsync(out.fileno())
        if _md5(staged) != what.md5:
            raise KamimError(f"{URL}{file.name}: what came has not the checksum of the published archive; try again")
        staged.rename(file)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise KamimError(f"{URL}{file.name}: cannot be fetched ({reason}); put it into {folder} yourself") from error
    finally:
        staged.unlink(missing_ok=True)
