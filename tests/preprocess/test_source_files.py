"""Samples of a store are traced back to the files that it was made from."""

import os
from pathlib import Path

import numpy as np
import pytest
from conftest import make_store
from PIL import Image

from kamim import KamimError
from kamim.storage.store import Store
from preprocess.decode import decode
from preprocess.source_files import source_files
from preprocess.sources import list_source


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Store]:
    """A folder of one grey level per file, one of them unreadable, and its store."""
    root = tmp_path / "images"
    for i in range(13):
        file = root / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((70, 80, 3), 15 * i, np.uint8)).save(file)
    (root / "a" / "8.png").write_bytes(b"damaged")
    return root, Store(make_store(root, tmp_path / "store", encoding="raw"))


def levels(store: Store) -> list[int]:
    return [round(float(store.images.data(i).mean()) / 15) for i in range(len(store))]


def test_every_image_has_its_file(made: tuple[Path, Store]) -> None:
    root, store = made
    files = source_files(store, list_source("imagefolder", root, "train"))
    assert len(files) == 12
    assert [int(Path(file or "").stem) for file in files] == levels(store)
    assert [decode((root / (file or "")).read_bytes())[0, 0, 0] // 15 for file in files] == levels(store)


def test_files_that_came_or_changed_later_move_no_other(made: tuple[Path, Store]) -> None:
    root, store = made
    before = source_files(store, list_source("imagefolder", root, "train"))
    (root / "a" / "0a.png").write_bytes((root / "a" / "0.png").read_bytes())
    (root / "b" / "1.png").unlink()
    os.utime(root / "b" / "3.png", (1, 1))
    now = source_files(store, list_source("imagefolder", root, "train"))
    assert now == [None if file in ("b/1.png", "b/3.png") else file for file in before]
    os.utime(root / "a" / "8.png", (1, 1))
    with pytest.raises(KamimError, match=r"files that .*/store lists in rejects.csv have changed"):
        source_files(store, list_source("imagefolder", root, "train"))


def test_another_folder_is_refused(made: tuple[Path, Store], class_folder: Path) -> None:
    with pytest.raises(KamimError, match=r"source = .*: is not what .*/store was made from"):
        source_files(made[1], list_source("imagefolder", class_folder, "train"))
