"""Folders of image files."""

import errno
import os
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path

from kamim import KamimError
from preprocess.sources.base import CHANGED, SUFFIXES, Item, Source, existing, is_image, printable, read_whole

SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}


def list_images(source: Path | None, split: str) -> Source:
    """Class folders (class = folder name, sorted), or one flat folder of images without labels.

    A folder without any image in it is no class; torchvision's ImageFolder refuses it.
    Raises ValueError for a missing source, for one without images, and for one whose folders are splits.
    """
    root = existing(source, "imagefolder")
    classes: list[str] = []
    items: list[Item] = []
    for name in subfolders(root):
        listed = images_below(root, name, len(classes))
        if listed:
            classes.append(name)
            items += listed
    if classes and SPLITS.issuperset(classes):
        raise KamimError(
            f"--source {printable(str(root))}: its folders ({', '.join(classes)}) are splits, not classes; "
            f"give one of them: --source {printable(str(root / classes[0]))}"
        )
    if not items:
        items = images_in(root)
    if not items:
        raise KamimError(
            f"--source {printable(str(root))}: holds no images ({', '.join(sorted(SUFFIXES))}), "
            "nor class folders of them"
        )
    return listed_folder(root, classes, items)


def listed_folder(root: Path, classes: list[str], items: list[Item]) -> Source:
    """The source of image files whose keys are their paths below a folder."""
    return Source(printable(str(root)), tuple(map(printable, classes)), items, partial(read_file, str(root)))


def subfolders(root: Path) -> list[str]:
    """Names of the folders in a folder, and of links to folders, sorted."""
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir())


def images_in(root: Path, label_of: Callable[[str], int] = lambda name: -1) -> list[Item]:
    """Image files in a folder itself, sorted by name."""
    names = sorted(entry.name for entry in root.iterdir() if is_image(entry.name))
    return [item for name in names if (item := file_item(str(root), name, label_of(name)))]


def images_below(root: Path, name: str, label: int) -> list[Item]:
    """Image files below root/name, sorted. Links are followed, each folder is entered once.

    Raises OSError for a folder that cannot be listed.
    """
    seen: set[str] = set()
    found: list[Item | None] = []
    for parent, folders, files in os.walk(root / name, followlinks=True, onerror=_refuse):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        below = os.path.relpath(parent, root)
        found += (file_item(str(root), f"{below}/{file}", label) for file in sorted(files))
    return [item for item in found if item]


def _refuse(error: OSError) -> None:
    raise error


def file_item(root: str, key: str, label: int) -> Item | None:
    """The item of a file; None where it is no image, or a pipe or device, which would block a reader.

    What cannot be looked at, such as a dangling link, is listed, and rejected when it is read.
    """
    if not is_image(key):
        return None
    try:
        found = Path(root, key).stat()
    except OSError:
        return Item(key, label, 0)
    return Item(key, label, found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None


def read_file(root: str, item: Item) -> bytes:
    """Returns the bytes of an image file. Raises OSError as read_whole does, and where its size is not as listed."""
    data = read_whole(f"{root}/{item.key}")
    if len(data) != item.size:
        raise OSError(errno.EBUSY, CHANGED)
    return data
