"""Keypoints and weights of single images, and sheets of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kamim import KamimError
from kamim.config.pretrain import Weighting
from kamim.detectors import detector, opencv
from kamim.method import geometry
from kamim.method import keypoints as kp
from kamim.method.weighting import density, keypoint_weights, weights
from preprocess.resize import resize_plain

if TYPE_CHECKING:
    from kamim.storage.store import Store


@dataclass(frozen=True)
class ImageWeights:
    """The keypoints and weights of one image: keypoints, map F bool [H, W], Omega and W float32 [g, g]."""

    rgb: np.ndarray
    keypoints: int
    bitmap: np.ndarray
    omega: np.ndarray
    weights: np.ndarray


def image_weights(rgb: np.ndarray, weighting: Weighting) -> ImageWeights:
    """Returns keypoints and weights of an image (uint8 [H, W, 3]), which is not resized.

    A last row or column of cells that the image fills only in part is left out, as in Eq. 2's convolution.
    Raises KamimError for an image smaller than one cell.
    """
    height, width = rgb.shape[:2]
    patch = weighting.patch_size
    if min(height, width) < patch:
        raise KamimError(f"the image is {width}x{height} px, smaller than one cell of --patch-size {patch}")
    # OpenCV's own calls, which give the results of the compiled loops, and start sooner.
    detected = opencv.fast(rgb) if weighting.detector == "fast" else detector(weighting.detector).detect(rgb)
    bitmap = kp.opencv_map(detected.xy, height, width, weighting.footprint)
    omega = density(kp.map_counts(bitmap, patch), patch)
    w = weights(omega, weighting.temperature, weighting.normalize)
    return ImageWeights(rgb, len(detected.xy), bitmap, omega, w)


def largest_crop(rgb: np.ndarray, resolution: int) -> np.ndarray:
    """Returns the largest crop that training takes of an image (uint8 [H, W, 3]): uint8 [resolution, resolution, 3].

    It shows the whole image if that is 3:4 to 4:3 wide, and is resized as in the released code.
    """
    top, left, height, width = geometry.largest_box(*rgb.shape[:2], *geometry.CROP_RATIO)
    return resize_plain(rgb[top : top + height, left : left + width], (resolution, resolution))


def plot_weights(images: Mapping[str, ImageWeights], weighting: Weighting, file: Path) -> None:
    """Draws one row per image: the image, its keypoints, its weights."""
    from kamim.reporting import plots

    rows = [(name, image.rgb, image.bitmap, image.weights) for name, image in images.items()]
    plots.weights_sheet(rows, weighting.patch_size, _caption(weighting), file)


def _caption(weighting: Weighting) -> str:
    caption = f"{weighting.detector}, {weighting.footprint}, w_ps {weighting.patch_size}, T {weighting.temperature}"
    return f"{caption}, normalised" if weighting.normalize else caption


def preview(store: "Store", weighting: Weighting, count: int, seed: int, file: Path) -> str:
    """Draws a sheet of `count` random crops as training sees them: image, remapped keypoints, weights.

    Returns a line that compares W with that of keypoints detected on the crops' own pixels.
    """
    from kamim.reporting import plots
    from pipelines.counts import CachedCounts
    from pipelines.loader import Crop, Loader
    from pipelines.plan import Plan

    job = store.manifest.job
    patch = weighting.patch_size
    if job.resolution % patch:
        raise KamimError(f"--patch-size {patch}: must divide the store's resolution {job.resolution}")
    count = min(count, len(store))
    fine = CachedCounts(store.keypoints(weighting.detector), weighting.footprint, 1)  # cells of one pixel: F itself
    plan = Plan(len(store), count, count, seed)
    batch = next(iter(Loader(store, plan, job.resolution, crop=Crop(job.crop_scale), counter=fine).micro_batches(0, 1)))
    assert batch.counts is not None
    rows, detected = [], []
    for i in range(count):
        bitmap = batch.counts[i].numpy() > 0
        w = keypoint_weights(kp.map_counts(bitmap, patch), patch, weighting.temperature, weighting.normalize)
        detected.append(image_weights(batch.images[i].numpy(), weighting).weights)
        index = int(batch.indices[i])
        rows.append((f"{index} {store.class_of(index)}", batch.images[i].numpy(), bitmap, w))
    plots.weights_sheet(rows, patch, f"{store.path.name}: {_caption(weighting)}", file)
    return _agreement(np.stack([row[3] for row in rows]), np.stack(detected))


def _agreement(stored: np.ndarray, detected: np.ndarray) -> str:
    """Compares W of stored keypoints with W of keypoints detected on the crops, both float32 [n, g, g]."""
    means = f"mean W {stored.mean():.2f} of stored keypoints, {detected.mean():.2f} of keypoints detected on the crops"
    if stored.std() == 0 or detected.std() == 0:
        return means
    correlation = float(np.corrcoef(stored.ravel(), detected.ravel())[0, 1])
    return f"{means}; correlation {correlation:.2f}"
