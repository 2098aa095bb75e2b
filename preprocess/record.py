"""The record of one image in a store: the image, usually shrunk, and its keypoints on its canonical frames.

A component stores any number of images as rows: named arrays, joined along their first axis.

    images      data uint8 [bytes], length int64 [N], size int64 [N, 2] (height, width) as stored, label int64 [N]
    detectors   positions uint16 [K, 2] or gaps uint8 [B], see Job.keypoint_array, an image's frames' one after the
                other; counts int64 [N, V, groups] of their rows; frame uint16 [N, V, 2] (height, width), see
                geometry.canonical_frames
"""

import functools
from collections.abc import Sequence

import numpy as np
import simplejpeg

from kamim.detectors import detect_packed, detector
from kamim.method import geometry
from kamim.method.colour import to_planes
from kamim.storage import gaps
from kamim.storage.keypoints import GAPS, KeypointArray, keypoint_array
from kamim.storage.manifest import IMAGES, Job
from preprocess.decode import decode_plain_jpeg
from preprocess.resize import resize_antialiased, resize_plain

Rows = dict[str, np.ndarray]

ORIGINAL_QUALITY = 95  # JPEG quality, without chroma subsampling, of originals that are not plain JPEG files


def record(
    job: Job, data: bytes | np.ndarray, rgb: np.ndarray, label: int, components: Sequence[str], key: str = ""
) -> dict[str, Rows]:
    """Returns the rows of one image, by component. data: from the source; rgb: decoded, uint8 [H, W, 3].

    key: its path within the source, for detectors that take it.
    """
    resized = functools.cache(lambda size: resize_plain(rgb, size))  # detectors share frames
    rows: dict[str, Rows] = {}
    for component in components:
        if component == IMAGES:
            rows[component] = image_rows(*stored_image(job, data, rgb), label)
        else:
            sizes = frame_sizes(job, component, rgb)
            stored = [stored_keypoints(job, component, resized(size), key) for size in sizes]
            rows[component] = keypoint_rows(_array(job, component), stored, np.array(sizes))
    return rows


def image_rows(data: np.ndarray, size: Sequence[int], label: int) -> Rows:
    """Returns one image as rows of the component `images`."""
    return {
        "data": data,
        "length": np.array([len(data)], np.int64),
        "size": np.array([size], np.int64),
        "label": np.array([label], np.int64),
    }


def keypoint_rows(array: KeypointArray, per_frame: Sequence[tuple[np.ndarray, np.ndarray]], frames: np.ndarray) -> Rows:
    """Returns one image's keypoints as rows of a detector's component.

    array: POSITIONS or GAPS. per_frame: see stored_keypoints. frames: int [V, 2], their (height, width).
    """
    rows, counts = zip(*per_frame, strict=True)
    return {
        array.name: np.concatenate(rows),
        "counts": np.stack(counts)[None].astype(np.int64),
        "frame": frames[None].astype(np.uint16),
    }


def _array(job: Job, name: str) -> KeypointArray:
    return keypoint_array(job, detector(name).rules)


def join(parts: Sequence[Rows], none: Rows) -> Rows:
    """Joins the rows of images, in order; without any, returns `none`."""
    parts = parts or [none]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def no_rows(job: Job, component: str) -> Rows:
    """Returns a component's rows of zero images, with the usual types and shapes."""
    if component == IMAGES:
        return no_images()
    detects = detector(component)
    return no_keypoints(_array(job, component), len(detects.rules.groups), detects.frames)


def no_images() -> Rows:
    """Returns the component `images` of zero images."""
    return {name: rows[:0] for name, rows in image_rows(np.empty(0, np.uint8), (0, 0), 0).items()}


def no_keypoints(array: KeypointArray, groups: int, frames: int) -> Rows:
    """Returns a detector's component of zero images."""
    none = np.empty((0, *array.row_shape), array.dtype), np.zeros(groups)
    rows_of_one = keypoint_rows(array, [none] * frames, np.zeros((frames, 2)))
    return {name: rows[:0] for name, rows in rows_of_one.items()}


def stored_image(job: Job, data: bytes | np.ndarray, rgb: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """Returns the image as stored, never enlarged: its bytes (uint8 [n], see encoded) and its (height, width)."""
    if job.encoding == "original":
        return original(data, rgb), (rgb.shape[0], rgb.shape[1])
    pixels = stored_pixels(job, rgb)
    return encoded(job, pixels), (pixels.shape[0], pixels.shape[1])


def original(data: bytes | np.ndarray, rgb: np.ndarray) -> np.ndarray:
    """Returns the bytes of a plain JPEG file unchanged; pixels of anything else (PNG, CMYK) as JPEG: uint8 [n].

    Converting at quality 95 without chroma subsampling keeps stores uniform: each of their images is a JPEG.
    """
    plain = isinstance(data, bytes) and decode_plain_jpeg(data) is not None
    jpeg = (
        data if plain else simplejpeg.encode_jpeg(np.ascontiguousarray(rgb), ORIGINAL_QUALITY, colorsubsampling="444")
    )
    return np.frombuffer(jpeg, np.uint8)


def stored_pixels(job: Job, rgb: np.ndarray) -> np.ndarray:
    """Returns the image at its stored size: uint8 [h, w, 3]."""
    height, width = rgb.shape[:2]
    size = geometry.stored_size(height, width, geometry.stored_area(job.resolution, job.crop_scale))
    return resize_antialiased(rgb, size) if job.resize == "bicubic" else resize_plain(rgb, size)


def encoded(job: Job, pixels: np.ndarray) -> np.ndarray:
    """Encodes pixels of the stored size in the job's encoding: uint8 [n]."""
    if job.encoding == "raw":
        return pixels.reshape(-1)
    if job.encoding == "yuv420":
        return to_planes(np.ascontiguousarray(pixels))
    jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), job.quality, colorsubsampling="420")
    return np.frombuffer(jpeg, np.uint8)


def frame_sizes(job: Job, name: str, rgb: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Returns the (height, width) of the canonical frames on which a detector runs."""
    return geometry.canonical_frames(*rgb.shape[:2], job.resolution, job.crop_scale, detector(name).frames)


def stored_keypoints(job: Job, name: str, frame: np.ndarray, key: str = "") -> tuple[np.ndarray, np.ndarray]:
    """Detects the keypoints of a canonical frame (uint8 [H, W, 3]) and returns them as stored, see as_stored."""
    return as_stored(job, name, *detect_packed(name, frame, 1 / job.crop_scale[0], key), frame.shape[:2])


def as_stored(
    job: Job, name: str, positions: np.ndarray, counts: np.ndarray, size: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the keypoints of a frame of size (height, width) as rows of a store's array, and counts of its rows.

    positions, counts: see kamim.detectors.detect_packed.
    """
    if _array(job, name) != GAPS:
        return positions, counts
    code = gaps.encode(positions, *size)
    return code, np.array([len(code)])
