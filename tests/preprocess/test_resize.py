"""The two resizes of preprocessing against slow twins and against the libraries whose definitions they have."""

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage import data
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from preprocess.resize import resize_antialiased, resize_plain


def keys_cubic(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def matrix(length: int, out_length: int) -> np.ndarray:
    """The resize of one axis as a matrix: every output sample is a weighted mean of all source samples."""
    scale = length / out_length
    centres = (np.arange(out_length)[:, None] + 0.5) * scale
    weights = keys_cubic((np.arange(length) + 0.5 - centres) / max(scale, 1))
    return weights / weights.sum(axis=1, keepdims=True)


def twin(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    down, across = matrix(pixels.shape[0], size[0]), matrix(pixels.shape[1], size[1])
    return np.einsum("yY,YXc,xX->yxc", down, pixels.astype(float), across).clip(0, 255)


SIDES = st.integers(1, 60)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(SIDES, SIDES, SIDES, SIDES, st.integers(0, 2**20))
def test_antialiased_is_the_stretched_cubic_rounded_once(h: int, w: int, to_h: int, to_w: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (h, w, 3)).astype(np.uint8)
    resized = resize_antialiased(pixels, (to_h, to_w))
    assert resized.dtype == np.uint8
    np.testing.assert_allclose(resized, twin(pixels, (to_h, to_w)), atol=0.51)


@pytest.mark.parametrize("size", [(234, 233), (128, 170), (300, 451)])
def test_antialiased_is_pillows_and_torchvisions_filter(size: tuple[int, int]) -> None:
    """They round between the two directions as well, so that a few pixels at strong edges differ by more than one."""
    photo = data.coffee()
    ours = resize_antialiased(photo, size).astype(int)
    pillow = np.asarray(Image.fromarray(photo).resize(size[::-1], Image.Resampling.BICUBIC))
    planes = torch.from_numpy(photo).permute(2, 0, 1)
    vision = F.resize(planes, list(size), InterpolationMode.BICUBIC, antialias=True).permute(1, 2, 0).numpy()
    for theirs in (pillow, vision):
        difference = np.abs(ours - theirs)
        assert np.quantile(difference, 0.999) <= 1
        assert difference.mean() < 0.25


def test_flat_images_stay_flat_and_equal_sizes_stay_as_they_are() -> None:
    flat = np.full((37, 91, 3), 201, np.uint8)
    assert (resize_antialiased(flat, (20, 40)) == 201).all()
    assert resize_antialiased(flat, (37, 91)) is flat
    assert resize_plain(flat, (37, 91)) is flat


def test_a_view_that_is_not_contiguous_is_resized_as_its_copy() -> None:
    turned = data.astronaut()[::-1, ::2]
    np.testing.assert_array_equal(resize_antialiased(turned, (99, 98)), resize_antialiased(turned.copy(), (99, 98)))


def test_plain_is_opencvs_and_torchvisions_bilinear() -> None:
    photo = data.astronaut()
    expected = cv2.resize(photo, (211, 190), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(resize_plain(photo, (190, 211)), expected)
    planes = torch.from_numpy(photo).permute(2, 0, 1)
    vision = F.resize(planes, [190, 211], antialias=False).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(expected - vision).max() <= 1
