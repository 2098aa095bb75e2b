"""JPEGs that are small and take minutes to decode: many scans of many pixels, each of which a decoder visits."""

import io
import signal
import struct
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import make_store
from mutations import reseal
from PIL import Image
from typer.testing import CliRunner

from kamim import KamimError
from kamim.cli import app
from kamim.storage.images import write_zarr_images
from kamim.storage.jpeg import SCAN_BYTES, check_scans, takes_long
from kamim.storage.store import Store
from pipelines.loader import Crop, Loader, SampleError
from pipelines.plan import Plan
from preprocess.decode import Undecodable, decode
from preprocess.verify import problems

SIDE = 13_377  # px; of the largest square that is decoded
EMPTY_SCAN = b"\xff\xda\0\x08\1\1\0\1\1\0"  # the first AC coefficient of each block, without any code


def scanned(side: int, scans: int) -> bytes:
    """A progressive grey JPEG of side x side px, as its header says, with further scans that hold nothing."""
    stream = io.BytesIO()
    Image.new("L", (16, 16)).save(stream, "JPEG", progressive=True)
    file = stream.getvalue()
    size, end = file.index(b"\xff\xc2") + 5, file.rindex(b"\xff\xd9")
    return file[:size] + struct.pack(">HH", side, side) + file[size + 4 : end] + EMPTY_SCAN * scans + file[end:]


def store_of(file: bytes, listed: int, folder: Path, tmp_path: Path) -> Path:
    """A store of originals whose images are this file, listed as of listed x listed px, with right checksums."""
    path = make_store(folder, tmp_path / "store", encoding="original")
    image = np.frombuffer(file, np.uint8)
    count = len(Store(path))
    for old in sorted((path / "images.zarr").rglob("*"), reverse=True):
        old.rmdir() if old.is_dir() else old.unlink()
    (path / "images.zarr").rmdir()
    write_zarr_images(path / "images.zarr", [(image, listed, listed, 0, False)] * count, count * len(image), "jpeg")
    reseal(path)
    return path


@pytest.mark.parametrize("listed", [SIDE, 64])
@pytest.mark.usefixtures("decoder")
def test_the_loader_refuses_what_preprocessing_refuses(listed: int, folder: Path, tmp_path: Path) -> None:
    """250 scans take 7 seconds, and 4,000 two minutes, if they are decoded; whatever size the store lists."""
    file = scanned(SIDE, 4000)
    with pytest.raises(Undecodable, match=f"scans of {SIDE}x{SIDE} px are more than the limit"):
        decode(file)
    store = Store(store_of(file, listed, folder, tmp_path))
    said = f"sample 0: 40.. scans of {SIDE}x{SIDE} px are more than the limit" if listed == SIDE else "sample 0: "
    with pytest.raises(SampleError, match=said):
        next(Loader(store, Plan(len(store), 1, 1, 0, order="stored"), 64, crop=Crop(), workers=1).micro_batches(0, 1))


def test_verify_names_what_the_loader_refuses(folder: Path, tmp_path: Path) -> None:
    path = store_of(scanned(SIDE, 4000), SIDE, folder, tmp_path)
    assert [problem.what.partition(" px")[0] for problem in problems(path)] == [
        f"image {index}: 4006 scans of {SIDE}x{SIDE}" for index in range(len(Store(path)))
    ]
    result = CliRunner().invoke(app, ["store", "preview", str(path), "--out", str(tmp_path / "x.png")])
    assert result.exit_code == 1 and "scans of" in result.stderr


def test_what_preprocessing_takes_is_verified_and_loaded(folder: Path, tmp_path: Path) -> None:
    """A progressive file that is long enough for 200,000 scans, but has comments instead."""
    stream = io.BytesIO()
    Image.new("L", (1024, 1024)).save(stream, "JPEG", progressive=True)
    file = stream.getvalue()
    file = file[:2] + (b"\xff\xfe\xff\xff" + EMPTY_SCAN * 6553 + b"123") * 30 + file[2:]
    assert takes_long(len(file) // SCAN_BYTES, 1024, 1024)
    store = Store(store_of(file, 1024, folder, tmp_path))
    assert problems(store.path) == []
    batch = next(Loader(store, Plan(len(store), 4, 4, 0), 64, crop=Crop(), workers=1).micro_batches(0, 1))
    assert len(batch.images) == 4


def test_the_limit_is_two_hundred_scans_of_the_largest_image() -> None:
    check_scans(200, SIDE, SIDE)
    check_scans(800, SIDE // 2, SIDE // 2)
    with pytest.raises(KamimError, match="201 scans"):
        check_scans(201, SIDE, SIDE)


def test_a_stop_does_not_wait_for_a_chunk(stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends a thread after the image that it decodes, not after the 24 images of its chunk."""
    decoded = []

    def slow(self: Loader, crops: object, scratch: object) -> None:
        decoded.append(crops)
        if len(decoded) == 1:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(0.2)

    monkeypatch.setattr(Loader, "_crop_alone", slow)
    monkeypatch.setattr("pipelines.turbojpeg.library", lambda: None)
    store = Store(stores["zarr"])
    with pytest.raises(KeyboardInterrupt):
        next(Loader(store, Plan(len(store), 24, 24, 0), 64, crop=Crop(), workers=1).micro_batches(0, 1))
    assert len(decoded) < 10
