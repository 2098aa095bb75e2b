"""Places365-Standard, http://places2.csail.mit.edu/download.html: folders of images and the official lists of them.

The lists' lines are "path label"; the folders have the names of the archives or of torchvision's Places365.
"""

import re
from collections import Counter
from pathlib import Path

from kamim import KamimError
from preprocess.sources.base import Source, existing, printable, read_whole
from preprocess.sources.folders import file_item, listed_folder

CATEGORIES = "categories_places365.txt"
LISTS = {"train": "places365_train_standard.txt", "val": "places365_val.txt"}
FOLDERS = {  # if both sizes exist, the small images, 256x256 px, are used
    "train": ("data_256_standard", "data_256", "data_large_standard", "data_large"),
    "val": ("val_256", "val_large"),
}
_LINE = re.compile(r"/?(?P<path>\S+) (?P<label>\d{1,4})")


def list_images(source: Path | None, split: str) -> Source:
    """Lists SOURCE, which holds categories_places365.txt, the split's list and its images, in the list's order.

    Raises KamimError if one of them is missing or a list is invalid.
    """
    root = existing(source, "places365")
    label_of = _pairs(root / CATEGORIES)
    classes = sorted(label_of, key=label_of.__getitem__)
    if sorted(label_of.values()) != list(range(len(classes))):
        raise KamimError(f"{printable(str(root))}: {CATEGORIES} does not number the classes from 0 without gaps")
    listed = _pairs(root / LISTS[split])
    folder = next((root / name for name in FOLDERS[split] if (root / name).is_dir()), None)
    if folder is None:
        raise KamimError(f"source = {printable(str(root))}: has none of {', '.join(FOLDERS[split])}")
    for path, label in listed.items():
        if ".." in path.split("/") or label >= len(classes):
            raise KamimError(f"{printable(str(root))}: {LISTS[split]} holds {printable(path)} {label}")
    items = [item for path, label in listed.items() if (item := file_item(str(folder), path, label))]
    return listed_folder(folder, classes, items, Counter())


def _pairs(file: Path) -> dict[str, int]:
    """Parses lines "path label", in their order."""
    lines = read_whole(file).decode(errors="surrogateescape").splitlines()
    matches = [_LINE.fullmatch(line.strip()) for line in lines]
    if not lines or not all(matches):
        raise KamimError(f"{printable(str(file))}: its lines are not PATH LABEL")
    return {pair["path"]: int(pair["label"]) for pair in matches if pair}
