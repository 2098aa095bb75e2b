"""Odd, damaged and hostile image files: the pixels that Pillow gives, or a refusal; and a job over all of them."""

import csv
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import tifffile
from conftest import make_store
from PIL import Image, ImageCms
from skimage import data
from test_decode import FILES, PHOTO, encoded, huge_jpeg, noise, pillow, png_chunk, refusal

from kamim.bench import preprocess as bench
from kamim.storage.manifest import REJECTS, Encoding
from kamim.storage.store import Store
from pipelines import turbojpeg
from pipelines.loader import Loader, SampleError
from pipelines.plan import Plan
from preprocess.build import Stopped
from preprocess.decode import MAX_SIDE, Undecodable, decode

JPEGS = Path(__file__).parents[1] / "fixtures/jpeg"
LARGE = Image.fromarray(data.astronaut()[:200, :300])
BOMB = zlib.compress(bytes(9 << 20))
PIXELS = np.asarray(PHOTO)


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def lossless(samples: np.ndarray, bits: int) -> bytes:
    """A lossless JPEG of grey samples [H, W], as differences to the left neighbour, or at the left border the upper."""
    height, width = samples.shape
    before = np.hstack([np.vstack([[[1 << (bits - 1)]], samples[:-1, :1]]), samples[:, :-1]])
    code = ""
    for difference in (samples - before).ravel().tolist():
        size = abs(difference).bit_length()
        low = difference if difference > 0 else difference + (1 << size) - 1
        code += f"{size:05b}" + (f"{low:0{size}b}" if size else "")
    code += "1" * (-len(code) % 8)
    packed = int(code, 2).to_bytes(len(code) // 8, "big").replace(b"\xff", b"\xff\0")
    return b"".join(
        [
            b"\xff\xd8",
            segment(0xC3, struct.pack(">BHHB", bits, height, width, 1) + b"\1\x11\0"),
            segment(0xC4, b"\0" + bytes([0, 0, 0, 0, 17, *[0] * 11]) + bytes(range(17))),  # 17 codes of 5 bits
            segment(0xDA, b"\1\1\0\1\0\0"),
            packed,
            b"\xff\xd9",
        ]
    )


def ramp(bits: int) -> np.ndarray:
    return np.arange(20 * 30).reshape(20, 30) * 7 % (1 << bits)


def twelve_bit() -> bytes:
    """A flat grey JPEG, whose code is the same for 8 and for 12 bits; the header says 12."""
    file = bytearray(encoded(np.full((16, 16), 128, np.uint8), "JPEG"))
    at = file.index(b"\xff\xc0")
    file[at + 1], file[at + 4] = 0xC1, 12
    return bytes(file)


def subsampled(name: str) -> bytes:
    return simplejpeg.encode_jpeg(PIXELS.copy(), colorsubsampling=name)


def profiled(kind: str) -> bytes:
    """With a profile of another colour space, which is not applied."""
    return encoded(PHOTO, kind, icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes())


def turned(kind: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(PHOTO, kind, exif=exif)


def interlaced() -> bytes:
    """PHOTO as PNG in the seven passes of Adam7."""
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    rows = (b"\0" + row.tobytes() for y, x, dy, dx in passes for row in PIXELS[y::dy, x::dx])
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", PHOTO.width, PHOTO.height, 8, 2, 0, 0, 1))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(b"".join(rows))) + png_chunk(b"IEND", b"")


def with_chunk(chunk: bytes) -> bytes:
    """A PNG with one more chunk after its header."""
    file = encoded(PHOTO, "PNG")
    return file[:33] + chunk + file[33:]


def wrong_checksum(chunk: bytes) -> bytes:
    file = bytearray(encoded(PHOTO, "PNG"))
    at = file.index(chunk) - 4
    file[at + 8 + int.from_bytes(file[at : at + 4], "big")] ^= 1
    return bytes(file)


def tiled(tile_width: int | None = None) -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, PIXELS, tile=(32, 48), photometric="rgb")
    stream.seek(0)
    if tile_width is not None:
        with tifffile.TiffFile(stream, mode="r+b") as tiff:
            tiff.pages[0].tags["TileWidth"].overwrite(tile_width)
    return stream.getvalue()


def gif(width: int, height: int) -> bytes:
    """One pixel on a canvas."""
    frame = b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\2\2\x4c\1\0;"
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6) + frame


def webp(width: int, height: int) -> bytes:
    """One pixel on the canvas of an animation."""
    frame = encoded(noise(1, 1), "WEBP")[12:]
    canvas = b"\2\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    chunks = ((b"VP8X", canvas), (b"ANIM", bytes(6)), (b"ANMF", bytes(16) + frame))
    body = b"WEBP" + b"".join(name + struct.pack("<I", len(content)) + content for name, content in chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def wide_png(width: int) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(bytes(9))) + png_chunk(b"IEND", b"")


def scanned(side: int, scans: int) -> bytes:
    """A JPEG of any number of scans, of which a header without any code is enough to visit all pixels once."""
    file = huge_jpeg(side)
    at = file.index(b"\xff\xda")
    return file[:at] + segment(0xDA, b"\1\1\0\0\x3f\0") * scans + file[at:]


def with_exif(segments: int) -> bytes:
    file = encoded(PHOTO.convert("CMYK"), "JPEG")
    return file[:2] + segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\0\0") * segments + file[2:]


AS_PILLOW: dict[str, Callable[[], bytes]] = FILES | {
    **{f"jpeg {name}": lambda name=name: subsampled(name) for name in ("420", "440", "411")},
    **{file.name: file.read_bytes for file in sorted(JPEGS.glob("*.jpg"))},
    "lossless jpeg": lambda: lossless(ramp(8), 8),
    "jpeg with restart markers": lambda: encoded(PHOTO, "JPEG", restart_marker_blocks=1),
    "progressive CMYK jpeg": lambda: encoded(PHOTO.convert("CMYK"), "JPEG", progressive=True),
    **{f"jpeg turned {n}": lambda n=n: turned("JPEG", n) for n in range(9)},
    **{f"{kind} turned": lambda kind=kind: turned(kind, 5) for kind in ("PNG", "WEBP", "TIFF")},
    **{f"{kind} with a profile": lambda kind=kind: profiled(kind) for kind in ("JPEG", "PNG", "TIFF")},
    "jpeg with 64 KB of comment": lambda: encoded(PHOTO, "JPEG", comment=b"x" * 65000),
    "interlaced png": interlaced,
    "png with junk after its end": lambda: encoded(PHOTO, "PNG") + b"junk" * 1000,
    "png with an unknown chunk": lambda: with_chunk(png_chunk(b"abCd", b"\0")),
    "2-bit png": lambda: encoded(PHOTO.convert("P", palette=Image.Palette.ADAPTIVE, colors=4), "PNG", bits=2),
    "grey gif": lambda: encoded(PHOTO.convert("L"), "GIF"),
    "interlaced gif": lambda: encoded(PHOTO.convert("P"), "GIF", interlace=1),
    "gif of one pixel on a canvas": lambda: gif(60, 50),
    "webp of one pixel on a canvas": lambda: webp(60, 50),
    "tiled tiff": tiled,
    "tiff, deflate": lambda: encoded(PHOTO, "TIFF", compression="tiff_adobe_deflate"),
    "tiff, jpeg": lambda: encoded(PHOTO, "TIFF", compression="jpeg"),
    "grey-alpha tiff": lambda: encoded(PHOTO.convert("LA"), "TIFF"),
    "pbm": lambda: encoded(PHOTO.convert("1"), "PPM"),
    "plain ppm": lambda: b"P3 2 1 255 1 2 3 4 5 6\n",
    "1-bit bmp": lambda: encoded(PHOTO.convert("1"), "BMP"),
    "1x20000 png": lambda: encoded(noise(20000, 1), "PNG"),
    "20000x1 jpeg": lambda: encoded(noise(1, 20000), "JPEG"),
    "largest side": lambda: encoded(noise(1, MAX_SIDE), "PNG"),
}
REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "lossless jpeg of 6 bits": (lambda: lossless(ramp(6), 6), "of a kind"),
    "lossless jpeg of 12 bits": (lambda: lossless(ramp(12), 12), "of a kind"),
    "12-bit jpeg": (twelve_bit, "of a kind"),
    "jpeg without code": (lambda: encoded(PHOTO, "JPEG").partition(b"\xff\xda")[0] + b"\xff\xd9", ""),
    "png with a wrong checksum of its header": (lambda: wrong_checksum(b"IHDR"), "cannot be read"),
    "png with a wrong checksum of its pixels": (lambda: wrong_checksum(b"IDAT"), "IDAT"),
    "png whose text is a bomb": (lambda: with_chunk(png_chunk(b"zTXt", b"a\0\0" + BOMB)), "too large"),
    "png whose profile is a bomb": (lambda: with_chunk(png_chunk(b"iCCP", b"a\0\0" + BOMB)), "too large"),
    "png with 170,000,000 px a side": (lambda: wide_png(170_000_000), "170000000x1 px; a side has at most 65500 px"),
    "png with one px too many": (lambda: wide_png(MAX_SIDE + 1), "65501x1 px"),
    "jpeg of 65,500 px a side": (lambda: huge_jpeg(MAX_SIDE), "65500x65500 px is more than"),
    "jpeg of 1,000 scans": (lambda: scanned(12_000, 1000), "1001 scans of 12000x12000 px are more than"),
    "jpeg of 101 Exif segments": (lambda: with_exif(101), "100 Exif segments"),
    "gif of one pixel on a large canvas": (lambda: gif(65_535, 65_535), "pixels"),
    "webp of one pixel on a large canvas": (lambda: webp(60_000, 60_000), "pixels"),
    "tiff with a large tile": (lambda: tiled(tile_width=60_000_000), "60000000x32 px"),
    "tiff of floats": (lambda: encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "range is not defined"),
    "web page": (lambda: b"<html>404: no such image</html>", "not an image"),
    "nothing": (lambda: b"", "empty file"),
    "postscript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "not an image"),
}
CUT = {
    "JPEG": lambda: encoded(LARGE, "JPEG", quality=95),
    "progressive JPEG": lambda: encoded(LARGE, "JPEG", quality=95, progressive=True),
    "JPEG with restart markers": lambda: encoded(LARGE, "JPEG", quality=95, restart_marker_blocks=1),
    "CMYK JPEG": lambda: encoded(LARGE.convert("CMYK"), "JPEG", quality=90),
    "PNG": lambda: encoded(LARGE, "PNG"),
    "GIF": lambda: encoded(LARGE.convert("P"), "GIF"),
    "WEBP": lambda: encoded(LARGE, "WEBP", quality=95),
    "TIFF": lambda: encoded(LARGE, "TIFF", compression="tiff_lzw"),
    "BMP": lambda: encoded(LARGE, "BMP"),
}


@pytest.mark.parametrize("name", sorted(AS_PILLOW.keys() - FILES.keys()))
def test_odd_files_decode_as_pillow_decodes_them(name: str) -> None:
    file = AS_PILLOW[name]()
    np.testing.assert_array_equal(decode(file), pillow(file))


@pytest.mark.parametrize("name", REFUSED)
def test_hostile_files_are_refused_with_a_reason(name: str) -> None:
    make, reason = REFUSED[name]
    assert reason in refusal(make())


def test_lossless_samples_come_back() -> None:
    expected = np.repeat(ramp(8).astype(np.uint8)[..., None], 3, axis=2)
    np.testing.assert_array_equal(decode(lossless(ramp(8), 8)), expected)


@pytest.mark.parametrize("name", CUT)
def test_a_file_cut_at_any_kilobyte_is_refused(name: str) -> None:
    file = CUT[name]()
    assert len(file) > 10_000
    for cut in range(0, len(file) - 30, 1024):
        refusal(file[:cut])


def test_many_exif_segments_are_read_up_to_the_limit() -> None:
    decode(with_exif(100))


@pytest.mark.parametrize("decoder", ["simplejpeg.decode_jpeg_header", "simplejpeg.decode_jpeg"])
def test_whatever_simplejpeg_raises_is_pillows_turn(decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = FILES["jpeg"]()
    for kind in (KeyError, AttributeError, OverflowError, RuntimeError):
        monkeypatch.setattr(decoder, raising(kind))
        np.testing.assert_array_equal(decode(file), pillow(file))


@pytest.mark.parametrize("kind", [MemoryError, KeyboardInterrupt])
def test_no_image_is_to_blame_for_a_lack_of_memory(kind: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simplejpeg, "decode_jpeg", raising(kind))
    monkeypatch.setattr(Image.Image, "convert", raising(kind))
    for name in ("jpeg", "png"):
        with pytest.raises(kind):
            decode(FILES[name]())


def raising(kind: type[BaseException]) -> Callable[..., None]:
    def fail(*args: object, **kwargs: object) -> None:
        raise kind("of a decoder")

    return fail


def test_in_the_loader_it_is_the_samples_error(stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turbojpeg, "library", lambda: None)
    store = Store(stores["zarr"])
    loader = Loader(store, Plan(len(store), 4, 4, seed=0), 64, workers=1)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", raising(KeyError))
    with pytest.raises(SampleError, match="of a decoder"):
        next(loader.micro_batches(0, 1))
    monkeypatch.setattr(simplejpeg, "decode_jpeg", raising(MemoryError))
    with pytest.raises(MemoryError):
        next(loader.micro_batches(0, 1))


def test_the_benchmark_of_plain_jpegs_leaves_out_what_simplejpeg_does_not_know() -> None:
    files = [FILES["jpeg"](), (JPEGS / "chroma-441.jpg").read_bytes(), with_exif(101), huge_jpeg(MAX_SIDE), PIXELS]
    assert [bench._is_plain_jpeg(file) for file in files] == [True, False, False, False, False]


def test_a_job_that_lacks_memory_can_go_on_later(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("preprocess.shards.decode", raising(MemoryError))
    with pytest.raises(Stopped, match="out of memory"):
        make_store(folder, tmp_path / "store")


@pytest.mark.parametrize("encoding", ["jpeg", "original"])
def test_a_job_over_all_of_them_ends_well_and_lists_its_rejects(tmp_path: Path, encoding: Encoding) -> None:
    """Every file under a suffix that is not its own, in one class folder."""
    files = {f"{n:03d}": make() for n, make in enumerate(AS_PILLOW.values())}
    files |= {f"cut {name}": make()[:5000] for name, make in CUT.items()}
    files |= {name.replace(",", ""): make() for name, (make, _) in REFUSED.items()}
    (tmp_path / "source/all").mkdir(parents=True)
    for n, (name, content) in enumerate(files.items()):
        suffix = (".jpg", ".PNG", ".gif", ".tiff", ".webp", ".JPEG")[n % 6]
        (tmp_path / f"source/all/{name}{suffix}").write_bytes(content)
    options = {"encoding": encoding, "shard_size": 16, "detectors": ("fast", "sift", "orb")}
    out = make_store(tmp_path / "source", tmp_path / "store", **options)
    with (out / REJECTS).open(newline="", encoding="utf-8") as listed:
        rejects = {row["file"]: row["reason"] for row in csv.DictReader(listed)}
    assert len(rejects) == len(CUT) + len(REFUSED)
    for name, reason in rejects.items():
        assert reason
        with pytest.raises(Undecodable):
            decode((tmp_path / "source" / name).read_bytes())
    store = Store(out)
    assert len(store) == len(AS_PILLOW)
    loader = Loader(store, Plan(len(store), 8, 8, seed=0), 64, workers=1)
    assert sum(len(batch.indices) for batch in loader) >= len(store) - 8
