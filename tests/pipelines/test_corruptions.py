"""Corruptions: each by its definition, pure functions of (seed, index), ordered by strength."""

import io

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter
from skimage import data

from kamim.evaluation.corrupted_images import BLUR, CONTRAST, KINDS, NOISE, QUALITY, STRENGTHS, Corruption

PHOTO = np.ascontiguousarray(data.astronaut()[:224, 100:324])


def corrupt(
    kind: str, strength: int, image: np.ndarray = PHOTO, seed: int = 0, epoch: int = 0, index: int = 3
) -> np.ndarray:
    out = image.copy()
    Corruption(kind, strength)(out[None], seed, epoch, np.array([index]))
    return out


@pytest.mark.parametrize("strength", STRENGTHS)
def test_noise_is_normal(strength: int) -> None:
    grey = np.full((256, 256, 3), 128, np.uint8)
    added = (corrupt("noise", strength, grey).astype(float) - 128) / 255
    inside = np.abs(added) < 0.49  # the rest is clipped
    assert added[inside].mean() == pytest.approx(0, abs=0.005)
    quantiles = np.quantile(added, [0.2, 0.5, 0.8]) / NOISE[strength - 1]
    np.testing.assert_allclose(quantiles, [-0.8416, 0, 0.8416], atol=0.03)
    a, b = added[:, :, 0].ravel(), added[:, :, 1].ravel()
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.02 and abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < 0.02


@pytest.mark.parametrize("strength", STRENGTHS)
def test_blur_is_a_gaussian_filter(strength: int) -> None:
    sigma = BLUR[strength - 1]
    expected = gaussian_filter(PHOTO.astype(float), (sigma, sigma, 0), mode="mirror", truncate=4)
    assert np.abs(corrupt("blur", strength) - expected).max() <= 1.5
    small = np.ascontiguousarray(PHOTO[::2, ::2])  # half the side, half the width of the blur
    expected = gaussian_filter(small.astype(float), (sigma / 2, sigma / 2, 0), mode="mirror", truncate=4)
    assert np.abs(corrupt("blur", strength, small) - expected).mean() <= 1


@pytest.mark.parametrize("strength", STRENGTHS)
def test_contrast_moves_values_towards_the_mean(strength: int) -> None:
    left = CONTRAST[strength - 1]
    for channel in range(3):
        values = PHOTO[:, :, channel] / 255
        expected = 255 * np.clip((values - values.mean()) * left + values.mean(), 0, 1)
        assert np.abs(corrupt("contrast", strength)[:, :, channel] - expected).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("strength", STRENGTHS)
def test_jpeg_is_pillows(strength: int) -> None:
    stream = io.BytesIO()
    Image.fromarray(PHOTO).save(stream, "JPEG", quality=QUALITY[strength - 1])
    expected = np.asarray(Image.open(stream)).astype(int)
    assert np.abs(corrupt("jpeg", strength) - expected).mean() < 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_corruptions_are_pure_and_get_stronger(kind: str) -> None:
    distances = []
    for strength in STRENGTHS:
        once = corrupt(kind, strength)
        np.testing.assert_array_equal(once, corrupt(kind, strength, epoch=9))
        distances.append(np.abs(once.astype(float) - PHOTO).mean())
        if kind == "noise":
            assert (once != corrupt(kind, strength, seed=1)).any() and (once != corrupt(kind, strength, index=4)).any()
    assert distances == sorted(distances) and distances[0] > 1


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_any_size_can_be_corrupted(kind: str) -> None:
    for shape in ((1, 1, 3), (5, 3, 3), (33, 17, 3)):
        assert corrupt(kind, 5, np.zeros(shape, np.uint8)).shape == shape
