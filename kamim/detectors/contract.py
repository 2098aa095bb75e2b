"""What a detector is, to the rest of kamim."""

from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np

from kamim.method.keypoints import Rules


@dataclass(frozen=True)
class Found:
    """Keypoints of one image, in the detector's own order.

    xy: float32 [K, 2], pixel centres in px. group: int64 [K], index into the detector's Rules.groups.
    response: float32 [K], larger is stronger.
    """

    xy: np.ndarray
    group: np.ndarray
    response: np.ndarray


class Detector(Protocol):
    """Anything that finds keypoints on an RGB image."""

    @property
    def rules(self) -> Rules:
        """Which keypoints of a larger frame it would still report on a crop."""
        ...

    @property
    def frames(self) -> int:
        """On how many canonical frames of an image its keypoints are stored: see geometry.canonical_frames."""
        ...

    def detect(self, rgb: np.ndarray, headroom: float = 1.0) -> Found:
        """Keypoints of rgb (uint8 [H, W, 3]). Called from several threads at once.

        headroom >= 1 multiplies the detector's own limit on the number of keypoints, for frames from
        which a crop will take only a part.
        """
        ...


def grey(rgb: np.ndarray) -> np.ndarray:
    """uint8 [H, W], the grey that OpenCV's detectors see: 0.114 R + 0.587 G + 0.299 B (see kamim.detectors)."""
    return cv2.cvtColor(rgb, cv2.COLOR_BGR2GRAY)
