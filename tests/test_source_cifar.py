"""CIFAR in both versions, as archive and as folder; its pickles are read without running them."""

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
from typing import Any

import numpy as np
import pytest
from conftest import listing

from preprocess import sources
from preprocess.decode import decode
from preprocess.sources import cifar, list_source
from preprocess.sources.inert import contents

NAMES = {"cifar10": [f"class{n}" for n in range(10)], "cifar100": [f"fine{n}" for n in range(100)]}


class Python2(pickle._Pickler):
    """Writes strings and bytes as Python 2's cPickle did."""

    def save_str(self, text: str | bytes) -> None:
        data = text.encode("latin-1") if isinstance(text, str) else text
        short = len(data) < 256
        self.write((b"U" + bytes([len(data)]) if short else b"T" + len(data).to_bytes(4, "little")) + data)
        self.memoize(text)

    dispatch = pickle._Pickler.dispatch | {str: save_str, bytes: save_str}


def pickled(value: Any) -> bytes:
    stream = io.BytesIO()
    Python2(stream, 2).dump(value)
    return stream.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def batch(dataset: str, name: str) -> tuple[list[int], np.ndarray]:
    """Labels [n], rows uint8 [n, 3072], of a batch of this name."""
    random = np.random.default_rng(list(name.encode()))
    count = 15 if name == "train" else 3
    rows = random.integers(0, 256, (count, 3072)).astype(np.uint8)
    return random.integers(0, len(NAMES[dataset]), count).tolist(), rows


def files(dataset: str, python: bool) -> dict[str, bytes]:
    """What the archive of a version holds, by path."""
    what = cifar.CIFARS[dataset]
    version = what.python if python else what.binary
    made = {
        version.names: pickled({what.label_names: NAMES[dataset]}) if python else "\n".join(NAMES[dataset]).encode()
    }
    for name in (name for split in what.batches.values() for name in split):
        labels, rows = batch(dataset, name)
        if python:
            coarse = {"coarse_labels": [0] * len(labels)} if dataset == "cifar100" else {}
            order = np.asfortranarray(rows) if name.endswith("2") else rows  # as numpy may have pickled it
            made[name] = pickled({"batch_label": name, what.label: labels, "data": order, **coarse})
        else:
            made[name + ".bin"] = b"".join(
                bytes([0] * (what.label_bytes - 1) + [label]) + row.tobytes()
                for label, row in zip(labels, rows, strict=True)
            )
    return {f"{version.folder}/{name}": data for name, data in made.items()}


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
def archives(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, bool], bytes]:
    """Small archives, whose checksums stand for the published ones."""
    made = {(dataset, python): archive(files(dataset, python)) for dataset in cifar.CIFARS for python in (True, False)}
    patched = {
        dataset: replace(
            what,
            python=replace(what.python, md5=hashlib.md5(made[dataset, True]).hexdigest()),
            binary=replace(what.binary, md5=hashlib.md5(made[dataset, False]).hexdigest()),
        )
        for dataset, what in cifar.CIFARS.items()
    }
    monkeypatch.setattr(cifar, "CIFARS", patched)
    monkeypatch.setattr(cifar, "IMAGES", {"train": 15, "val": 3})
    return made


def complaint(dataset: str, root: Path) -> str:
    cifar._load.cache_clear()
    with pytest.raises(ValueError) as raised:
        list_source(dataset, root, "train")
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("dataset", cifar.CIFARS)
def test_every_form_is_the_same_source(dataset: str, tmp_path: Path, archives: dict[tuple[str, bool], bytes]) -> None:
    what = cifar.CIFARS[dataset]
    for python, version in ((True, what.python), (False, what.binary)):
        write(tmp_path / f"folder{python}", files(dataset, python))
        write(tmp_path / f"archive{python}", {version.archive: archives[dataset, python]})
    for split, names in what.batches.items():
        labels, rows = zip(*(batch(dataset, name) for name in names), strict=True)
        expected = np.concatenate(rows).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        listed = [list_source(dataset, root, split) for root in sorted(tmp_path.iterdir())]
        assert len({listing(source) for source in listed}) == 1
        for source in listed:
            cifar._load.cache_clear()
            read, items = pickle.loads(pickle.dumps((source.read, source.items)))
            assert len(pickle.dumps(source.read)) < 1000
            assert source.classes == tuple(NAMES[dataset])
            assert [item.label for item in items] == [label for part in labels for label in part]
            np.testing.assert_array_equal(np.stack([decode(read(item)) for item in items]), expected)


def test_another_archive_than_the_published_one_is_refused(
    tmp_path: Path, archives: dict[tuple[str, bool], bytes]
) -> None:
    damaged = bytearray(archives["cifar10", False])
    damaged[50] ^= 1
    write(tmp_path, {"cifar-10-binary.tar.gz": bytes(damaged)})
    assert "has not the checksum" in complaint("cifar10", tmp_path)
    (tmp_path / "cifar-10-binary.tar.gz").unlink()
    assert "has none of cifar-10-batches-py, cifar-10-python.tar.gz" in complaint("cifar10", tmp_path)


@pytest.mark.parametrize("python", [True, False])
def test_damaged_folders_are_refused(tmp_path: Path, python: bool) -> None:
    held = files("cifar10", python)
    for n, name in enumerate(name for name in held if "test" not in name):
        for cut in (0, len(held[name]) // 2):
            root = tmp_path / f"{n}.{cut}"
            write(root, held | {name: held[name][:cut]})
            complaint("cifar10", root)
    root = tmp_path / "missing"
    write(root, dict(list(held.items())[:3]))
    complaint("cifar10", root)


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/unpickled",)


@pytest.mark.parametrize(
    "value",
    [
        {"data": Evil()}, Evil(), [Evil()], {"data": partial(print)}, {"data": np.zeros(3, np.int32)},
        {"data": np.dtype("u1")}, {"data": {1, 2}}, [1, 2], {"data": np.array([None])},
    ],
)  # fmt: skip
def test_only_plain_data_is_read_from_a_pickle(value: Any) -> None:
    with pytest.raises(ValueError, match=r"pickle|numpy|array") as raised:
        contents(pickled(value))
    assert "\n" not in str(raised.value)
    assert not Path("/tmp/unpickled").exists()


def test_pickles_of_plain_data_come_back() -> None:
    value = {
        "a": [1, -2, 300, 70000, None, True, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)], "b": {}, "c": "é" * 300,
        "d": [n % 7 for n in range(2500)], "e": ["x", "x"], "f": {"g": [1]}, "h": {"i": 1, "j": 2},
    }  # fmt: skip
    assert contents(pickled(value)) == value
    rows = np.arange(12, dtype=np.uint8).reshape(3, 4)
    for made in (rows, rows.T):
        np.testing.assert_array_equal(contents(pickled({"data": made}))["data"], made)


def test_damaged_pickles_are_refused_or_read() -> None:
    data = pickled({"data": np.arange(12, dtype=np.uint8), "labels": [1, 2, 3], "x": {"y": "z"}})
    random = np.random.default_rng(0)
    for _ in range(500):
        damaged = bytearray(data)
        for at in random.integers(0, len(data), random.integers(1, 4)):
            damaged[at] = random.integers(256)
        try:
            contents(bytes(damaged))
        except ValueError as error:
            assert "pickle" in str(error) or "array" in str(error)


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
    server: Path, tmp_path: Path, archives: dict[tuple[str, bool], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "new/folder"
    with pytest.raises(ValueError, match=r"cifar-10-binary.tar.gz: cannot be fetched \(File not found"):
        sources.download("cifar10", root)
    write(server, {"cifar-10-binary.tar.gz": archives["cifar10", False] + b"x"})
    with pytest.raises(ValueError, match="has not the checksum"):
        sources.download("cifar10", root)
    assert list(root.iterdir()) == []
    write(server, {"cifar-10-binary.tar.gz": archives["cifar10", False]})
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
    with pytest.raises(ValueError, match="--source"):
        sources.download("cifar10", None)
