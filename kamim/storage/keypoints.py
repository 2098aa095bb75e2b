"""The keypoints of one detector in a store, and the checks of those of single images."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kamim import KamimError
from kamim.method.geometry import MAX_FRAME_SIDE
from kamim.method.keypoints import Rules
from kamim.storage import gaps, mmap_array
from kamim.storage.manifest import Job

PAGE_ROWS = 1 << 20


class KeypointArray(NamedTuple):
    """The paged array of a detector's keypoints."""

    name: str
    dtype: type[np.generic]
    row_shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """The bytes of a row."""
        return np.dtype(self.dtype).itemsize * math.prod(self.row_shape)


POSITIONS = KeypointArray("positions", np.uint16, (2,))
GAPS = KeypointArray("gaps", np.uint8, ())


def keypoint_array(job: Job, rules: Rules) -> KeypointArray:
    """Returns the array that holds the keypoints of a detector with these rules in the job's store."""
    return GAPS if job.whole_pixels == "gaps" and rules.in_reading_order else POSITIONS


class Keypoints:
    """Read-only keypoints of one detector, of N images on V frames in G groups.

    frame: uint16 [N, V, 2] (height, width). array: POSITIONS or GAPS, whose rows hold them, see keypoint_array.
    job: that of their store, None without one. Raises KamimError, naming the file and the fault, if they are damaged.
    """

    def __init__(self, path: Path, detector: str, rules: Rules, array: KeypointArray, job: Job | None = None):
        self.path = path.parent
        self.job = job
        self.rules = rules
        self.array = array
        folder = path / detector
        mmap_array.check_group(path, {})
        mmap_array.check_group(folder, {})
        self.frame = mmap_array.read(folder / "frame", np.uint16, (None, None, 2))
        shape = self.frame.shape[:2]
        self._start = mmap_array.read(folder / "start", np.int64, shape)
        self._counts = mmap_array.read(folder / "counts", np.uint32, (*shape, len(rules.groups)))
        self._total = np.zeros(shape, np.int64)
        for group in range(len(rules.groups)):  # several times as fast as a sum over a short last axis
            self._total += self._counts[..., group]
        self._rows = mmap_array.ArrayReader(folder / array.name, array.dtype, array.row_shape)

    def check_crops(self, images: int, resolution: int, crop_scale: tuple[float, float] | None) -> None:
        """Raises KamimError if the keypoints are not of `images` images, or their frames are for other crops.

        crop_scale: see Job.other_crops.
        """
        if images != len(self.frame):
            raise KamimError(f"{self.path}: has keypoints of {len(self.frame)} images, the loader's store {images}")
        if self.job is not None and (difference := self.job.other_crops(resolution, crop_scale)):
            raise KamimError(
                f"{self.path}: its keypoints are for {difference}; preprocess with --resolution and --crop-scale to "
                "match, or count with OnlineCounts"
            )

    @property
    def held(self) -> np.ndarray:
        """The rows of each image on all frames, 0 for an image without keypoints: int64 [N]."""
        return np.asarray(self._total.sum(axis=1))

    def image(self, index: int, frame: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Returns the keypoints of one frame of an image: (positions uint16 [K, 2], counts int [G]).

        Raises IndexError if the store is damaged and gaps lead out of the frame.
        """
        rows, counts = self.rows(index, frame)
        if self.array == POSITIONS:
            return rows, counts
        positions = gaps.decode(rows, *self.frame[index, frame].tolist())
        return positions, np.array([len(positions)])

    def rows(self, index: int, frame: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the keypoints of one frame of an image as stored: rows of the array, and their counts uint32 [G]."""
        start, total = self._start[index, frame], self._total[index, frame]
        return self._rows.rows(int(start), int(total)), self._counts[index, frame]

    def addresses(self, indices: np.ndarray, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns (addresses uint64 [n], counts uint32 [n, G]) for images `indices` (int [n]) on `frames` (int [n]).

        An address points to the rows that `rows` returns, and is valid as long as this object exists. Raises
        IndexError if the store is damaged and rows lie outside its files.
        """
        totals = self._total[indices, frames]
        return self._rows.addresses(self._start[indices, frames], totals), self._counts[indices, frames]

    def will_need(self, indices: np.ndarray) -> None:
        """Announces that the keypoints of images (int [n]), on all frames, will be read soon. See read_ahead."""
        self._rows.will_need(self._start[indices], self._total[indices])

    def in_range(self) -> np.ndarray:
        """Returns whether each image's rows lie within the files: bool [N]."""
        return np.asarray(self._rows.holds(self._start, self._total).all(axis=1))


def keypoint_faults(keypoints: Keypoints) -> dict[str, np.ndarray]:
    """Returns the possible faults of the keypoints of single images and which images have them, bool [N]."""
    outside = np.asarray((keypoints.frame < 1) | (keypoints.frame > MAX_FRAME_SIDE))
    return {
        "lies outside its file": ~keypoints.in_range(),
        f"has a frame that is not 1 to {MAX_FRAME_SIDE} px a side": np.asarray(outside.any(axis=(1, 2))),
    }


def write_keypoints(
    path: Path,
    detector: str,
    array: KeypointArray,
    images: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]],
    total_rows: int,
) -> None:
    """Writes keypoints.zarr/<detector> from (rows, counts, frames) of every image.

    rows: of the array, one frame after the other; counts: int64 [V, G], of rows; frames: uint16 [V, 2].
    """
    group = mmap_array.create_group(path / detector)
    writer = mmap_array.ArrayWriter(
        group, array.name, array.row_shape, array.dtype, mmap_array.page_rows(total_rows, PAGE_ROWS)
    )
    starts, all_counts, all_frames = [], [], []
    for rows, counts, frames in images:
        ends = np.cumsum(counts.sum(axis=1))
        starts.append([writer.append(part) for part in np.split(rows, ends[:-1])])
        all_counts.append(counts)
        all_frames.append(frames)
    writer.close()
    mmap_array.create(group, "start", np.array(starts, np.int64))
    mmap_array.create(group, "counts", np.stack(all_counts).astype(np.uint32))
    mmap_array.create(group, "frame", np.stack(all_frames).astype(np.uint16))
