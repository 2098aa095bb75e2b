"""The code of whole-pixel positions against a slow, obvious twin, and on bytes that no encoder writes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kamim.detectors import detect_packed
from kamim.storage import gaps

SIDES = st.one_of(st.integers(1, 40), st.sampled_from([254, 255, 256, 257, 510, 4094, 4095]))


def slow_decode(code: bytes, height: int, width: int) -> list[tuple[int, int]] | None:
    """Pixel after pixel: the (x, y) of keypoints, or None if the code leads out of the frame."""
    pixels = ((x, y) for y in range(height) for x in range(width))
    found = []
    for byte in code:
        for _ in range(byte):
            if next(pixels, None) is None:
                return None
        if byte < 255:
            if (pixel := next(pixels, None)) is None:
                return None
            found.append(pixel)
    return found


def positions_of(numbers: np.ndarray, width: int) -> np.ndarray:
    """The positions of pixels, numbered row by row: uint16 [K, 2]."""
    return (np.stack([numbers % width, numbers // width], axis=1) * 16).astype(np.uint16)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), SIDES, SIDES, st.sampled_from([0.0, 0.001, 0.02, 0.3, 1.0]))
def test_positions_come_back_and_are_the_slow_ones(seed: int, height: int, width: int, density: float) -> None:
    random = np.random.default_rng(seed)
    pixels = height * width
    numbers = np.unique(random.integers(0, pixels, min(int(density * pixels), 3000)))
    if random.random() < 0.5:
        numbers = np.union1d(numbers, [0, pixels - 1])
    positions = positions_of(numbers, width)
    code = gaps.encode(positions, height, width)
    np.testing.assert_array_equal(gaps.decode(code, height, width), positions)
    assert len(code) <= len(positions) + pixels // 255
    if pixels < 100_000:
        slow = slow_decode(code.tobytes(), height, width)
        assert slow is not None
        np.testing.assert_array_equal(np.array(slow, np.uint16).reshape(-1, 2) * 16, positions)


@pytest.mark.parametrize(("height", "width"), [(4095, 4095), (1, 4095), (4095, 1), (4093, 4091), (211, 225)])
def test_every_pixel_of_a_frame_has_its_row_and_column(height: int, width: int) -> None:
    """The division by multiplication is exact; a keypoint at every pixel costs one byte each."""
    code = np.zeros(height * width, np.uint8)
    expected = positions_of(np.arange(height * width), width)
    np.testing.assert_array_equal(gaps.decode(code, height, width), expected)
    np.testing.assert_array_equal(gaps.encode(expected, height, width), code)


@pytest.mark.parametrize(
    ("number", "code"),
    [(0, [0]), (1, [1]), (254, [254]), (255, [255, 0]), (256, [255, 1]), (509, [255, 254]), (510, [255, 255, 0])],
)
def test_the_code_of_a_gap(number: int, code: list[int]) -> None:
    """The format's definition, which files depend on."""
    assert gaps.encode(positions_of(np.array([number]), 30), 40, 30).tolist() == code
    again = positions_of(np.array([0, number + 1]), 30)
    assert gaps.encode(again, 40, 30).tolist() == [0, *code]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.one_of(st.integers(0, 255), st.sampled_from([0, 254, 255])), max_size=60),
    st.integers(0, 70),
    st.integers(1, 70),
    st.integers(0, 70),
)
def test_any_bytes_are_decoded_or_refused_and_nothing_is_written_elsewhere(
    code: list[int], height: int, width: int, room: int
) -> None:
    guarded = np.full((room + 20, 2), 7, np.uint16)
    kept = gaps.decode_into(np.array(code, np.uint8), height, width, guarded[10 : 10 + room])
    assert (guarded[:10] == 7).all()
    assert (guarded[10 + room :] == 7).all()
    expected = slow_decode(bytes(code), height, width)
    if expected is None or room < len(code):
        assert kept == -1
    else:
        assert (guarded[10 : 10 + kept] // 16).tolist() == [list(pixel) for pixel in expected]


def test_a_code_that_leads_far_out_of_the_frame_is_refused() -> None:
    """Its last pixel has a number above 2^32, which must not wrap."""
    code = np.full(2**32 // 255 + 20, 255, np.uint8)
    code[-1] = 3
    with pytest.raises(IndexError, match="keypoints lie outside their frame"):
        gaps.decode(code, 4095, 4095)


@pytest.mark.parametrize(
    "positions", [[[16, 0], [0, 0]], [[0, 0], [0, 0]], [[8, 0]], [[0, 17]], [[480, 0]], [[0, 640]]]
)
def test_other_positions_have_no_code(positions: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="not sorted, distinct pixels of the frame"):
        gaps.encode(np.array(positions, np.uint16), 40, 30)


def test_fast_takes_about_a_byte_per_keypoint(photos: list[np.ndarray]) -> None:
    for photo in photos:
        positions, _ = detect_packed("fast", photo, 1.5)
        code = gaps.encode(positions, *photo.shape[:2])
        np.testing.assert_array_equal(gaps.decode(code, *photo.shape[:2]), positions)
        assert len(positions) > 500
        assert len(code) < 1.5 * len(positions)
