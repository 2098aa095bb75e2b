"""Folders of images with a class for every pixel, for training and evaluating semantic segmentation.

DIR/images/<stem>.<suffix>   images in any format that preprocess.decode reads
DIR/masks/<stem>.png         for each, a PNG of its size that holds the index of every pixel's class
DIR/classes.txt              a name on each line; the first line names index 0
"""

import hashlib
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from kamim import KamimError
from kamim.method.geometry import stored_size
from kamim.storage.escape import printable
from preprocess.decode import decode, decode_mask
from preprocess.resize import resize_antialiased
from preprocess.sources.base import is_image, read_whole

T = TypeVar("T")
IMAGES, MASKS, CLASSES = "images", "masks", "classes.txt"
MAX_CLASSES = 256  # the values of 8 bits
UNLABELLED = -1  # a pixel without a class
MANY_IGNORED = 0.05  # share of pixels without a class from which it is reported
SHOWN = 5  # names of classes in a message


@dataclass(frozen=True)
class MaskFolder:
    """A folder of images and masks that open_mask_folder has checked. Samples are sorted by stem.

    images: the file names of the images. classes: by index. ignore_index: the value in masks of pixels without a class.
    fingerprint: a digest of the classes and of all files. pixels: the number of ignored pixels, then of each class's.
    digests: the sha256 of each image's file.
    """

    path: Path
    images: tuple[str, ...]
    classes: tuple[str, ...]
    ignore_index: int
    fingerprint: str = ""
    pixels: tuple[int, ...] = ()
    digests: tuple[bytes, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int, area: float) -> np.ndarray:
        """Returns an image as a store of that area would hold it: RGB uint8 [H, W, 3], antialiased if downsampled.

        area: px^2, see kamim.method.geometry.stored_area. Raises KamimError if the file cannot be read.
        """
        pixels = read_file(self.image_file(index), decode)
        return resize_antialiased(pixels, stored_size(pixels.shape[0], pixels.shape[1], area))

    def mask(self, index: int) -> np.ndarray:
        """Returns the class of every pixel of an image's file: int16 [H, W], UNLABELLED for ignored pixels.

        Raises KamimError if the file cannot be read or holds an index that names no class.
        """
        return read_file(self.mask_file(index), self.classes_of)

    def image_file(self, index: int) -> Path:
        """Returns the file of an image."""
        return self.path / IMAGES / self.images[index]

    def mask_file(self, index: int) -> Path:
        """Returns the file of an image's mask."""
        return self.path / MASKS / f"{Path(self.images[index]).stem}.png"

    def classes_of(self, data: bytes) -> np.ndarray:
        """Returns the classes in the bytes of a mask, as mask() gives them."""
        values = decode_mask(data)
        table = np.full(256, -2, np.int16)
        table[: len(self.classes)] = np.arange(len(self.classes))
        table[self.ignore_index] = UNLABELLED
        classes = table[values]
        if (unknown := classes == -2).any():
            raise KamimError(
                f"holds the index {values[unknown].min()}, but {CLASSES} names 0 to {len(self.classes) - 1} and "
                f"ignore_index is {self.ignore_index}; a mask holds indices of {CLASSES}, not grey levels"
            )
        return classes

    @property
    def ignored(self) -> float:
        """The share of all pixels that have no class."""
        return self.pixels[0] / sum(self.pixels)

    def cautions(self) -> list[str]:
        """Returns a line for each property of the masks that changes what a mean over the classes says."""
        named = [name for index, name in enumerate(self.classes) if index != self.ignore_index]
        absent = [name for name in named if self.pixels[1 + self.classes.index(name)] == 0]
        lines = []
        if absent:
            shown = ", ".join(absent[:SHOWN]) + ", ..." * (len(absent) > SHOWN)
            lines.append(f"{self.path}: no mask holds {len(absent)} of its {len(named)} classes: {shown}")
        if self.ignored > MANY_IGNORED:
            lines.append(
                f"{self.path}: {self.ignored:.1%} of the pixels hold {self.ignore_index}, which is ignore_index; they "
                "count neither in training nor in any score"
            )
        return lines


def open_mask_folder(path: Path, ignore_index: int, workers: int | None = None) -> MaskFolder:
    """Lists a folder and reads all of it once. ignore_index: 0 .. 255. workers: threads; None is one per core.

    Raises KamimError for a missing folder, an image without a mask or a mask without an image, files that cannot be
    read, sizes that differ, indices that name no class, and masks that hold fewer than two classes.
    """
    for folder in (path, path / IMAGES, path / MASKS):
        if not folder.is_dir():
            raise KamimError(f"{folder}: no such folder; segmentation reads DIR/{IMAGES}, DIR/{MASKS}, DIR/{CLASSES}")
    classes = read_file(path / CLASSES, _names)
    images = _paired(path, _by_stem(path / IMAGES, is_image), _by_stem(path / MASKS, lambda name: name[-4:] == ".png"))
    listed = MaskFolder(path, images, classes, ignore_index)
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        samples = list(pool.map(lambda index: _checked(listed, index), range(len(listed))))
    of_samples, digests, pixels = zip(*samples, strict=True)
    of_classes = hashlib.sha256("\n".join(classes).encode()).digest()
    fingerprint = hashlib.sha256(b"".join((of_classes, *of_samples))).hexdigest()
    counts = tuple(np.sum(pixels, axis=0).tolist())
    opened = replace(listed, fingerprint=fingerprint, pixels=counts, digests=digests)
    _check_two_classes(opened)
    return opened


def _check_two_classes(folder: MaskFolder) -> None:
    held = [name for name, pixels in zip(folder.classes, folder.pixels[1:], strict=True) if pixels]
    if len(held) < 2:
        what = f"every pixel that is not ignored is of the class {held[0]}" if held else "every pixel is ignored"
        raise KamimError(
            f"{folder.path / MASKS}: {what}, and {folder.ignored:.1%} hold {folder.ignore_index}, which is "
            f"ignore_index; a segmentation needs two classes. Masks of two classes hold 0 and 1, the indices of "
            f"{CLASSES}; in masks of 0 and 255 write 1 for 255"
        )


def read_file(file: Path, parse: Callable[[bytes], T]) -> T:
    """Returns parse(content of the file). Raises KamimError, which names the file, if it cannot be read or parsed."""
    try:
        return parse(read_whole(file))
    except OSError as error:
        raise KamimError(f"{file}: {error.strerror}") from error
    except KamimError as error:
        raise KamimError(f"{file}: {error}") from error


def _names(data: bytes) -> tuple[str, ...]:
    names = tuple(printable(name.strip()) for name in data.decode(errors="replace").strip().splitlines())
    if not 2 <= len(names) <= MAX_CLASSES:
        raise KamimError(f"names {len(names)} classes, one a line; must be 2 to {MAX_CLASSES}")
    for line, name in enumerate(names, 1):
        if not name or names.count(name) > 1:
            raise KamimError(f"line {line} {f'repeats {name}' if name else 'is empty'}; every class needs its own name")
    return names


def _by_stem(folder: Path, wanted: Callable[[str], bool]) -> Mapping[str, str]:
    """Returns file names by stem, sorted. Raises KamimError if two files have the same stem, or there are none."""
    names: dict[str, str] = {}
    for file in sorted(file for file in folder.iterdir() if wanted(file.name) and not file.name.startswith(".")):
        stem, name = file.stem, file.name
        if stem in names:
            raise KamimError(f"{folder}: {names[stem]} and {name} have the same stem; keep one of them")
        names[stem] = name
    if not names:
        raise KamimError(f"{folder}: holds no such files ({'images' if folder.name == IMAGES else '.png'})")
    return names


def _paired(path: Path, images: Mapping[str, str], masks: Mapping[str, str]) -> tuple[str, ...]:
    odd = sorted(images.keys() ^ masks.keys())
    if odd:
        here, there = (IMAGES, MASKS) if odd[0] in images else (MASKS, IMAGES)
        more = f" (and {len(odd) - 1} more without a partner)" if len(odd) > 1 else ""
        raise KamimError(f"{path}: {here} holds {odd[0]}, {there} does not{more}; each image needs a mask of its stem")
    return tuple(images[stem] for stem in sorted(images))


def _checked(folder: MaskFolder, index: int) -> tuple[bytes, bytes, np.ndarray]:
    """Returns digests of a sample's name and files and of its image alone, and its pixels as in MaskFolder.pixels.

    Raises KamimError if the files are invalid.
    """
    digests = [folder.images[index].encode(errors="surrogateescape")]

    def hashed(parse: Callable[[bytes], np.ndarray], data: bytes) -> np.ndarray:
        digests.append(hashlib.sha256(data).digest())
        return parse(data)

    image = read_file(folder.image_file(index), partial(hashed, decode))
    mask = read_file(folder.mask_file(index), partial(hashed, folder.classes_of))
    if image.shape[:2] != mask.shape:
        (h, w), (height, width) = mask.shape, image.shape[:2]
        raise KamimError(f"{folder.mask_file(index)}: is {w}x{h} px, its image {width}x{height} px; they must be equal")
    pixels = np.bincount(mask.ravel() - UNLABELLED, minlength=1 + len(folder.classes))
    return hashlib.sha256(b"".join(digests)).digest(), digests[1], pixels
