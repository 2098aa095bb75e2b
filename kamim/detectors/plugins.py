"""Plug-ins: detectors that other packages register as entry points of the group `kamim.detectors`.

The whole contract of a registered object (docs/detectors.md):

    detect(array) -> (xy, response)     xy float32 [K, 2] (x, y), centres in px; response float32 [K]
    detect(array, key)                  likewise; key: str, the image's path within its source, "" if it has none
    border: float = 0                   px at the image's border in which it reports nothing
    grey: bool = False                  array is uint8 [H, W] (kamim.detectors.contract.grey), not RGB [H, W, 3]
    snap: bool = False                  it reports whole pixels of the array
"""

from importlib.metadata import EntryPoint, entry_points
from inspect import signature
from typing import Any

import numpy as np

from kamim import KamimError
from kamim.detectors.contract import DetectedKeypoints, grey
from kamim.method.keypoints import Group, Rules

GROUP = "kamim.detectors"


def names() -> tuple[str, ...]:
    """Returns the registered names, sorted."""
    return tuple(sorted(entry_points(group=GROUP).names))


def load(name: str) -> "PlugIn":
    """Loads a registered detector. Raises KamimError, naming its distribution, if it cannot be used."""
    entries = tuple(entry_points(group=GROUP, name=name))
    what = f"detector {name!r} of {' and of '.join(map(_distribution, entries))}"
    if len(entries) > 1:
        raise KamimError(f"{what}: one name for two; uninstall one")
    try:
        plugin = entries[0].load()
        if isinstance(plugin, type) or not callable(getattr(plugin, "detect", None)):
            raise TypeError(f"{entries[0].value} is not an object with detect(array) -> xy, response")
        return PlugIn(plugin, what)
    except Exception as error:  # importing foreign code may raise anything
        raise KamimError(f"{what}: cannot be used: {_line(error)}") from error


def origin(name: str) -> str:
    """Returns the distributions that register a name, with their versions."""
    distributions = (entry.dist for entry in entry_points(group=GROUP, name=name))
    return ", ".join(f"{dist.name} {dist.version}" for dist in distributions if dist)


def _takes_key(detect: Any) -> bool:
    """Whether a function has a parameter `key`; functions of C may have no signature."""
    try:
        return "key" in signature(detect).parameters
    except (TypeError, ValueError):
        return False


def _distribution(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else entry.value


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


class PlugIn:
    """Adapts a registered object to Detector: one group without a cap, on one canonical frame."""

    frames = 1

    def __init__(self, plugin: Any, description: str):
        """plugin: an object that keeps the contract. description: its name in errors."""
        group = Group(border=float(getattr(plugin, "border", 0)))
        self.rules = Rules((group,), snap=bool(getattr(plugin, "snap", False)))
        self._detect = plugin.detect
        self._takes_key = _takes_key(plugin.detect)
        self._grey = bool(getattr(plugin, "grey", False))
        self._description = description

    def detect(self, rgb: np.ndarray, headroom: float = 1.0, key: str = "") -> DetectedKeypoints:
        """See Detector. Raises KamimError if the object fails or breaks the contract."""
        array, given = grey(rgb) if self._grey else rgb, {"key": key} if self._takes_key else {}
        try:
            xy, response = (np.asarray(part, np.float32) for part in self._detect(array, **given))
        except Exception as error:
            raise KamimError(f"{self._description}: failed: {_line(error)}") from error
        if response.ndim != 1 or xy.shape != (len(response), 2) or not np.isfinite(xy).all():
            raise KamimError(
                f"{self._description}: gave xy {list(xy.shape)} and response {list(response.shape)}; "
                "needs finite xy [K, 2] and response [K]"
            )
        if self.rules.snap and not ((xy == np.rint(xy)) & (xy >= 0) & (xy < array.shape[1::-1])).all():
            raise KamimError(f"{self._description}: has snap, but gave xy that are not whole pixels of the array")
        return DetectedKeypoints(xy, np.zeros(len(xy), np.int64), response)
