"""Images that a training and a validation store share are found, and reported before anything is measured."""

import shutil
from pathlib import Path

import pytest
from conftest import make_store

from kamim.storage import overlap
from kamim.storage.manifest import Encoding
from kamim.storage.store import Store


@pytest.fixture(scope="module")
def val(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three of the twelve images of `folder`, under other names, and two others of the same sizes and formats."""
    root = tmp_path_factory.mktemp("val")
    for name in "ab":
        (root / name).mkdir()
    shutil.copy(folder / "a/0.jpg", root / "b/copy.jpg")
    shutil.copy(folder / "b/1.png", root / "b/x.png")
    shutil.copy(folder / "c/2.JPEG", root / "a/2.jpg")
    for name in ("a", "b"):
        (root / name / "other.jpg").write_bytes((folder / name / "3.jpg").read_bytes()[:-2] + b"\0\xff\xd9")
    return root


@pytest.mark.parametrize("backend", ["zarr", pytest.param("ffcv", marks=pytest.mark.filterwarnings("ignore"))])
@pytest.mark.parametrize("encoding", ["jpeg", "raw", "original"])
def test_shared_images_are_counted(backend: str, encoding: Encoding, folder: Path, val: Path, tmp_path: Path) -> None:
    if backend == "ffcv":
        pytest.importorskip("ffcv")
    train, measured = (
        Store(make_store(source, tmp_path / name, backend, encoding=encoding))
        for name, source in (("train", folder), ("val", val))
    )
    shared = 3 if encoding == "original" else 5  # a byte before the end of a JPEG changes no pixel
    assert overlap.shared_images(train, measured) == (shared, 5)
    assert overlap.caution(train, measured).startswith(f"{shared} of 5 validation images are training images too")
    assert overlap.shared_images(measured, train) == (shared, 12)


def test_other_images_are_not_shared(stores: dict[str, Path], marked_store: Path) -> None:
    assert overlap.caution(Store(stores["zarr"]), Store(marked_store)) == ""


def test_of_a_large_store_some_are_looked_for(stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "LOOKED_AT", 10)
    store = Store(stores["zarr"])
    assert overlap.shared_images(store, store) == (10, 10)
