"""Bytes of any image file -> RGB pixels, or a reason why not. Never silently wrong ones.

What a file means is what torchvision's default loader takes it to mean: Pillow's first frame, converted to
RGB, EXIF orientation not applied. One exception: 16 bits of grey are scaled to 8, where Pillow would clip them.
"""

import io
import struct
import warnings

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 178_956_970  # where Pillow itself speaks of a decompression bomb; refused before decoding


# What SUFFIXES name; Pillow knows more, and hands some of them to other programs (EPS to Ghostscript).
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")

# What its readers raise for damaged files. Not MemoryError: that an image is left out must not depend on the machine.
PILLOWS_ERRORS = (
    OSError, ValueError, SyntaxError, EOFError, RuntimeError, TypeError, LookupError, ArithmeticError, AttributeError,
    struct.error, Image.DecompressionBombError,
)  # fmt: skip


class Undecodable(ValueError):
    """This file is not an image that can be trusted; the message says why."""


def decode(data: bytes | np.ndarray) -> np.ndarray:
    """RGB uint8 [H, W, 3], as it is where it is decoded already.

    Raises Undecodable for anything truncated, corrupt, oversized or not an image.
    """
    if isinstance(data, np.ndarray):
        assert data.dtype == np.uint8 and data.ndim == 3 and data.shape[2] == 3
        return data
    if not data:
        raise Undecodable("empty file")
    pixels = decode_plain_jpeg(data)
    return _pillow(data) if pixels is None else pixels


def decode_plain_jpeg(data: bytes) -> np.ndarray | None:
    """RGB uint8 [H, W, 3] of a JPEG that libjpeg-turbo decodes strictly, the common case.

    Returns None for anything else: no JPEG, CMYK, odd headers, damage. Pillow decides about those. Raises Undecodable
    for a JPEG that is oversized.
    """
    if data[:3] != b"\xff\xd8\xff":
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(height, width)
        if colorspace in ("CMYK", "YCCK"):
            return None
        return simplejpeg.decode_jpeg(data, colorspace="RGB")  # strict: damage is an error
    except Undecodable:
        raise
    except ValueError:
        return None


def _pillow(data: bytes) -> np.ndarray:
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image.height, image.width)
            if image.format == "PNG":
                _check_png(data)
            if image.mode.startswith("I;16"):  # Pillow's own conversion would clip 16 bits, not scale them
                grey = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
                return np.repeat(grey[..., None], 3, axis=2)
            if image.mode in ("I", "F"):
                raise Undecodable(f"pixels of mode {image.mode}, whose range is not defined")
            return np.asarray(image.convert("RGB"))
    except Undecodable:
        raise
    except UnidentifiedImageError as error:
        raise Undecodable("not an image") from error
    except PILLOWS_ERRORS as error:
        raise Undecodable(" ".join(str(error).split()) or type(error).__name__) from error


def _check_png(data: bytes) -> None:
    """Raises what Pillow raises where a chunk's checksum is wrong; decoding alone would not look."""
    with Image.open(io.BytesIO(data)) as image:
        image.verify()


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise Undecodable(f"{width}x{height} px is more than the limit of {MAX_PIXELS} px")
