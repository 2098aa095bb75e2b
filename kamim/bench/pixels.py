"""Compares crops and whole images of stored pixels with those that torchvision makes of the originals.

torchvision resizes the same part of the original bilinearly, with and without antialiasing. PSNR is over RGB.
Sharpness is the ratio of the variances of the Laplacians of the grey images, ours over torchvision's.
"""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch.nn.functional import grid_sample

from kamim.method import geometry
from kamim.storage.manifest import Job
from pipelines.crop import crop_resize
from preprocess.decode import decode
from preprocess.record import stored_image

SEED = 0
RESAMPLES = 1000  # bootstrap resamples of the images
INTERVAL = (2.5, 97.5)  # per cent
PIXELS = ("psnr_antialiased", "psnr_plain", "sharpness_antialiased", "sharpness_plain")


class StoredImage:
    """An image as stored by `job`, and random crops of it as made by the loader, without flips."""

    def __init__(self, job: Job, data: bytes | np.ndarray, original: np.ndarray, index: int, crops: int):
        encoded, (height, width) = stored_image(job, data, original)
        sizes = np.array([[height, width]])
        self.bytes = len(encoded)
        self._pixels = encoded.reshape(height, width, 3) if job.encoding == "raw" else decode(encoded.tobytes())
        self._side = job.resolution
        self._views = [
            geometry.crop_views(sizes, job.crop_scale, geometry.CROP_RATIO, SEED, epoch, np.array([index]))[0]
            for epoch in range(crops)
        ]
        (whole,) = geometry.whole_views(sizes)
        self.of_crops = np.array([self._measure(original, view) for view in self._views])  # [crops, 4], as PIXELS
        self.of_whole = np.array([self._measure(original, whole)])  # [1, 4]

    def crop(self, number: int) -> np.ndarray:
        """Returns a crop: uint8 [R, R, 3]."""
        return self._resized(self._views[number])

    def _resized(self, view: np.ndarray) -> np.ndarray:
        resized = np.empty((self._side, self._side, 3), np.uint8)
        crop_resize(np.ascontiguousarray(self._pixels), np.array([*view[:4], 0, 0]), resized)
        return resized

    def _measure(self, original: np.ndarray, view: np.ndarray) -> tuple[float, ...]:
        """Returns the measures PIXELS of one view of the stored image."""
        ours, scale = self._resized(view), np.array(original.shape[:2]) / self._pixels.shape[:2]
        box = tuple((view[:4].reshape(2, 2) * scale).ravel())
        theirs = _antialiased(original, box, self._side), _plain(original, box, self._side)
        return *(_psnr(ours, their) for their in theirs), *(_sharpness(ours) / _sharpness(their) for their in theirs)


def compare_pixels(job: Job, stored: Sequence[StoredImage]) -> dict[str, Any]:
    """Returns medians of PIXELS over all crops, with intervals, and the same of `whole` images."""
    return {
        "encoding": job.encoding,
        "bytes_per_image": float(np.mean([image.bytes for image in stored])),
        **_medians(np.stack([image.of_crops for image in stored])),
        "whole": _medians(np.stack([image.of_whole for image in stored])),
    }


def _antialiased(pixels: np.ndarray, box: tuple[float, ...], side: int) -> np.ndarray:
    """Resizes a box (top, left, height, width, in px) as torchvision does Pillow images: uint8 [side, side, 3]."""
    top, left, height, width = box
    edges = (left, top, min(left + width, pixels.shape[1]), min(top + height, pixels.shape[0]))
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BILINEAR, box=edges))


def _plain(pixels: np.ndarray, box: tuple[float, ...], side: int) -> np.ndarray:
    """Resizes a box (top, left, height, width, in px) bilinearly without antialiasing: uint8 [side, side, 3]."""
    top, left, height, width = box
    steps = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    y, x = (
        2 * (start + length * steps) / whole - 1
        for start, length, whole in zip((top, left), (height, width), pixels.shape[:2], strict=True)
    )
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1)
    planes = torch.tensor(pixels).permute(2, 0, 1).double()
    sampled = grid_sample(planes[None], grid[None], padding_mode="border", align_corners=False)[0]
    return sampled.round().permute(1, 2, 0).numpy().astype(np.uint8)


def _psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the PSNR in dB; for equal images, that of one value off by half a grey level."""
    squared = float(((a.astype(np.float64) - b) ** 2).mean())
    return float(10 * np.log10(255**2 / max(squared, 0.25 / a.size)))


def _sharpness(image: np.ndarray) -> float:
    """Returns the variance of the Laplacian of the grey image plus 1e-6, so that ratios exist for flat images."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    return float(cv2.Laplacian(grey, cv2.CV_32F).var()) + 1e-6


def _medians(values: np.ndarray) -> dict[str, Any]:
    """Returns medians and intervals of values, [images, crops, 4], by the names PIXELS."""
    random = np.random.default_rng(SEED)
    draws = [values[random.integers(len(values), size=len(values))] for _ in range(RESAMPLES)]
    bounds = np.percentile([np.median(drawn, axis=(0, 1)) for drawn in draws], INTERVAL, axis=0).T
    medians = np.median(values, axis=(0, 1))
    of_each = zip(PIXELS, medians.tolist(), bounds.tolist(), strict=True)
    return {
        key: value for name, median, bound in of_each for key, value in ((name, median), (f"{name}_interval", bound))
    }
