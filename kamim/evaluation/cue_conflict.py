"""Cue-conflict images: the shape of one category in the texture of another.

The layout is DIR/SHAPE/SHAPE<n>-TEXTURE<m>.png, as in https://github.com/rgeirhos/texture-vs-shape, folder
stimuli/style-transfer-preprocessed-512. Source: Geirhos et al., "ImageNet-trained CNNs are biased towards texture"
(ICLR 2019).
"""

import hashlib
import re
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kamim import KamimError
from kamim.evaluation.mask_folder import UNLABELLED, read_file
from kamim.method.geometry import stored_size
from preprocess.decode import decode
from preprocess.resize import resize_antialiased

_NAME = re.compile(r"([a-z]+)\d+-([a-z]+)\d+\.png")


@dataclass(frozen=True)
class CueConflicts:
    """Images, sorted by name. shapes, textures: the categories of each. fingerprint: a digest of names and files.

    It is a kamim.evaluation.dense.DenseSource whose pixels have no class.
    """

    path: Path
    files: tuple[str, ...]
    shapes: tuple[str, ...]
    textures: tuple[str, ...]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.files)

    def image(self, index: int, area: float) -> np.ndarray:
        """Returns RGB uint8 [H, W, 3], antialiased if downsampled to `area` px^2. Raises KamimError for a bad file."""
        pixels = read_file(self.path / self.files[index], decode)
        return resize_antialiased(pixels, stored_size(pixels.shape[0], pixels.shape[1], area))

    def mask(self, index: int) -> np.ndarray:
        """Returns one pixel without a class."""
        return np.full((1, 1), UNLABELLED, np.int16)


def open_cue_conflicts(path: Path, categories: Container[str]) -> CueConflicts:
    """Lists and reads the images whose shape and texture are two different ones of `categories`.

    Raises KamimError for a missing folder, a folder without such images, and files that cannot be read.
    """
    if not path.is_dir():
        raise KamimError(f"{path}: no such folder")
    files = [(f"{file.parent.name}/{file.name}", _NAME.fullmatch(file.name)) for file in sorted(path.glob("*/*.png"))]
    images = [(name, *match.groups()) for name, match in files if match and match[1] == name.partition("/")[0]]
    chosen = [
        (name, shape, texture)
        for name, shape, texture in images
        if shape != texture and shape in categories and texture in categories
    ]
    if not chosen:
        raise KamimError(
            f"{path}: {len(images)} images are named SHAPE/SHAPE<n>-TEXTURE<m>.png, none of which conflicts in two of "
            "the categories"
        )
    digest = hashlib.sha256()
    for name, _, _ in chosen:
        digest.update(name.encode() + read_file(path / name, lambda data: hashlib.sha256(data).digest()))
    names, shapes, textures = zip(*chosen, strict=True)
    return CueConflicts(path, names, shapes, textures, digest.hexdigest())
