"""Decodes the bytes of any image file to RGB pixels, or raises an error with the reason; never returns wrong pixels.

Files are decoded as by torchvision's default loader: Pillow's first frame, converted to RGB, EXIF orientation not
applied (except a TIFF's, which Pillow applies itself). One exception: greys of more than 8 bits are scaled to 8,
whereas Pillow would clip them. A TIFF is refused if Pillow ignores what its header says, see preprocess.tiff.
"""

import io
import warnings

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TILELENGTH, TILEWIDTH, TiffImageFile

from kamim import KamimError
from kamim.storage.images import LARGEST_IMAGE
from kamim.storage.jpeg import LOSSLESS, Markers, check_scans, read_markers
from preprocess import tiff

# Limits, checked before anything is decoded.
MAX_SIDE = 65_500  # of a JPEG, by libjpeg
MAX_EXIF = 100  # Exif segments of a JPEG, which Pillow joins one by one

PROGRESSIVE = b"\xff\xc2"  # the usual marker of a progressive JPEG, which other compressed data never contain
JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"

# The formats that SUFFIXES names. Pillow knows more, and passes some of them to other programs (EPS to Ghostscript).
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")


class Undecodable(KamimError):
    """This file cannot be decoded reliably; the message gives the reason."""


def decode(data: bytes | np.ndarray) -> np.ndarray:
    """Returns the pixels of an image file, RGB uint8 [H, W, 3]. Pixels that are decoded already are returned unchanged.

    Raises Undecodable for anything truncated, corrupt, oversized or not an image, whatever exception its decoder
    raises. MemoryError is raised unchanged, since the rejection of an image must not depend on the machine.
    """
    if isinstance(data, np.ndarray):
        assert data.dtype == np.uint8 and data.ndim == 3 and data.shape[2] == 3
        return data
    if not data:
        raise Undecodable("empty file")
    try:
        pixels = decode_plain_jpeg(data)
        return _pillow(data) if pixels is None else pixels
    except (Undecodable, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise Undecodable("not an image, or of a kind that cannot be read") from error
    except Exception as error:  # decoders raise nearly every kind for a damaged file
        raise Undecodable(" ".join(str(error).split()) or type(error).__name__) from error


def decode_mask(data: bytes) -> np.ndarray:
    """Returns the class indices that a PNG holds, uint8 [H, W]: grey levels, or indices into its palette.

    Raises Undecodable for anything else: other formats, colours, 16 bits, and grey levels of fewer than 8 bits, which
    Pillow would scale; for files that decode rejects, as it does.
    """
    if data[:8] != PNG:
        raise Undecodable("not a PNG")
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            _check_size(image.height, image.width)
            _check_png(data)
            grey, indexed = 0, 3  # colour types of the header, whose last five bytes begin with depth and colour type
            bits, colour = data[24], data[25]
            if colour != indexed and (colour, bits) != (grey, 8):
                raise Undecodable(f"{bits} bits of colour type {colour}; class indices are 8 bits of grey or a palette")
            return np.array(image)
    except (Undecodable, MemoryError):
        raise
    except Exception as error:  # decoders raise nearly every kind for a damaged file
        raise Undecodable(" ".join(str(error).split()) or type(error).__name__) from error


def decode_plain_jpeg(data: bytes) -> np.ndarray | None:
    """Decodes the common kinds of JPEG with libjpeg-turbo: RGB uint8 [H, W, 3], or None for a file that needs Pillow.

    Those are other formats, CMYK, chroma subsampling that simplejpeg does not know (it raises KeyError), damaged files,
    and lossless ones, whose samples may have fewer than 8 bits, which simplejpeg does not report. Raises Undecodable
    for a JPEG beyond the limits.
    """
    if data[:3] != JPEG or (markers := _markers(data)).frame == LOSSLESS:
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        _check_jpeg(markers, height, width)
        if colorspace in ("CMYK", "YCCK"):
            return None
        return simplejpeg.decode_jpeg(data, colorspace="RGB")  # strict: damage is an error
    except (Undecodable, MemoryError):
        raise
    except Exception:  # noqa: BLE001 - Pillow decides about any failure
        return None


def _pillow(data: bytes) -> np.ndarray:
    markers = _markers(data) if data[:3] == JPEG else None
    if markers and markers.exif > MAX_EXIF:
        raise Undecodable(f"more than the limit of {MAX_EXIF} Exif segments")
    layout = tiff.read_layout(data) if data[:4] in tiff.MAGIC else None
    if layout and (fault := layout.fault()):
        raise Undecodable(fault)
    with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=FORMATS) as image:
        _check_size(image.height, image.width)
        if markers:
            _check_jpeg(markers, image.height, image.width)
        elif image.format == "PNG":
            _check_png(data)
        elif isinstance(image, TiffImageFile):
            _check_size(image.tag_v2.get(TILELENGTH, 0), image.tag_v2.get(TILEWIDTH, 0))  # tiles are decoded whole
        if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM"):
            return _scaled(np.asarray(image).astype(np.uint16), layout)
        if image.mode in ("I", "F"):
            raise Undecodable(f"pixels of mode {image.mode}, whose range is not defined")
        return np.asarray(image.convert("RGB"))


def _scaled(grey: np.ndarray, layout: tiff.Layout | None) -> np.ndarray:
    """Scales deep greys (uint16 [H, W]) to RGB uint8 [H, W, 3]. Pillow's own conversion would clip them.

    They have 16 bits, or those that a TIFF's header says; Pillow scales a PGM's by their maximum to 16 bits.
    """
    eight = (grey >> (max(layout.bits) - 8 if layout else 8)).astype(np.uint8)
    if layout and layout.photometric == tiff.WHITE_IS_ZERO:
        eight = 255 - eight
    return np.repeat(eight[..., None], 3, axis=2)


def _check_size(height: int, width: int) -> None:
    if max(height, width) > MAX_SIDE:
        raise Undecodable(f"{width}x{height} px; a side has at most {MAX_SIDE} px")
    if height * width > LARGEST_IMAGE:
        raise Undecodable(f"{width}x{height} px is more than the limit of {LARGEST_IMAGE} px")


def _markers(data: bytes) -> Markers:
    """Returns the markers of a JPEG. Raises Undecodable for one that libjpeg refuses.

    Only files whose compressed data may have to be searched are left to the compiled loop: a process's first call of
    one takes 0.4 s, as numba imports scipy.
    """
    long = len(data) > 1 << 20 or PROGRESSIVE in data
    markers: Markers = read_markers(np.frombuffer(data, np.uint8)) if long else read_markers.py_func(data)
    if not markers.scans:
        raise Undecodable("a JPEG that is truncated or damaged before its first scan")
    return markers


def _check_jpeg(markers: Markers, height: int, width: int) -> None:
    """Checks the size of a JPEG, and how often a decoder would visit all its pixels."""
    _check_size(height, width)
    try:
        check_scans(markers.scans, height, width)
    except KamimError as error:
        raise Undecodable(str(error)) from error


def _check_png(data: bytes) -> None:
    """Raises Pillow's error for a wrong checksum of a chunk, which decoding alone would not check."""
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        image.verify()
