"""Crops of YCbCr planes: against a slow twin, against whole images decoded to RGB, and with JPEGs made to do harm."""

import io
import os
import signal

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kamim.method.colour import planes_bytes, to_planes
from kamim.storage.manifest import FORMATS
from pipelines import turbojpeg
from pipelines.chunk import Crops, CropScratch, Stored, decode_and_crop
from pipelines.crop import crop_resize
from pipelines.ycbcr import INTERLEAVE, Planes, crop_planes

needs_library = pytest.mark.skipif(turbojpeg.library() is None, reason="libturbojpeg is not installed")
BLOCKS = [*turbojpeg._BLOCKS]
SIDE = 48


def crop(planes: Planes, view: tuple[int, ...], side: int = SIDE) -> np.ndarray:
    out = np.empty((side, side, 3), np.uint8)
    crop_planes(planes, np.array(view), np.empty((3, planes.height + INTERLEAVE, side), np.uint16), out)
    return out


def sampled(plane: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Bilinear samples of a plane at positions counted from the centre of its first sample: float [rows, columns]."""
    (y, dy), (x, dx) = ((at.astype(int), at - at.astype(int)) for at in (rows, columns))
    below, right = np.minimum(y + 1, plane.shape[0] - 1), np.minimum(x + 1, plane.shape[1] - 1)
    upper = plane[y][:, x] * (1 - dx) + plane[y][:, right] * dx
    lower = plane[below][:, x] * (1 - dx) + plane[below][:, right] * dx
    return upper * (1 - dy[:, None]) + lower * dy[:, None]


def positions(start: int, length: int, block: int) -> np.ndarray:
    """Centres of SIDE equal parts of an axis' pixels start .. start + length - 1, in samples of `block` pixels each."""
    centres = start + (np.arange(SIDE) + 0.5) * length / SIDE
    return np.clip(centres / block - 0.5, start // block, (start + length - 1) // block)


def twin(planes: list[np.ndarray], block: tuple[int, int], view: tuple[int, ...]) -> np.ndarray:
    """The crop in floating point, by the equations of JFIF."""
    top, left, height, width, flip_v, flip_h = view
    y, cb, cr = (
        sampled(plane.astype(float), positions(top, height, down), positions(left, width, across))
        for plane, (down, across) in zip(planes, ((1, 1), block, block), strict=True)
    )
    red, blue = y + 1.402 * (cr - 128), y + 1.772 * (cb - 128)
    green = y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128)
    rgb = np.stack([red, green, blue], 2).clip(0, 255)
    return rgb[:: -1 if flip_v else 1, :: -1 if flip_h else 1]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from(BLOCKS), st.booleans(), st.booleans())
def test_a_crop_is_its_slow_twins(seed: int, block: tuple[int, int], flip_v: bool, flip_h: bool) -> None:
    random = np.random.default_rng(seed)
    height, width = (int(side) for side in random.integers(1, 120, 2))
    chroma = (-(-height // max(block[0], 1)), -(-width // max(block[1], 1)))
    planes = [random.integers(0, 256, shape).astype(np.uint8) for shape in ((height, width), chroma, chroma)]
    h, w = (int(random.integers(1, side + 1)) for side in (height, width))
    top, left = int(random.integers(0, height - h + 1)), int(random.integers(0, width - w + 1))
    cb = height * width
    given_planes = Planes(
        np.concatenate([plane.ravel() for plane in planes]),
        height,
        width,
        width,
        cb,
        cb + planes[1].size,
        chroma[1],
        *block,
    )
    view = (top, left, h, w, int(flip_v), int(flip_h))
    if block == (0, 0):
        planes, block = [planes[0], *np.full((2, 1, 1), 128, np.uint8)], (1 << 20, 1 << 20)
    assert (
        np.abs(crop(given_planes, view) - twin(planes, block, view)).max() <= 1.6
    )  # weights are 256ths, Cb counts 1.77


def test_chroma_lies_in_the_centre_of_its_block() -> None:
    """Cr rises by 4 a pixel across the image; a sample holds its block's mean, so any crop shows the same ramp."""
    height, width = 32, 60
    ramp = np.tile((8 * np.arange(width // 2) + 2).astype(np.uint8), (height // 2, 1))
    data = np.concatenate([np.full(height * width, 100), np.full(ramp.size, 128), ramp.ravel()]).astype(np.uint8)
    planes = Planes(data, height, width, width, height * width, height * width + ramp.size, width // 2, 2, 2)
    for left, w in ((10, 24), (11, 24), (20, 12)):
        red = crop(planes, (0, left, height, w, 0, 0), 24)[0, :, 0].astype(float)
        cr = 4 * (left + (np.arange(24) + 0.5) * w / 24 - 0.5)
        inner = slice(2, -2)  # beyond the crop's outermost samples there is nothing to interpolate
        assert np.abs(red - np.clip(100 + 1.402 * (cr - 128), 0, 255))[inner].max() <= 1


def test_planes_are_jfifs() -> None:
    random = np.random.default_rng(1)
    for height, width in ((4, 6), (5, 7), (1, 1), (1, 4), (3, 2)):
        rgb = random.integers(0, 256, (height, width, 3)).astype(np.uint8)
        planes = to_planes(rgb)
        assert len(planes) == planes_bytes(height, width)
        red, green, blue = rgb.astype(float).transpose(2, 0, 1)
        luma = 0.299 * red + 0.587 * green + 0.114 * blue
        np.testing.assert_array_equal(planes[: height * width], np.floor(luma + 0.5).ravel())
        (rows, columns), chroma = ((height + 1) // 2, (width + 1) // 2), planes[height * width :].reshape(2, -1)
        for found, difference, scale in zip(chroma, (blue - luma, red - luma), (1.772, 1.402), strict=True):
            for at, value in enumerate(found):
                y, x = divmod(at, columns)
                mean = 128 + difference[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean() / scale
                assert abs(min(mean, 255) - value) <= 0.51
        assert len(chroma[0]) == rows * columns


def through_the_chunk(data: bytes, size: tuple[int, int], room: np.ndarray | None = None) -> np.ndarray | None:
    """The whole image, resized, or None if the compiled call leaves it undone."""
    encoded, sizes = np.frombuffer(data, np.uint8), np.array([size], np.uint16)
    if room is None:
        room = np.empty(turbojpeg.room_for(sizes), np.uint8)
    out, failed = np.zeros((1, SIDE, SIDE, 3), np.uint8), np.empty(1, np.bool_)
    stored = Stored(FORMATS.index("jpeg"), np.array([encoded.ctypes.data], np.uint64), np.array([len(data)]))
    resized = np.empty((3, size[0] + INTERLEAVE, SIDE), np.uint16)
    scratch = CropScratch(turbojpeg.turbo(room), resized, np.empty((SIDE, SIDE, 3), np.uint8))
    crops = Crops(np.zeros(1, np.int64), sizes, np.array([[0, 0, *size, 0, 0]]), out)
    decode_and_crop(stored, crops, scratch, failed, np.zeros(1, np.bool_))
    return None if failed[0] else out[0]


@needs_library
@pytest.mark.parametrize("subsampling", ["444", "422", "420", "440", "411", "Gray"])
@pytest.mark.parametrize("size", [(96, 128), (97, 131), (33, 35)])
def test_every_subsampling_is_close_to_decoding_the_whole_image(
    subsampling: str, size: tuple[int, int], photos: list[np.ndarray]
) -> None:
    for photo in photos:
        pixels = np.ascontiguousarray(photo[40 : 40 + size[0], 60 : 60 + size[1]])
        if subsampling == "Gray":
            data = simplejpeg.encode_jpeg(pixels[..., 1:2].copy(), 90, colorspace="GRAY")
        else:
            data = simplejpeg.encode_jpeg(pixels, 90, colorsubsampling=subsampling)
        expected = np.empty((SIDE, SIDE, 3), np.uint8)
        crop_resize(simplejpeg.decode_jpeg(data), np.array([0, 0, *size, 0, 0]), expected)
        found = through_the_chunk(data, size)
        assert found is not None
        difference = found.astype(int) - expected
        assert np.abs(difference).mean() <= (1.5 if subsampling in ("420", "440", "422", "411") else 0.3)
        assert np.abs(difference.mean(axis=(0, 1))).max() <= 0.5
        if subsampling == "Gray":  # colours are clipped to 0 .. 255 after they are resized, not before
            assert np.abs(difference).max() <= 1


@needs_library
def test_kinds_that_are_not_ycbcr_and_sizes_that_lie_are_left_undone(photos: list[np.ndarray]) -> None:
    pixels = np.ascontiguousarray(photos[0][:64, :80])
    whole = simplejpeg.encode_jpeg(pixels)
    assert through_the_chunk(whole, (64, 80)) is not None
    for size in ((64, 79), (63, 80), (65, 80), (80, 64), (1, 1), (64, 160)):
        assert through_the_chunk(whole, size) is None
    for mode in ("CMYK", "RGB"):
        file = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(file, "JPEG", **({"keep_rgb": True} if mode == "RGB" else {}))
        assert through_the_chunk(file.getvalue(), (64, 80)) is None
    for cut in (0, 1, 2, 20, len(whole) // 2, len(whole) - 3):
        assert through_the_chunk(whole[:cut], (64, 80)) is None


def damaged(data: bytes, random: np.random.Generator) -> bytes:
    """A JPEG with a few bytes changed, most of them in its headers: sizes, sampling factors, tables, components."""
    made = bytearray(data)
    frame = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    for _ in range(int(random.integers(1, 4))):
        first, last = ((frame + 2, frame + 19), (0, 640), (0, len(made)))[int(random.integers(3))]
        made[int(random.integers(first, last))] = int(random.integers(256))
    return bytes(made[: int(random.integers(1, len(made)))] if random.random() < 0.1 else made)


@needs_library
def test_whatever_the_bytes_are_nothing_is_written_beside_the_room(photos: list[np.ndarray]) -> None:
    """Each case in a process of its own; KAMIM_FUZZ_CASES says how many."""
    size, cases = (50, 70), int(os.environ.get("KAMIM_FUZZ_CASES", "40"))
    pixels = np.ascontiguousarray(photos[1][: size[0], : size[1]])
    wholes = []
    for name in ("444", "422", "420", "411"):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", progressive=True)
        wholes += [simplejpeg.encode_jpeg(pixels, colorsubsampling=name), file.getvalue()]
    through_the_chunk(wholes[0], size)  # compiled before the first fork
    need, around = turbojpeg.room_for(np.array([size])), 1 << 16
    decoded = 0
    for case in range(cases):
        random = np.random.default_rng((int(os.environ.get("KAMIM_FUZZ_SEED", "0")), case))
        data = damaged(wholes[case % len(wholes)], random)
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            memory = np.full(need + 2 * around, 77, np.uint8)
            made = through_the_chunk(data, size, memory[around : around + need])
            beside = (memory[:around] != 77).any() or (memory[around + need :] != 77).any()
            os._exit(1 if beside else 2 if made is None else 3)
        status = os.waitpid(child, 0)[1]
        assert os.WIFEXITED(status) and os.WEXITSTATUS(status) > 1, (case, status)
        decoded += os.WEXITSTATUS(status) == 3
    assert decoded < cases
