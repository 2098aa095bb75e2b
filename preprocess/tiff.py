"""What the header of a TIFF file says of its samples (TIFF 6.0 and BigTIFF), some of which Pillow ignores.

MaxSampleValue is not read, as it must not affect how an image is displayed (TIFF 6.0, section 8).
"""

import struct
from typing import NamedTuple

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
BITS = (1, 2, 4, 8, 12, 16)  # per sample, of files that Pillow reads
MAX_ENTRIES, MAX_VALUES = 1 << 16, 64  # that are read of a header, and of a tag
_BITS, _COMPRESSION, _PHOTOMETRIC, _PLANES, _PREDICTOR, _FORMAT, _SUBSAMPLING = 258, 259, 262, 284, 317, 339, 530
_INTEGERS = {1: "B", 3: "H", 4: "I", 16: "Q"}  # BYTE, SHORT, LONG, LONG8
_FORMATS = {2: "signed", 3: "floating-point"}  # 1 is unsigned
WHITE_IS_ZERO, _YCBCR = 0, 6  # photometric interpretations


class Layout(NamedTuple):
    """How the samples of a TIFF's first image are stored. Distinct values of all samples, in the header's numbers.

    photometric: 0 if white is zero; None if the header lacks it.
    """

    bits: set[int]
    formats: set[int]
    photometric: int | None
    compressed: bool
    separate: bool
    predictor: int
    subsampled: bool

    def fault(self) -> str:
        """Returns why the pixels that Pillow gives, if it gives any, may not be those of the file; else ""."""
        if self.formats != {1}:
            return f"{_FORMATS.get(max(self.formats), 'undefined')} samples, whose range is not defined"
        if len(self.bits) > 1 or not self.bits <= set(BITS):
            bits, allowed = (", ".join(map(str, numbers)) for numbers in (sorted(self.bits), BITS))
            return f"samples of {bits} bits; must be all of one of {allowed}"
        if self.photometric is None:
            return "its header lacks PhotometricInterpretation, so that 0 may be black or white"
        if self.compressed:
            return ""
        if self.separate and max(self.bits) > 8:
            return f"uncompressed samples of {max(self.bits)} bits in separate planes; save them interleaved"
        if self.predictor != 1:
            return "a predictor without compression, which some readers apply and others ignore"
        if self.photometric == _YCBCR and self.subsampled:
            return "uncompressed YCbCr with subsampling"
        return ""


def read_layout(data: bytes) -> Layout:
    """Returns the layout of the first image of a TIFF file. Raises struct.error if its header ends early."""
    tags = _tags(data)
    return Layout(
        bits=set(tags.get(_BITS, (1,))),
        formats=set(tags.get(_FORMAT, (1,))),
        photometric=tags.get(_PHOTOMETRIC, (None,))[0],
        compressed=tags.get(_COMPRESSION, (1,)) != (1,),
        separate=tags.get(_PLANES, (1,)) == (2,),
        predictor=tags.get(_PREDICTOR, (1,))[0],
        subsampled=tags.get(_SUBSAMPLING, (2, 2)) != (1, 1),
    )


def _tags(data: bytes) -> dict[int, tuple[int, ...]]:
    """Returns the integers of the tags of the first image."""
    order = "<" if data[:2] == b"II" else ">"
    start, number, length = ("Q", "Q", "HHQ8s") if b"+" in data[2:4] else ("I", "H", "HHI4s")
    (at,) = struct.unpack_from(order + start, data, struct.calcsize(order + start))
    (entries,) = struct.unpack_from(order + number, data, at)
    at += struct.calcsize(order + number)
    tags = {}
    for entry in range(min(entries, MAX_ENTRIES)):
        tag, kind, count, value = struct.unpack_from(order + length, data, at + entry * struct.calcsize(order + length))
        if kind in _INTEGERS and 0 < count <= MAX_VALUES:
            values = f"{order}{count}{_INTEGERS[kind]}"
            inline = struct.calcsize(values) <= len(value)
            tags[tag] = (
                struct.unpack_from(values, value)
                if inline
                else struct.unpack_from(values, data, struct.unpack(order + start, value)[0])
            )
    return tags
