"""Folders of images and masks: what is read, and one line for everything that cannot be."""

import io
import os
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kamim import KamimError
from kamim.evaluation.mask_folder import MaskFolder, open_mask_folder
from kamim.storage.images import LARGEST_IMAGE
from preprocess.decode import Undecodable, decode_mask

CASES = int(os.environ.get("KAMIM_FUZZ_CASES", "300"))
NAMES = "sky\nroad\ncar\n"


def png(values: np.ndarray, mode: str = "L", **options: object) -> bytes:
    stream = io.BytesIO()
    image = Image.fromarray(values.astype(np.uint8))
    if mode == "P":
        image.putpalette(list(range(255, -1, -1)) * 3)
    (image if mode in "LP" else image.convert(mode)).save(stream, "png", **options)
    return stream.getvalue()


def header(width: int, height: int, bits: int = 8, colour: int = 0, body: bytes = b"") -> bytes:
    """A PNG of any header, with right checksums."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    fields = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", fields) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three samples of three sizes; the mask of sample n holds n, and 255 in its first row."""
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    (tmp_path / "classes.txt").write_text(NAMES)
    for n, (name, height, width) in enumerate((("a.jpg", 20, 30), ("b.png", 31, 17), ("c.webp", 24, 24))):
        Image.fromarray(np.full((height, width, 3), 40 * n, np.uint8)).save(tmp_path / "images" / name)
        mask = np.full((height, width), n)
        mask[0] = 255
        (tmp_path / "masks" / f"{name[0]}.png").write_bytes(png(mask))
    return tmp_path


def opened(folder: Path, ignore_index: int = 255) -> MaskFolder:
    return open_mask_folder(folder, ignore_index, workers=2)


def test_a_folder_is_read(folder: Path) -> None:
    (folder / "images/.hidden.png").write_bytes(b"")
    (folder / "images/notes.txt").write_text("no image")
    masks = opened(folder)
    assert masks.images == ("a.jpg", "b.png", "c.webp") and masks.classes == ("sky", "road", "car")
    for n, (height, width) in enumerate(((20, 30), (31, 17), (24, 24))):
        expected = np.full((height, width), n, np.int16)
        expected[0] = -1
        np.testing.assert_array_equal(masks.mask(n), expected)
        assert masks.image(n, np.inf).shape == (height, width, 3)
    assert masks.image(0, 150).shape == (10, 15, 3)  # made smaller as a store would hold it


def test_an_image_larger_than_a_store_holds_is_read(folder: Path) -> None:
    """Stored images have sides of at most 4,095 px; the sizes that are compared are those of the files."""
    Image.fromarray(np.zeros((2, 5000, 3), np.uint8)).save(folder / "images/d.png")
    (folder / "masks/d.png").write_bytes(png(np.zeros((2, 5000))))
    assert opened(folder).mask(3).shape == (2, 5000)


def test_the_fingerprint_is_of_every_file(folder: Path) -> None:
    seen = {opened(folder).fingerprint}
    assert seen == {opened(folder).fingerprint}
    for change in (
        lambda: (folder / "classes.txt").write_text("sky\nroad\nbus\n"),
        lambda: (folder / "masks/a.png").write_bytes(png(np.ones((20, 30)))),
        lambda: Image.fromarray(np.ones((31, 17, 3), np.uint8)).save(folder / "images/b.png"),
        lambda: [
            (folder / name).rename(folder / name.replace("c.", "d.")) for name in ("images/c.webp", "masks/c.png")
        ],
    ):
        change()
        seen.add(opened(folder).fingerprint)
    assert len(seen) == 5


@pytest.mark.parametrize("mode", ["L", "P"])
def test_masks_are_indices_and_not_colours(mode: str) -> None:
    values = np.random.default_rng(0).integers(0, 256, (9, 11)).astype(np.uint8)
    np.testing.assert_array_equal(decode_mask(png(values, mode)), values)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_small_palettes_are_not_scaled(bits: int) -> None:
    values = np.arange(16).reshape(4, 4) % 2**bits
    np.testing.assert_array_equal(decode_mask(png(values, "P", bits=bits)), values)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not a PNG"),
        (b"\xff\xd8\xff\xe0", "not a PNG"),
        (png(np.zeros((4, 4)), "RGB"), "8 bits of colour type 2"),
        (png(np.zeros((4, 4)), "RGBA"), "8 bits of colour type 6"),
        (png(np.zeros((4, 4)), "LA"), "8 bits of colour type 4"),
        (png(np.zeros((4, 4)), "1"), "1 bits of colour type 0"),
        (header(4, 4, bits=2, body=b"\0\0" * 4), "2 bits of colour type 0"),
        (header(4, 4, bits=16, body=bytes(9 * 4)), "16 bits of colour type 0"),
        (png(np.zeros((40, 40)))[:-30], "Truncated File Read"),
        (header(4, 4, body=b"\0"), "image file is truncated"),
        (header(14_000, 14_000), f"limit of {LARGEST_IMAGE} p"),
        (header(60_000, 60_000), f"limit of {LARGEST_IMAGE} p"),
        (header(70_000, 1), "a side has at most"),
        (header(0, 4), "cannot identify image file"),
    ],
)
def test_a_mask_that_cannot_be_trusted_is_rejected(data: bytes, said: str) -> None:
    with pytest.raises(Undecodable, match=re.escape(said)):
        decode_mask(data)


def with_right_checksums(data: bytes) -> bytes:
    """A PNG whose chunks end with the checksums of what they hold, as far as there are whole chunks."""
    out, at = bytearray(data), 8
    while at + 12 <= len(out):
        (length,) = struct.unpack_from(">I", out, at)
        if at + 12 + length > len(out):
            break
        struct.pack_into(">I", out, at + 8 + length, zlib.crc32(out[at + 4 : at + 8 + length]))
        at += 12 + length
    return bytes(out)


def test_damaged_masks_are_read_or_rejected() -> None:
    """Whatever bytes change, with right checksums, a mask is uint8 [H, W], or Undecodable."""
    random = np.random.default_rng(1)
    read = 0
    for mode in ("L", "P"):
        sound = png(random.integers(0, 3, (16, 16)), mode)
        for _ in range(CASES):
            data = bytearray(sound)
            for at in random.integers(8, len(data), random.integers(1, 4)):
                data[at] = random.integers(256)
            data = data[: random.integers(1, len(data) + 1)] if random.random() < 0.2 else data
            try:
                mask = decode_mask(with_right_checksums(bytes(data)))
            except Undecodable:
                continue
            assert mask.dtype == np.uint8 and mask.ndim == 2
            read += 1
    assert read > CASES / 10


def break_it(folder: Path, how: str) -> None:
    if how == "masks":
        (folder / "masks").rename(folder / "annotations")
    elif how == "no mask":
        (folder / "masks/b.png").unlink()
    elif how == "no image":
        (folder / "images/b.png").unlink()
    elif how == "twins":
        Image.new("RGB", (3, 3)).save(folder / "images/a.png")
    elif how == "empty":
        for file in (folder / "images").iterdir():
            file.unlink()
    elif how == "size":
        (folder / "masks/b.png").write_bytes(png(np.zeros((17, 31))))
    elif how == "value":
        (folder / "masks/b.png").write_bytes(png(np.full((31, 17), 3)))
    elif how == "image":
        (folder / "images/a.jpg").write_bytes(b"\xff\xd8\xff\xe0 no JPEG")
    elif how == "pipe":
        (folder / "masks/b.png").unlink()
        (folder / "masks/b.png").mkdir()
    else:
        (folder / "classes.txt").write_text(how)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("masks", "masks: no such folder; segmentation reads DIR/images, DIR/masks, DIR/classes.txt"),
        ("no mask", "images holds b, masks does not; each image needs a mask of its stem"),
        ("no image", "masks holds b, images does not"),
        ("twins", "images: a.jpg and a.png have the same stem"),
        ("empty", "images: holds no such files (images)"),
        ("size", "masks/b.png: is 31x17 px, its image 17x31 px; they must be equal"),
        ("value", "masks/b.png: holds the index 3, but classes.txt names 0 to 2 and ignore_index is 255"),
        ("image", "images/a.jpg: "),
        ("pipe", "masks/b.png: "),
        ("sky\n", "classes.txt: names 1 classes, one a line; must be 2 to 256"),
        ("sky\nroad\nsky\n", "classes.txt: line 1 repeats sky"),
        ("sky\n\nroad\n", "classes.txt: line 2 is empty"),
    ],
)
def test_a_folder_that_cannot_be_used_is_one_line(folder: Path, how: str, said: str) -> None:
    break_it(folder, how)
    with pytest.raises(KamimError, match=re.escape(said)) as caught:
        opened(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(KamimError, match="nowhere: no such folder"):
        opened(tmp_path / "nowhere")


def test_the_ignored_index_may_be_any(folder: Path) -> None:
    with pytest.raises(KamimError, match="holds the index 255"):
        opened(folder, ignore_index=1)
    for file in (folder / "masks").iterdir():
        file.write_bytes(png(np.minimum(np.asarray(Image.open(file)), 3)))
    assert opened(folder, ignore_index=3).mask(2)[0, 0] == -1


def of_values(folder: Path, *values: int) -> Path:
    """Replaces every mask by one whose columns hold the values in turn, an equal number of pixels each."""
    for file in (folder / "masks").iterdir():
        height, width = np.asarray(Image.open(file)).shape
        file.write_bytes(png(np.resize(np.array(values), (height, width))))
    return folder


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ((0, 255), "every pixel that is not ignored is of the class sky, and 5"),
        ((255,), "every pixel is ignored, and 100.0% hold 255, which is ignore_index"),
        ((2,), "is of the class car, and 0.0% hold 255"),
    ],
)
def test_masks_of_one_class_are_refused_and_two_values_are_explained(
    folder: Path, values: tuple[int, ...], said: str
) -> None:
    with pytest.raises(KamimError, match=re.escape(said)) as caught:
        opened(of_values(folder, *values))
    assert "in masks of 0 and 255 write 1 for 255" in str(caught.value)


def test_grey_levels_in_place_of_indices_are_explained(folder: Path) -> None:
    with pytest.raises(KamimError, match=r"holds the index 128, .* a mask holds indices of classes.txt, not grey"):
        opened(of_values(folder, 0, 128, 255))


def test_classes_that_no_mask_holds_and_many_ignored_pixels_are_reported(folder: Path) -> None:
    assert opened(of_values(folder, 0, 1, 2)).cautions() == []
    masks = opened(of_values(folder, 0, 1, 255))
    values = np.concatenate([np.asarray(Image.open(file)).ravel() for file in (folder / "masks").iterdir()])
    assert masks.pixels == ((values == 255).sum(), (values == 0).sum(), (values == 1).sum(), 0)
    absent, ignored = masks.cautions()
    assert absent == f"{folder}: no mask holds 1 of its 3 classes: car"
    assert ignored.startswith(f"{folder}: {(values == 255).mean():.1%} of the pixels hold 255, which is ignore_index")
    assert opened(of_values(folder, 0, 1, 2), ignore_index=2).cautions() == [
        f"{folder}: {1 / 3:.1%} of the pixels hold 2, which is ignore_index; they count neither in training nor in any "
        "score"
    ]
