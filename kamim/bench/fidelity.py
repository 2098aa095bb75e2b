"""Measures how well cached keypoints approximate online keypoints, and stored pixels the original ones.

For random crops of full-size photographs, W from remapped keypoints of the canonical frames is compared with W from
keypoints detected on the crop. The noise floor is the crop's own W compared with that of the same crop moved by one
source pixel. Nothing is stored or compressed, so that only the remapping is measured. Pixels: kamim.bench.pixels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kamim import KamimError
from kamim.bench import originals
from kamim.bench.crops import PATCH_SIZE, RESOLUTION, SCALE, TEMPERATURE
from kamim.bench.pixels import INTERVAL, RESAMPLES, SEED, StoredImage, compare_pixels
from kamim.detectors import detect_packed, detector
from kamim.method import geometry
from kamim.method import keypoints as kp
from kamim.method.weighting import keypoint_weights
from kamim.storage.manifest import Job
from preprocess.plan import make_job
from preprocess.record import as_stored
from preprocess.resize import resize_plain
from preprocess.sources import Source


@dataclass(frozen=True)
class FidelityCase:
    """The resolution, crop_scale, w_ps and T of a comparison.

    frames: the number of canonical frames per image, or None for the detector's own number.
    """

    resolution: int = RESOLUTION
    crop_scale: tuple[float, float] = SCALE
    patch_size: int = PATCH_SIZE
    temperature: float = TEMPERATURE
    frames: int | None = None


def fidelity(
    source: Source,
    detectors: Sequence[str],
    setting: FidelityCase,
    images: int,
    crops: int,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Compares `crops` random crops of each of `images` images, spread evenly over the source.

    Returns keypoints: a row per (detector, footprint) with correlations of W and density, L1 of W / mean W, and means
    of W; and pixels: medians over the crops and over the `whole` images, in dB (PSNR) and as ratios (sharpness). An
    `_interval` is a 95 % bootstrap interval over images. Raises KamimError if the source has fewer than `images`.
    """
    if images > len(source.items):
        raise KamimError(f"images = {images}: {source.location} has {len(source.items)}")
    chosen = np.linspace(0, len(source.items) - 1, images).astype(int)
    job = make_job(
        "imagefolder",
        "train",
        source,
        detectors=detectors,
        container="zarr",
        resolution=setting.resolution,
        crop_scale=setting.crop_scale,
    )
    held: dict[str, list[int]] = {name: [] for name in detectors}
    stored: list[StoredImage] = []
    on_stored: dict[tuple[str, str], list[np.ndarray]] = {}
    maps: dict[tuple[str, str], list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}
    for done, index in enumerate(chosen):
        data, pixels = originals.read(source, source.items[index])
        image = StoredImage(job, data, pixels, int(index), crops)
        stored.append(image)
        frames = {name: _CachedKeypoints(job, pixels, name, setting) for name in detectors}
        for name in detectors:
            held[name].append(frames[name].bytes)
        for crop in range(crops):
            for key, counts in _counts(pixels, frames, crop, int(index), setting).items():
                maps.setdefault(key, []).append(counts)
            for name in detectors:
                xy = detector(name).detect(image.crop(crop)).xy
                for footprint in kp.FOOTPRINTS:
                    on_stored.setdefault((name, footprint), []).append(_cells(xy, footprint, setting))
        progress(done + 1, images)
    rows = [
        {
            "detector": name,
            "footprint": footprint,
            "bytes_per_image": float(np.mean(held[name])),
            **_compare(maps[name, footprint], crops, setting),
            "mean_weight_online_on_stored": float(_weights(np.stack(on_stored[name, footprint]), setting).mean()),
        }
        for name, footprint in maps
    ]
    return {"keypoints": rows, "pixels": compare_pixels(job, stored)}


class _CachedKeypoints:
    """A detector's keypoints on the canonical frames of an image. bytes: those that a store needs for them."""

    def __init__(self, job: Job, pixels: np.ndarray, name: str, setting: FidelityCase):
        self.size = np.array([pixels.shape[:2]])
        count = setting.frames or detector(name).frames
        sizes = geometry.canonical_frames(*pixels.shape[:2], setting.resolution, setting.crop_scale, count)
        self.frames = np.array(sizes)
        headroom = 1 / setting.crop_scale[0]
        self._packed = [detect_packed(name, resize_plain(pixels, size), headroom) for size in sizes]
        stored = (as_stored(job, name, *packed, size) for packed, size in zip(self._packed, sizes, strict=True))
        self.bytes = sum(rows.nbytes for rows, _ in stored)
        self._rules = detector(name).rules.arrays()

    def remapped(self, view: np.ndarray, side: int) -> np.ndarray:
        """Returns the keypoints' centres in the crop of `view`, in px: float [K, 2]."""
        (nearest,) = geometry.nearest_frames(self.frames[None], self.size, view[None], side)
        positions, groups = self._packed[nearest]
        points = np.empty((len(positions), 2), np.int32)
        kept = kp.remap(positions, groups, self._rules, self.frames[nearest], self.size[0], view, side, points)
        return points[:kept] / geometry.POSITION_UNIT


def _counts(
    pixels: np.ndarray, frames: Mapping[str, _CachedKeypoints], epoch: int, index: int, setting: FidelityCase
) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Returns cell counts of a random crop by detector and footprint: cached, online, and online of the moved crop."""
    height, width = pixels.shape[:2]
    (view,) = geometry.crop_views(
        np.array([[height, width]]), setting.crop_scale, geometry.CROP_RATIO, SEED, epoch, np.array([index])
    )
    crop = _crop(pixels, view, setting.resolution)
    moved = _crop(pixels, _moved(view, height, width), setting.resolution)
    counts = {}
    for name, keypoints in frames.items():
        remapped = keypoints.remapped(view, setting.resolution)
        xy = (remapped, *(detector(name).detect(image).xy for image in (crop, moved)))
        for footprint in kp.FOOTPRINTS:
            cached, online, of_moved = (_cells(points, footprint, setting) for points in xy)
            counts[name, footprint] = (cached, online, of_moved)
    return counts


def _crop(pixels: np.ndarray, view: np.ndarray, side: int) -> np.ndarray:
    """Crops as the released code does: bilinear, without antialiasing, from the full-size image, then flips."""
    top, left, height, width, flip_v, flip_h = view
    crop = resize_plain(pixels[top : top + height, left : left + width], (side, side))
    crop = crop[::-1] if flip_v else crop
    return np.ascontiguousarray(crop[:, ::-1] if flip_h else crop)


def _moved(view: np.ndarray, height: int, width: int) -> np.ndarray:
    """Returns the view moved by one pixel, horizontally if possible; of a whole image, one pixel narrower."""
    top, left, h, w, *_ = view.tolist()
    if w < width:
        by = (0, 1 if left + w < width else -1, 0, 0, 0, 0)
    elif h < height:
        by = (1 if top + h < height else -1, 0, 0, 0, 0, 0)
    else:
        by = (0, 1, 0, -1, 0, 0)
    return view + by


def _cells(xy: np.ndarray, footprint: str, setting: FidelityCase) -> np.ndarray:
    bitmap = kp.keypoint_map(xy, setting.resolution, setting.resolution, footprint)
    return kp.map_counts(bitmap, setting.patch_size)


def _compare(
    maps: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], crops: int, setting: FidelityCase
) -> dict[str, Any]:
    """Returns a row's measures. maps: counts of every crop, grouped by image."""
    counts = [np.stack(kind) for kind in zip(*maps, strict=True)]
    cached, online, moved = (_weights(of_kind, setting) for of_kind in counts)

    def correlation(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])

    def normalised_l1(a: np.ndarray, b: np.ndarray) -> float:
        means = (w.mean(axis=(1, 2), keepdims=True) for w in (a, b))
        return float(np.abs(a / next(means) - b / next(means)).mean())

    of_w, floor = correlation(cached, online), correlation(moved, online)
    return {
        "crops": len(maps),
        "weight_correlation": of_w,
        "weight_correlation_floor": floor,
        "share_of_floor": of_w / floor,
        "share_of_floor_interval": _share_interval(cached, online, moved, crops),
        "density_correlation": correlation(counts[0], counts[1]),
        "density_correlation_floor": correlation(counts[2], counts[1]),
        "l1_of_normalised_weights": normalised_l1(cached, online),
        "l1_of_normalised_weights_floor": normalised_l1(moved, online),
        "mean_weight": float(cached.mean()),
        "mean_weight_online": float(online.mean()),
    }


def _weights(counts: np.ndarray, setting: FidelityCase) -> np.ndarray:
    """Returns W, float64 [crops, g, g], of counts, int16 [crops, g, g]."""
    return keypoint_weights(counts, setting.patch_size, setting.temperature).astype(np.float64)


def _share_interval(cached: np.ndarray, online: np.ndarray, moved: np.ndarray, crops: int) -> list[float]:
    """Returns the 95 % bootstrap interval of the share of the floor; images are resampled with all their crops.

    Arguments are float64 [images * crops, g, g]. A resample adds the per-image sums that determine the correlation.
    """

    def sums(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Returns, per image, the number of cells and their sums of a, b, aa, bb and ab: [images, 6]."""
        a, b = (w.reshape(len(w) // crops, -1) for w in (a, b))
        return np.stack([np.full(len(a), a.shape[1]), *(x.sum(1) for x in (a, b, a * a, b * b, a * b))], axis=1)

    def correlation(totals: np.ndarray) -> np.ndarray:
        n, a, b, aa, bb, ab = totals.T
        return np.asarray((n * ab - a * b) / np.sqrt((n * aa - a * a) * (n * bb - b * b)))

    images = len(cached) // crops
    draws = np.random.default_rng(SEED).multinomial(images, np.full(images, 1 / images), RESAMPLES)
    shares = correlation(draws @ sums(cached, online)) / correlation(draws @ sums(moved, online))
    return [float(bound) for bound in np.percentile(shares, INTERVAL)]
