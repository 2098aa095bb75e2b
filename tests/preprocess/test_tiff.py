"""TIFF and PNM files whose samples Pillow would misread: their true values, or a refusal with the reason."""

import io
import struct
import zlib
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from test_decode import encoded, refusal

from preprocess.decode import decode

GREY = np.tile(np.linspace(0, 65535, 100).astype(np.uint16), (80, 1))
COLOUR = np.stack([GREY, GREY // 2, GREY // 4], axis=2)


def written(samples: np.ndarray, **options: Any) -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, samples, metadata=None, **options)
    return stream.getvalue()


def tiff(samples: bytes, width: int, height: int, *tags: tuple[int, int, int]) -> bytes:
    """A grey, little-endian TIFF of one strip. tags: (number, 3 for 16 bits or 4 for 32, value), or others' values."""
    fields = {256: (3, width), 257: (3, height), 259: (3, 1), 262: (3, 1), 273: (4, 8), 277: (3, 1), 278: (3, height)}
    fields |= {279: (4, len(samples))} | {number: (kind, value) for number, kind, value in tags}
    fields = {number: (kind, value) for number, (kind, value) in sorted(fields.items()) if value >= 0}
    directory = b"".join(struct.pack("<HHII", number, kind, 1, value) for number, (kind, value) in fields.items())
    body = samples + bytes(len(samples) % 2)
    return struct.pack("<2sHI", b"II", 42, 8 + len(body)) + body + struct.pack("<H", len(fields)) + directory + bytes(4)


def packed_12(grey: np.ndarray) -> bytes:
    """12-bit samples [H, W], H rows of whole bytes."""
    bits = (grey[..., None] >> np.arange(11, -1, -1) & 1).astype(np.uint8).reshape(len(grey), -1)
    return np.packbits(bits, axis=1).tobytes()


def check(file: bytes, expected: np.ndarray, tolerance: float = 1) -> None:
    """expected: of 0 to 1, float [H, W] or [H, W, 3]. tolerance: in steps of 8 bits."""
    expected = 255 * (expected if expected.ndim == 3 else np.repeat(expected[..., None], 3, axis=2))
    np.testing.assert_allclose(decode(file), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_white_is_zero(byteorder: str, compression: str | None) -> None:
    options = {"photometric": "miniswhite", "byteorder": byteorder, "compression": compression}
    check(written((GREY >> 8).astype(np.uint8), **options), 1 - GREY / 65535)
    file = written(65535 - GREY, **options)
    assert tifffile.imread(io.BytesIO(file)).tolist() == (65535 - GREY).tolist()
    if byteorder == "<":
        check(file, GREY / 65535)
    else:
        refusal(file)


@pytest.mark.parametrize("photometric", ["rgb", "separated"])
@pytest.mark.parametrize("alpha", [False, True])
def test_planes_of_16_bits(photometric: str, alpha: bool) -> None:
    samples = np.dstack([COLOUR, 65535 - GREY]) if alpha or photometric == "separated" else COLOUR
    options = {"photometric": photometric, "extrasamples": [2] if alpha and photometric == "rgb" else None}
    expected, tolerance = COLOUR / 65535, 1
    if photometric == "separated":
        expected, tolerance = (1 - expected) * (GREY / 65535)[..., None], 3  # Pillow converts CMYK from 8 bits
    check(written(samples, planarconfig="contig", **options), expected, tolerance)
    planes = np.moveaxis(samples, 2, 0)
    check(written(planes, planarconfig="separate", compression="zlib", **options), expected, tolerance)
    check(written((planes >> 8).astype(np.uint8), planarconfig="separate", **options), expected, tolerance)
    assert "16 bits in separate planes" in refusal(written(planes, planarconfig="separate", **options))


@pytest.mark.parametrize("kind", ["i1", "i2", "i4", "f2", "f4", "f8"])
@pytest.mark.parametrize("channels", [1, 3])
def test_samples_without_a_range_are_refused(kind: str, channels: int) -> None:
    samples = (GREY if channels == 1 else COLOUR).astype(np.int64) // 256 - 128
    file = written(samples.astype(kind), photometric="minisblack" if channels == 1 else "rgb")
    assert ("floating-point" if kind[0] == "f" else "signed") in (reason := refusal(file))
    assert "range is not defined" in reason


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("width", [100, 99])
def test_12_bits_are_scaled_by_their_maximum(compressed: bool, width: int) -> None:
    grey = (GREY >> 4)[:, :width]
    samples = packed_12(grey)
    file = tiff(
        zlib.compress(samples) if compressed else samples, width, 80, (258, 3, 12), (259, 3, 8 * compressed or 1)
    )
    np.testing.assert_array_equal(cv2.imdecode(np.frombuffer(file, np.uint8), -1) >> 4, grey)  # it scales to 16 bits
    check(file, grey / 4095)
    refusal(tiff(samples, width, 80, (258, 3, 12), (262, 3, 0)))  # white is 0


def test_headers_that_leave_the_pixels_open_are_refused() -> None:
    samples = (GREY >> 8).astype(np.uint8).tobytes()
    check(tiff(samples, 100, 80, (258, 3, 8)), GREY / 65535)
    check(tiff(samples, 100, 80, (258, 3, 8), (281, 3, 100)), GREY / 65535)  # MaxSampleValue
    assert "PhotometricInterpretation" in refusal(tiff(samples, 100, 80, (258, 3, 8), (262, 3, -1)))
    assert "predictor" in refusal(tiff(samples, 100, 80, (258, 3, 8), (317, 3, 2)))
    for bits in (3, 10, 14, 24, 32, 64):
        assert f"samples of {bits} bits" in refusal(tiff(samples, 10, 10, (258, 3, bits)))
    file = tiff(samples, 100, 80, (258, 3, 8))
    for cut in range(4, len(file) - 4):  # the last bytes are the offset of a second image
        refusal(file[:cut])


def test_ycbcr_without_compression_has_no_subsampling() -> None:
    samples = (COLOUR >> 8).astype(np.uint8)
    options = {"photometric": "ycbcr", "planarconfig": "contig"}
    flat = cv2.cvtColor(samples[..., [0, 2, 1]], cv2.COLOR_YCrCb2RGB)
    file = written(samples, subsampling=(1, 1), **options)
    assert np.abs(decode(file).astype(int) - flat).mean() < 2
    tag = struct.pack("<HHIHH", 530, 3, 2, 1, 1)
    assert file.count(tag) == 1
    assert "subsampling" in refusal(file.replace(tag, struct.pack("<HHIHH", 530, 3, 2, 2, 2)))


@pytest.mark.parametrize("maximum", [1, 15, 100, 255, 256, 1023, 4095, 16383, 65534, 65535])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("plain", [False, True])
def test_pnm_is_scaled_by_its_maximum(maximum: int, channels: int, plain: bool) -> None:
    samples = np.random.default_rng(0).integers(0, maximum + 1, (20, 30, channels))
    magic = {(1, False): "P5", (3, False): "P6", (1, True): "P2", (3, True): "P3"}[channels, plain]
    body = " ".join(map(str, samples.ravel())).encode() if plain else samples.astype(">u2" if maximum > 255 else "u1")
    file = f"{magic}\n# a comment\n30 20\n{maximum}\n".encode() + bytes(body)
    check(file, samples.squeeze() / maximum)
    if maximum == 65535 and not plain:
        other = cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_ANYDEPTH)
        np.testing.assert_allclose(decode(file), other / 257, rtol=0, atol=1)


def test_16_bits_of_png_and_tiff_are_scaled_as_before() -> None:
    for kind in ("PNG", "TIFF", "PPM"):
        np.testing.assert_array_equal(decode(encoded(GREY, kind))[..., 1], GREY >> 8)
