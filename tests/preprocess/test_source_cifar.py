"""CIFAR's binary version, as archive and as folder; the python version is refused."""

import hashlib
import io
import os
import pickle
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import listing

from preprocess import sources
from preprocess.decode import decode
from preprocess.sources import cifar, list_source

NAMES = {"cifar10": [f"class{n}" for n in range(10)], "cifar100": [f"fine{n}" for n in range(100)]}


def batch(dataset: str, name: str) -> tuple[list[int], np.ndarray]:
    """Labels [n], rows uint8 [n, 3072], of a batch of this name."""
    random = np.random.default_rng(list(name.encode()))
    count = 15 if name == "train.bin" else 3
    rows = random.integers(0, 256, (count, 3072)).astype(np.uint8)
    return random.integers(0, len(NAMES[dataset]), count).tolist(), rows


def files(dataset: str) -> dict[str, bytes]:
    """What the archive holds, by path."""
    what = cifar.CIFARS[dataset]
    made = {what.names: "\n".join(NAMES[dataset]).encode()}
    for name in (name for split in what.batches.values() for name in split):
        labels, rows = batch(dataset, name)
        before = bytes(what.label_bytes - 1)
        made[name] = b"".join(before + bytes([n]) + row.tobytes() for n, row in zip(labels, rows, strict=True))
    return {f"{what.folder}/{name}": data for name, data in made.items()}


def archive(held: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, data in held.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def write(root: Path, held: dict[str, bytes]) -> None:
    for name, data in held.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


@pytest.fixture(autouse=True)
def archives(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Small archives, whose checksums stand for the published ones."""
    made = {dataset: archive(files(dataset)) for dataset in cifar.CIFARS}
    patched = {
        dataset: replace(what, md5=hashlib.md5(made[dataset]).hexdigest()) for dataset, what in cifar.CIFARS.items()
    }
    monkeypatch.setattr(cifar, "CIFARS", patched)
    monkeypatch.setattr(cifar, "IMAGES", {"train": 15, "val": 3})
    cifar._load.cache_clear()
    return made


def complaint(dataset: str, root: Path) -> str:
    cifar._load.cache_clear()
    with pytest.raises(ValueError) as raised:
        list_source(dataset, root, "train")
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("dataset", cifar.CIFARS)
def test_both_forms_are_the_same_source(dataset: str, tmp_path: Path, archives: dict[str, bytes]) -> None:
    what = cifar.CIFARS[dataset]
    write(tmp_path / "folder", files(dataset))
    write(tmp_path / "archive", {what.archive: archives[dataset]})
    for split, names in what.batches.items():
        labels, rows = zip(*(batch(dataset, name) for name in names), strict=True)
        expected = np.concatenate(rows).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        listed = [list_source(dataset, tmp_path / name, split) for name in ("folder", "archive")]
        assert len({listing(source) for source in listed}) == 1
        for source in listed:
            cifar._load.cache_clear()
            read, items = pickle.loads(pickle.dumps((source.read, source.items)))
            assert len(pickle.dumps(source.read)) < 1000
            assert source.classes == tuple(NAMES[dataset])
            assert [item.label for item in items] == [label for part in labels for label in part]
            np.testing.assert_array_equal(np.stack([decode(read(item)) for item in items]), expected)


def test_another_archive_than_the_published_one_is_refused(tmp_path: Path, archives: dict[str, bytes]) -> None:
    damaged = bytearray(archives["cifar10"])
    damaged[50] ^= 1
    write(tmp_path, {"cifar-10-binary.tar.gz": bytes(damaged)})
    assert "has not the checksum" in complaint("cifar10", tmp_path)
    (tmp_path / "cifar-10-binary.tar.gz").unlink()
    os.mkfifo(tmp_path / "cifar-10-binary.tar.gz")  # which would block a reader
    assert "has not the checksum" in complaint("cifar10", tmp_path)


def test_the_archive_is_checked_wherever_it_is_read(tmp_path: Path, archives: dict[str, bytes]) -> None:
    write(tmp_path, {"cifar-10-binary.tar.gz": archives["cifar10"]})
    source = list_source("cifar10", tmp_path, "train")
    write(tmp_path, {"cifar-10-binary.tar.gz": archive(files("cifar10") | {"more": b""})})
    cifar._load.cache_clear()  # as in a worker process
    with pytest.raises(ValueError, match="has not the checksum"):
        source.read(source.items[0])


@pytest.mark.parametrize("place", ["cifar-10-python.tar.gz", "cifar-10-batches-py/data_batch_1"])
def test_pickles_are_not_read_and_the_message_says_what_is(tmp_path: Path, place: str) -> None:
    write(tmp_path, {place: pickle.dumps({"data": 0})})
    reason = complaint("cifar10", tmp_path)
    assert "neither cifar-10-batches-bin nor cifar-10-binary.tar.gz, which --download fetches" in reason
    assert "python version is not read" in reason


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    held = files("cifar10")
    for n, name in enumerate(name for name in held if "test" not in name):
        for cut in (0, len(held[name]) // 2):
            root = tmp_path / f"{n}.{cut}"
            write(root, held | {name: held[name][:cut]})
            complaint("cifar10", root)
    root = tmp_path / "missing"
    write(root, dict(list(held.items())[:3]))
    complaint("cifar10", root)
    root = tmp_path / "labels"
    write(root, held | {"cifar-10-batches-bin/data_batch_3.bin": bytes([10]) * (3 * 3073)})
    assert "not those of cifar10" in complaint("cifar10", root)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that is served where the data sets are fetched from."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as http:
        monkeypatch.setattr(cifar, "URL", f"http://127.0.0.1:{http.server_port}/")
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield folder
        http.shutdown()
        thread.join()


def test_downloads_are_checked_and_whole(
    server: Path, tmp_path: Path, archives: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "new/folder"
    with pytest.raises(ValueError, match=r"cifar-10-binary.tar.gz: cannot be fetched \(File not found"):
        sources.download("cifar10", root)
    write(server, {"cifar-10-binary.tar.gz": archives["cifar10"] + b"x"})
    with pytest.raises(ValueError, match="has not the checksum"):
        sources.download("cifar10", root)
    assert list(root.iterdir()) == []
    write(server, {"cifar-10-binary.tar.gz": archives["cifar10"]})
    sources.download("cifar10", root)
    assert [file.name for file in root.iterdir()] == ["cifar-10-binary.tar.gz"]
    assert len(list_source("cifar10", root, "val").items) == 3
    monkeypatch.setattr(cifar, "URL", "http://127.0.0.1:9/")
    sources.download("cifar10", root)  # nothing is fetched twice
    with pytest.raises(ValueError, match="cannot be fetched"):
        sources.download("cifar100", root)


def test_only_what_can_be_fetched_is(tmp_path: Path) -> None:
    assert cifar.URL.startswith("https://")
    with pytest.raises(ValueError, match="only cifar10, cifar100"):
        sources.download("imagenet", tmp_path)
    with pytest.raises(ValueError, match="needs source=DIR"):
        sources.download("cifar10", None)
