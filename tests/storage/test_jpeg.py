"""The markers of a JPEG count where libjpeg reads them, and nowhere else."""

import io
import struct

import numpy as np
import pytest
import simplejpeg
from PIL import Image
from skimage import data

from kamim.storage.jpeg import Markers, read_markers
from preprocess.decode import decode
from preprocess.record import original

PHOTO = Image.fromarray(data.astronaut()[60:141, 180:277])
LOSSLESS, SCAN, EXIF = b"\xff\xc3", b"\xff\xda", b"\xff\xe1\0\x0cExif\0\0II*\0"
HIDDEN = (LOSSLESS + SCAN + b"\xff\xd9") * 9 + EXIF * 200


def jpeg(mode: str = "RGB", **options: object) -> bytes:
    stream = io.BytesIO()
    PHOTO.convert(mode).save(stream, "JPEG", **options)
    return stream.getvalue()


def with_segment(file: bytes, marker: int, content: bytes) -> bytes:
    return file[:2] + struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content + file[2:]


def markers(file: bytes) -> Markers:
    """As the compiled loop and as Python count them."""
    compiled = read_markers(np.frombuffer(file, np.uint8))
    assert read_markers.py_func(file) == compiled
    return compiled


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (jpeg(), Markers(0xC0, 1, 0)),
        (jpeg("L"), Markers(0xC0, 1, 0)),
        (jpeg("CMYK"), Markers(0xC0, 1, 0)),
        (jpeg(restart_marker_blocks=1), Markers(0xC0, 1, 0)),
        (jpeg(progressive=True), Markers(0xC2, 10, 0)),  # the scans of libjpeg's jpeg_simple_progression
        (jpeg("L", progressive=True), Markers(0xC2, 6, 0)),
    ],
)
def test_frame_and_scans_are_those_of_the_encoder(file: bytes, expected: Markers) -> None:
    assert markers(file) == expected
    for marker in (0xE1, 0xE2, 0xFE):  # Exif or XMP, ICC, a comment
        assert markers(with_segment(file, marker, b"Exo" + HIDDEN)) == expected
    assert markers(with_segment(file, 0xE1, b"Exif\0\0" + HIDDEN)) == expected._replace(exif=1)
    assert markers(file + HIDDEN) == expected
    assert markers(file[:2] + b"junk\xff\0\xff\xff\xff" + file[3:]) == expected  # which libjpeg skips


@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=["baseline", "progressive"])
@pytest.mark.parametrize("where", ["exif", "profile", "comment", "after its end"])
def test_originals_keep_their_bytes_whatever_their_metadata_hold(options: dict[str, bool], where: str) -> None:
    plain, kind = jpeg(**options), {"exif": 0xE1, "profile": 0xE2, "comment": 0xFE}.get(where)
    content = b"Exif\0\0MM\0*" + HIDDEN if where == "exif" else HIDDEN
    file = with_segment(plain, kind, content) if kind else plain + HIDDEN
    expected = simplejpeg.decode_jpeg(plain)
    np.testing.assert_array_equal(decode(file), expected)
    assert original(file, expected).tobytes() == file


@pytest.mark.parametrize("refused", [b"\xff\xd9", b"\xff\xd8", b"\xff\xc8\0\4ab", b"\xff\xf0\0\4ab", b"\xff\x02\0\4ab"])
def test_what_libjpeg_refuses_ends_the_count(refused: bytes) -> None:
    file = jpeg(progressive=True)
    start = file.index(SCAN)
    assert markers(file[:2] + refused + file[2:]) == Markers(0, 0, 0)
    assert markers(file[:start] + refused + file[start:]) == Markers(0xC2, 0, 0)
    with pytest.raises(ValueError):
        simplejpeg.decode_jpeg(file[:2] + refused + file[2:])


def test_segments_without_content_are_passed_as_libjpeg_passes_them() -> None:
    for length in (0, 1, 2):
        file = jpeg()[:2] + struct.pack(">BBH", 0xFF, 0xE1, length) + jpeg()[2:]
        assert markers(file) == Markers(0xC0, 1, 0)
        np.testing.assert_array_equal(decode(file), simplejpeg.decode_jpeg(jpeg()))


def test_a_cut_file_has_the_scans_that_are_left() -> None:
    file = jpeg(progressive=True)
    counts = [markers(file[:cut]).scans for cut in range(len(file))]
    assert counts == sorted(counts)
    assert (counts[3], counts[-1]) == (0, 10)
