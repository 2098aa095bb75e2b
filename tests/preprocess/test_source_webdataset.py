"""WebDataset shards: samples by name, labels from .cls or .json, shards from a folder or a pattern."""

import bz2
import gzip
import json
import lzma
import pickle
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_source_tars import packed

from preprocess.sources import Source, list_source
from preprocess.sources.base import of_split
from preprocess.sources.webdataset import braces


def shard(root: Path, name: str, files: dict[str, Any]) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    encoded = {key: data if isinstance(data, bytes) else json.dumps(data).encode() for key, data in files.items()}
    (root / name).write_bytes(packed(encoded))


def labels(source: Source) -> dict[str, int]:
    return {item.key: item.label for item in source.items}


def complaint(root: Path, split: str = "train") -> str:
    with pytest.raises(ValueError) as raised:
        list_source("webdataset", root, split)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_samples_are_read_from_shards_in_order(tmp_path: Path) -> None:
    shard(tmp_path, "x-000001.tar", {"d/c.jpg": b"three", "d/c.cls": b"2"})
    shard(
        tmp_path, "x-000000.tar", {"b.cls": b" 4\n", "b.jpg": b"one", "b.txt": b"?", "a.a.PNG": b"two", "a.cls": b"0"}
    )
    source = list_source("webdataset", tmp_path, "train")
    assert source.classes == ("0", "1", "2", "3", "4")
    assert labels(source) == {"x-000000.tar/b.jpg": 4, "x-000000.tar/a.a.PNG": 0, "x-000001.tar/d/c.jpg": 2}
    read, items = pickle.loads(pickle.dumps((source.read, source.items)))
    assert [read(item) for item in items] == [b"one", b"two", b"three"]
    assert [item.size for item in items] == [3, 3, 5]


def test_labels_are_numbers_or_names_or_none(tmp_path: Path) -> None:
    named = {"a.jpg": b"", "a.json": {"label": "zebra"}, "b.jpg": b"", "b.json": {"label": "ant"}}
    shard(tmp_path / "names", "x.tar", named)
    twice = {"a.jpg": b"", "a.json": {"label": 7}, "a.cls": b"1", "b.jpg": b"", "b.cls": b"0", "b.json": {}}
    shard(tmp_path / "both", "x.tar", twice)
    shard(tmp_path / "none", "x.tar", {"a.jpg": b"", "a.json": {"caption": "x"}, "b.jpg": b""})
    names, both, none = (list_source("webdataset", tmp_path / name, "train") for name in ("names", "both", "none"))
    assert (names.classes, list(labels(names).values())) == (("ant", "zebra"), [1, 0])
    assert (both.classes, list(labels(both).values())) == (("0", "1"), [1, 0])
    assert (none.classes, list(labels(none).values())) == ((), [-1, -1])


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"a.jpg": b"", "a.cls": b"1", "b.jpg": b""}, "x.tar/b.jpg has no label; every image must have a label"),
        ({"a.jpg": b"", "a.cls": b"", "b.jpg": b"", "b.cls": b"2"}, "x.tar/a.jpg has no label"),
        ({"b.jpg": b"", "b.cls": b"0", "a.jpg": b"", "a.cls": b"-1"}, "labels from -1 to 0, such as -1 of x.tar/a.jpg"),
        ({"IMG_2020.05.01.jpg": b"", "IMG_2020.05.01.cls": b"3"}, "x.tar: IMG_2020.05.01.cls is the label of no image"),
        ({"I.05.jpg": b"", "I.05.json": {"label": 3}, "b.jpg": b""}, "x.tar: I.05.json is the label of no image"),
        ({"a.jpg": b"", "b.cls": b"3"}, "x.tar: b.cls is the label of no image"),
        ({"a.jpg": b"", "d/a.cls": b"3"}, "x.tar: d/a.cls is the label of no image"),
        ({"a.jpg": b"", "b.json": {"label": 1}}, "x.tar: b.json is the label of no image"),
        ({"a.jpg": b"", "a.png": b""}, "x.tar: a.jpg, a.png are images of one sample"),
        ({"I.05.01.jpg": b"", "I.05.02.jpg": b""}, "x.tar: I.05.01.jpg, I.05.02.jpg are images of one sample"),
        ({"a.jpg": b"", "a.cls": b"1", "b.jpg": b"", "b.cls": b"ant"}, "every image must have a label"),
        ({"a.jpg": b"", "a.cls": b"999999999"}, "labels from 999999999"),
        ({"a.jpg": b"", "a.json": {"label": -1}}, "labels from -1"),
        ({"a.jpg": b"", "a.json": {"label": [1]}}, "neither a number nor a name"),
        ({"a.jpg": b"", "a.json": b"{"}, "is not JSON"),
        ({"a.jpg": b"", "a.json": b"[" * 100_000}, "is not JSON"),
        ({"a.jpg": b"", "a.cls": bytes(2 << 20)}, "at most 1048576 bytes"),
        ({"a.txt": b""}, "no images"),
    ],
)
def test_what_is_wrong_with_a_shard_is_said(tmp_path: Path, files: dict[str, Any], reason: str) -> None:
    shard(tmp_path, "x.tar", files)
    assert reason in complaint(tmp_path)


def test_a_sample_has_one_image(tmp_path: Path) -> None:
    files = {
        "a.seg.png": b"mask",
        "a.jpg": b"one",
        "a.cls": b"1",
        "a.boxes.json": {"label": 7},
        "b.depth.png": b"depth",
        "b.jpeg": b"two",
        "b.json": {"label": 0},
        "IMG.05.01.jpg": b"three",
        "IMG.cls": b"0",
    }
    shard(tmp_path, "x.tar", files)
    source = list_source("webdataset", tmp_path, "train")
    assert labels(source) == {"x.tar/a.jpg": 1, "x.tar/b.jpeg": 0, "x.tar/IMG.05.01.jpg": 0}
    assert [source.read(item) for item in source.items] == [b"one", b"two", b"three"]


def test_hidden_members_and_shards_are_left_out(tmp_path: Path) -> None:
    files = {"._0.jpg": b"fork", "0.jpg": b"one", "0.cls": b"0", "._0.cls": b"fork", "./1.jpg": b"two", "./1.cls": b"1"}
    shard(tmp_path, "x.tar", files | {"__MACOSX/0.jpg": b"fork"})
    (tmp_path / "._x.tar").write_bytes(b"Mac OS X")
    source = list_source("webdataset", tmp_path, "train")
    assert [source.read(item) for item in source.items] == [b"one", b"two"]
    assert source.summary()[1] == "skipped 3 other files: 3 hidden or of the system"


@pytest.mark.parametrize(
    ("pack", "program"), [(gzip.compress, "zcat"), (bz2.compress, "bzcat"), (lzma.compress, "xzcat")]
)
@pytest.mark.parametrize(("name", "becomes"), [("x.tar.gz", "x.tar"), ("x.tgz", "x.tar"), ("x.tar", "x.tar.new")])
def test_what_to_do_about_compressed_shards_is_said(
    pack: Callable[[bytes], bytes], program: str, name: str, becomes: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(pack(packed({"a.jpg": b"x"})))
    expected = f"cannot be sought in; first: {program} {tmp_path / name} > {tmp_path / becomes}"
    for source in (tmp_path, tmp_path / f"{{{name},b}}"):
        reason = complaint(source)
        assert f"{tmp_path / name}: is compressed, so it {expected}" in reason
    if shutil.which(program):
        subprocess.run(["bash", "-c", reason.partition("first: ")[2]], check=True)
        if name != "x.tar":
            (tmp_path / name).unlink()
        assert [item.key for item in list_source("webdataset", tmp_path, "train").items] == ["x.tar/a.jpg"]


def test_what_follows_the_end_of_a_shard_is_told(tmp_path: Path) -> None:
    shard(tmp_path, "a.tar", {"a.jpg": b"one"})
    shard(tmp_path, "b.tar", {"b.jpg": b"two"})
    assert list_source("webdataset", tmp_path, "train").remark == ""
    with (tmp_path / "a.tar").open("ab") as file:
        file.write((tmp_path / "b.tar").read_bytes())
    source = list_source("webdataset", tmp_path, "train")
    assert len(source.items) == 2
    assert f"what follows the end mark of {tmp_path}/a.tar is not read" in source.summary()[-1]


def test_truncated_and_missing_shards_are_named(tmp_path: Path) -> None:
    shard(tmp_path, "x-0.tar", {"a.jpg": b"x" * 600})
    (tmp_path / "x-1.tar").write_bytes((tmp_path / "x-0.tar").read_bytes()[:1024])
    assert f"{tmp_path / 'x-1.tar'}: " in (reason := complaint(tmp_path))
    assert "truncated" in reason
    assert f"{tmp_path / 'x-2.tar'}: cannot be read: No such file" in complaint(tmp_path / "x-{2..3}.tar")


def test_shards_may_be_a_pattern(tmp_path: Path) -> None:
    for name in ("a/x-08.tar", "a/x-09.tar", "b/x-10.tar", "b/x-11.tar"):
        shard(tmp_path, name, {"1.jpg": name.encode()})
    source = list_source("webdataset", tmp_path / "{b/x-10,a/x-09}.tar", "val")
    assert [source.read(item) for item in source.items] == [b"b/x-10.tar", b"a/x-09.tar"]
    source = list_source("webdataset", tmp_path / "a/x-{08..09}.tar", "train")
    assert list(labels(source)) == ["x-08.tar/1.jpg", "x-09.tar/1.jpg"]


def test_braces_are_expanded_as_a_shell_does() -> None:
    patterns = [
        "x-{008..011}.tar",
        "{a,b}{1..2}",
        "plain",
        "{8..011}",
        "{01..100}",
        "{0..10}",
        "x{a}{}y",
        "{,a}b",
        "{a,b",
    ]
    for pattern in patterns:
        shell = subprocess.run(["bash", "-c", f"printf '%s\\n' {pattern}"], capture_output=True, text=True, check=True)
        assert braces(pattern) == shell.stdout.splitlines()
    assert len(braces("{a,b}" * 16 + "{a}" * 5000)) == 1 << 16
    for pattern in ("{0..99999999999}", "{2..1}", "{0..999999}{0..9}"):
        with pytest.raises(ValueError, match="stands for"):
            braces(pattern)


def test_files_of_a_split_are_told_by_their_names() -> None:
    of_imagenet = ["imagenet1k-train-0000.tar", "imagenet1k-train-0001.tar", "imagenet1k-validation-00.tar"]
    assert of_split(of_imagenet, "train", "x") == of_imagenet[:2]
    assert of_split(of_imagenet, "val", "x") == of_imagenet[2:]
    assert of_split(["train/0.tar", "test/0.tar"], "val", "x") == ["test/0.tar"]
    assert of_split(["dev/0.tar", "test/0.tar", "TRAINING_0.tar"], "val", "x") == ["dev/0.tar"]
    assert of_split(["b.tar", "restrained.tar", "a.tar"], "val", "x") == ["a.tar", "b.tar", "restrained.tar"]
    assert of_split(["train.tar", "extra.tar"], "train", "x") == ["train.tar"]
    with pytest.raises(ValueError, match="has no files of split = train, only of test, val"):
        of_split(["valid.tar", "eval.tar"], "train", "x")
    assert of_split([], "train", "x") == []


@given(st.lists(st.sampled_from(["train-0", "val_1", "x/test2", "y"]), unique=True), st.sampled_from(["train", "val"]))
def test_no_file_is_in_two_splits(files: list[str], split: str) -> None:
    try:
        found = of_split(files, split, "x")
    except ValueError:
        return
    assert set(found) <= set(files)
    assert not found or found == ["y"] or all(("train" in name) == (split == "train") for name in found)
