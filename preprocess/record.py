"""What a store keeps of one image: the image made small, and its keypoints at the canonical scale.

A component's share of any number of images is its rows: named arrays, joined along their first axis.

    images      data uint8 [bytes], length int64 [N], size int64 [N, 2] (height, width) as stored,
                frame uint16 [N, 2] (height, width) of the canonical frame, label int64 [N]
    detectors   positions uint16 [K, 2], counts int64 [N, groups], see kamim.detectors.detect_packed
"""

from collections.abc import Sequence

import cv2
import numpy as np
import simplejpeg

from kamim import geometry
from kamim.detectors import detect_packed, detector
from kamim.store import IMAGES, Job

Rows = dict[str, np.ndarray]


def record(job: Job, rgb: np.ndarray, label: int, components: Sequence[str]) -> dict[str, Rows]:
    """The rows of one image (RGB uint8 [H, W, 3]), by component."""
    made: dict[str, Rows] = {}
    frame = canonical(job, rgb)
    for component in components:
        if component == IMAGES:
            data, size = stored_image(job, rgb)
            made[component] = image_rows(data, size, frame.shape[:2], label)
        else:
            made[component] = keypoint_rows(*keypoints(job, component, frame))
    return made


def image_rows(data: np.ndarray, size: Sequence[int], frame: Sequence[int], label: int) -> Rows:
    """One image as rows of the component `images`."""
    return {
        "data": data, "length": np.array([len(data)], np.int64), "size": np.array([size], np.int64),
        "frame": np.array([frame], np.uint16), "label": np.array([label], np.int64),
    }  # fmt: skip


def keypoint_rows(positions: np.ndarray, counts: np.ndarray) -> Rows:
    """One image's keypoints as rows of a detector's component."""
    return {"positions": positions, "counts": counts.reshape(1, -1).astype(np.int64)}


def join(component: str, parts: Sequence[Rows]) -> Rows:
    """The rows of any number of images, in order, from those of each."""
    if component == IMAGES:
        none = image_rows(np.empty(0, np.uint8), (0, 0), (0, 0), 0)
    else:
        none = keypoint_rows(np.empty((0, 2), np.uint16), np.zeros(len(detector(component).rules.groups)))
    return {name: np.concatenate([empty[:0], *(part[name] for part in parts)]) for name, empty in none.items()}


def stored_image(job: Job, rgb: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """The image as stored, never enlarged: its bytes (uint8 [n], JPEG or raw) and its (height, width)."""
    pixels = stored_pixels(job, rgb)
    return encoded(job, pixels), (pixels.shape[0], pixels.shape[1])


def stored_pixels(job: Job, rgb: np.ndarray) -> np.ndarray:
    """The image at its stored size: uint8 [h, w, 3]."""
    height, width = rgb.shape[:2]
    return _resize(rgb, geometry.stored_size(height, width, geometry.stored_area(job.resolution, job.crop_scale)))


def encoded(job: Job, pixels: np.ndarray) -> np.ndarray:
    """The bytes that stand for pixels in the store: uint8 [n], JPEG or raw."""
    if job.encoding == "raw":
        return pixels.reshape(-1)
    jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), job.quality, colorsubsampling="420")
    return np.frombuffer(jpeg, np.uint8)


def canonical(job: Job, rgb: np.ndarray) -> np.ndarray:
    """The image at the canonical scale, where its keypoints are found: uint8 [h, w, 3]."""
    height, width = rgb.shape[:2]
    area = geometry.canonical_area(job.resolution, job.crop_scale)
    return _resize(rgb, geometry.size_for_area(height, width, area))


def keypoints(job: Job, name: str, frame: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Packed keypoints of a canonical frame, see kamim.detectors.detect_packed."""
    return detect_packed(name, frame, 1 / job.crop_scale[0])


def _resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear, antialias off, as the released code resizes."""
    if pixels.shape[:2] == size:
        return pixels
    return cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_LINEAR)
