"""SIFT and ORB, OpenCV's, with its defaults; and its FAST, which the kernel of kamim.detectors.fast equals."""

import functools

import cv2
import numpy as np

from kamim.detectors.contract import DetectedKeypoints
from kamim.method.keypoints import Group, Rules


def _detected(keypoints: tuple[cv2.KeyPoint, ...], group: np.ndarray) -> DetectedKeypoints:
    xy = np.asarray(cv2.KeyPoint_convert(keypoints), np.float32).reshape(-1, 2)  # type: ignore[attr-defined]
    return DetectedKeypoints(xy, group, np.array([k.response for k in keypoints], np.float32))


def fast(rgb: np.ndarray) -> DetectedKeypoints:
    """OpenCV's FAST: the keypoints of kamim.detectors.fast bit for bit, slower, without a compiled loop."""
    keypoints = cv2.FastFeatureDetector_create().detect(rgb)  # type: ignore[attr-defined]
    return _detected(keypoints, np.zeros(len(keypoints), np.int64))


class Sift:
    """SIFT (Lowe). A group is an octave; octave -1 is the image at twice its size; the border is 5 px of the octave."""

    OCTAVES = range(-1, 6)
    rules = Rules(tuple(Group(border=5.0 * 2.0**octave) for octave in OCTAVES))
    frames = 2

    def detect(self, rgb: np.ndarray, headroom: float = 1.0, key: str = "") -> DetectedKeypoints:
        """See Detector. SIFT has no limit on the number of keypoints."""
        keypoints = cv2.SIFT_create().detect(rgb, None)  # type: ignore[attr-defined]
        packed = np.array([k.octave for k in keypoints], np.int64).reshape(-1)
        octave = ((packed & 255) ^ 128) - 128  # the low byte, signed
        return _detected(keypoints, np.clip(octave, self.OCTAVES[0], self.OCTAVES[-1]) - self.OCTAVES[0])


class Orb:
    """ORB (Rublee et al.), 500 features on 8 levels of scale 1.2. A group is a level.

    The border is 31 px of the level, the cap is the level's share of the 500, divided as in OpenCV.
    """

    FEATURES, LEVELS, SCALE, EDGE = 500, 8, 1.2, 31
    frames = 1

    @functools.cached_property
    def rules(self) -> Rules:
        """One group per level; see the class."""
        first = self.FEATURES * (1 - 1 / self.SCALE) / (1 - (1 / self.SCALE) ** self.LEVELS)
        caps = [round(first / self.SCALE**level) for level in range(self.LEVELS - 1)]
        caps.append(self.FEATURES - sum(caps))
        return Rules(tuple(Group(self.EDGE * self.SCALE**level, cap) for level, cap in enumerate(caps)))

    def detect(self, rgb: np.ndarray, headroom: float = 1.0, key: str = "") -> DetectedKeypoints:
        """See Detector."""
        orb = cv2.ORB_create(nfeatures=round(self.FEATURES * headroom))  # type: ignore[attr-defined]
        larger = min(rgb.shape[:2]) > 2 * self.EDGE  # OpenCV raises on an image of one row
        keypoints = orb.detect(rgb, None) if larger else ()
        return _detected(keypoints, np.array([k.octave for k in keypoints], np.int64).reshape(-1))
