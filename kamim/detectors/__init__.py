"""Detectors by name: FAST, SIFT and ORB with OpenCV's defaults, and those that other packages register.

Every detector takes an RGB array as it is. OpenCV reads three channels as BGR, so its grey is
0.114 R + 0.587 G + 0.299 B; the released code does the same, and equal keypoints need equal greys.
"""

import functools
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from kamim import KamimError
from kamim.detectors import plugins
from kamim.detectors.contract import Detector, Found
from kamim.detectors.fast import Fast
from kamim.detectors.opencv import Orb, Sift
from kamim.method.keypoints import quantise

__all__ = ["DETECTORS", "Detector", "Found", "detect_packed", "detector", "names", "origin"]

DETECTORS: Mapping[str, Detector] = MappingProxyType({"fast": Fast(), "sift": Sift(), "orb": Orb()})


def names() -> tuple[str, ...]:
    """Every detector there is, the built-in ones first. Loads none."""
    return (*DETECTORS, *(name for name in plugins.names() if name not in DETECTORS))


@functools.cache
def detector(name: str) -> Detector:
    """The detector called `name`. Raises ValueError for an unknown one, and for a plug-in that is none."""
    if name in DETECTORS:
        return DETECTORS[name]
    if name not in names():
        raise KamimError(f"detector = {name!r}: must be one of {', '.join(names())}")
    return plugins.load(name)


def origin(name: str) -> str:
    """Which code a detector is: the distribution that registers it, and its version; kamim's own have none."""
    return "" if name in DETECTORS else plugins.origin(name)


def detect_packed(name: str, rgb: np.ndarray, headroom: float) -> tuple[np.ndarray, np.ndarray]:
    """Detects and packs for the store: (positions uint16 [K, 2] (x, y) in 1/16 px, counts int64 [groups]).

    Sorted by group; within a capped group strongest first (ties by y, x), else by y, x with duplicates
    dropped (a footprint drawn twice is the same footprint). Equal input gives equal bytes.
    """
    rules = detector(name).rules
    found = detector(name).detect(rgb, headroom)
    points = np.clip(quantise(found.xy), 0, np.iinfo(np.uint16).max).astype(np.uint16, order="C")
    keys = points.view(np.uint32)[:, 0]  # y above x: whole numbers sort far faster than rows
    kept: list[np.ndarray] = []
    for number, group in enumerate(rules.groups):
        of_group = found.group == number
        mine = keys[of_group]
        if group.cap:
            kept.append(mine[np.lexsort((mine, -found.response[of_group]))])
        else:
            mine.sort()
            first = np.ones(len(mine), np.bool_)
            np.not_equal(mine[1:], mine[:-1], out=first[1:])
            kept.append(mine[first])
    counts = np.array([len(mine) for mine in kept], np.int64)
    return np.concatenate(kept).view(np.uint16).reshape(-1, 2), counts
