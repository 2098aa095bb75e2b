"""FAST, SIFT and ORB with OpenCV's defaults, and what each cannot see at an image's border.

Every detector takes an RGB array as it is. OpenCV reads three channels as BGR, so its grey is
0.114 R + 0.587 G + 0.299 B; the released code does the same, and equal keypoints need equal greys.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import cv2
import numpy as np

from kamim.keypoints import Group, Rules, quantise


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

    def detect(self, rgb: np.ndarray, headroom: float = 1.0) -> Found:
        """Keypoints of rgb (uint8 [H, W, 3]).

        headroom >= 1 multiplies the detector's own limit on the number of keypoints, for frames from
        which a crop will take only a part.
        """
        ...


def _found(keypoints: tuple[cv2.KeyPoint, ...], group: np.ndarray) -> Found:
    xy = np.array([k.pt for k in keypoints], np.float32).reshape(-1, 2)
    return Found(xy, group, np.array([k.response for k in keypoints], np.float32))


class Fast:
    """FAST-9-16, threshold 10, non-maximum suppression (Rosten and Drummond; the paper's text says 12 contiguous)."""

    rules = Rules((Group(border=3.0),), snap=True)

    def detect(self, rgb: np.ndarray, headroom: float = 1.0) -> Found:
        """See Detector; FAST has no limit on the number."""
        keypoints = cv2.FastFeatureDetector_create().detect(rgb)  # type: ignore[attr-defined]
        return _found(keypoints, np.zeros(len(keypoints), np.int64))


class Sift:
    """SIFT (Lowe). A group is an octave; octave -1 is the doubled image; the border is 5 px of the octave."""

    OCTAVES = range(-1, 6)
    rules = Rules(tuple(Group(border=5.0 * 2.0**octave) for octave in OCTAVES))

    def detect(self, rgb: np.ndarray, headroom: float = 1.0) -> Found:
        """See Detector; SIFT has no limit on the number."""
        keypoints = cv2.SIFT_create().detect(rgb, None)  # type: ignore[attr-defined]
        packed = np.array([k.octave for k in keypoints], np.int64).reshape(-1)
        octave = ((packed & 255) ^ 128) - 128  # the low byte, signed
        return _found(keypoints, np.clip(octave, self.OCTAVES[0], self.OCTAVES[-1]) - self.OCTAVES[0])


class Orb:
    """ORB (Rublee et al.), 500 features on 8 levels of scale 1.2. A group is a level.

    Border: 31 px of the level. Cap: the level's share of the 500, as OpenCV divides them.
    """

    FEATURES, LEVELS, SCALE, EDGE = 500, 8, 1.2, 31

    @functools.cached_property
    def rules(self) -> Rules:
        """One group per level, see the class."""
        first = self.FEATURES * (1 - 1 / self.SCALE) / (1 - (1 / self.SCALE) ** self.LEVELS)
        caps = [round(first / self.SCALE**level) for level in range(self.LEVELS - 1)]
        caps.append(self.FEATURES - sum(caps))
        return Rules(tuple(Group(self.EDGE * self.SCALE**level, cap) for level, cap in enumerate(caps)))

    def detect(self, rgb: np.ndarray, headroom: float = 1.0) -> Found:
        """See Detector."""
        orb = cv2.ORB_create(nfeatures=round(self.FEATURES * headroom))  # type: ignore[attr-defined]
        sees = min(rgb.shape[:2]) > 2 * self.EDGE  # on an image of one row OpenCV would fail, not find nothing
        keypoints = orb.detect(rgb, None) if sees else ()
        return _found(keypoints, np.array([k.octave for k in keypoints], np.int64).reshape(-1))


DETECTORS: Mapping[str, Detector] = MappingProxyType({"fast": Fast(), "sift": Sift(), "orb": Orb()})


def detector(name: str) -> Detector:
    """The detector called `name`. Raises ValueError for an unknown one."""
    if name not in DETECTORS:
        raise ValueError(f"detector = {name!r}: must be one of {', '.join(DETECTORS)}")
    return DETECTORS[name]


def detect_packed(name: str, rgb: np.ndarray, headroom: float) -> tuple[np.ndarray, np.ndarray]:
    """Detects and packs for the store: (positions uint16 [K, 2] (x, y) in 1/16 px, counts int64 [groups]).

    Sorted by group; within a capped group strongest first (ties by y, x), else by y, x with duplicates
    dropped (a footprint drawn twice is the same footprint). Equal input gives equal bytes.
    """
    rules = detector(name).rules
    found = detector(name).detect(rgb, headroom)
    points = np.clip(quantise(found.xy), 0, np.iinfo(np.uint16).max)
    kept: list[np.ndarray] = []
    for number, group in enumerate(rules.groups):
        of_group = found.group == number
        xy, response = points[of_group], found.response[of_group]
        if group.cap:
            kept.append(xy[np.lexsort((xy[:, 0], xy[:, 1], -response))])
        else:
            kept.append(np.unique(xy[:, ::-1], axis=0)[:, ::-1])
    counts = np.array([len(xy) for xy in kept], np.int64)
    return np.concatenate(kept).astype(np.uint16), counts
