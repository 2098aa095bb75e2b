"""Detectors of other packages: objects registered as entry points of the group `kamim.detectors`.

The contract, all that such a package needs to know of kamim (docs/detectors.md):

    detect(array) -> (xy, response)     xy float32 [K, 2] (x, y), centres in px; response float32 [K]
    border: float = 0                   px at the image's border in which it finds nothing
    grey: bool = False                  array is uint8 [H, W] (kamim.detectors.contract.grey), not RGB [H, W, 3]
    snap: bool = False                  it reports whole pixels
"""

from importlib.metadata import EntryPoint, entry_points
from typing import Any

import numpy as np

from kamim import KamimError
from kamim.detectors.contract import Found, grey
from kamim.method.keypoints import Group, Rules

GROUP = "kamim.detectors"


def names() -> tuple[str, ...]:
    """Registered names, sorted."""
    return tuple(sorted(entry_points(group=GROUP).names))


def load(name: str) -> "PlugIn":
    """A registered detector. Raises ValueError, naming its distribution, for one that cannot be used."""
    entries = tuple(entry_points(group=GROUP, name=name))
    what = f"detector {name!r} of {' and of '.join(map(_distribution, entries))}"
    if len(entries) > 1:
        raise KamimError(f"{what}: one name for two; uninstall one")
    try:
        found = entries[0].load()
        if isinstance(found, type) or not callable(getattr(found, "detect", None)):
            raise TypeError(f"{entries[0].value} is not an object with detect(array) -> xy, response")
        return PlugIn(found, what)
    except Exception as error:  # whatever a module may do when it is imported
        raise KamimError(f"{what}: cannot be used: {_line(error)}") from error


def origin(name: str) -> str:
    """The distributions that register a name, and their versions."""
    found = (entry.dist for entry in entry_points(group=GROUP, name=name))
    return ", ".join(f"{dist.name} {dist.version}" for dist in found if dist)


def _distribution(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else entry.value


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


class PlugIn:
    """A registered object as a Detector, its keypoints one group without a cap, found on one frame."""

    frames = 1

    def __init__(self, found: Any, what: str):
        """found: what keeps the contract. what: how errors name it."""
        group = Group(border=float(getattr(found, "border", 0)))
        self.rules = Rules((group,), snap=bool(getattr(found, "snap", False)))
        self._detect = found.detect
        self._grey = bool(getattr(found, "grey", False))
        self._what = what

    def detect(self, rgb: np.ndarray, headroom: float = 1.0) -> Found:
        """See Detector. Raises ValueError where the object fails or breaks the contract."""
        try:
            xy, response = (np.asarray(part, np.float32) for part in self._detect(grey(rgb) if self._grey else rgb))
        except Exception as error:
            raise KamimError(f"{self._what}: failed: {_line(error)}") from error
        if response.ndim != 1 or xy.shape != (len(response), 2) or not np.isfinite(xy).all():
            raise KamimError(
                f"{self._what}: gave xy {list(xy.shape)} and response {list(response.shape)}; "
                "needs finite xy [K, 2] and response [K]"
            )
        return Found(xy, np.zeros(len(xy), np.int64), response)
