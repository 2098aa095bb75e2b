"""Sources of images. A data set is one function that lists it, and one line in SOURCES."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType

from kamim import KamimError
from preprocess.sources import cifar, folders, huggingface, imagenet, inaturalist, places365, sample, webdataset
from preprocess.sources.base import Item, Member, Read, Source, printable
from preprocess.sources.sample import PHOTOGRAPHS, photograph

__all__ = ["PHOTOGRAPHS", "SOURCES", "Item", "Member", "Read", "Source", "list_source", "photograph", "printable"]

SOURCES: Mapping[str, Callable[[Path | None, str], Source]] = MappingProxyType(
    {
        "cifar10": partial(cifar.list_images, "cifar10"),
        "cifar100": partial(cifar.list_images, "cifar100"),
        "huggingface": huggingface.list_images,
        "imagefolder": folders.list_images,
        "imagenet": imagenet.list_images,
        "inaturalist2021": inaturalist.list_images,
        "places365": places365.list_images,
        "sample": sample.list_images,
        "webdataset": webdataset.list_images,
    }
)
SPLITS = ("train", "val")


def list_source(dataset: str, source: Path | None, split: str) -> Source:
    """Lists a data set. Raises KamimError for an unknown data set or split, or an invalid source."""
    if dataset not in SOURCES:
        raise KamimError(f"data set {dataset!r}: must be one of {', '.join(SOURCES)}")
    if split not in SPLITS:
        raise KamimError(f"split = {split}: must be one of {', '.join(SPLITS)}")
    try:
        listed = SOURCES[dataset](source, split)
    except OSError as error:
        where = printable(str(error.filename or source))
        raise KamimError(f"{where}: cannot be read: {error.strerror or error}") from error
    if not listed.items:
        raise KamimError(f"source = {listed.location}: holds no images")
    return listed


def download(dataset: str, folder: Path | None) -> None:
    """Downloads a data set into a folder unless it exists. Raises KamimError if that is not possible."""
    if dataset not in cifar.CIFARS:
        raise KamimError(f"download: {dataset} is not fetched, only {', '.join(cifar.CIFARS)}")
    if folder is None:
        raise KamimError("download: needs source=DIR, the folder to fetch into")
    cifar.download(dataset, folder)
