"""Remap, raster and counts against slow, obvious twins and against cv2.drawKeypoints."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kamim.method import keypoints as kp
from kamim.method.keypoints import Group, Rules


def drawn(xy: np.ndarray, height: int, width: int) -> np.ndarray:
    """The reference's map F."""
    points = [cv2.KeyPoint(float(x), float(y), 1.0) for x, y in xy]
    canvas = cv2.drawKeypoints(np.zeros((height, width, 3), np.uint8), points, None, color=(255, 255, 255))
    return canvas[..., 0] > 0


def test_a_ring_is_opencvs_for_every_phase_at_every_border() -> None:
    side = 24
    places = [0, 1, 2, 3, 4, 5, 11, 18, 19, 20, 21, 22, 23]
    phases = np.arange(16) / 16
    for y in places:
        for x in places:
            for fy, fx in ((phases[(x + y) % 16], f) for f in phases):
                xy = np.array([[x + fx, y + fy]], np.float32)
                if xy.max() > side - 1 / 32:
                    continue
                np.testing.assert_array_equal(kp.keypoint_map(xy, side, side, "ring"), drawn(xy, side, side))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(9, 200), st.integers(9, 200))
def test_many_rings_are_opencvs_on_any_shape(seed: int, height: int, width: int) -> None:
    xy = (np.random.default_rng(seed).random((200, 2)) * (width - 0.1, height - 0.1)).astype(np.float32)
    np.testing.assert_array_equal(kp.keypoint_map(xy, height, width, "ring"), drawn(xy, height, width))


def test_a_point_is_the_pixel_that_holds_the_centre() -> None:
    xy = np.array([[3, 5], [10.4, 7.6], [0, 0], [19, 19]], np.float32)
    expected = np.zeros((20, 20), bool)
    expected[[5, 8, 0, 19], [3, 10, 0, 19]] = True
    np.testing.assert_array_equal(kp.keypoint_map(xy, 20, 20, "point"), expected)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from(["ring", "point"]), st.integers(1, 120), st.integers(1, 120))
def test_opencvs_map_is_the_compiled_one(seed: int, footprint: str, height: int, width: int) -> None:
    """Points outside, and those that round to the next pixel or out of the image, included."""
    random = np.random.default_rng(seed)
    xy = (random.random((60, 2)) * (width + 4, height + 4) - 2).astype(np.float32)
    xy[::3] = np.rint(xy[::3] * 2) / 2
    expected = kp.keypoint_map(xy, height, width, footprint)
    np.testing.assert_array_equal(kp.opencv_map(xy, height, width, footprint), expected)


def test_an_unknown_footprint_is_refused() -> None:
    with pytest.raises(ValueError, match=r"footprint = 'disc': must be one of ring, point"):
        kp.stamps("disc")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from(kp.FOOTPRINTS), st.integers(6, 200), st.integers(6, 200))
def test_points_on_whole_pixels_are_drawn_as_any_others(seed: int, footprint: str, height: int, width: int) -> None:
    random = np.random.default_rng(seed)
    points = (random.integers(0, (width, height), (random.integers(0, 300), 2)) * 16).astype(np.int32)
    slow, fast = (kp.raster_scratch(height, width) for _ in range(2))
    table, dots = kp.stamps(footprint), np.stack([slow, slow])
    drawn = kp.Footprint(table, kp.runs(table))
    for _ in range(2):  # the second time on scratch that is not empty
        kp.raster(points, len(points), height, width, table, slow)
        kp.raster_whole(points, len(points), height, width, drawn, fast, dots)
    np.testing.assert_array_equal(kp.pixels(slow, height, width), kp.pixels(fast, height, width))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96]))
def test_cell_counts_are_sums_over_cells(seed: int, patch_size: int) -> None:
    xy = np.random.default_rng(seed).uniform(0, 191, (400, 2)).astype(np.float32)
    bitmap = kp.raster_scratch(192, 192)
    kp.raster(kp.quantise(xy), len(xy), 192, 192, kp.stamps("ring"), bitmap)
    counts = np.full((192 // patch_size,) * 2, -1, np.int16)
    kp.cell_counts(bitmap, patch_size, counts)
    np.testing.assert_array_equal(counts, kp.map_counts(drawn(xy, 192, 192), patch_size))


def slow_remap(
    positions: np.ndarray,
    groups: np.ndarray,
    rules: Rules,
    frame: tuple[int, int],
    image: tuple[int, int],
    box: tuple[int, int, int, int],
    flip_v: bool,
    flip_h: bool,
    side: int,
) -> list[tuple[float, float]]:
    """Edge coordinates in the crop, one keypoint at a time, one step at a time."""
    kept = []
    room = [group.cap or 10**9 for group in rules.groups]
    for (px, py), g in zip(positions.tolist(), groups.tolist(), strict=True):
        x, y = px / 16 + 0.5, py / 16 + 0.5  # edge coordinates of the canonical frame
        x, y = x * image[1] / frame[1], y * image[0] / frame[0]  # of the stored image
        x, y = x - box[1], y - box[0]  # of the crop
        x, y = x * side / box[3], y * side / box[2]  # of the resized crop
        x, y = (side - x if flip_h else x), (side - y if flip_v else y)
        border = rules.groups[g].border
        if border <= x < side - border and border <= y < side - border and room[g] > 0:
            room[g] -= 1
            kept.append((x, y))
    return kept


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.booleans(), st.booleans(), st.booleans())
def test_remap_is_the_slow_one(seed: int, flip_v: bool, flip_h: bool, snap: bool) -> None:
    random = np.random.default_rng(seed)
    frame, image = (201, 221), (230, 253)
    rules = Rules((Group(3.0), Group(31.0, cap=20), Group(0.0, cap=5)), snap)
    groups = np.sort(random.integers(0, 3, 300))
    positions = (random.random((300, 2)) * (frame[1] * 16, frame[0] * 16)).astype(np.uint16)
    h, w = int(random.integers(50, 231)), int(random.integers(50, 254))
    box = (int(random.integers(0, 231 - h)), int(random.integers(0, 254 - w)), h, w)
    out = np.empty((300, 2), np.int32)
    counts = np.bincount(groups, minlength=3)
    kept = kp.remap(positions, counts, rules.arrays(), frame, image, (*box, flip_v, flip_h), 192, out)
    expected = slow_remap(positions, groups, rules, frame, image, box, flip_v, flip_h, 192)
    assert kept == len(expected)
    if kept:
        edges = out[:kept] / 16 + 0.5  # snapped: the centre of the pixel the edge coordinate lies in
        np.testing.assert_allclose(edges, np.maximum(expected, 0.5), atol=(0.5 if snap else 0.5 / 16) + 1e-9, rtol=0)
    assert (out[:kept] >= 0).all()
    assert (out[:kept] < 192 * 16).all()


# Whatever a kernel is given, it writes where it may


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(st.one_of(st.integers(-(2**62), 2**62), st.integers(-5, 60)), min_size=1, max_size=5),
    st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(float("nan"))), min_size=1, max_size=5),
    st.booleans(),
)
def test_remap_writes_no_more_than_it_reads_and_inside_the_crop(
    counts: list[int], borders: list[float], snap: bool
) -> None:
    positions = np.random.default_rng(len(counts)).integers(0, 65536, (50, 2)).astype(np.uint16)
    guarded = np.full((70, 2), -7, np.int32)
    rules = kp.RuleArrays(np.array(borders), np.full(len(borders), -3), snap)
    kept = kp.remap(positions, np.array(counts), rules, (90, 90), (90, 90), (0, 0, 90, 90, 0, 0), 64, guarded[10:60])
    assert 0 <= kept <= 50
    assert (guarded[:10] == -7).all()
    assert (guarded[60:] == -7).all()
    assert ((guarded[10 : 10 + kept] >= 0) & (guarded[10 : 10 + kept] < 64 * 16)).all()


@pytest.mark.parametrize("whole", [False, True])
def test_points_outside_are_not_drawn(whole: bool) -> None:
    inside = np.array([[0, 0], [63, 40], [17, 63]], np.int32) * 16
    outside = np.array([[-1, 5], [64, 5], [5, -1], [5, 64], [-(2**27), 9], [2**27 - 1, 2**27 - 1]], np.int32) * 16
    table, bitmaps = kp.stamps("ring"), []
    for points in (inside, np.concatenate([outside, inside, outside])):
        height, width = kp.raster_scratch(64, 64).shape
        memory = np.zeros((height + 100, width), np.uint64)
        bitmap = memory[50 : 50 + height]
        if whole:
            dots = np.stack([kp.raster_scratch(64, 64)] * 2)
            kp.raster_whole(points, len(points), 64, 64, kp.Footprint(table, kp.runs(table)), bitmap, dots)
        else:
            kp.raster(points, len(points), 64, 64, table, bitmap)
        bitmaps.append(bitmap.copy())
        bitmap[:] = 0
        assert not memory.any()
    np.testing.assert_array_equal(*bitmaps)


def test_more_cells_than_a_bit_map_has_are_refused() -> None:
    for patch_size, shape in ((8, (9, 8)), (8, (8, 40)), (3, (30, 8)), (8, (400, 8))):
        with pytest.raises(ValueError, match="the cells exceed the bitmap"):
            kp.cell_counts(kp.raster_scratch(64, 64), patch_size, np.zeros(shape, np.int16))


@pytest.mark.parametrize("border", [-1.0, float("nan"), float("inf")])
def test_a_border_is_a_length(border: float) -> None:
    with pytest.raises(ValueError, match=f"border = {border}: must be 0 px or more, and finite"):
        Group(border)


@pytest.mark.parametrize("cap", [-1, 2**31, 10**30])
def test_a_cap_is_a_number_of_keypoints(cap: int) -> None:
    with pytest.raises(ValueError, match=rf"cap = {cap}: must be 0 \(no cap\) to 2147483647"):
        Group(0.0, cap)


@pytest.mark.parametrize("groups", [0, 257])
def test_a_detector_has_some_groups(groups: int) -> None:
    with pytest.raises(ValueError, match=f"groups: are {groups}, must be 1 to 256"):
        Rules((Group(0.0),) * groups)
