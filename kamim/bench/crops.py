"""The crops that every loader makes in the benchmarks: those of the paper's pretraining of a ViT-B."""

import copy

from kamim.method import geometry
from kamim.storage.keypoints import Keypoints

RESOLUTION = 192  # px
SCALE = (0.67, 1.0)  # share of the image's area
RATIO = geometry.CROP_RATIO  # width / height
PATCH_SIZE, TEMPERATURE = 8, 0.25  # w_ps in px, and T


def for_any_crops(keypoints: Keypoints) -> Keypoints:
    """Returns the keypoints without the check that they are for such crops: a benchmark measures the time, not W."""
    unchecked = copy.copy(keypoints)
    unchecked.job = None
    return unchecked
