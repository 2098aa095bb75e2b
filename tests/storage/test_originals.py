"""Stores of the originals' own bytes, and raw stores of small images."""

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
from conftest import BACKENDS, make_store, plan_job
from PIL import Image
from skimage import data
from typer.testing import CliRunner

from kamim.cli import app
from kamim.config.pretrain import Pretrain, Weighting
from kamim.storage.store import Store
from kamim.training.data import check_area, online_differs
from pipelines.loader import Crop, Loader
from pipelines.plan import Plan
from preprocess.decode import decode
from preprocess.plan import make_job
from preprocess.sources import list_source
from preprocess.verify import problems


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A photograph as JPEG, progressive JPEG, CMYK JPEG, PNG with alpha, and one that is very wide."""
    root = tmp_path_factory.mktemp("mixed") / "class"
    root.mkdir()
    photo = Image.fromarray(data.coffee())
    photo.save(root / "0.jpg", quality=83)
    photo.save(root / "1.jpg", quality=60, progressive=True)
    photo.convert("CMYK").save(root / "2.jpg")
    photo.convert("RGBA").save(root / "3.png")
    Image.fromarray(np.tile(data.coffee()[:8], (1, 100, 1))[:, :60_000]).save(root / "4.jpg")
    return root.parent


@pytest.mark.parametrize("backend", BACKENDS)
def test_originals_keep_their_bytes_and_sizes(mixed: Path, backend: str, tmp_path: Path) -> None:
    made = Store(make_store(mixed, tmp_path / "out", backend, encoding="original"))
    files = sorted((mixed / "class").iterdir())
    assert made.manifest.stored_area is None
    assert made.images.sizes.tolist() == [[400, 600]] * 4 + [[8, 60_000]]
    for index in (0, 1, 4):
        assert made.images.data(index).tobytes() == files[index].read_bytes()
    for index in (2, 3):  # as JPEG of high quality
        difference = decode(made.images.data(index).tobytes()).astype(float) - decode(files[index].read_bytes())
        assert np.abs(difference).mean() < 2
    assert problems(made.path, deep=True) == []
    check_area(made, 1024, 0.2)  # whatever the resolution


@pytest.mark.parametrize("backend", BACKENDS)
def test_images_larger_than_a_page_get_larger_pages(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "source/class").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3)).astype(np.uint8)
    for name in "ab":
        Image.fromarray(noise).save(tmp_path / f"source/class/{name}.jpg", quality=100, subsampling=0)
    monkeypatch.setattr("kamim.storage.beton.PAGE_SIZE", 1 << 16)
    made = Store(make_store(tmp_path / "source", tmp_path / "out", backend, encoding="original"))
    content = (tmp_path / "source/class/a.jpg").read_bytes()
    assert len(content) > 1 << 16
    assert [made.images.data(i).tobytes() for i in (0, 1)] == [content] * 2


def test_crops_of_originals_are_the_released_codes(mixed: Path, tmp_path: Path, decoder: str) -> None:
    """Bilinear without antialiasing, straight from the full-size pixels; from planes, with chroma interpolated once."""
    made = Store(make_store(mixed, tmp_path / "out", encoding="original"))
    batch = next(iter(Loader(made, Plan(5, 5, 5, 0, order="stored"), 64).micro_batches(0, 1)))
    whole = simplejpeg.decode_jpeg((mixed / "class/0.jpg").read_bytes())
    expected = cv2.resize(whole, (64, 64), interpolation=cv2.INTER_LINEAR).astype(int)
    difference = np.abs(batch.images[0].numpy() - expected)
    assert difference.max() <= 1 if decoder == "pixels" else difference.mean() <= 0.5
    for crops in Loader(made, Plan(5, 5, 5, 0), 64, crop=Crop()).micro_batches(0, 3):
        assert crops.images.float().std() > 10


def test_another_resolution_keeps_originals(mixed: Path, tmp_path: Path) -> None:
    made = Store(make_store(mixed, tmp_path / "out", encoding="original", resolution=64))
    before = (made.path / "images.zarr/data/c/0").stat().st_ino
    make_store(mixed, tmp_path / "out", encoding="original", resolution=96)
    after = Store(tmp_path / "out")
    assert after.manifest.job.resolution == 96
    assert (after.path / "images.zarr/data/c/0").stat().st_ino == before


@pytest.mark.parametrize(
    ("shape", "encoding"), [((32, 32), "raw"), ((64, 40), "raw"), ((95, 95), "jpeg"), ((96, 20), "jpeg")]
)
def test_small_images_are_raw_by_default(shape: tuple[int, int], encoding: str, tmp_path: Path) -> None:
    """Below 96 px and not made smaller: 64 px crops need (64^2 / 0.67) px."""
    folder = tmp_path / "source/class"
    folder.mkdir(parents=True)
    for i in range(3):
        Image.fromarray(data.coffee()[i : i + shape[0], : shape[1]]).save(folder / f"{i}.png")
    (folder / "9.png").write_bytes(b"not an image")
    job, _ = plan_job(tmp_path / "source", encoding=None)
    assert job.encoding == encoding


def test_a_store_keeps_its_encoding_where_none_is_asked_for(folder: Path, tmp_path: Path) -> None:
    make_store(folder, tmp_path / "out", encoding="original")
    listed = list_source("imagefolder", folder, "train")
    kept = make_job("imagefolder", "train", listed, detectors=("fast",), out=tmp_path / "out")
    asked = make_job("imagefolder", "train", listed, detectors=("fast",), out=tmp_path / "out", pixels="auto")
    assert (kept.encoding, asked.encoding) == ("original", "jpeg")


@pytest.mark.parametrize("encoding", ["jpeg", "raw", "original"])
def test_online_keypoints_are_the_released_codes_on_originals_alone(
    folder: Path, tmp_path: Path, encoding: str
) -> None:
    made = Store(make_store(folder, tmp_path / "out", encoding=encoding))
    weighting = Weighting(keypoints="online")
    config = Pretrain.model_validate({"data": {"store": made.path}, "out": tmp_path, "weighting": weighting})
    assert bool(online_differs(config, made)) == (encoding != "original")
    assert not online_differs(config.model_copy(update={"weighting": Weighting()}), made)
    assert not online_differs(config.model_copy(update={"weighting": None}), made)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--container", "lmdb"], "--container lmdb: must be ffcv or zarr"),
        (["--pixels", "png"], "--pixels png: must be one of jpeg, raw, yuv420, original"),
        (["--container", "ffcv", "--pixels", "yuv420"], "--container ffcv: holds no images with --pixels yuv420; take"),
        (["--images-as", "files"], "--images-as files: must be resized or original"),
        (["--images-as", "original", "--encoding", "raw"], "--encoding raw: is for resized images"),
        (["--pixels", "jpeg", "--encoding", "raw"], "--encoding raw: is an earlier name of --pixels; give --pixels"),
    ],
)
def test_what_cannot_be_stored_is_said_in_one_line(folder: Path, tmp_path: Path, options: list[str], line: str) -> None:
    given = ["preprocess", "imagefolder", "--source", str(folder), "--out", str(tmp_path / "out"), *options]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 1
    assert line in result.output


@pytest.mark.parametrize(
    ("options", "notes", "stored"),
    [
        ([], [], ("zarr", "jpeg")),
        (["--images", "ffcv"], ["--images ffcv is now --container ffcv"], ("ffcv", "jpeg")),
        (["--images", "auto"], ["--images auto is now the default"], ("zarr", "jpeg")),
        (["--encoding", "yuv420"], ["--encoding yuv420 is now --pixels yuv420"], ("zarr", "yuv420")),
        (["--images-as", "original"], ["--images-as original is now --pixels original"], ("zarr", "original")),
        (["--images-as", "resized"], ["--images-as resized is now --pixels jpeg or raw"], ("zarr", "jpeg")),
    ],
)
def test_earlier_names_of_options_are_taken_with_a_note(
    folder: Path, tmp_path: Path, options: list[str], notes: list[str], stored: tuple[str, str]
) -> None:
    given = ["preprocess", "imagefolder", "--source", str(folder), "--out", str(tmp_path / "out"), "--workers", "1"]
    result = CliRunner().invoke(app, [*given, "--resolution", "64", *options])
    assert result.exit_code == 0, result.output
    assert [line for line in result.stderr.splitlines() if line.startswith("note: ")] == [f"note: {n}" for n in notes]
    job = Store(tmp_path / "out").manifest.job
    assert (job.images, job.encoding) == stored


def test_the_container_does_not_depend_on_what_is_installed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = list_source("imagefolder", folder, "train")
    for module in (None, sys):  # not to be imported, and there
        monkeypatch.setitem(sys.modules, "ffcv", module)
        assert make_job("imagefolder", "train", listed, detectors=("fast",)).images == "zarr"
    make_store(folder, tmp_path / "out", "ffcv")
    kept = make_job("imagefolder", "train", listed, detectors=("fast",), out=tmp_path / "out")
    planes = make_job("imagefolder", "train", listed, detectors=("fast",), out=tmp_path / "out", pixels="yuv420")
    assert (kept.images, planes.images) == ("ffcv", "zarr")


def test_the_store_resizes_with_antialiasing(tmp_path: Path) -> None:
    """A checkerboard of single pixels becomes grey; without antialiasing it stays black and white."""
    board = (np.indices((400, 400)).sum(axis=0) % 2 * 255).astype(np.uint8)
    (tmp_path / "source/class").mkdir(parents=True)
    Image.fromarray(np.repeat(board[..., None], 3, axis=2)).save(tmp_path / "source/class/0.png")
    made = Store(make_store(tmp_path / "source", tmp_path / "out", encoding="raw"))
    height, width = made.images.sizes[0]
    pixels = made.images.data(0).reshape(height, width, 3)
    assert height < 100
    assert pixels.astype(float).std() < 8
    assert abs(pixels.astype(float).mean() - 127.5) < 1
