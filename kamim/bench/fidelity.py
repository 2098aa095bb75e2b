"""How well keypoints found once stand for keypoints found on every crop.

For random crops of full-size photographs: W from the canonical frame's keypoints, remapped, against W from the
keypoints of the crop itself; beside the noise floor, which is the crop's own W against that of the same crop
moved by one source pixel. Nothing is stored or compressed on the way, so that the remap alone is judged.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch

from kamim import geometry
from kamim import keypoints as kp
from kamim.detectors import detect_packed, detector
from kamim.weighting import counts_to_weights
from preprocess.decode import decode
from preprocess.sources import Item, Source

SEED = 0
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Setting:
    """resolution, crop_scale, w_ps and T of the comparison."""

    resolution: int = 192
    crop_scale: tuple[float, float] = (0.67, 1.0)
    patch_size: int = 8
    temperature: float = 0.25


def fidelity(
    source: Source, detectors: Sequence[str], setting: Setting, images: int, progress: Callable[[int, int], None]
) -> list[dict[str, Any]]:
    """One row per (detector, footprint): correlations of W and density, L1 of W / mean W, means of W.

    Images are taken evenly through the source. Raises ValueError where it has fewer than `images`.
    """
    if images > len(source.items):
        raise ValueError(f"--images {images}: --source has {len(source.items)}")
    chosen = np.linspace(0, len(source.items) - 1, images).astype(int)
    maps: dict[tuple[str, str], list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}
    for done, index in enumerate(chosen):
        for key, counts in _counts(source, source.items[index], int(index), detectors, setting).items():
            maps.setdefault(key, []).append(counts)
        progress(done + 1, images)
    return [
        {"detector": name, "footprint": footprint, **_compare(maps[name, footprint], setting)}
        for name, footprint in maps
    ]


def _counts(
    source: Source, item: Item, index: int, detectors: Sequence[str], setting: Setting
) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Cell counts of one random crop: cached, online, and online of the moved crop, by detector and footprint."""
    pixels = decode(source.read(item))
    height, width = pixels.shape[:2]
    frame = geometry.size_for_area(height, width, geometry.canonical_area(setting.resolution, setting.crop_scale))
    canonical = cv2.resize(pixels, frame[::-1], interpolation=cv2.INTER_LINEAR)
    box = geometry.crop_box(height, width, *setting.crop_scale, 3 / 4, 4 / 3, SEED, 0, index)
    flips = geometry.flips(SEED, 0, index)
    crop = _crop(pixels, box, flips, setting.resolution)
    moved = _crop(pixels, _moved(box, height, width), flips, setting.resolution)
    counts = {}
    for name in detectors:
        positions, groups = detect_packed(name, canonical, headroom=1 / setting.crop_scale[0])
        points = np.empty((len(positions), 2), np.int32)
        rules = detector(name).rules
        kept = kp.remap(
            positions, groups, *rules.arrays(), frame, (height, width), (*box, *flips), setting.resolution, points
        )
        found, again = (detector(name).detect(image).xy for image in (crop, moved))
        for footprint in kp.FOOTPRINTS:
            counts[name, footprint] = (
                _cells(points[:kept] / geometry.POSITION_UNIT, footprint, setting),
                _cells(found, footprint, setting),
                _cells(again, footprint, setting),
            )
    return counts


def _crop(pixels: np.ndarray, box: Box, flips: tuple[bool, bool], side: int) -> np.ndarray:
    """As the released code crops: bilinear, antialias off, straight from the full-size image, then flips."""
    top, left, height, width = box
    crop = cv2.resize(pixels[top : top + height, left : left + width], (side, side), interpolation=cv2.INTER_LINEAR)
    crop = crop[::-1] if flips[0] else crop
    return np.ascontiguousarray(crop[:, ::-1] if flips[1] else crop)


def _moved(box: Box, height: int, width: int) -> Box:
    """The box one pixel to the right, or else down, or else (it is the whole image) one pixel narrower."""
    top, left, h, w = box
    if left + w < width:
        return top, left + 1, h, w
    if left > 0:
        return top, left - 1, h, w
    if top + h < height:
        return top + 1, left, h, w
    if top > 0:
        return top - 1, left, h, w
    return top, left + 1, h, w - 1


def _cells(xy: np.ndarray, footprint: str, setting: Setting) -> np.ndarray:
    bitmap = kp.keypoint_map(xy, setting.resolution, setting.resolution, footprint)
    return kp.map_counts(bitmap, setting.patch_size)


def _compare(maps: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], setting: Setting) -> dict[str, float]:
    counts = [np.stack(kind) for kind in zip(*maps, strict=True)]
    cached, online, moved = (
        counts_to_weights(torch.from_numpy(c), setting.patch_size, setting.temperature).numpy().astype(np.float64)
        for c in counts
    )

    def correlation(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])

    def normalised_l1(a: np.ndarray, b: np.ndarray) -> float:
        means = (w.mean(axis=(1, 2), keepdims=True) for w in (a, b))
        return float(np.abs(a / next(means) - b / next(means)).mean())

    of_w, floor = correlation(cached, online), correlation(moved, online)
    return {
        "images": len(maps),
        "weight_correlation": of_w,
        "weight_correlation_floor": floor,
        "share_of_floor": of_w / floor,
        "density_correlation": correlation(counts[0], counts[1]),
        "density_correlation_floor": correlation(counts[2], counts[1]),
        "l1_of_normalised_weights": normalised_l1(cached, online),
        "l1_of_normalised_weights_floor": normalised_l1(moved, online),
        "mean_weight": float(cached.mean()),
        "mean_weight_online": float(online.mean()),
    }
