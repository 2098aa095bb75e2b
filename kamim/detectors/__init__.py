"""The registry of detectors: FAST, SIFT and ORB with OpenCV's defaults, and those that other packages register.

Every detector takes an RGB array. OpenCV reads three channels as BGR, so its grey is
0.114 R + 0.587 G + 0.299 B; the released code does the same, and equal keypoints need equal greys.
"""

import functools
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from kamim import KamimError
from kamim.detectors import plugins
from kamim.detectors.contract import DetectedKeypoints, Detector
from kamim.detectors.fast import Fast
from kamim.detectors.opencv import Orb, Sift
from kamim.method.keypoints import quantise

__all__ = ["DETECTORS", "DetectedKeypoints", "Detector", "detect_packed", "detector", "names", "origin"]

DETECTORS: Mapping[str, Detector] = MappingProxyType({"fast": Fast(), "sift": Sift(), "orb": Orb()})


def names() -> tuple[str, ...]:
    """Returns the names of all detectors, the built-in ones first. Loads none."""
    return (*DETECTORS, *(name for name in plugins.names() if name not in DETECTORS))


@functools.cache
def detector(name: str) -> Detector:
    """Returns the detector `name`. Raises KamimError if it is unknown, or a plug-in that cannot be used."""
    if name in DETECTORS:
        return DETECTORS[name]
    if name not in names():
        raise KamimError(f"detector = {name!r}: must be one of {', '.join(names())}")
    return plugins.load(name)


def origin(name: str) -> str:
    """Returns the name and version of the distribution that registers a detector, or "" for kamim's own."""
    return "" if name in DETECTORS else plugins.origin(name)


def detect_packed(name: str, rgb: np.ndarray, headroom: float, key: str = "") -> tuple[np.ndarray, np.ndarray]:
    """Detects keypoints in the store's form: (positions uint16 [K, 2] (x, y) in 1/16 px, counts int64 [groups]).

    Positions are sorted by group; within a group with a cap strongest first (ties by y, x), otherwise by y, x without
    duplicates (drawing a footprint twice changes nothing). Equal input gives equal bytes.
    """
    rules = detector(name).rules
    keypoints = detector(name).detect(rgb, headroom, key)
    points = np.clip(quantise(keypoints.xy), 0, np.iinfo(np.uint16).max).astype(np.uint16, order="C")
    keys = points.view(np.uint32)[:, 0]  # y above x; integers sort far faster than rows
    kept: list[np.ndarray] = []
    for number, group in enumerate(rules.groups):
        in_group = keypoints.group == number
        group_keys = keys[in_group]
        if group.cap:
            kept.append(group_keys[np.lexsort((group_keys, -keypoints.response[in_group]))])
        else:
            group_keys.sort()
            first = np.ones(len(group_keys), np.bool_)
            np.not_equal(group_keys[1:], group_keys[:-1], out=first[1:])
            kept.append(group_keys[first])
    counts = np.array([len(group_keys) for group_keys in kept], np.int64)
    return np.concatenate(kept).view(np.uint16).reshape(-1, 2), counts
