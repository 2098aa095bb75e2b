"""The markers of a JPEG file, read segment by segment as libjpeg and Pillow read them (ITU-T T.81, Annex B).

A segment may hold any bytes: the thumbnail in Exif data has markers of its own, and so may whatever follows the image.
"""

from typing import NamedTuple

from kamim import KamimError
from kamim.method.kernels import kernel
from kamim.storage.images import LARGEST_IMAGE

MAX_SCANNED = 200 * LARGEST_IMAGE  # scans of a file times its pixels, as a decoder visits all of them in each scan
SCAN_BYTES = 10  # of the shortest scan, whose code is empty

LOSSLESS = 0xC3  # a frame, see Markers
_TEM, _RST0, _RST7, _SOS, _APP0, _APP1, _APP15, _COM = 0x01, 0xD0, 0xD7, 0xDA, 0xE0, 0xE1, 0xEF, 0xFE
_SOF0, _SOF15, _DRI = 0xC0, 0xCF, 0xDD
_DHT, _JPG, _DAC = 0xC4, 0xC8, 0xCC  # between SOF0 and SOF15
_PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)


class Markers(NamedTuple):
    """frame: the second byte of the frame's marker SOFn, 0 if there is none. scans, exif: counts of such segments."""

    frame: int
    scans: int
    exif: int


@kernel
def read_markers(data):
    """Returns the Markers of a JPEG file (uint8 [n]) up to its end or to the first segment that libjpeg refuses.

    A file without scans is therefore none that libjpeg decodes. The code after the first scan is searched for further
    scans only if the file may have some: if it is progressive, or if that scan lacks components of the frame.
    """
    frame, components, scans, exif, at = 0, 0, 0, 0, 2
    while True:
        while at + 3 < len(data) and (data[at] != 0xFF or data[at + 1] == 0 or data[at + 1] == 0xFF):
            at += 1
        if at + 3 >= len(data):
            break
        marker, length = int(data[at + 1]), 256 * int(data[at + 2]) + int(data[at + 3])
        if marker == _TEM or _RST0 <= marker <= _RST7:  # they have no length
            at += 2
            continue
        of_frame = _SOF0 <= marker <= _SOF15 and marker != _JPG
        if not (of_frame or _SOS <= marker <= _DRI or _APP0 <= marker <= _APP15 or marker == _COM):
            break
        content, at = data[at + 4 : at + 2 + length], at + 2 + max(length, 2)
        if marker == _SOS:
            scans += 1
            if frame not in _PROGRESSIVE and len(content) > 0 and content[0] == components:
                break
        elif of_frame and marker != _DHT and marker != _DAC:
            frame, components = marker, int(content[5]) if len(content) > 5 else 0
        elif marker == _APP1 and len(content) >= 4:
            exif += int(content[0] == 0x45 and content[1] == 0x78 and content[2] == 0x69 and content[3] == 0x66)
    return Markers(frame, scans, exif)


def takes_long(scans, height, width):
    """Returns whether decoding files of n scans of height x width px, numbers or arrays, visits over MAX_SCANNED px."""
    return scans * height * width > MAX_SCANNED


def check_scans(scans: int, height: int, width: int) -> None:
    """Raises KamimError for a file that takes_long."""
    if takes_long(scans, height, width):
        raise KamimError(f"{scans} scans of {width}x{height} px are more than the limit of {MAX_SCANNED} px")
