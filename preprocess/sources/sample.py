"""The sample data set: patches of photographs that come with scikit-image and scikit-learn."""

import importlib.resources
from functools import lru_cache
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from kamim import KamimError
from kamim.method import rng
from preprocess.sources.base import Item, Source

# Photographs in the wheels of scikit-image and scikit-learn, large and varied enough to cut patches from.
PHOTOGRAPHS = {
    "skimage.data": (
        "astronaut.png",
        "brick.png",
        "camera.png",
        "cell.png",
        "chelsea.png",
        "coffee.png",
        "coins.png",
        "grass.png",
        "gravel.png",
        "hubble_deep_field.jpg",
        "ihc.png",
        "moon.png",
        "motorcycle_left.png",
        "retina.jpg",
        "rocket.jpg",
    ),
    "sklearn.datasets.images": ("china.jpg", "flower.jpg"),
}
PATCHES = {"train": 150, "val": 50}  # per photograph
PATCH_SIDES = (72, 112)
VAL_SHARE = 1 / 3  # share of the longer side; training patches come from the rest, so no pixel is in both splits
_SAMPLE_SEED = 0


@lru_cache(maxsize=4)
def photograph(name: str) -> np.ndarray:
    """Returns one of PHOTOGRAPHS, whole: RGB uint8 [H, W, 3]. Raises KamimError if its package is not installed."""
    package = next(package for package, names in PHOTOGRAPHS.items() if name in names)
    try:
        folder = importlib.resources.files(package)
    except ModuleNotFoundError as error:
        raise KamimError(f"the sample data set needs {error.name}; pip install 'kamim[sample]'") from error
    with folder.joinpath(name).open("rb") as file, Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def _patch(item: Item) -> bytes:
    """Returns the JPEG of one sample patch. Key: split/photograph/number."""
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


def list_images(source: Path | None, split: str) -> Source:
    """Lists labelled patches of photographs that scikit-image and scikit-learn ship; the class is the photograph."""
    if source is not None:
        raise KamimError(f"source = {source}: the sample data set needs none")
    photographs = [name for names in PHOTOGRAPHS.values() for name in names]
    classes = tuple(name.partition(".")[0] for name in photographs)
    items = [
        Item(f"{split}/{name}/{label * PATCHES[split] + number}", label, 0)
        for label, name in enumerate(photographs)
        for number in range(PATCHES[split])
    ]
    return Source("photographs of scikit-image and scikit-learn", classes, items, _patch)
