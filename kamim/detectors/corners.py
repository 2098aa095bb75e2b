"""Harris and Shi-Tomasi corners (cv2.goodFeaturesToTrack), registered as any other package's detectors are."""

import cv2
import numpy as np


class Corners:
    """Local maxima of a measure of the 3 x 3 px structure tensor, down to a hundredth of the image's largest.

    harris: det - 0.04 trace^2 (Harris and Stephens), else the smaller eigenvalue (Shi and Tomasi).
    """

    grey, snap, border = True, True, 1.0

    def __init__(self, harris: bool):
        self._harris = harris

    def detect(self, grey: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(xy float32 [K, 2], response float32 [K]) of uint8 [H, W], strongest first."""
        found, quality = cv2.goodFeaturesToTrackWithQuality(  # type: ignore[call-overload]
            grey, maxCorners=0, qualityLevel=0.01, minDistance=0, mask=None, useHarrisDetector=self._harris
        )
        if found is None:
            return np.empty((0, 2), np.float32), np.empty(0, np.float32)
        return found.reshape(-1, 2), quality.reshape(-1)


harris = Corners(harris=True)
shi_tomasi = Corners(harris=False)
