"""ImageNet, ILSVRC2012, as published on image-net.org and on Kaggle. The classes are its WordNet ids, sorted.

Train and val have the same labels in every layout. A class folder counts even when it is empty, as the other split
may have images of that class.
"""

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from kamim import KamimError
from preprocess.sources import devkit
from preprocess.sources.base import Item, Source, existing, is_image, printable, read_whole
from preprocess.sources.folders import images_below, images_in, listed_folder, subfolders
from preprocess.sources.tars import Tar, on_continued, read_member, unpacked

KAGGLE = "ILSVRC/Data/CLS-LOC"
KAGGLE_TRUTH = "LOC_val_solution.csv"
DEVKIT = "ILSVRC2012_devkit_t12"
DEVKIT_FILES = ("data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt")
_TIMEOUT = 60  # seconds to read meta.mat
_WNID = re.compile(r"n\d+")
_CLASS_TAR = re.compile(r"(?:.*/)?(n\d+)\.tar")


def list_images(source: Path | None, split: str) -> Source:
    """Lists SOURCE/<split>/<wnid>/*.JPEG, also below ILSVRC/Data/CLS-LOC, or SOURCE/ILSVRC2012_img_<split>.tar.

    Flat validation images, in a folder or the tar, need their classes next to them: LOC_val_solution.csv, or
    ILSVRC2012_devkit_t12, as folder or .tar.gz. Raises KamimError for anything else.
    """
    root = existing(source, "imagenet")
    tar = root / f"ILSVRC2012_img_{split}.tar"
    folders = [root / split, root / KAGGLE / split]
    for folder in folders:
        if folder.is_dir():
            return _class_folders(folder) or _flat(root, folder, split)
    if tar.is_file():
        return _train_tar(tar) if split == "train" else _val_tar(root, tar)
    looked = ", ".join(str(place.relative_to(root)) for place in (*folders, tar))
    raise KamimError(f"source = {printable(str(root))}: has none of {looked}")


def _class_folders(folder: Path) -> Source | None:
    wnids = [name for name in subfolders(folder) if _WNID.fullmatch(name)]
    skipped: Counter[str] = Counter()
    items = [item for label, wnid in enumerate(wnids) for item in images_below(folder, wnid, label, skipped)]
    return listed_folder(folder, wnids, items, skipped) if items else None


def _flat(root: Path, folder: Path, split: str) -> Source:
    if split == "train":
        raise KamimError(f"source = {printable(str(folder))}: has no class folders <wnid> with images in them")
    classes, label_of = _truth(root)
    skipped: Counter[str] = Counter()
    items = images_in(folder, skipped, label_of)
    if not items:
        raise KamimError(f"source = {printable(str(folder))}: holds no images, nor class folders of them")
    return listed_folder(folder, classes, items, skipped)


def _train_tar(file: Path) -> Source:
    """Lists a tar of one tar per class: the same items, in the same order, as its class folders give."""
    tar = Tar(file)
    inner = {match[1]: entry for entry in tar.entries() if (match := _CLASS_TAR.fullmatch(entry.name))}
    wnids = sorted(inner)
    if not wnids:
        raise KamimError(f"{tar.name}: holds no <wnid>.tar")
    items: list[Item] = []
    for label, wnid in enumerate(wnids):
        images = {entry.name: entry for entry in tar.entries(inner[wnid]) if is_image(entry.name)}
        items += (tar.member(f"{wnid}/{name}", label, images[name]) for name in sorted(images))
    return Source(tar.name, tuple(map(printable, wnids)), items, read_member, remark=on_continued([tar]))


def _val_tar(root: Path, file: Path) -> Source:
    classes, label_of = _truth(root)
    tar = Tar(file)
    images = {entry.name: entry for entry in tar.entries() if is_image(entry.name)}
    items = [tar.member(name, label_of(name), images[name]) for name in sorted(images)]
    return Source(tar.name, tuple(classes), items, read_member, remark=on_continued([tar]))


def _truth(root: Path) -> tuple[list[str], Callable[[str], int]]:
    """Returns the classes, and a function from a validation image's name to its label, which may raise ValueError."""
    if (root / KAGGLE_TRUTH).is_file():
        file, truth = KAGGLE_TRUTH, _kaggle_truth(root / KAGGLE_TRUTH)
        classes = sorted(set(truth.values()))
    elif (root / DEVKIT / "data").is_dir():
        file = DEVKIT
        classes, truth = _devkit_truth(DEVKIT, [read_whole(root / DEVKIT / name) for name in DEVKIT_FILES])
    elif (root / f"{DEVKIT}.tar.gz").is_file():
        file = f"{DEVKIT}.tar.gz"
        held = unpacked(root / file)
        classes, truth = _devkit_truth(file, [bytes(held.get(f"{DEVKIT}/{name}", b"")) for name in DEVKIT_FILES])
    else:
        raise KamimError(
            f"source = {printable(str(root))}: the classes of the validation images are in none of {KAGGLE_TRUTH}, "
            f"{DEVKIT} and {DEVKIT}.tar.gz; put one there, or sort the images into val/<wnid>"
        )
    labels = {wnid: label for label, wnid in enumerate(classes)}

    def label_of(name: str) -> int:
        stem = name.rpartition("/")[2].partition(".")[0]
        if stem not in truth:
            raise KamimError(f"source = {printable(str(root))}: {file} does not know {printable(name)}")
        return labels[truth[stem]]

    return classes, label_of


def _kaggle_truth(file: Path) -> dict[str, str]:
    """Parses lines "image,wnid box wnid box ..." below a heading, of Kaggle's ImageNet challenge."""
    lines = read_whole(file).decode(errors="surrogateescape").splitlines()[1:]
    pairs = (line.partition(",") for line in lines)
    truth = {image: boxes.partition(" ")[0] for image, _, boxes in pairs}
    if not truth or not all(map(_WNID.fullmatch, truth.values())):
        raise KamimError(f"{printable(str(file))}: is not the lines ImageId,PredictionString of Kaggle's ImageNet")
    return truth


def _devkit_truth(where: str, files: list[bytes]) -> tuple[list[str], dict[str, str]]:
    """Returns the classes and each image's class: line n of the truth is the ILSVRC2012_ID of ILSVRC2012_val_<n>."""
    meta, truth = files
    try:
        read = subprocess.run(
            [sys.executable, "-P", devkit.__file__], input=meta, capture_output=True, timeout=_TIMEOUT, check=True
        )
        wnids = json.loads(read.stdout)
        images = {f"ILSVRC2012_val_{n:08d}": wnids[str(int(line))] for n, line in enumerate(truth.split(), 1)}
    except (subprocess.SubprocessError, ValueError, KeyError) as error:
        raise KamimError(f"{where}: {' and '.join(DEVKIT_FILES)} are not the devkit's") from error
    return sorted(wnids.values()), images
