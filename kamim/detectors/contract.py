"""The interface of a detector."""

from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np

from kamim.method.keypoints import Rules


@dataclass(frozen=True)
class DetectedKeypoints:
    """Keypoints of one image, in the detector's own order.

    xy: float32 [K, 2], pixel centres in px. group: int64 [K], index into the detector's Rules.groups.
    response: float32 [K], larger is stronger.
    """

    xy: np.ndarray
    group: np.ndarray
    response: np.ndarray


class Detector(Protocol):
    """An object that detects keypoints on an RGB image."""

    @property
    def rules(self) -> Rules:
        """The rules for which keypoints of a larger frame the detector would also report on a crop."""
        ...

    @property
    def frames(self) -> int:
        """The number of canonical frames on which keypoints are stored (geometry.canonical_frames)."""
        ...

    def detect(self, rgb: np.ndarray, headroom: float = 1.0, key: str = "") -> DetectedKeypoints:
        """Returns the keypoints of rgb (uint8 [H, W, 3]). Several threads may call it at once.

        headroom >= 1 multiplies the detector's own limit on the number of keypoints, for frames of which
        a crop shows only a part. key: the image's path within its source, if it has one.
        """
        ...


def grey(rgb: np.ndarray) -> np.ndarray:
    """Returns the grey that OpenCV's detectors see, uint8 [H, W]: 0.114 R + 0.587 G + 0.299 B (see kamim.detectors)."""
    return cv2.cvtColor(rgb, cv2.COLOR_BGR2GRAY)
