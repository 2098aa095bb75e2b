"""iNaturalist 2021, https://github.com/visipedia/inat_comp/tree/master/2021: a class is the full category.

Category folders are named NNNNN_kingdom_..._species, and their number is the label.
"""

import re
from collections import Counter
from pathlib import Path

from kamim import KamimError
from preprocess.sources.base import Item, Source, existing, is_image, printable
from preprocess.sources.folders import images_below, listed_folder, subfolders
from preprocess.sources.tars import Entry, Tar, on_continued, read_member

PLACES = {  # names of the archives, and of torchvision
    "train": ("train", "2021_train", "train_mini", "2021_train_mini"),
    "val": ("val", "2021_valid"),
}
_CATEGORY = re.compile(r"(\d{5})_\w.*")


def list_images(source: Path | None, split: str) -> Source:
    """Lists SOURCE, if it holds category folders, such as .../train_mini; else a folder or .tar of the split in it.

    train_mini is used if train does not exist. An archive must be decompressed, as it is not seekable: zcat
    train.tar.gz > train.tar. Raises KamimError for anything else.
    """
    root = existing(source, "inaturalist2021")
    for folder in (root, *(root / place for place in PLACES[split])):
        categories = [name for name in subfolders(folder) if _CATEGORY.fullmatch(name)] if folder.is_dir() else []
        if categories:
            _check(categories, str(folder))
            skipped: Counter[str] = Counter()
            items = [
                item for label, name in enumerate(categories) for item in images_below(folder, name, label, skipped)
            ]
            return listed_folder(folder, categories, items, skipped)
    for place in PLACES[split]:
        if (root / f"{place}.tar").is_file():
            return _tar(root / f"{place}.tar")
        if (root / f"{place}.tar.gz").is_file():
            return _tar(root / f"{place}.tar.gz")  # says how to decompress it
    looked = ", ".join(f"{place}, {place}.tar" for place in PLACES[split])
    raise KamimError(f"source = {printable(str(root))}: holds no category folders NNNNN_..., nor any of {looked}")


def _tar(file: Path) -> Source:
    """Lists a tar: the same items, in the same order, as the folders it unpacks to."""
    tar = Tar(file)
    by_category: dict[str, dict[str, Entry]] = {}
    for entry in tar.entries():
        folder, _, name = entry.name.rpartition("/")
        category = folder.rpartition("/")[2]
        if is_image(name) and _CATEGORY.fullmatch(category):
            by_category.setdefault(category, {})[name] = entry
    categories = sorted(by_category)
    if not categories:
        raise KamimError(f"{tar.name}: holds no images in category folders NNNNN_...")
    _check(categories, tar.name)
    items: list[Item] = []
    for label, category in enumerate(categories):
        images = by_category.pop(category)
        items += (tar.member(f"{category}/{name}", label, images[name]) for name in sorted(images))
    return Source(tar.name, tuple(map(printable, categories)), items, read_member, remark=on_continued([tar]))


def _check(categories: list[str], where: str) -> None:
    for label, name in enumerate(categories):
        if int(name[:5]) != label:
            raise KamimError(
                f"{printable(where)}: category {label:05d} is missing; for a part of the categories use imagefolder"
            )
