"""Harris and Shi-Tomasi corners (cv2.goodFeaturesToTrack), registered as entry points like plug-ins."""

import cv2
import numpy as np


class Corners:
    """Detects local maxima of a measure of the 3 x 3 px structure tensor, down to 1 % of the image's largest.

    harris: the measure is det - 0.04 trace^2 (Harris and Stephens), otherwise the smaller eigenvalue (Shi and Tomasi).
    """

    grey, snap, border = True, True, 1.0

    def __init__(self, harris: bool):
        self._harris = harris

    def detect(self, grey: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns (xy float32 [K, 2], response float32 [K]) of grey (uint8 [H, W]), strongest first."""
        xy, quality = cv2.goodFeaturesToTrackWithQuality(  # type: ignore[call-overload]
            grey, maxCorners=0, qualityLevel=0.01, minDistance=0, mask=None, useHarrisDetector=self._harris
        )
        if xy is None:
            return np.empty((0, 2), np.float32), np.empty(0, np.float32)
        return xy.reshape(-1, 2), quality.reshape(-1)


harris = Corners(harris=True)
shi_tomasi = Corners(harris=False)
