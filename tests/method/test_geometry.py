"""Sizes and boxes against torchvision's algorithm, point maps against pixels."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2

from kamim.method import geometry, rng


def torchvision_box(height: int, width: int, scale: tuple[float, float], index: int) -> tuple[int, int, int, int]:
    """Calls torchvision's own make_params with our draws in place of its global generator."""
    shape = iter([rng.unit(5, 2, index, rng.CROP, draw) for draw in range(2 * geometry.CROP_ATTEMPTS)])
    place = iter([rng.unit(5, 2, index, rng.CROP, 2 * geometry.CROP_ATTEMPTS + k) for k in (0, 1)])

    class Drawn:
        def uniform_(self, low: float, high: float) -> torch.Tensor:
            return torch.tensor([float(low) + (float(high) - float(low)) * next(shape)], dtype=torch.float64)

    image = torch.zeros(3, height, width)
    transform = v2.RandomResizedCrop(192, scale=scale)
    transform._log_ratio = torch.log(torch.tensor(transform.ratio, dtype=torch.float64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", lambda *_: Drawn())
        patch.setattr(torch, "randint", lambda low, high, size: torch.tensor([low + int(next(place) * (high - low))]))
        made = transform.make_params([image])
    return made["top"], made["left"], made["height"], made["width"]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 900), st.integers(1, 900), st.integers(0, 2**32 - 1), st.sampled_from([(0.67, 1.0), (0.08, 1.0)]))
def test_crop_box_is_torchvisions(height: int, width: int, index: int, scale: tuple[float, float]) -> None:
    box = geometry.crop_box(height, width, *scale, 3 / 4, 4 / 3, 5, 2, index)
    assert box == torchvision_box(height, width, scale, index)


@pytest.mark.parametrize(
    ("height", "width", "expected"), [(100, 1000, (0, 433, 100, 133)), (1000, 90, (440, 0, 120, 90))]
)
def test_a_shape_that_no_attempt_fits_is_cropped_centrally(height: int, width: int, expected: tuple[int, ...]) -> None:
    assert geometry.crop_box(height, width, 0.9, 1.0, 3 / 4, 4 / 3, 0, 0, 0) == expected
    assert torchvision_box(height, width, (0.9, 1.0), 0) == expected


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 4000), st.integers(1, 4000))
def test_stored_images_are_never_enlarged_and_no_crop_of_them_is(height: int, width: int) -> None:
    area = geometry.stored_area(192, (0.67, 1.0))
    h, w = geometry.stored_size(height, width, area)
    assert h <= height
    assert w <= width
    if (h, w) != (height, width) and min(h, w) > 20:
        assert abs(h * w - area) < 0.03 * area
        assert abs(np.log(h / w) - np.log(height / width)) < 0.06


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 4))
def test_canonical_frames_are_where_crops_see_the_image(height: int, width: int, count: int) -> None:
    frames = np.array(geometry.canonical_frames(height, width, 192, (0.67, 1.0), count))
    assert frames.shape == (count, 2)
    assert ((frames >= 1) & (frames <= geometry.MAX_FRAME_SIDE)).all()
    draws = range(1000, 1200)  # not those that the frames were made of
    boxes = np.array([geometry.crop_box(height, width, 0.67, 1.0, 3 / 4, 4 / 3, 5, 0, i) for i in draws])
    seen = np.log(192 / boxes[:, 2:])
    offered = np.log(frames / (height, width))
    nearest = np.abs(seen[:, None] - offered).sum(axis=2).min(axis=1)
    if frames.max() < geometry.MAX_FRAME_SIDE and min(height, width) > 20 and frames.min() > 100:
        assert nearest.mean() < (0.25, 0.16, 0.14, 0.13)[count - 1]
        np.testing.assert_allclose(offered.mean(axis=0), seen.mean(axis=0), atol=0.04)


def test_a_view_takes_the_frame_nearest_in_scale() -> None:
    frames = np.array([[[192, 192], [384, 192], [192, 384]]] * 3)  # twice the size, stretched down, stretched across
    sizes = np.array([[96, 96]] * 3)
    views = np.array([[0, 0, 90, 90, 0, 0], [5, 5, 50, 90, 1, 0], [1, 2, 96, 60, 0, 1]])
    assert geometry.nearest_frames(frames, sizes, views, 192).tolist() == [0, 1, 2]
    shrunk = geometry.nearest_frames(2 * frames[:, ::-1], sizes * 2, views * 2, 384)  # the same at twice the size
    assert shrunk.tolist() == [2, 1, 0]


@pytest.mark.parametrize("flip", [False, True])
def test_axis_map_takes_the_crops_edges_to_the_outputs(flip: bool) -> None:
    scale, offset = geometry.axis_map(10, 50, 192, flip)
    edges = [10 * scale + offset, 60 * scale + offset]
    assert edges == pytest.approx([192, 0] if flip else [0, 192])


def test_axis_map_agrees_with_flipping_pixels() -> None:
    row = np.arange(8)
    scale, offset = geometry.axis_map(0, 8, 8, True)
    centres = (row + 0.5) * scale + offset - 0.5
    np.testing.assert_array_equal(row[::-1][centres.astype(int)], row)


def test_flips_are_fair_independent_and_pure() -> None:
    drawn = np.array([geometry.flips(3, 1, i) for i in range(4000)])
    assert np.abs(drawn.mean(axis=0) - 0.5).max() < 0.03
    assert abs(np.corrcoef(drawn.T)[0, 1]) < 0.05
    assert tuple(drawn[17]) == geometry.flips(3, 1, 17)
