"""Guarantees of a store with either image backend; pages; FFCV's format; messages about damaged stores."""

import ctypes
import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import simplejpeg
import zarr
from conftest import BACKENDS, has_ffcv, make_store
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from kamim import KamimError
from kamim.cli import app
from kamim.detectors import DETECTORS, detect_packed
from kamim.method import geometry
from kamim.method.colour import to_planes
from kamim.storage import beton, mmap_array
from kamim.storage.keypoints import POSITIONS, Keypoints, write_keypoints
from kamim.storage.manifest import file_checksums
from kamim.storage.store import Store
from preprocess.resize import resize_antialiased

DETECTED = ("fast", "sift", "orb")
STORED_AREA = 64**2 / 0.67


def source_pixels(folder: Path) -> list[np.ndarray]:
    """The images of a class folder, in the store's order."""
    return [np.asarray(Image.open(file).convert("RGB")) for file in sorted(folder.glob("*/*"))]


def resized(pixels: np.ndarray, area: float) -> np.ndarray:
    """About `area` px of the same shape, antialiased (tests/test_resize.py)."""
    scale = (area / (pixels.shape[0] * pixels.shape[1])) ** 0.5
    height, width = (round(side * scale) for side in pixels.shape[:2])
    return resize_antialiased(pixels, (height, width))


def expected_image(pixels: np.ndarray) -> np.ndarray:
    return pixels if pixels.shape[0] * pixels.shape[1] <= STORED_AREA else resized(pixels, STORED_AREA)


@pytest.fixture(scope="module", params=BACKENDS)
def path(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("store") / request.param
    return make_store(folder, out, request.param, detectors=DETECTED)


@pytest.fixture(scope="module", params=BACKENDS)
def raw_path(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(folder, tmp_path_factory.mktemp("raw") / request.param, request.param, encoding="raw")


def test_images_keep_order_labels_and_sizes(path: Path, folder: Path) -> None:
    opened = Store(path)
    assert len(opened) == 12
    assert opened.manifest.classes == ("a", "b", "c")
    assert opened.images.labels.dtype == np.int64
    assert opened.images.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert opened.images.sizes.tolist() == [list(expected_image(p).shape[:2]) for p in source_pixels(folder)]


def test_images_are_the_jpegs_of_the_resized_source(path: Path, folder: Path) -> None:
    images = Store(path).images
    assert images.encoding == "jpeg"
    for index, pixels in enumerate(source_pixels(folder)):
        expected = simplejpeg.encode_jpeg(np.ascontiguousarray(expected_image(pixels)), 90, colorsubsampling="420")
        data = images.data(index)
        assert data.dtype == np.uint8
        assert data.tobytes() == expected
        assert simplejpeg.decode_jpeg(data).shape[:2] == tuple(images.sizes[index])


def test_raw_images_are_the_resized_source(raw_path: Path, folder: Path) -> None:
    images = Store(raw_path).images
    assert images.encoding == "raw"
    for index, pixels in enumerate(source_pixels(folder)):
        np.testing.assert_array_equal(images.data(index).reshape(*images.sizes[index], 3), expected_image(pixels))


def test_yuv420_images_are_the_planes_of_the_resized_source(folder: Path, tmp_path: Path) -> None:
    opened = Store(make_store(folder, tmp_path / "store", None, encoding="yuv420"))
    assert (opened.manifest.job.images, opened.images.encoding) == ("zarr", "yuv420")
    for index, pixels in enumerate(source_pixels(folder)):
        np.testing.assert_array_equal(opened.images.data(index), to_planes(expected_image(pixels)))
    made = runner.invoke(app, ["store", "verify", str(tmp_path / "store"), "--deep"])
    assert made.exit_code == 0, made.stderr


def test_ffcv_files_hold_no_yuv420(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(KamimError, match="container = ffcv: holds no images with pixels = yuv420; take container=zarr"):
        make_store(folder, tmp_path / "store", "ffcv", encoding="yuv420")


@pytest.mark.parametrize("detector", DETECTED)
def test_keypoints_are_those_of_the_canonical_frame(path: Path, folder: Path, detector: str) -> None:
    keypoints = Store(path).keypoints(detector)
    assert keypoints.rules == DETECTORS[detector].rules
    for index, pixels in enumerate(source_pixels(folder)):
        sizes = geometry.canonical_frames(*pixels.shape[:2], 64, (0.67, 1.0), DETECTORS[detector].frames)
        assert keypoints.frame[index].tolist() == list(map(list, sizes))
        for number, (height, width) in enumerate(sizes):
            frame = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)
            expected, counts = detect_packed(detector, frame, 1 / 0.67)
            positions, found_counts = keypoints.image(index, number)
            np.testing.assert_array_equal(positions, expected)
            np.testing.assert_array_equal(found_counts, counts)


def test_the_manifest_holds_what_shaped_the_store(path: Path) -> None:
    manifest = Store(path).manifest
    assert (manifest.job.resolution, manifest.job.quality, manifest.job.encoding) == (64, 90, "jpeg")
    assert manifest.count == manifest.job.items == 12
    assert manifest.stored_area == pytest.approx(STORED_AREA)
    assert manifest.checksums == file_checksums(path)


def test_more_keypoints_than_sixteen_bits_count_are_kept(tmp_path: Path) -> None:
    zarr.create_group(tmp_path / "keypoints.zarr")
    positions = np.random.default_rng(0).integers(0, 1200, (70_000, 2)).astype(np.uint16)
    frames = np.full((2, 2), 1200)
    images = [(positions, np.array([[69_000], [1_000]]), frames), (positions[:3], np.array([[0], [3]]), frames)]
    total, folder = sum(len(xy) for xy, *_ in images), tmp_path / "keypoints.zarr"
    write_keypoints(folder, "fast", POSITIONS, images, total)
    keypoints = Keypoints(folder, "fast", DETECTORS["fast"].rules, POSITIONS)
    for index, (expected, *_) in enumerate(images):
        found = [keypoints.image(index, frame)[0] for frame in (0, 1)]
        np.testing.assert_array_equal(np.concatenate(found), expected)


# Pages


def written(path: Path, items: list[np.ndarray], page_rows: int) -> list[int]:
    writer = mmap_array.ArrayWriter(zarr.create_group(path), "a", items[0].shape[1:], items[0].dtype, page_rows)
    starts = [writer.append(item) for item in items]
    writer.close()
    return starts


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 10), max_size=12), st.booleans())
def test_items_come_back_whole_and_never_cross_a_page(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], pairs: bool
) -> None:
    path = tmp_path_factory.mktemp("paged")
    shape = (2,) if pairs else ()
    random = np.random.default_rng(len(lengths))
    items = [random.integers(0, 1 << 16, (n, *shape)).astype(np.uint16) for n in (*lengths, 1)]
    starts = written(path, items, 10)
    reader = mmap_array.ArrayReader(path / "a", np.uint16, shape)
    plain = zarr.open_array(path / "a", mode="r")[:]  # any zarr reader
    for start, item in zip(starts, items, strict=True):
        assert start % 10 + len(item) <= 10
        rows = reader.rows(start, len(item))
        assert rows.dtype == np.uint16
        np.testing.assert_array_equal(rows, item)
        np.testing.assert_array_equal(plain[start : start + len(item)], item)
    addresses = reader.addresses(np.array(starts), np.array([len(item) for item in items]))
    for address, item in zip(addresses.tolist(), items, strict=True):
        assert ctypes.string_at(address, item.nbytes) == item.tobytes()


@pytest.mark.parametrize(("start", "count"), [(-1, 1), (8, 3), (20, 1), (3, -1), (1 << 62, 1)])
def test_rows_outside_the_pages_have_no_address(tmp_path: Path, start: int, count: int) -> None:
    written(tmp_path / "paged", [np.zeros(7, np.uint16)] * 2, 10)
    reader = mmap_array.ArrayReader(tmp_path / "paged/a", np.uint16)
    with pytest.raises(IndexError, match="rows lie outside the pages"):
        reader.addresses(np.array([0, start]), np.array([7, count]))


def test_an_item_larger_than_a_page_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="11 rows does not fit a page of 10"):
        written(tmp_path, [np.zeros(11, np.uint8)], 10)


def test_items_without_rows_are_empty_wherever_they_lie(tmp_path: Path) -> None:
    items = [np.zeros((n, 2), np.uint16) for n in (0, 10, 0, 0)]
    starts = written(tmp_path, items, 10)
    reader = mmap_array.ArrayReader(tmp_path / "a", np.uint16, (2,))
    assert [reader.rows(start, len(item)).shape for start, item in zip(starts, items, strict=True)] == [
        (0, 2),
        (10, 2),
        (0, 2),
        (0, 2),
    ]


def test_an_array_without_rows_opens(tmp_path: Path) -> None:
    written(tmp_path, [np.zeros(0, np.uint8)], 10)
    assert mmap_array.ArrayReader(tmp_path / "a", np.uint8).rows(0, 0).shape == (0,)


def test_pages_of_zeros_survive(tmp_path: Path) -> None:
    items = [np.zeros(10, np.uint8), np.zeros(7, np.uint8), np.ones(4, np.uint8)]
    starts = written(tmp_path, items, 10)
    reader = mmap_array.ArrayReader(tmp_path / "a", np.uint8)
    for start, item in zip(starts, items, strict=True):
        np.testing.assert_array_equal(reader.rows(start, len(item)), item)


def test_items_are_read_only_views_of_a_file(tmp_path: Path) -> None:
    starts = written(tmp_path, [np.arange(5, dtype=np.uint8)], 10)
    rows = mmap_array.ArrayReader(tmp_path / "a", np.uint8).rows(starts[0], 5)
    assert isinstance(rows.base.base, np.memmap)
    assert not rows.flags.writeable


# FFCV's format


def written_by_ffcv(
    path: Path, count: int, images: Iterable[tuple[np.ndarray, int, int, int, bool]], largest: int = 0
) -> None:
    """beton.write by the ffcv package's own fields and page allocator."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.rgb_image import IMAGE_MODES
    from ffcv.memory_allocator import MemoryAllocator
    from ffcv.types import ALLOC_TABLE_TYPE, CURRENT_VERSION, FieldDescType, HeaderType, get_metadata_type

    page_size = max(beton.PAGE_SIZE, mmap_array.power_of_two(largest))
    fields: dict[str, Any] = {"image": RGBImageField(), "label": IntField()}
    header = np.zeros(1, HeaderType)
    descriptors = np.zeros(len(fields), FieldDescType)
    for descriptor, type_id, (name, field) in zip(
        descriptors, (beton.IMAGE_FIELD, beton.INT_FIELD), fields.items(), strict=True
    ):
        descriptor["type_id"] = type_id
        descriptor["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
        descriptor["arguments"] = field.to_binary()[0]
    metadata = np.zeros(count, get_metadata_type(list(fields.values())))
    image_meta, label_meta = (metadata[name] for name in metadata.dtype.names)  # type: ignore[union-attr]
    start = header.nbytes + descriptors.nbytes + metadata.nbytes
    allocator = MemoryAllocator(str(path), start, page_size)
    path.write_bytes(bytes(start))
    allocator.__enter__()
    try:
        for index, (data, height, width, label, raw) in enumerate(images):
            allocator.set_current_sample(index)
            pointer, memory = allocator.malloc(data.nbytes)
            memory[:] = data
            image_meta[index] = (IMAGE_MODES["raw" if raw else "jpg"], width, height, pointer)
            fields["label"].encode(label_meta[index : index + 1], label, allocator.malloc)
    finally:
        allocator.__exit__(None, None, None)
    with path.open("r+b") as file:
        table = file.seek(0, 2)
        header[0] = (CURRENT_VERSION, len(fields), page_size, count, table)
        file.write(np.array(allocator.allocations, ALLOC_TABLE_TYPE).tobytes())  # tofile hides a full disk's errno
        file.seek(0)
        for block in (header, descriptors, metadata):
            file.write(block.tobytes())


@has_ffcv
@pytest.mark.parametrize("largest", [0, beton.PAGE_SIZE + 1])
def test_a_file_is_what_ffcv_writes(tmp_path: Path, largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Byte for byte, over several pages."""
    monkeypatch.setattr(beton, "PAGE_SIZE", 1 << 14)
    random = np.random.default_rng(0)
    sizes = [100, 1 << 14, 9_000, 9_000, 1, (1 << 14) - 1, 40]
    images = [(random.integers(0, 256, n).astype(np.uint8), n % 200 + 1, 7, n - 5, n % 2 == 0) for n in sizes]
    beton.write(tmp_path / "ours", len(images), images, min(largest, 1 << 15))
    written_by_ffcv(tmp_path / "theirs", len(images), images, min(largest, 1 << 15))
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@has_ffcv
def test_our_types_are_ffcvs() -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.types import ALLOC_TABLE_TYPE, CURRENT_VERSION, TYPE_ID_HANDLER, FieldDescType, HeaderType
    from ffcv.types import get_metadata_type as metadata_type

    assert beton.VERSION == CURRENT_VERSION
    assert HeaderType == beton.HEADER
    assert FieldDescType == beton.FIELD
    assert beton.ALLOCATION == ALLOC_TABLE_TYPE
    assert RGBImageField().metadata_type == beton.IMAGE
    theirs = metadata_type([RGBImageField(), IntField()])
    assert beton.SAMPLE.itemsize == theirs.itemsize
    assert list(beton.SAMPLE.fields.values()) == list(theirs.fields.values())
    assert TYPE_ID_HANDLER[beton.IMAGE_FIELD] is RGBImageField
    assert TYPE_ID_HANDLER[beton.INT_FIELD] is IntField


def read_by_stock_ffcv(file: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns all pixels and labels of a file, in order. Run it in a process of its own (see baselines.stock_ffcv)."""
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    loader = Loader(
        file,
        batch_size=3,
        num_workers=1,
        order=OrderOption.SEQUENTIAL,
        os_cache=True,
        pipelines={"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]},
    )
    batches = [(pixels.copy(), labels.copy()) for pixels, labels in loader]
    pixels, labels = zip(*batches, strict=True)
    return np.concatenate(pixels), np.concatenate(labels).ravel()


@has_ffcv
@pytest.mark.parametrize("encoding", ["jpeg", "raw"])
def test_the_stock_ffcv_loader_reads_a_store(encoding: str, photos: list[np.ndarray], tmp_path: Path) -> None:
    for i in range(6):
        file = tmp_path / f"source/{i % 3}/{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photos[i % 3][50 : 50 + 70, 30 * i : 30 * i + 80]).save(file)
    images = Store(make_store(tmp_path / "source", tmp_path / "store", "ffcv", encoding=encoding)).images
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        read, labels = process.submit(read_by_stock_ffcv, str(tmp_path / "store/images.beton")).result()
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    for index, pixels in enumerate(read):
        if encoding == "raw":
            np.testing.assert_array_equal(pixels, images.data(index).reshape(pixels.shape))
        else:  # FFCV decodes with the faster, less exact transform
            difference = np.abs(pixels.astype(int) - simplejpeg.decode_jpeg(images.data(index)))
            assert difference.max() <= 16
            assert difference.mean() < 1.5


def test_images_that_fill_several_ffcv_pages_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beton, "PAGE_SIZE", 1 << 12)
    random = np.random.default_rng(5)
    images = [random.integers(0, 256, n).astype(np.uint8) for n in (3000, 3000, 1, 4096, 500)]
    beton.write(tmp_path / "x.beton", 5, ((data, 7, 9, label, False) for label, data in enumerate(images, -1)))
    read = beton.Beton(tmp_path / "x.beton")
    assert read.labels.tolist() == [-1, 0, 1, 2, 3]
    assert read.sizes.tolist() == [[7, 9]] * 5
    for index, data in enumerate(images):
        np.testing.assert_array_equal(read.data(index), data)


def test_a_damaged_ffcv_file_is_refused(folder: Path, tmp_path: Path) -> None:
    file = make_store(folder, tmp_path / "store", "ffcv") / "images.beton"
    whole = file.read_bytes()
    for damage, complaint in (
        (b"", "not an FFCV file"),
        (b"\x09" + whole[1:], "not an FFCV file of version 2"),
        (whole[:-24], "truncated"),
        (whole[:24] + b"\x07" + whole[25:], "fields of types"),
    ):
        file.write_bytes(damage)
        with pytest.raises(ValueError, match=complaint):
            beton.Beton(file)


# What is not a store, and stores that are not whole

runner = CliRunner()


def complaint(*arguments: str) -> str:
    """Returns the error of a failing command: one line, no traceback."""
    result = runner.invoke(app, arguments)
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    return result.stderr.strip()


@pytest.fixture
def copy(path: Path, tmp_path: Path) -> Path:
    return shutil.copytree(path, tmp_path / "copy")


def manifest_edit(path: Path, edit: Callable[[dict], object]) -> None:  # type: ignore[type-arg]
    fields = json.loads((path / "manifest.json").read_text())
    edit(fields)
    (path / "manifest.json").write_text(json.dumps(fields))


def test_what_is_not_a_store_is_said_in_one_line(copy: Path, tmp_path: Path) -> None:
    def said() -> str:
        with pytest.raises(ValueError) as raised:
            Store(copy)
        assert str(copy) in str(raised.value)
        assert str(raised.value) in complaint("store", "info", str(copy))
        return str(raised.value)

    original = (copy / "manifest.json").read_text()
    manifest_edit(copy, lambda fields: fields.update(schema_version=99))
    assert "schema version 99, this kamim reads 3 to 5; preprocess it again" in said()
    manifest_edit(copy, lambda fields: fields.pop("schema_version"))
    assert "not a manifest" in said()
    (copy / "manifest.json").write_text(original.replace('"count": 12', '"count": "many"'))
    assert "count" in said()
    (copy / "manifest.json").write_text(original.replace('"count"', '"amount"'))
    said()
    for corrupt in (original[:100], "[]", "", "\0" * 50):
        (copy / "manifest.json").write_text(corrupt)
        assert "not a manifest" in said()
    (copy / "manifest.json").write_bytes(b"\xff\xfe{}")
    assert "not a manifest" in said()
    (copy / "manifest.json").unlink()
    assert "is missing; put it back with `kamim store verify" in said()
    (copy / "manifest.backup").unlink()
    assert "no manifest.json" in said()
    assert "kamim preprocess" in complaint("store", "info", str(tmp_path / "nowhere"))


def test_a_missing_detector_is_named_with_what_to_do(folder: Path, tmp_path: Path) -> None:
    opened = Store(make_store(folder, tmp_path / "store", detectors=("sift",)))
    with pytest.raises(ValueError, match=r"no 'fast' keypoints, only sift; .* with --detectors fast"):
        opened.keypoints("fast")


def test_a_store_may_have_no_keypoints(folder: Path, tmp_path: Path) -> None:
    opened = Store(make_store(folder, tmp_path / "store", detectors=()))
    assert opened.detectors == ()
    assert len(opened.images.labels) == 12
    with pytest.raises(ValueError, match="only images"):
        opened.keypoints("fast")


def test_info_says_what_a_store_holds(path: Path) -> None:
    result = runner.invoke(app, ["store", "info", str(path)])
    assert result.exit_code == 0
    assert "12 images of 3 classes" in result.stdout
    assert "fast, sift, orb" in result.stdout


def verify(path: Path) -> tuple[int, str]:
    result = runner.invoke(app, ["store", "verify", str(path)])
    return result.exit_code, result.stdout + result.stderr


def test_verify_finds_a_flipped_bit_in_any_file(copy: Path) -> None:
    assert verify(copy)[0] == 0
    files = [file for file in sorted(copy.rglob("*")) if file.is_file() and file.name != "manifest.json"]
    assert len(files) > 10
    for number, file in enumerate(files):
        whole = file.read_bytes()
        damaged = bytearray(whole)
        damaged[len(whole) * number // len(files)] ^= 1 << number % 8
        file.write_bytes(damaged)
        code, said = verify(copy)
        assert (code, said) == (1, f"{file}: damaged\n")
        file.write_bytes(whole)
    assert verify(copy)[0] == 0


def test_verify_finds_missing_and_extra_files(copy: Path) -> None:
    (copy / "rejects.csv").unlink()
    (copy / "keypoints.zarr/manifest.json").write_text("{}")
    (copy / "notes.txt").write_text("mine")
    code, said = verify(copy)
    assert code == 1
    assert said.splitlines() == [
        f"{copy / 'keypoints.zarr/manifest.json'}: not in the manifest",
        f"{copy / 'notes.txt'}: not in the manifest",
        f"{copy / 'rejects.csv'}: missing",
    ]


def test_a_store_replaced_while_it_is_open_is_never_mixed_with_the_other(folder: Path, tmp_path: Path) -> None:
    """The other store's images are the same ones in another order, so that counts and files agree."""
    turned = tmp_path / "turned"
    for file in folder.glob("*/*"):
        (turned / {"a": "c", "b": "b", "c": "a"}[file.parent.name]).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, turned / {"a": "c", "b": "b", "c": "a"}[file.parent.name])
    path, other = make_store(folder, tmp_path / "store"), make_store(turned, tmp_path / "other")
    expected, new = Store(path).keypoints("fast").rows(0, 0)[0].tolist(), Store(other).keypoints("fast").rows(0, 0)[0]
    assert expected != new.tolist()
    both, images, nothing = (Store(path) for _ in range(3))
    assert both.keypoints("fast").rows(0, 0)[0].tolist() == expected
    before = images.images.data(0).tobytes(), both.images.data(0).tobytes()
    path.rename(tmp_path / "old")
    other.rename(path)
    assert (images.images.data(0).tobytes(), both.images.data(0).tobytes()) == before  # mapped before
    for use in (lambda: images.keypoints("fast"), lambda: nothing.images, nothing.check):
        with pytest.raises(KamimError, match="was replaced by another store since it was opened"):
            use()
    path.rename(other)
    (tmp_path / "old").rename(path)
    assert images.keypoints("fast").rows(0, 0)[0].tolist() == expected  # the same store again


def test_a_large_store_does_not_use_up_file_descriptors(tmp_path: Path) -> None:
    """ImageNet's FAST keypoints, and every larger total, are some 64 to 128 mapped files."""
    for total in (1, 10**6, 2 * 10**9, 10**11):
        rows = mmap_array.page_rows(total, 1 << 20)
        assert rows >= 1 << 20
        assert total / rows <= 64
