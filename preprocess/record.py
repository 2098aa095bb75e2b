"""What a store keeps of one image: the image made small, and its keypoints at the canonical scale."""

from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg

from kamim import geometry
from kamim.detectors import detect_packed
from kamim.store import Job


@dataclass(frozen=True)
class Record:
    """One image of the store."""

    data: np.ndarray  # uint8 [n]
    size: tuple[int, int]  # (height, width) as stored
    frame: tuple[int, int]  # (height, width) of the canonical frame
    keypoints: list[tuple[np.ndarray, np.ndarray]]  # per detector: positions, counts


def record(job: Job, rgb: np.ndarray) -> Record:
    """The record of an image, RGB uint8 [H, W, 3]."""
    data, size = stored_image(job, rgb)
    frame = canonical(job, rgb)
    return Record(data, size, (frame.shape[0], frame.shape[1]), [keypoints(job, name, frame) for name in job.detectors])


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
