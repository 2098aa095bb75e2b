"""CIFAR-10 and CIFAR-100 (fine labels), https://www.cs.toronto.edu/~kriz/cifar.html, python and binary versions.

An archive, or the folder it makes; val is the official test set. Images are 32x32 pixels, not files. A process that
reads them holds the split's pixels, 154 MB for train, as archives cannot be sought in.
"""

import hashlib
import http.client
import os
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from preprocess.sources.base import Item, Member, Source, existing, printable
from preprocess.sources.inert import contents
from preprocess.sources.tars import unpacked

URL = "https://www.cs.toronto.edu/~kriz/"
IMAGES = {"train": 50_000, "val": 10_000}
SIDE = 32
PIXELS = 3 * SIDE * SIDE
_TIMEOUT = 60  # seconds without a byte

Files = Mapping[str, bytes | memoryview]


@dataclass(frozen=True)
class Version:
    """One of the two forms a data set is published in."""

    archive: str
    md5: str
    folder: str
    suffix: str  # of its files
    names: str  # the file of class names


@dataclass(frozen=True)
class Cifar:
    """One of the two data sets."""

    classes: int
    batches: Mapping[str, tuple[str, ...]]  # by split
    label: str  # which labels count, in the python version
    label_names: str
    label_bytes: int  # before an image's pixels in the binary version; the last one counts
    python: Version
    binary: Version


CIFARS = {
    "cifar10": Cifar(
        classes=10,
        batches={"train": tuple(f"data_batch_{n}" for n in range(1, 6)), "val": ("test_batch",)},
        label="labels",
        label_names="label_names",
        label_bytes=1,
        python=Version(
            archive="cifar-10-python.tar.gz",
            md5="c58f30108f718f92721af3b95e74349a",
            folder="cifar-10-batches-py",
            suffix="",
            names="batches.meta",
        ),
        binary=Version(
            archive="cifar-10-binary.tar.gz",
            md5="c32a1d4ab5d03f1284b67883e8d87530",
            folder="cifar-10-batches-bin",
            suffix=".bin",
            names="batches.meta.txt",
        ),
    ),
    "cifar100": Cifar(
        classes=100,
        batches={"train": ("train",), "val": ("test",)},
        label="fine_labels",
        label_names="fine_label_names",
        label_bytes=2,
        python=Version(
            archive="cifar-100-python.tar.gz",
            md5="eb9058c3a382ffc7106e4002c42a8d85",
            folder="cifar-100-python",
            suffix="",
            names="meta",
        ),
        binary=Version(
            archive="cifar-100-binary.tar.gz",
            md5="03b5dce01913d631647c71ecec9e9cb8",
            folder="cifar-100-binary",
            suffix=".bin",
            names="fine_label_names.txt",
        ),
    ),
}


def list_images(dataset: str, source: Path | None, split: str) -> Source:
    """The archive in SOURCE, or the folder it makes. Both versions give the same source.

    Raises ValueError where there is none, and for one that is damaged or not the published one.
    """
    root = existing(source, dataset)
    place, version = _find(dataset, root)
    if place.is_file() and _md5(place) != version.md5:
        raise ValueError(f"{printable(str(place))}: has not the checksum of the published archive; fetch it again")
    classes, labels, _ = _load(dataset, str(place), split)
    time = place.stat().st_mtime_ns
    items = [Member(f"{split}/{n:05d}", int(label), PIXELS, time, str(place), n) for n, label in enumerate(labels)]
    return Source(printable(str(root)), classes, items, partial(_read, dataset, split))


def _find(dataset: str, root: Path) -> tuple[Path, Version]:
    versions = (CIFARS[dataset].python, CIFARS[dataset].binary)
    places = [(root / name, version) for version in versions for name in (version.folder, version.archive)]
    for place, version in places:
        if place.exists():
            return place, version
    looked = ", ".join(place.name for place, _ in places)
    raise ValueError(f"--source {printable(str(root))}: has none of {looked}; --download fetches it")


def _md5(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "md5").hexdigest()


def _read(dataset: str, split: str, item: Item) -> np.ndarray:
    assert isinstance(item, Member)
    return _load(dataset, item.file, split)[2][item.at]


@lru_cache(maxsize=1)
def _load(dataset: str, place: str, split: str) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """Class names, labels [N], pixels uint8 [N, 32, 32, 3] of a split."""
    what = CIFARS[dataset]
    python = Path(place).name in (what.python.folder, what.python.archive)
    version = what.python if python else what.binary
    wanted = [name + version.suffix for name in what.batches[split]]
    try:
        held = _files(Path(place), version, [version.names, *wanted])
        names = _python_names(held, what) if python else bytes(held[version.names]).decode().split()
        batches = [_python_batch(held[name], what) if python else _binary_batch(held[name], what) for name in wanted]
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{printable(place)}: cannot be read as {dataset}: {error}") from error
    labels, rows = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    if len(labels) != IMAGES[split]:
        raise ValueError(f"{printable(place)}: holds {len(labels)} images for {split}, not {IMAGES[split]}")
    if len(names) != what.classes or labels.max() >= what.classes or labels.min() < 0:
        raise ValueError(f"{printable(place)}: labels or class names are not those of {dataset}")
    pixels = rows.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
    return tuple(map(printable, names)), labels, np.ascontiguousarray(pixels)


def _files(place: Path, version: Version, names: list[str]) -> Files:
    if place.is_dir():
        return {name: (place / name).read_bytes() for name in names}
    held = unpacked(place)
    return {name: held[f"{version.folder}/{name}"] for name in names}


def _binary_batch(data: bytes | memoryview, what: Cifar) -> tuple[np.ndarray, np.ndarray]:
    """Records of label bytes and pixels, a channel after the other."""
    records = np.frombuffer(data, np.uint8)
    if records.size % (what.label_bytes + PIXELS):
        raise ValueError(f"{records.size} bytes are not whole records")
    records = records.reshape(-1, what.label_bytes + PIXELS)
    return records[:, what.label_bytes - 1], records[:, what.label_bytes :]


def _python_batch(data: bytes | memoryview, what: Cifar) -> tuple[np.ndarray, np.ndarray]:
    held = contents(data)
    labels, rows = held.get(what.label), held.get("data")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise ValueError(f"{what.label} is not a list of numbers")
    if not isinstance(rows, np.ndarray) or rows.shape != (len(labels), PIXELS):
        raise ValueError(f"data is not {len(labels)} rows of {PIXELS} pixels")
    return np.array(labels), rows


def _python_names(held: Files, what: Cifar) -> list[str]:
    names = contents(held[what.python.names]).get(what.label_names)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{what.label_names} is not a list of names")
    return names


def download(dataset: str, folder: Path) -> None:
    """Fetches the binary version's archive into a folder, unless an archive or its folder is there already.

    Raises ValueError where it cannot be fetched, or is not the published one.
    """
    what = CIFARS[dataset]
    if any((folder / name).exists() for v in (what.python, what.binary) for name in (v.folder, v.archive)):
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / what.binary.archive
    staged = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        with urllib.request.urlopen(URL + file.name, timeout=_TIMEOUT) as stream, open(staged, "xb") as out:
            while part := stream.read(1 << 20):
                out.write(part)
            out.flush()
            os.fsync(out.fileno())
        if _md5(staged) != what.binary.md5:
            raise ValueError(f"{URL}{file.name}: what came has not the checksum of the published archive; try again")
        staged.rename(file)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise ValueError(f"{URL}{file.name}: cannot be fetched ({reason}); put it into {folder} yourself") from error
    finally:
        staged.unlink(missing_ok=True)
