"""AKAZE keypoints (Alcantarilla, Nuevo and Bartoli, BMVC 2013), registered as an entry point like a plug-in.

Keypoints are maxima of the determinant of the Hessian in a nonlinear scale space, which edge-stopping diffusion
computes in fast explicit (FED) cycles. The parameters are OpenCV's defaults; the code is our own, since
opencv-python 5 no longer contains AKAZE.
"""

import math

import cv2
import numpy as np

OCTAVES, LEVELS = 4, 4
THRESHOLD = 1e-3  # on the determinant, for grey in [0, 1]
BASE_SIGMA = 1.6
DERIVATIVE_FACTOR = 1.5  # derivatives are taken over this many sigma
CONTRAST_PERCENTILE = 70
LARGEST_STEP = 0.25  # largest stable step of the explicit scheme
SMALLEST = (40, 80)  # smallest (height, width) of a second or later octave


class Akaze:
    """The AKAZE detector; see the module."""

    grey, border = True, 1.0

    def detect(self, grey: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns (xy float32 [K, 2], response float32 [K]) of grey (uint8 [H, W]), finest level first."""
        if min(grey.shape) < 3:
            return np.empty((0, 2), np.float32), np.empty(0, np.float32)
        levels = _determinants(grey.astype(np.float32) / 255)
        maxima = [_maxima(levels[max(i - 1, 0) : i], level, levels[i + 1 : i + 2]) for i, level in enumerate(levels)]
        xy = [
            (at + 0.5) * np.divide(grey.shape[::-1], level.shape[::-1]) - 0.5
            for (at, _), level in zip(maxima, levels, strict=True)
        ]
        return np.concatenate(xy).astype(np.float32), np.concatenate([response for _, response in maxima])


def _determinants(image: np.ndarray) -> list[np.ndarray]:
    """Returns the scale-normalised determinant of the Hessian on each level of the scale space, float32 [h, w]."""
    contrast = _contrast(image)
    evolved = cv2.GaussianBlur(image, (0, 0), BASE_SIGMA)
    time, determinants = BASE_SIGMA**2 / 2, []
    for octave in range(OCTAVES):
        if octave:
            height, width = (side // 2 for side in evolved.shape)
            if height < SMALLEST[0] or width < SMALLEST[1]:
                break
            evolved = cv2.resize(evolved, (width, height), interpolation=cv2.INTER_AREA)
            contrast *= 0.75
        for level in range(LEVELS):
            sigma = BASE_SIGMA * 2 ** (octave + level / LEVELS)
            smooth = cv2.GaussianBlur(evolved, (0, 0), 1)
            evolved = _diffuse(evolved, _conductivity(smooth, contrast), (sigma**2 / 2 - time) / 4**octave)
            time = sigma**2 / 2
            smooth = cv2.GaussianBlur(evolved, (0, 0), 1)
            determinants.append(_determinant(smooth, round(sigma * DERIVATIVE_FACTOR / 2**octave)))
    return determinants


def _gradient(image: np.ndarray, reach: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns Scharr derivatives (along x, along y) per px, from pixels at a distance of `reach` px."""
    across, along = np.zeros(2 * reach + 1, np.float32), np.zeros(2 * reach + 1, np.float32)
    across[[0, -1]] = -0.5 / reach, 0.5 / reach
    along[[0, reach, -1]] = 3 / 16, 10 / 16, 3 / 16
    return cv2.sepFilter2D(image, -1, across, along), cv2.sepFilter2D(image, -1, along, across)


def _contrast(image: np.ndarray) -> float:
    """Returns the gradient magnitude that counts as an edge: a percentile of the non-zero ones."""
    x, y = _gradient(cv2.GaussianBlur(image, (0, 0), 1), 1)
    size = np.hypot(x, y)
    size = size[size > 0]
    return float(np.percentile(size, CONTRAST_PERCENTILE)) if len(size) else 1.0


def _conductivity(smooth: np.ndarray, contrast: float) -> np.ndarray:
    """Returns Perona and Malik's second conductivity function: near 1 in flat regions, near 0 at edges."""
    x, y = _gradient(smooth, 1)
    return 1 / (1 + (x * x + y * y) / contrast**2)


def _diffuse(image: np.ndarray, conductivity: np.ndarray, time: float) -> np.ndarray:
    """Nonlinear diffusion for `time` px^2: one FED cycle of as few explicit steps as are stable."""
    steps = math.ceil(math.sqrt(3 * time / LARGEST_STEP + 0.25) - 0.5)
    across = (conductivity[:, 1:] + conductivity[:, :-1]) / 2
    down = (conductivity[1:] + conductivity[:-1]) / 2
    image = image.copy()
    for step in range(steps):
        tau = 1.5 * time / (steps * (steps + 1)) / math.cos(math.pi * (2 * step + 1) / (4 * steps + 2)) ** 2
        flow_x, flow_y = tau * across * np.diff(image, axis=1), tau * down * np.diff(image, axis=0)
        image[:, :-1] += flow_x
        image[:, 1:] -= flow_x
        image[:-1] += flow_y
        image[1:] -= flow_y
    return image


def _determinant(smooth: np.ndarray, reach: int) -> np.ndarray:
    x, y = _gradient(smooth, reach)
    (xx, xy), (_, yy) = _gradient(x, reach), _gradient(y, reach)
    return (xx * yy - xy * xy) * reach**4


def _maxima(below: list[np.ndarray], level: np.ndarray, above: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the maxima of a level over 3 x 3 px of it and of its neighbours in scale: (subpixel (x, y), value)."""
    square = np.ones((3, 3), np.uint8)
    peak = (level > THRESHOLD) & (level >= cv2.dilate(level, square))
    for other in (*below, *above):
        resized = cv2.resize(other, level.shape[::-1], interpolation=cv2.INTER_LINEAR)
        peak &= level > cv2.dilate(resized, square)
    peak[[0, -1]] = peak[:, [0, -1]] = False
    y, x = np.nonzero(peak)
    gx, gy = (level[y, x + 1] - level[y, x - 1]) / 2, (level[y + 1, x] - level[y - 1, x]) / 2
    xx = level[y, x + 1] + level[y, x - 1] - 2 * level[y, x]
    yy = level[y + 1, x] + level[y - 1, x] - 2 * level[y, x]
    xy = (level[y + 1, x + 1] + level[y - 1, x - 1] - level[y + 1, x - 1] - level[y - 1, x + 1]) / 4
    curved = xx * yy - xy * xy
    shift = np.stack((xy * gy - yy * gx, xy * gx - xx * gy), axis=1) / np.where(curved == 0, np.inf, curved)[:, None]
    sharp = (np.abs(shift) <= 1).all(axis=1)
    return (np.stack((x, y), axis=1) + shift)[sharp], level[y, x][sharp]


akaze = Akaze()
