"""Lists folders of image files."""

import errno
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath

from kamim import KamimError
from preprocess.sources.base import (
    CHANGED,
    SHOWN,
    SUFFIXES,
    Item,
    Source,
    existing,
    is_image,
    kind_of,
    printable,
    read_whole,
    split_of,
)

# Usual names of the folders of a split, in order of preference; what --split takes, in order of preference.
SPLITS = {
    "train": ("train", "training", "trainval"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
TAKEN = {"train": ("train",), "val": ("val", "test")}
# Kinds of files that other data sets read.
OTHERS = {"webdataset": (".tar",), "huggingface": (".parquet", ".arrow"), "cifar10": (".bin",)}
BESIDE = "beside the class folders"  # images without a class
LINKED = "links to folders of other classes"


def list_images(source: Path | None, split: str) -> Source:
    """Lists class folders (class = folder name, sorted), or one flat folder of images without labels.

    If the folders with images are splits, such as train and val, it lists the folder of the split.
    A folder without any image is not a class; torchvision's ImageFolder rejects it.
    Raises KamimError for a missing source, for one without images, for folders of which only some are splits, and for
    folders of other splits.
    """
    root = existing(source, "imagefolder")
    classes: list[str] = []
    items: list[Item] = []
    skipped: Counter[str] = Counter()
    for name in subfolders(root):
        listed = images_below(root, name, len(classes), skipped)
        if listed:
            classes.append(name)
            items += listed
    nested = {item.key.partition("/")[0] for item in items if item.key.count("/") > 1}
    if splits := _splits(classes, nested):
        chosen = root / _folder_of(split, splits, root)
        if others := [name for name in classes if name not in splits]:
            raise KamimError(
                f"source = {printable(str(root))}: its folders {_listed(splits)} are named as splits, "
                f"{_listed(others)} not; for the split, give source={printable(str(chosen))}; if all are classes, "
                "rename those"
            )
        return list_images(chosen, split)
    flat = images_in(root, skipped)
    if not items:
        items = flat
    elif flat:
        skipped[BESIDE] = len(flat)
    if not items:
        raise KamimError(
            f"source = {printable(str(root))}: holds no images ({', '.join(sorted(SUFFIXES))}), "
            f"nor class folders of them{_other_dataset(skipped)}"
        )
    return replace(listed_folder(root, classes, items, skipped), remark=_on_nested_folders(root, items))


def _other_dataset(skipped: Counter[str]) -> str:
    """Returns which data set reads the files that a folder holds in place of images, or ""."""
    for dataset, kinds in OTHERS.items():
        if found := [kind for kind in kinds if skipped[kind]]:
            return f"; `kamim preprocess {dataset}` reads {found[0]} files"
    return ""


def _on_nested_folders(root: Path, items: list[Item]) -> str:
    """Returns a remark on images in folders within a class folder, which some data sets mean as classes; else ""."""
    nested = [PurePosixPath(item.key).parent for item in items if item.key.count("/") > 1]
    if not nested:
        return ""
    folder, (one, lie) = printable(str(nested[0])), (("image", "lies") if len(nested) == 1 else ("images", "lie"))
    outer = nested[0].parts[0]
    alone = all(item.label == 0 for item in items)
    return (
        f"{len(nested):,} {one} {lie} in folders within a class folder, such as {folder}; "
        f"their class is the outer folder, such as {printable(outer)}"
        + (f"; if its folders are the classes, take {printable(str(root / outer))} as the source" if alone else "")
    )


def _splits(folders: list[str], nested: set[str]) -> dict[str, str]:
    """Returns the folders that are splits, and which; nothing if all folders are classes. nested: see below.

    A folder with the name of a split is a class all the same, such as the class train, if it is none of `nested`, which
    hold folders of images, if no folder has the name of another split, and if there are two or more other folders.
    """
    usual = {name: split for split, names in SPLITS.items() for name in names}
    splits = {name: split for name in folders if (split := usual.get(name.lower()) or split_of(name))}
    few = len(folders) == 1 or (len(folders) == 2 and any(name.lower() in usual for name in splits))
    return splits if few or nested & splits.keys() or len(set(splits.values())) > 1 else {}


def _listed(names: Iterable[str]) -> str:
    names = list(map(printable, names))
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _folder_of(split: str, splits: dict[str, str], root: Path) -> str:
    """Returns the folder of a split, that of a usual name if there are several. Raises KamimError unless it is one."""
    for kind in TAKEN[split]:
        folders = [name for name in splits if splits[name] == kind]
        usual = [name for wanted in SPLITS[kind] for name in folders if name.lower() == wanted]
        if usual or len(folders) == 1:
            return [*usual, *folders][0]
        if folders:
            raise KamimError(
                f"source = {printable(str(root))}: the folders {_listed(folders)} are all for split = {split}; give "
                f"one of them as source=..."
            )
    raise KamimError(
        f"source = {printable(str(root))}: its folders ({_listed(splits)}) are splits, none of them for "
        f"split = {split}; give another split=..., or one of the folders as source=..."
    )


def listed_folder(root: Path, classes: list[str], items: list[Item], skipped: Counter[str]) -> Source:
    """Returns the source of image files whose keys are their paths below a folder."""
    return Source(printable(str(root)), tuple(map(printable, classes)), items, partial(read_file, str(root)), skipped)


def subfolders(root: Path) -> list[str]:
    """Returns the names of the folders in a folder, including links to folders, sorted."""
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir())


def images_in(root: Path, skipped: Counter[str], label_of: Callable[[str], int] = lambda name: -1) -> list[Item]:
    """Lists the image files in a folder itself, sorted by name, and counts its other files in `skipped`."""
    files = sorted(entry.name for entry in root.iterdir() if not entry.is_dir())
    skipped.update(kind_of(name) for name in files if not is_image(name))
    return [item for name in files if is_image(name) and (item := file_item(str(root), name, label_of(name)))]


def images_below(root: Path, name: str, label: int, skipped: Counter[str]) -> list[Item]:
    """Lists the image files below root/name, sorted, and counts the other files in `skipped`.

    Links are followed, and each folder is entered once. Links to folders of other labels, or to one that contains the
    root, are counted in `skipped`. Raises OSError for a folder that cannot be listed.
    """
    seen: set[str] = set()
    items: list[Item | None] = []
    own = os.path.realpath(root / name)
    for parent, folders, files in os.walk(root / name, followlinks=True, onerror=_raise):
        real = os.path.realpath(parent)
        if not _within(real, own) and _holds_other_labels(real, root, own):
            skipped[LINKED] += 1
            folders.clear()
            continue
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        below = os.path.relpath(parent, root)
        skipped.update(kind_of(f"{below}/{file}") for file in files if not is_image(f"{below}/{file}"))
        items += (file_item(str(root), f"{below}/{file}", label) for file in sorted(files))
    return [item for item in items if item]


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder.rstrip('/')}/")


def _holds_other_labels(real: str, root: Path, own: str) -> bool:
    """Returns whether a folder lies in another folder of the root than `own`, or contains the root."""
    others = [os.path.realpath(entry) for entry in root.iterdir() if entry.is_dir()]
    base = os.path.realpath(root)
    return _within(base, real) or _within(real, base) or any(_within(real, other) for other in others if other != own)


def _raise(error: OSError) -> None:
    raise error


def file_item(root: str, key: str, label: int) -> Item | None:
    """Returns the item of a file, or None if it is not an image, or is a pipe or device, which would block a reader.

    A path that cannot be accessed, such as a dangling link, is listed, and rejected when it is read.
    """
    if not is_image(key):
        return None
    try:
        status = Path(root, key).stat()
    except OSError:
        return Item(key, label, 0)
    return Item(key, label, status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None


def read_file(root: str, item: Item) -> bytes:
    """Returns the bytes of an image file. Raises OSError as read_whole does, and if its size is not as listed."""
    data = read_whole(f"{root}/{item.key}")
    if len(data) != item.size:
        raise OSError(errno.EBUSY, CHANGED)
    return data
