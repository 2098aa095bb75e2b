"""Hugging Face data sets: Arrow as save_to_disk writes it, and parquet; images and labels by the schema."""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from preprocess.sources import Source, huggingface, list_source

FILES = [f"image {n}".encode() * 20 for n in range(7)]
LABELS = [0, 2, 1, 1, 0, 2, 2]
FEATURES = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["ant", "bee", "cat"]}}
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def table(rows: slice = slice(None), features: dict[str, Any] | None = None, **columns: Any) -> pa.Table:
    image = pa.array([{"bytes": data, "path": f"{n}.jpg"} for n, data in enumerate(FILES[rows])], IMAGE)
    made = pa.table({"image": image, "label": pa.array(LABELS[rows], pa.int64())} | columns)
    if features is None:
        return made
    return made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def saved(folder: Path, *parts: pa.Table) -> None:
    """As datasets.Dataset.save_to_disk does."""
    folder.mkdir(parents=True)
    names = [f"data-{n:05d}-of-{len(parts):05d}.arrow" for n in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, part.schema) as stream:
            stream.write_table(part, max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "cache-1234.arrow").write_bytes(b"not one of them")


def parquet(file: Path, part: pa.Table) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(part, file, row_group_size=2)


def check(source: Source, rows: slice = slice(None), classes: tuple[str, ...] = ("ant", "bee", "cat")) -> None:
    assert source.classes == classes
    assert [item.label for item in source.items] == LABELS[rows]
    read, items = pickle.loads(pickle.dumps((source.read, source.items)))
    assert len(pickle.dumps(source.read)) < 1000
    order = np.random.default_rng(0).permutation(len(items))
    assert {n: read(items[n]) for n in order} == dict(enumerate(FILES[rows]))
    assert all(item.size > 0 and item.time > 0 for item in items)


def complaint(root: Path, split: str = "train") -> str:
    with pytest.raises(ValueError) as raised:
        list_source("huggingface", root, split)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_saved_data_set(tmp_path: Path) -> None:
    saved(tmp_path / "one", table(slice(0, 5), FEATURES), table(slice(5, None), FEATURES))
    for split in ("train", "val"):
        check(list_source("huggingface", tmp_path / "one", split))


def test_a_saved_dict_of_data_sets(tmp_path: Path) -> None:
    saved(tmp_path / "train", table(slice(0, 5), FEATURES))
    saved(tmp_path / "test", table(slice(5, None), FEATURES))
    check(list_source("huggingface", tmp_path, "train"), slice(0, 5))
    check(list_source("huggingface", tmp_path, "val"), slice(5, None))


@pytest.mark.parametrize("features", [FEATURES, None])
def test_parquet_as_the_hub_has_it(tmp_path: Path, features: dict[str, Any] | None) -> None:
    classes = ("ant", "bee", "cat") if features else ("0", "1", "2")
    parquet(tmp_path / "data/train-00000-of-00002.parquet", table(slice(0, 4), features))
    parquet(tmp_path / "data/train-00001-of-00002.parquet", table(slice(4, 5), features))
    parquet(tmp_path / "data/validation-00000-of-00001.parquet", table(slice(5, None), features))
    train, val = (list_source("huggingface", tmp_path, split) for split in ("train", "val"))
    check(train, slice(0, 5), classes)
    check(val, slice(5, None), classes)
    assert train.items[4].key == "data/train-00001-of-00002.parquet/0"


def test_images_may_be_bytes_and_labels_names_or_none(tmp_path: Path) -> None:
    parquet(tmp_path / "a/x.parquet", pa.table({"img": FILES[:2], "labels": ["bee", "ant"]}))
    parquet(tmp_path / "b/x.parquet", pa.table({"jpg": FILES[:2], "caption": ["x", "y"]}))
    names, none = (list_source("huggingface", tmp_path / name, "train") for name in "ab")
    assert (names.classes, [item.label for item in names.items]) == (("ant", "bee"), [1, 0])
    assert (none.classes, [item.label for item in none.items]) == ((), [-1, -1])
    assert [names.read(item) for item in names.items] == FILES[:2]


def test_cifar100s_fine_labels_count(tmp_path: Path) -> None:
    coarse = {"_type": "ClassLabel", "names": ["x"]}
    features = {"image": {"_type": "Image"}, "coarse_label": coarse, "fine_label": FEATURES["label"]}
    made = table().rename_columns(["image", "fine_label"]).append_column("coarse_label", pa.array([0] * 7))
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    parquet(tmp_path / "x.parquet", made.replace_schema_metadata(metadata))
    check(list_source("huggingface", tmp_path, "train"))


def test_a_row_without_bytes_is_not_read_from_where_its_path_leads(tmp_path: Path) -> None:
    image = pa.array([{"bytes": None, "path": "/etc/hostname"}, None, {"bytes": b"x", "path": None}], IMAGE)
    parquet(tmp_path / "x.parquet", pa.table({"image": image}))
    source = list_source("huggingface", tmp_path, "train")
    for item in source.items[:2]:
        with pytest.raises(OSError, match="without the bytes"):
            source.read(item)
    assert source.read(source.items[2]) == b"x"


def test_damage_is_named(tmp_path: Path) -> None:
    assert "holds no .parquet files, nor state.json" in complaint(tmp_path)
    file = tmp_path / "x.parquet"
    parquet(file, table())
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert f"{file}: " in complaint(tmp_path)
    file.unlink()
    saved(tmp_path / "s", table())
    arrow = tmp_path / "s/data-00000-of-00001.arrow"
    arrow.write_bytes(arrow.read_bytes()[:100])
    assert f"{arrow}: " in complaint(tmp_path)
    arrow.unlink()
    assert f"{arrow}: " in complaint(tmp_path)
    for held in (
        '{"_data_files": [{"filename": "../../x.arrow"}]}',
        "{",
        '{"_data_files": 3}',
        "[]",
        '{"_data_files": [], "_indices_data_files": [{"filename": "i.arrow"}]}',
    ):
        (tmp_path / "s/state.json").write_text(held)
        assert "state.json" in complaint(tmp_path)


def test_a_file_cut_after_listing_is_an_unreadable_image(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    parquet(file, table())
    source = list_source("huggingface", tmp_path, "train")
    whole = file.read_bytes()
    file.write_bytes(whole[:4] + bytes(len(whole) - 4))
    with pytest.raises(OSError):
        source.read(source.items[0])


READ_ALL = """
import sys
from pathlib import Path
from preprocess.sources import list_source
source = list_source("huggingface", Path(sys.argv[1]), "train")
for item in source.items:
    source.read(item)
"""


@pytest.mark.parametrize("offsets", [(0, 2_000_000_000, 280), (-2_000_000_000, 140, 280), (280, 140, 0)])
def test_edited_offsets_never_reach_memory(tmp_path: Path, offsets: tuple[int, ...]) -> None:
    saved(tmp_path / "s", table())
    arrow = tmp_path / "s/data-00000-of-00001.arrow"
    whole = arrow.read_bytes()
    assert whole.count(struct.pack("<3i", 0, 140, 280)) == 3
    arrow.write_bytes(whole.replace(struct.pack("<3i", 0, 140, 280), struct.pack("<3i", *offsets)))
    ran = subprocess.run([sys.executable, "-c", READ_ALL, tmp_path], capture_output=True, text=True)
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1].startswith(f"kamim.KamimError: {arrow}: ")


def test_metadata_on_which_pyarrow_aborts_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.parquet", "b.parquet"):
        parquet(tmp_path / name, table())
    (tmp_path / "script.py").write_text("import os; print('.', end='', flush=True); os.abort()")
    monkeypatch.setattr(huggingface.footers, "__file__", str(tmp_path / "script.py"))
    assert f"{tmp_path / 'b.parquet'}: its metadata are damaged" in complaint(tmp_path)


@pytest.mark.parametrize(
    "metadata",
    ["[]", "3", '{"info": 3}', '{"info": {"features": [3]}}', "[" * 100_000, '{"info": {"features": {"image": 3}}}'],
)
def test_metadata_of_another_form_are_named_or_ignored(tmp_path: Path, metadata: str) -> None:
    parquet(tmp_path / "x.parquet", table().replace_schema_metadata({"huggingface": metadata}))
    if "image" in metadata:
        check(list_source("huggingface", tmp_path, "train"), classes=("0", "1", "2"))
    else:
        assert f"{tmp_path / 'x.parquet'}: " in complaint(tmp_path)


def read_or_not(source: Source, number: int) -> bytes | None:
    try:
        return source.read(source.items[number])
    except OSError:
        return None


def test_a_file_replaced_after_listing_is_noticed(tmp_path: Path) -> None:
    for kind, write in (("parquet", parquet), ("arrow", lambda file, part: saved(file.parent, part))):
        file = tmp_path / kind / ("x.parquet" if kind == "parquet" else "data-00000-of-00001.arrow")
        write(file, table())
        source = list_source("huggingface", file.parent, "train")
        other = tmp_path / "other" / kind / file.name
        for part in (table(slice(0, 3)), table().set_column(0, "image", pa.array([b"another"] * 7))):
            write(other, part)
            other.rename(file)
            huggingface._held.table.cache_clear()  # as in a worker process
            huggingface._held.images.cache_clear()
            found = [read_or_not(source, n) for n in range(len(source.items))]
            assert all(data in (None, expected) for data, expected in zip(found, FILES, strict=True))
            assert None in found
            shutil.rmtree(other.parent)


def test_a_pipe_is_no_data_set(tmp_path: Path) -> None:
    saved(tmp_path / "s", table())
    (tmp_path / "s/data-00000-of-00001.arrow").unlink()
    os.mkfifo(tmp_path / "s/data-00000-of-00001.arrow")
    assert "not a plain one" in complaint(tmp_path)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (pa.table({"label": [1]}), "needs one column of images, has none"),
        (pa.table({"image": [b"x"], "img": [b"y"]}), "has image, img"),
        (pa.table({"image": ["text"]}), "not the bytes of image files"),
        (pa.table({"image": [b"x", b"y"], "label": [0, None]}), "x.parquet/1 has no label; every"),
        (pa.table({"image": [b"x"], "label": [1.5]}), "x.parquet/0 has the label 1.5 of type float; every image must"),
        (pa.table({"image": [b"x", b"y"], "label": [0, -1]}), "labels from -1 to 0, such as -1 of x.parquet/1"),
        (table(features=FEATURES, label=pa.array([0.0] * 7)), "labels are of type float, such as 0.0 of x.parquet/0"),
        (table(features=FEATURES | {"label": {"_type": "ClassLabel", "names": ["ant"]}}), "labels 0 to 2 of 1 classes"),
        (table(features=FEATURES | {"label": {"_type": "ClassLabel", "names": "ant"}}), "does not list the names"),
        (table(features=FEATURES | {"label": {"_type": "ClassLabel", "names": [1, 2, 3]}}), "does not list the names"),
        (table(features=FEATURES, label=pa.array(["ant"] * 7)), "labels are of type str"),
        (table().replace_schema_metadata({"huggingface": "{"}), "x.parquet"),
    ],
)
def test_unfitting_columns_are_named(tmp_path: Path, made: pa.Table, reason: str) -> None:
    parquet(tmp_path / "x.parquet", made)
    assert reason in complaint(tmp_path)


def test_files_must_have_the_same_columns(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", table())
    parquet(tmp_path / "b.parquet", pa.table({"img": [b"x"]}))
    assert "differ in their columns: a.parquet has images in column image.bytes" in complaint(tmp_path)


def test_classes_in_another_order_are_named(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", table(features=FEATURES))
    turned = FEATURES | {"label": {"_type": "ClassLabel", "names": ["ant", "cat", "bee"]}}
    parquet(tmp_path / "b.parquet", table(features=turned))
    assert complaint(tmp_path).endswith("a.parquet has class 1: bee, b.parquet cat")
    (tmp_path / "b.parquet").unlink()
    parquet(tmp_path / "c.parquet", table())
    assert complaint(tmp_path).endswith("a.parquet has class 0: ant, c.parquet none")


@pytest.mark.parametrize(
    "files",
    [
        ("full/train-00000-of-00001", "small/train-00000-of-00001", "tiny/train-00000-of-00001"),
        ("data/full-train-00000-of-00001", "data/small-train-00000-of-00001"),
        ("data/train-00000-of-00001", "data/train-00000-of-00002", "data/train-00001-of-00002"),
        ("data/train-00000-of-00001-0123456789abcdef", "data/train-00000-of-00001-fedcba9876543210"),
        ("data/train-00000-of-00001", "data/train-00000-of-00001 (1)"),
        ("default/train/0000", "default/partial-train/0000"),
    ],
)
def test_configurations_and_copies_of_a_split_are_never_merged(files: tuple[str, ...], tmp_path: Path) -> None:
    for name in files:
        parquet(tmp_path / f"{name}.parquet", table())
    folders = {name.rpartition("/")[0] for name in files}
    reason = complaint(tmp_path)
    assert all(folder in reason for folder in folders) if len(folders) > 1 else files[0].partition("-0000")[0] in reason
    if len(folders) == len(files):
        check(list_source("huggingface", tmp_path / sorted(folders)[0], "train"), classes=("0", "1", "2"))


def test_the_files_that_are_read_are_told(tmp_path: Path) -> None:
    for number, rows in enumerate((slice(0, 4), slice(4, None))):
        parquet(tmp_path / f"data/train-0000{number}-of-00002.parquet", table(rows))
    parquet(tmp_path / ".cache/train-00000-of-00002.parquet", table())
    source = list_source("huggingface", tmp_path, "train")
    check(source, classes=("0", "1", "2"))
    assert source.summary()[-1] == "read from 2 files of data/train-*-of-00002"


def test_threads_read_each_row_group_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet(tmp_path / "train.parquet", table())
    source = list_source("huggingface", tmp_path, "train")
    column, asked = huggingface._Parquet.column, []

    def counted(self: Any, group: int, name: str) -> Any:
        asked.append(group)
        return column(self, group, name)

    monkeypatch.setattr(huggingface._Parquet, "column", counted)
    with ThreadPoolExecutor(3) as pool:
        wait = Barrier(3)  # every thread has a row group of its own before any reads on

        def both(first: int) -> list[Any]:
            read = [source.read(source.items[first])]
            wait.wait()
            return [*read, source.read(source.items[first + 1])]

        found = [*pool.map(both, (0, 2, 4))]
    assert found == [FILES[0:2], FILES[2:4], FILES[4:6]]
    assert sorted(asked) == [0, 1, 2]


def test_a_table_without_rows_is_said_in_one_line(tmp_path: Path) -> None:
    parquet(tmp_path / "train.parquet", table(slice(0, 0)))
    assert "holds no images" in complaint(tmp_path)
