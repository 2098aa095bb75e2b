"""The type of a source of images, and the checks that all sources share."""

import errno
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kamim import KamimError
from kamim.storage.escape import printable as printable  # names from sources are untrusted

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})
MAX_FILE_BYTES = 1 << 28  # limit of an encoded image, checked before it is read
MAX_CLASSES = 1_000_000
CHANGED = "changed since it was listed"
SHOWN = 5  # names per line
HIDDEN = "hidden or of the system"  # a kind of skipped files
SYSTEM = frozenset({"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"})


@dataclass(frozen=True, slots=True)
class Item:
    """One image: its key within the source, its label (-1: none), its size in bytes (0: not a file).

    time: when its file last changed, in ns since 1970 (0: not a file). It takes 0.2 to 0.3 kB of memory, key included.
    """

    key: str
    label: int
    size: int
    time: int = 0


@dataclass(frozen=True, slots=True)
class Member(Item):
    """An image within a larger file: the file, and the byte or row where it begins (-1: cannot be read)."""

    file: str = ""
    at: int = 0


Read = Callable[[Item], bytes | np.ndarray]


@dataclass(frozen=True)
class Source:
    """A listed data set. read(item) returns the bytes of an image file, or RGB pixels, uint8 [H, W, 3].

    read raises OSError if an item cannot be read. It is sent to worker processes, so it holds little state.
    skipped: the number of files in the folders of images that are not taken as images, by their kind.
    remark: a sentence about the listing, or "".
    """

    location: str
    classes: tuple[str, ...]
    items: Sequence[Item]
    read: Read
    skipped: Mapping[str, int] = field(default_factory=dict)
    remark: str = ""

    def summary(self) -> list[str]:
        """Returns the listing as lines: images, classes by name, skipped files."""
        names = ", ".join(self.classes[:SHOWN]) + (", ..." if len(self.classes) > SHOWN else "")
        classes = f"{len(self.classes):,} {plural(len(self.classes), 'class', 'classes')} ({names})"
        images = f"{len(self.items):,} {plural(len(self.items), 'image')}"
        lines = [f"{self.location}: {images}, {classes if self.classes else 'no classes'}"]
        if count := sum(self.skipped.values()):
            kinds = sorted(self.skipped.items(), key=lambda kind: (-kind[1], kind[0]))
            shown = ", ".join(f"{number:,} {kind}" for kind, number in kinds[:SHOWN])
            more = ", ..." if len(kinds) > SHOWN else ""
            lines.append(f"skipped {count:,} other {plural(count, 'file')}: {shown}{more}")
        return [*lines, self.remark] if self.remark else lines


def plural(count: int, one: str, many: str = "") -> str:
    """Returns the noun for a count; many: its plural if that is not `one` with an s."""
    return one if count == 1 else many or f"{one}s"


def is_hidden(path: str) -> bool:
    """Returns whether a part of a file's path is hidden (.ipynb_checkpoints, ._1.jpg) or of a system (__MACOSX)."""
    return any(part in SYSTEM or (part[:1] == "." and part.strip(".") != "") for part in path.split("/"))


def kind_of(path: str) -> str:
    """Returns HIDDEN, or else the suffix of a file in lower case, or "without suffix"."""
    suffix = Path(path).suffix
    if is_hidden(path):
        return HIDDEN
    return printable(suffix.lower()) if suffix else "without suffix"


def is_image(path: str) -> bool:
    """Returns whether a file has the suffix of an image and is not hidden. path: relative to the source."""
    _, dot, suffix = path.rpartition(".")
    return dot + suffix.lower() in SUFFIXES and not is_hidden(path)


def existing(source: Path | None, dataset: str) -> Path:
    """Returns SOURCE as an absolute folder. Raises KamimError if it is missing."""
    if source is None:
        raise KamimError(f"{dataset}: needs source=DIR, the folder of its images")
    if not source.is_dir():
        raise KamimError(f"source = {printable(str(source))}: no such folder")
    return source.resolve()


def check_size(size: int) -> None:
    """Raises OSError for an encoded image above MAX_FILE_BYTES."""
    if size > MAX_FILE_BYTES:
        raise OSError(errno.EFBIG, f"{size} bytes are more than the limit of {MAX_FILE_BYTES}")


def read_whole(file: str | Path) -> bytes:
    """Returns the bytes of a file of at most MAX_FILE_BYTES.

    Raises OSError for a larger file, for one that changes while it is read, and for a pipe or a device, which would
    block.
    """
    with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK), "rb") as stream:
        before = os.fstat(stream.fileno())
        if not stat.S_ISREG(before.st_mode):
            raise OSError(errno.EINVAL, "not a plain file")
        check_size(before.st_size)
        data = stream.read(before.st_size)
        after = os.fstat(stream.fileno())
    if (len(data), after.st_size, after.st_mtime_ns) != (before.st_size, before.st_size, before.st_mtime_ns):
        raise OSError(errno.EBUSY, "changed while it was read")
    return data


Label = int | str | float | None  # as a data set gives it; None: no label


def name_classes(labels: Sequence[Label], keys: Sequence[str], where: str) -> tuple[tuple[str, ...], list[int]]:
    """Returns class names, and a label per image, from a data set's labels: class n is named n, names are sorted.

    keys: of the images, for messages. Raises KamimError, which names an image, if only some images have a label, if
    numbers and names are mixed, and for numbers that are not whole or out of range.
    """
    kinds = {type(label) for label in labels}
    if kinds <= {type(None)}:
        return (), [-1] * len(labels)
    if kinds == {str}:
        number = {name: n for n, name in enumerate(sorted({str(label) for label in labels}))}
        return tuple(map(printable, number)), [number[str(label)] for label in labels]
    if kinds != {int}:
        usual = type(labels[0]) if type(labels[0]) in (int, str) else None
        n, label = next((n, label) for n, label in enumerate(labels) if type(label) is not usual)
        has = "no label" if label is None else f"the label {label!r:.40} of type {type(label).__name__}"
        raise KamimError(
            f"{where}: {printable(keys[n])} has {has}; every image must have a label, all whole numbers or all names, "
            "or none must have one"
        )
    numbers = [int(label or 0) for label in labels]
    lowest, highest = min(numbers), max(numbers)
    if not 0 <= lowest <= highest < MAX_CLASSES:
        wrong = lowest if lowest < 0 else highest
        raise KamimError(
            f"{where}: labels from {lowest} to {highest}, such as {wrong} of {printable(keys[numbers.index(wrong)])}; "
            f"must be 0 to {MAX_CLASSES - 1}; if images have no class, none may have a label"
        )
    return tuple(map(str, range(highest + 1))), numbers


# The names that the Hugging Face hub recognises for splits in file and folder names.
_SPLIT = re.compile(
    r"(?<![a-z])(?:(?P<train>train|training)|(?P<val>val|valid|validation|dev)|(?P<test>test|testing|eval|evaluation))"
    r"(?![a-z])"
)


def split_of(path: str) -> str | None:
    """Returns what the last split in a path is: train, val, test, or None without any."""
    names = list(_SPLIT.finditer(path.lower()))
    return names[-1].lastgroup if names else None


def of_split(files: Iterable[str], split: str, where: str) -> list[str]:
    """Returns the files, sorted, whose name or folder names the split; all of them if none names any.

    `val` means the test files if no file is named for validation.
    Raises KamimError if files name other splits only.
    """
    by_split: dict[str | None, list[str]] = {}
    for file in sorted(files):
        by_split.setdefault(split_of(file), []).append(file)
    named = [split, "test"] if split == "val" else [split]
    if by_split.keys() <= {None}:
        return by_split.get(None, [])
    for name in named:
        if name in by_split:
            return by_split[name]
    splits = ", ".join(sorted(name for name in by_split if name))
    raise KamimError(f"source = {where}: has no files of split = {split}, only of {splits}")
