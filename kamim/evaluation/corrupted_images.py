"""Corruptions of images at five strengths: noise, blur, contrast and JPEG.

Source: Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations"
(ICLR 2019), ImageNet-C: Gaussian noise, Gaussian blur, contrast and JPEG compression with their parameters, which are
meant for images of 224 px. The width of the blur is scaled to the image's side; the others do not depend on it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg

from kamim.method import rng

STRENGTHS = (1, 2, 3, 4, 5)
SIDE = 224  # px, the side of the images that the parameters are meant for
NOISE = (0.08, 0.12, 0.18, 0.26, 0.38)  # standard deviation, of values in [0, 1]
BLUR = (1, 2, 3, 4, 6)  # standard deviation, in px of an image of SIDE
CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)  # share of the contrast that is left
QUALITY = (25, 18, 15, 10, 7)  # JPEG quality

Corrupt = Callable[[np.ndarray, int, tuple[int, int]], np.ndarray]  # image, strength - 1, (seed, index) -> image


@dataclass(frozen=True)
class Corruption:
    """One corruption, for the `augment` of a Loader. kind: a key of KINDS. strength: one of STRENGTHS.

    Random values are a pure function of (seed, index), and the same at every strength.
    """

    kind: str
    strength: int

    def __call__(self, images: np.ndarray, seed: int, epoch: int, indices: np.ndarray) -> None:
        """Changes the images of samples `indices` (int64 [n]), uint8 [n, H, W, 3], in place."""
        for image, index in zip(images, indices.tolist(), strict=True):
            image[:] = KINDS[self.kind](image, self.strength - 1, (seed, index))


def _noise(image: np.ndarray, level: int, draw: tuple[int, int]) -> np.ndarray:
    """Adds normal noise (stream CORRUPT; the Box-Muller transform of two draws per value)."""
    seed, index = draw
    draws = rng.units(seed, 0, np.array([index]), rng.CORRUPT, 2 * image.size).reshape(2, *image.shape)
    normal = np.sqrt(-2 * np.log1p(-draws[0])) * np.cos(2 * np.pi * draws[1])
    return _rounded(image + 255 * NOISE[level] * normal)


def _blur(image: np.ndarray, level: int, draw: tuple[int, int]) -> np.ndarray:
    sigma = BLUR[level] * min(image.shape[:2]) / SIDE
    return _rounded(cv2.GaussianBlur(image.astype(np.float32), (0, 0), sigma))


def _contrast(image: np.ndarray, level: int, draw: tuple[int, int]) -> np.ndarray:
    """Moves values towards their channel's mean over the image."""
    mean = image.mean(axis=(0, 1))
    return _rounded((image - mean) * CONTRAST[level] + mean)


def _jpeg(image: np.ndarray, level: int, draw: tuple[int, int]) -> np.ndarray:
    """Encodes and decodes the image as a JPEG, with chroma at half the resolution."""
    data = simplejpeg.encode_jpeg(np.ascontiguousarray(image), QUALITY[level], "RGB", "420")
    return simplejpeg.decode_jpeg(data, "RGB")


def _rounded(values: np.ndarray) -> np.ndarray:
    return values.round().clip(0, 255).astype(np.uint8)


KINDS: Mapping[str, Corrupt] = {"noise": _noise, "blur": _blur, "contrast": _contrast, "jpeg": _jpeg}
