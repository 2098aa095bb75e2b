"""Finds images that two stores share, such as training images among those that a classifier is measured on."""

import hashlib

import numpy as np

from kamim.storage.images import ImageReader
from kamim.storage.store import Store

LOOKED_AT = 2000  # validation images that are looked for, spread evenly over a larger store


def shared_images(train: Store, val: Store) -> tuple[int, int]:
    """Returns how many images of `val` are in `train`, byte for byte as stored, and how many were looked for.

    Only images of the same size and number of bytes are read.
    """
    chosen = np.unique(np.linspace(0, len(val) - 1, LOOKED_AT).astype(np.int64))
    theirs = _kinds(val.images)[chosen]
    candidates = np.flatnonzero(np.isin(_kinds(train.images), theirs))
    known = {_digest(train.images, index) for index in candidates.tolist()}
    return sum(_digest(val.images, index) in known for index in chosen.tolist()), len(chosen)


def caution(train: Store, val: Store) -> str:
    """Returns a warning if the stores share images, otherwise ""."""
    shared, looked_at = shared_images(train, val)
    return text(shared, looked_at, f"{val.path} and {train.path}") if shared else ""


def text(shared: int, looked_at: int, where: str) -> str:
    """Returns the warning that `shared` of `looked_at` validation images are training images."""
    return (
        f"{shared:,} of {looked_at:,} validation images are training images too, byte for byte ({where}): the scores "
        "are in part of images that the classifier was trained on"
    )


def _kinds(images: ImageReader) -> np.ndarray:
    """Returns a number for each image's bytes, height and width, which equal images share: int64 [N]."""
    height, width = images.sizes.astype(np.int64).T
    return np.asarray(images.lengths << 32 | height << 16 | width)


def _digest(images: ImageReader, index: int) -> bytes:
    return hashlib.sha256(images.data(index).tobytes()).digest()
