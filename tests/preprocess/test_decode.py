"""Image files as they come: decoded as Pillow decodes them, or refused with a reason. Never silently wrong."""

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage import data

from kamim.storage.images import LARGEST_IMAGE
from preprocess.decode import Undecodable, decode

PHOTO = Image.fromarray(data.astronaut()[60:141, 180:277])


def encoded(image: Image.Image | np.ndarray, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(stream, kind, **options)
    return stream.getvalue()


def pillow(file: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(file)) as image:
        return np.asarray(image.convert("RGB"))


def refusal(file: bytes) -> str:
    with pytest.raises(Undecodable) as raised:
        decode(file)
    reason = str(raised.value)
    assert reason
    assert "\n" not in reason
    return reason


def rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    return exif


def with_alpha(mode: str) -> Image.Image:
    image = PHOTO.convert(mode)
    image.putalpha(Image.fromarray(np.tile(np.arange(PHOTO.width, dtype=np.uint8), (PHOTO.height, 1))))
    return image


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)


def ycck() -> bytes:
    """A CMYK JPEG whose Adobe marker says that its colours are YCCK, as Photoshop writes them."""
    file = bytearray(encoded(PHOTO.convert("CMYK"), "JPEG"))
    at = file.index(b"Adobe") + 11
    assert file[at] == 0
    file[at] = 2
    return bytes(file)


FILES: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: encoded(PHOTO, "JPEG"),
    "jpeg 4:4:4": lambda: encoded(PHOTO, "JPEG", subsampling=0),
    "jpeg 4:2:2": lambda: encoded(PHOTO, "JPEG", subsampling=1),
    "jpeg of RGB components": lambda: encoded(PHOTO, "JPEG", keep_rgb=True),
    "progressive jpeg": lambda: encoded(PHOTO, "JPEG", progressive=True),
    "grey jpeg": lambda: encoded(PHOTO.convert("L"), "JPEG"),
    "YCCK jpeg": lambda: ycck(),
    "jpeg of several pictures": lambda: encoded(PHOTO, "MPO", save_all=True, append_images=[PHOTO.rotate(90)]),
    "animated png": lambda: encoded(PHOTO, "PNG", save_all=True, append_images=[PHOTO.rotate(90)]),
    "animated webp": lambda: encoded(PHOTO, "WEBP", save_all=True, append_images=[PHOTO.rotate(90)]),
    "tiff of several pages": lambda: encoded(PHOTO, "TIFF", save_all=True, append_images=[PHOTO.rotate(90)]),
    "CMYK jpeg": lambda: encoded(PHOTO.convert("CMYK"), "JPEG"),
    "turned jpeg": lambda: encoded(PHOTO, "JPEG", exif=rotated()),
    "jpeg with trailing garbage": lambda: encoded(PHOTO, "JPEG") + b"garbage\xff\xd8\xff" * 40,
    "png": lambda: encoded(PHOTO, "PNG"),
    "grey png": lambda: encoded(PHOTO.convert("L"), "PNG"),
    "1-bit png": lambda: encoded(PHOTO.convert("1"), "PNG"),
    "palette png": lambda: encoded(PHOTO.convert("P"), "PNG"),
    "palette png with transparency": lambda: encoded(PHOTO.convert("P"), "PNG", transparency=3),
    "RGB png with transparent colour": lambda: encoded(PHOTO, "PNG", transparency=(0, 0, 0)),
    "RGBA png": lambda: encoded(with_alpha("RGB"), "PNG"),
    "LA png": lambda: encoded(with_alpha("L"), "PNG"),
    "turned png": lambda: encoded(PHOTO, "PNG", exif=rotated()),
    "animated gif": lambda: encoded(
        PHOTO.convert("P"), "GIF", save_all=True, append_images=[Image.new("P", PHOTO.size, n) for n in (1, 2)]
    ),
    "bmp": lambda: encoded(PHOTO, "BMP"),
    "webp": lambda: encoded(PHOTO, "WEBP", quality=70),
    "lossless webp with alpha": lambda: encoded(with_alpha("RGB"), "WEBP", lossless=True),
    "tiff, lzw": lambda: encoded(PHOTO, "TIFF", compression="tiff_lzw"),
    "CMYK tiff": lambda: encoded(PHOTO.convert("CMYK"), "TIFF"),
    "ppm": lambda: encoded(PHOTO, "PPM"),
    "1x1 png": lambda: encoded(noise(1, 1), "PNG"),
    "1x1 jpeg": lambda: encoded(noise(1, 1), "JPEG"),
    "1x30000 png": lambda: encoded(noise(1, 30000), "PNG"),
    "30000x1 jpeg": lambda: encoded(noise(30000, 1), "JPEG"),
}


@pytest.mark.parametrize("name", FILES)
def test_decodes_as_pillow_does(name: str) -> None:
    file = FILES[name]()
    pixels = decode(file)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, pillow(file))


def test_common_jpegs_do_not_need_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("preprocess.decode._pillow", lambda file: pytest.fail("decoded by Pillow"))
    for name in ("jpeg", "jpeg 4:4:4", "progressive jpeg", "grey jpeg", "jpeg with trailing garbage"):
        decode(FILES[name]())


def test_orientation_is_not_applied() -> None:
    for name in ("turned jpeg", "turned png"):
        assert decode(FILES[name]()).shape == (PHOTO.height, PHOTO.width, 3)


def test_alpha_is_dropped() -> None:
    np.testing.assert_array_equal(decode(FILES["RGBA png"]()), np.asarray(PHOTO))


def test_cmyk_comes_out_in_its_colours() -> None:
    difference = decode(encoded(PHOTO.convert("CMYK"), "JPEG", quality=98)).astype(int) - np.asarray(PHOTO)
    assert np.abs(difference).mean() < 4


def test_pixels_stay_as_they_are() -> None:
    pixels = noise(3, 5)
    assert decode(pixels) is pixels


@pytest.mark.parametrize("name", ["animated png", "animated webp", "tiff of several pages", "jpeg of several pictures"])
def test_of_several_pictures_the_first_counts(name: str) -> None:
    difference = decode(FILES[name]()).astype(int) - np.asarray(PHOTO)
    assert np.abs(difference).mean() < 8


def test_an_animation_is_its_first_frame() -> None:
    np.testing.assert_array_equal(decode(FILES["animated gif"]()), np.asarray(PHOTO.convert("P").convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_of_grey_are_scaled_to_eight(kind: str) -> None:
    deep = np.random.default_rng(1).integers(0, 1 << 16, (20, 30)).astype(np.uint16)
    expected = np.repeat((deep >> 8).astype(np.uint8)[..., None], 3, axis=2)
    np.testing.assert_array_equal(decode(encoded(deep, kind)), expected)


def test_sixteen_bits_of_big_endian_grey_are_scaled_to_eight() -> None:
    deep = np.random.default_rng(1).integers(0, 1 << 16, (20, 30)).astype(">u2")
    image = Image.frombytes("I;16B", (30, 20), deep.tobytes())
    expected = np.repeat((deep >> 8).astype(np.uint8)[..., None], 3, axis=2)
    np.testing.assert_array_equal(decode(encoded(image, "TIFF")), expected)


def test_sixteen_bits_of_colour_are_scaled_to_eight() -> None:
    deep = np.random.default_rng(1).integers(0, 1 << 16, (20, 30, 3)).astype(np.uint16)
    file = cv2.imencode(".png", deep)[1].tobytes()
    np.testing.assert_array_equal(decode(file), (deep[..., ::-1] >> 8).astype(np.uint8))


def test_pixels_without_a_defined_range_are_refused() -> None:
    assert "range" in refusal(encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"))
    assert "range" in refusal(encoded(Image.fromarray(np.ones((4, 4), np.int32)), "TIFF"))


@pytest.mark.parametrize(
    "name",
    ["jpeg", "progressive jpeg", "grey jpeg", "CMYK jpeg", "png", "palette png", "webp", "bmp", "tiff, lzw", "ppm"],
)
def test_truncated_files_are_refused(name: str) -> None:
    file = FILES[name]()
    for cut in (1, 2, 3, 4, 11, 20, 40, len(file) // 4, len(file) // 2, len(file) * 3 // 4, len(file) - 30):
        refusal(file[:cut])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.sampled_from(["jpeg", "progressive jpeg", "png", "animated gif"]), st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused_or_lacks_nothing(name: str, part: float) -> None:
    file = FILES[name]()
    try:
        pixels = decode(file[: int(part * len(file))])
    except Undecodable as error:
        assert str(error)
    else:
        np.testing.assert_array_equal(pixels, pillow(file))


def test_what_is_not_an_image_is_refused() -> None:
    assert refusal(b"") == "empty file"
    assert refusal(b"<html>404: no such image</html>") == "not an image, or of a kind that cannot be read"
    assert refusal(bytes(5000)) == "not an image, or of a kind that cannot be read"
    refusal(b"\xff\xd8\xff")
    refusal(b"\x89PNG\r\n\x1a\n")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0", b"RIFF"]),
    st.binary(max_size=300),
)
def test_random_bytes_are_refused(magic: bytes, rest: bytes) -> None:
    refusal(magic + rest)


@pytest.mark.parametrize("kind", [RuntimeError, TypeError, KeyError, OverflowError, struct.error, AttributeError])
def test_whatever_a_decoder_raises_is_a_refusal(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise kind("Failed to decode\nframe 0")  # as Pillow's readers do

    monkeypatch.setattr(Image.Image, "convert", fail)
    assert "Failed to decode" in refusal(FILES["png"]())


SMALL = PHOTO.resize((9, 7))
HEADERS = {
    "tiff": encoded(SMALL, "TIFF"),
    "fax tiff": encoded(SMALL.convert("1"), "TIFF", compression="group4"),
    "gif": encoded(SMALL.convert("P"), "GIF"),
    "webp": encoded(SMALL, "WEBP", exif=rotated()),
    "bmp": encoded(SMALL.convert("P"), "BMP"),
    "ppm": encoded(SMALL, "PPM"),
    "jpeg": encoded(SMALL, "JPEG", exif=rotated()),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_damaged_header_never_stops_the_job(name: str) -> None:
    random = np.random.default_rng(6)
    for _ in range(150):
        damaged = bytearray(HEADERS[name])
        for at in random.integers(0, len(damaged), random.integers(1, 6)):
            damaged[at] = random.choice([0, 1, 2, 4, 8, 16, 127, 128, 255])
        try:
            pixels = decode(bytes(damaged))
        except Undecodable as error:
            assert "\n" not in str(error)
        else:
            assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3


def png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def huge_png(side: int) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(bytes(1000))) + png_chunk(b"IEND", b"")


def huge_jpeg(side: int) -> bytes:
    file = bytearray(encoded(PHOTO, "JPEG"))
    at = file.index(b"\xff\xc0") + 5
    file[at : at + 4] = struct.pack(">HH", side, side)
    return bytes(file)


@pytest.mark.parametrize("file", [huge_png(100_000), huge_png(15_000), huge_jpeg(65_500), huge_jpeg(15_000)])
def test_a_decompression_bomb_is_refused_before_any_pixel_is_made(file: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **kwargs: object) -> None:
        pytest.fail("decoded")

    monkeypatch.setattr(simplejpeg, "decode_jpeg", never)
    for decoder in ("load", "convert", "__array_interface__"):
        monkeypatch.setattr(Image.Image, decoder, never)
    assert "pixels" in (reason := refusal(file)) or str(LARGEST_IMAGE) in reason


@pytest.mark.parametrize("name", ["jpeg", "progressive jpeg", "grey jpeg"])
def test_a_jpeg_with_a_flipped_bit_is_as_pillow_sees_it_or_refused(name: str) -> None:
    file = FILES[name]()
    for bit in np.random.default_rng(3).integers(0, 8 * len(file), 150):
        damaged = bytearray(file)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            pixels = decode(bytes(damaged))
        except Undecodable:
            continue
        np.testing.assert_array_equal(pixels, pillow(bytes(damaged)))


@pytest.mark.parametrize("name", ["png", "palette png"])
def test_a_png_with_a_flipped_bit_is_whole_or_refused(name: str) -> None:
    file = FILES[name]()
    expected = pillow(file)
    for bit in (
        *range(8 * (len(file) - 300), 8 * len(file), 11),
        *np.random.default_rng(4).integers(0, 8 * len(file), 100),
    ):
        damaged = bytearray(file)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            pixels = decode(bytes(damaged))
        except Undecodable:
            continue
        np.testing.assert_array_equal(pixels, expected)


sides = st.integers(1, 40)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(sides, sides, st.integers(0, 2**32 - 1), st.sampled_from(["PNG", "BMP", "TIFF", "PPM"]))
def test_lossless_formats_give_back_their_pixels(height: int, width: int, seed: int, kind: str) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    np.testing.assert_array_equal(decode(encoded(pixels, kind)), pixels)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    sides,
    sides,
    st.integers(0, 2**32 - 1),
    st.integers(1, 100),
    st.integers(0, 2),
    st.booleans(),
    st.sampled_from(["RGB", "L", "CMYK"]),
)
def test_jpegs_of_any_kind_decode_as_pillow_does(
    height: int, width: int, seed: int, quality: int, subsampling: int, progressive: bool, mode: str
) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    file = encoded(image, "JPEG", quality=quality, subsampling=subsampling, progressive=progressive)
    np.testing.assert_array_equal(decode(file), pillow(file))
