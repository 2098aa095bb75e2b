"""Loaders of other projects in `kamim bench loader`: which take part, and that they do what they are asked to do."""

import importlib.util
import multiprocessing
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from kamim.bench import peers
from kamim.storage.store import Store

IMAGES, STEP = 24, 10


def fake(files: list[Path], folder: Path, batch: int, workers: int) -> peers.Epoch:
    """A peer whose batches hold as many images as there are files, one too many if its files or folder are wrong."""
    assert folder.is_dir()
    wrong = any(simplejpeg.decode_jpeg_header(file.read_bytes())[0] == 0 for file in files)
    return lambda: [np.zeros((len(files) - 1 + wrong, 1)), np.zeros((1, 1))]


def broken(files: list[Path], folder: Path, batch: int, workers: int) -> peers.Epoch:
    raise OSError("broken")


def grey_images(folder: Path) -> list[Path]:
    """Writes images of one grey level each: STEP times their number."""
    files = [folder / f"{index}.jpg" for index in range(IMAGES)]
    for index, file in enumerate(files):
        image = np.full((210 + index, 250 - index, 3), STEP * index, np.uint8)
        file.write_bytes(simplejpeg.encode_jpeg(image, 95))
    return files


def two_epochs(name: str, folder: Path) -> list[list[np.ndarray]]:
    """Returns the batches of two epochs of a peer, of five grey images each."""
    (folder / "peer").mkdir()
    epoch = peers.PEERS[name].open(grey_images(folder), folder / "peer", 5, 2)
    return [[np.array(batch.numpy() if hasattr(batch, "numpy") else batch) for batch in epoch()] for _ in range(2)]


def levels(batches: Iterable[np.ndarray]) -> np.ndarray:
    """Returns the numbers of the grey images in a list of batches, in order."""
    means = np.concatenate([batch.reshape(len(batch), -1).astype(np.float64).mean(1) for batch in batches])
    return np.round(means / STEP).astype(int)


def test_installed_peers_take_part_and_missing_ones_do_not(
    stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"fake": peers.Peer("json", fake), "missing": peers.Peer("no_such_package", broken)}
    monkeypatch.setattr(peers, "PEERS", given | {"broken": peers.Peer("json", broken)})
    store, before = Store(stores["zarr"]), set(multiprocessing.active_children())
    with peers.peer_runs(store, tmp_path / "peers", 8, 2) as runs:
        assert list(runs) == ["fake", "broken"]
        assert runs["fake"]() == runs["fake"]() == peers.EPOCHS * len(store)
        with pytest.raises(OSError, match="broken"):
            runs["broken"]()
    written = [file.read_bytes() for file in sorted((tmp_path / "peers" / "files").iterdir())]
    assert written == [store.images.data(index).tobytes() for index in range(len(store))]
    assert set(multiprocessing.active_children()) <= before


@pytest.mark.parametrize("name", peers.PEERS)
def test_a_peer_crops_every_image_once_an_epoch_in_random_order(name: str, tmp_path: Path) -> None:
    if not importlib.util.find_spec(package := peers.PEERS[name].package):
        pytest.skip(f"{package} is not installed")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        first, second = process.submit(two_epochs, name, tmp_path).result()
    assert {batch.shape[1:] for batch in first} <= {(192, 192, 3), (3, 192, 192)}
    assert {batch.dtype for batch in first} == {np.dtype(np.uint8)}
    assert sorted(levels(first)) == sorted(levels(second)) == list(range(IMAGES))
    assert list(levels(first)) != list(levels(second))
