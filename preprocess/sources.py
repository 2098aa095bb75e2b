"""Where images come from. A data set is one function that lists it, and one line in SOURCES."""

import hashlib
import importlib.resources
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
import simplejpeg
from PIL import Image

from kamim import rng

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})


@dataclass(frozen=True)
class Item:
    """One image: its key within the source, its label (-1: none), its size in bytes (0: not a file).

    time: when its file last changed, in ns since 1970 (0: not a file).
    """

    key: str
    label: int
    size: int
    time: int = 0


@dataclass(frozen=True)
class Source:
    """A listed data set. read(item) gives the bytes of an image file; it travels to worker processes."""

    location: str
    classes: tuple[str, ...]
    items: Sequence[Item]
    read: Callable[[Item], bytes]

    def fingerprint(self) -> str:
        """sha256 over every item's key, label and size, in order."""
        digest = hashlib.sha256()
        for item in self.items:
            digest.update(f"{item.key}\0{item.label}\0{item.size}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()


def printable(name: str) -> str:
    """A name that any file can hold: undecodable bytes as \\xNN."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _read_file(root: str, item: Item) -> bytes:
    return Path(root, item.key).read_bytes()


def _images_below(folder: Path) -> Iterator[Path]:
    """Image files below a folder, in sorted order. Links are followed, each folder is entered once."""
    seen: set[str] = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        images = (Path(parent, name) for name in sorted(files) if Path(name).suffix.lower() in SUFFIXES)
        yield from (image for image in images if image.is_file() or image.is_symlink())  # a pipe would block a reader


def image_folder(source: Path | None, split: str) -> Source:
    """Class folders (class = folder name, sorted), or one flat folder of images without labels.

    Raises ValueError for a missing source, and for one without images.
    """
    root = _existing(source, "imagefolder")
    classes = tuple(sorted(entry.name for entry in os.scandir(root) if entry.is_dir()))
    items = [
        Item(os.fspath(file.relative_to(root)), label, *_stat(file))
        for label, name in enumerate(classes)
        for file in _images_below(root / name)
    ]
    if not items:
        classes = ()
        items = [Item(file.name, -1, *_stat(file)) for file in _images_below(root) if file.parent == root]
    if not items:
        raise ValueError(f"--source {root}: holds no images ({', '.join(sorted(SUFFIXES))}), nor class folders of them")
    location = str(root.resolve())
    return Source(printable(location), tuple(map(printable, classes)), items, partial(_read_file, location))


def imagenet(source: Path | None, split: str) -> Source:
    """ILSVRC2012 as class folders: SOURCE/<split>/<wnid>/*.JPEG, also below ILSVRC/Data/CLS-LOC."""
    root = _existing(source, "imagenet")
    places = [root / split, root / "ILSVRC/Data/CLS-LOC" / split]
    for place in places:
        if place.is_dir():
            listed = image_folder(place, split)
            if not listed.classes:
                raise ValueError(f"--source {place}: flat, without class folders; sort it into <wnid>/*.JPEG first")
            return listed
    raise ValueError(f"--source {root}: has neither {' nor '.join(str(p.relative_to(root)) for p in places)}")


def _existing(source: Path | None, dataset: str) -> Path:
    if source is None:
        raise ValueError(f"{dataset}: needs --source DIR, the folder of its images")
    if not source.is_dir():
        raise ValueError(f"--source {source}: no such folder")
    return source


def _stat(file: Path) -> tuple[int, int]:
    """Size and time of last change; zeros for a dangling link, which is listed, and rejected when read."""
    if not file.exists():
        return 0, 0
    found = file.stat()
    return found.st_size, found.st_mtime_ns


# Photographs in the wheels of scikit-image and scikit-learn, large and varied enough to cut patches from.
PHOTOGRAPHS = {
    "skimage.data": (
        "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "coffee.png", "coins.png", "grass.png",
        "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg",
    ),
    "sklearn.datasets.images": ("china.jpg", "flower.jpg"),
}  # fmt: skip
PATCHES = {"train": 150, "val": 50}  # per photograph
PATCH_SIDES = (72, 112)
VAL_SHARE = 1 / 3  # of the longer side; training patches come from the rest, so no pixel is in both splits
_SAMPLE_SEED = 0


@lru_cache(maxsize=4)
def photograph(name: str) -> np.ndarray:
    """One of PHOTOGRAPHS, whole: RGB uint8 [H, W, 3]. Raises ValueError where its package is not installed."""
    package = next(package for package, names in PHOTOGRAPHS.items() if name in names)
    try:
        folder = importlib.resources.files(package)
    except ModuleNotFoundError as error:
        raise ValueError(f"the sample data set needs {error.name}; pip install 'kamim[sample]'") from error
    with folder.joinpath(name).open("rb") as file, Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def _patch(item: Item) -> bytes:
    """The JPEG of one sample patch. Key: split/photograph/number."""
    split, name, number = item.key.split("/")
    pixels = photograph(name)
    across = pixels.shape[1] >= pixels.shape[0]  # cut the longer side
    long, short = (pixels.shape[1], pixels.shape[0]) if across else pixels.shape[:2]
    cut = round(long * (1 - VAL_SHARE))
    start, stop = (0, cut) if split == "train" else (cut, long)
    u = [rng.unit(_SAMPLE_SEED, split == "val", int(number), rng.CROP, draw) for draw in range(3)]
    side = int(PATCH_SIDES[0] + u[0] * (PATCH_SIDES[1] - PATCH_SIDES[0] + 1))
    a = start + int(u[1] * (stop - start - side + 1))
    b = int(u[2] * (short - side + 1))
    top, left = (b, a) if across else (a, b)
    patch = np.ascontiguousarray(pixels[top : top + side, left : left + side])
    return simplejpeg.encode_jpeg(patch, quality=95)


def sample(source: Path | None, split: str) -> Source:
    """Labelled patches of photographs that scikit-image and scikit-learn ship; class = the photograph."""
    if source is not None:
        raise ValueError(f"--source {source}: the sample data set needs none")
    photographs = [name for names in PHOTOGRAPHS.values() for name in names]
    classes = tuple(name.partition(".")[0] for name in photographs)
    items = [
        Item(f"{split}/{name}/{label * PATCHES[split] + number}", label, 0)
        for label, name in enumerate(photographs)
        for number in range(PATCHES[split])
    ]
    return Source("photographs of scikit-image and scikit-learn", classes, items, _patch)


SOURCES: Mapping[str, Callable[[Path | None, str], Source]] = MappingProxyType(
    {"imagefolder": image_folder, "imagenet": imagenet, "sample": sample}
)
SPLITS = ("train", "val")


def list_source(dataset: str, source: Path | None, split: str) -> Source:
    """Lists a data set. Raises ValueError for an unknown data set or split, or a source that is not one."""
    if dataset not in SOURCES:
        raise ValueError(f"data set {dataset!r}: must be one of {', '.join(SOURCES)}")
    if split not in SPLITS:
        raise ValueError(f"--split {split}: must be one of {', '.join(SPLITS)}")
    return SOURCES[dataset](source, split)
