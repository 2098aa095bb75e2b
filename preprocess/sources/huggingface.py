"""Hugging Face data sets: a folder that `save_to_disk` wrote (Arrow), or parquet files, with a column of images.

An image is a struct of its file's bytes and its name, or the bytes alone (https://huggingface.co/docs/datasets).
The schema's metadata names the columns of images and labels, if `datasets` wrote it; otherwise names and types do.
A thread that reads them keeps two row groups of images.
"""

import errno
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import accumulate, zip_longest
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from kamim import KamimError
from preprocess.sources import parquet_footers as footers
from preprocess.sources.base import (
    CHANGED,
    Item,
    Label,
    Member,
    Source,
    check_size,
    existing,
    is_hidden,
    name_classes,
    of_split,
    plural,
    printable,
    read_whole,
)

IMAGES, LABELS = ("image", "img", "jpg", "png"), ("label", "labels", "fine_label")
# A file of a set of parts, as datasets names it: train-00000-of-00002.parquet, formerly with a hash before the suffix.
_PART = re.compile(r"(?P<whole>.*)-(?P<number>[0-9]{5})-of-(?P<parts>[0-9]{5}).*")


class _Table(Protocol):
    """A file of rows, in groups."""

    schema: Any
    rows: list[int]  # rows of each group

    def column(self, group: int, name: str) -> Any:
        """Returns a pyarrow array of a column, or of a struct's field. Raises pyarrow.ArrowInvalid if damaged."""

    def bytes(self, group: int, name: str) -> int:
        """Returns the number of bytes of a column in a group."""


class _Arrow:
    """A stream of record batches, mapped into memory."""

    def __init__(self, file: str):
        import pyarrow as pa

        table = pa.ipc.open_stream(pa.memory_map(file)).read_all()
        self.schema, self._batches = table.schema, table.to_batches()
        self.rows = [batch.num_rows for batch in self._batches]

    def column(self, group: int, name: str) -> Any:
        return _column(self._batches[group], name)

    def bytes(self, group: int, name: str) -> int:
        return int(self.column(group, name).nbytes)


class _Parquet:
    def __init__(self, file: str):
        import pyarrow.parquet as pq

        self._file = pq.ParquetFile(file)
        self.schema, meta = self._file.schema_arrow, self._file.metadata
        self.rows = [meta.row_group(n).num_rows for n in range(meta.num_row_groups)]

    def column(self, group: int, name: str) -> Any:
        return _column(self._file.read_row_group(group, columns=[name], use_threads=False), name)

    def bytes(self, group: int, name: str) -> int:
        held = self._file.metadata.row_group(group)
        columns = (held.column(n) for n in range(held.num_columns))
        return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == name)


def _column(rows: Any, name: str) -> Any:
    """Returns a validated column, or struct's field, of a RecordBatch or Table: pyarrow trusts the offsets it reads."""
    import pyarrow.compute as pc

    top, _, field = name.partition(".")
    column = rows.column(top)
    column.validate(full=True)
    return pc.struct_field(column, field) if field else column


class _Columns(NamedTuple):
    image: str
    label: str | None
    classes: tuple[str, ...] | None  # None: the schema names none


class _Held(threading.local):
    """The open files of a thread: threads read in different places, and would close each other's row groups."""

    def __init__(self) -> None:
        self.table = lru_cache(maxsize=8)(_opened)
        self.images = lru_cache(maxsize=2)(self._images)

    def _images(self, file: str, group: int, column: str) -> tuple[Any, int]:
        """Returns the images of a row group, and the mean of their sizes."""
        table = self.table(file)
        return table.column(group, column), _mean_size(table, group, column)


def _mean_size(table: _Table, group: int, column: str) -> int:
    return table.bytes(group, column) // max(table.rows[group], 1)


def _opened(file: str) -> _Table:
    if not Path(file).is_file():
        raise OSError(errno.ENOENT, "no such file, or not a plain one")
    return _Parquet(file) if file.endswith(".parquet") else _Arrow(file)


_held = _Held()


def list_images(source: Path | None, split: str) -> Source:
    """Lists the folder SOURCE: the files whose name or folder names the split, else all files.

    An item's size is the mean of its row group. Raises KamimError for files of several configurations or copies of the
    split, for files that are damaged or have no column of images, or several; and without pyarrow.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise KamimError("huggingface: needs pyarrow; pip install 'kamim[huggingface]'")
    root = existing(source, "huggingface")
    where = printable(str(root))
    files = of_split(_files(root), split, where)
    if not files:
        raise KamimError(f"source = {where}: holds no .parquet files, nor state.json with .arrow files")
    remark = _on_files(files, f"source = {where}", split)
    _check_footers([root / name for name in files if name.endswith(".parquet")])
    rows: list[Member] = []
    labels: list[Label] = []
    layouts: dict[_Columns, str] = {}
    for name in files:
        try:
            table = _held.table(str(root / name))
            columns = _columns(table.schema)
            layouts.setdefault(columns, name)
            rows += _rows(root, name, table, columns.image)
            labels += _labels(table, columns.label)
        except Exception as error:  # pyarrow raises nearly every kind for a damaged file
            reason = " ".join(str(error).split()) or type(error).__name__
            raise KamimError(f"{printable(str(root / name))}: {reason}") from error
    if len(layouts) > 1:
        raise KamimError(f"source = {where}: its files of split = {split} differ in their columns: {_unlike(layouts)}")
    classes, numbers = _numbers(columns, labels, [row.key for row in rows], f"source = {where}")
    items = [replace(row, label=number) for row, number in zip(rows, numbers, strict=True)]
    return Source(where, classes, items, partial(_read, columns.image), remark=remark)


def _on_files(files: Sequence[str], where: str, split: str) -> str:
    """Returns a remark on the files of a split and their folder.

    Raises KamimError if they may hold the same images twice: if they are in several folders, or are numbered as parts
    of several wholes, as those of a data set with several configurations.
    """
    sets: Counter[str] = Counter()
    numbers: Counter[str] = Counter()
    for file in files:
        folder, _, name = file.rpartition("/")
        part = _PART.fullmatch(name)
        sets[f"{folder or '.'}/{part['whole']}-*-of-{part['parts']}" if part else folder or "."] += 1
        numbers[f"{folder or '.'}/{part['whole']}-{part['number']}-of-{part['parts']}" if part else file] += 1
    listed = ", ".join(f"{count} {plural(count, 'file')} of {printable(name)}" for name, count in sets.items())
    if len(sets) > 1:
        raise KamimError(
            f"{where}: split = {split} has {listed}: if these are configurations or copies of one data set, give the "
            "folder of one as source=..., or move the others away; if they are its parts, move them into one folder"
        )
    if copies := [name for name, count in numbers.items() if count > 1]:
        raise KamimError(f"{where}: {printable(copies[0])} is there more than once; remove all but one copy")
    return f"read from {listed}"


def _unlike(layouts: Mapping[_Columns, str]) -> str:
    """Returns the first difference between two layouts, which are given with a file of each."""
    (one, first), (other, second) = list(layouts.items())[:2]
    pairs = [("images in column", one.image, other.image), ("labels in column", one.label, other.label)]
    for n, names in enumerate(zip_longest(one.classes or (), other.classes or ())):
        pairs.append((f"class {n}:", *names))
    what, a, b = next(pair for pair in pairs if pair[1] != pair[2])
    return printable(f"{first} has {what} {a or 'none'}, {second} {b or 'none'}")


def _files(root: Path) -> Iterator[str]:
    """Yields parquet files below a folder, and the Arrow files that a state.json names (others are caches)."""
    for parent, _, names in os.walk(root):
        below = Path(parent).relative_to(root)
        held = [name for name in names if name.endswith(".parquet") and Path(parent, name).is_file()]
        if "state.json" in names and not is_hidden(os.fspath(below)):
            held += _saved(Path(parent, "state.json"))
        yield from (name for name in (os.fspath(below / name) for name in held) if not is_hidden(name))


def _saved(state: Path) -> list[str]:
    """Returns the file names in a state.json. Raises KamimError for names that lead elsewhere."""
    try:
        held = json.loads(read_whole(state))
        names = [str(file["filename"]) for file in held["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise KamimError(f"{printable(str(state))}: is not of save_to_disk: {error!r}") from error
    if held.get("_indices_data_files"):
        raise KamimError(f"{printable(str(state))}: rows are selected by indices; save it with datasets 2 or later")
    for name in names:
        if Path(name).name != name or not name.endswith(".arrow"):
            raise KamimError(f"{printable(str(state))}: names {printable(name)}, not an .arrow file beside it")
    return names


def _check_footers(files: Sequence[Path]) -> None:
    """Raises KamimError for the first parquet file whose metadata crashes the process that reads it."""
    if not files:
        return
    names = b"\0".join(os.fsencode(file) for file in files)
    read = subprocess.run([sys.executable, "-P", footers.__file__], input=names, capture_output=True)
    if read.returncode:
        culprit = files[min(len(read.stdout), len(files) - 1)]
        raise KamimError(f"{printable(str(culprit))}: its metadata are damaged")


def _columns(schema: Any) -> _Columns:
    import pyarrow.types as types

    features = _features((schema.metadata or {}).get(b"huggingface", b"{}"))
    kinds = {name: str(f["_type"]) for name, f in features.items() if isinstance(f, dict) and "_type" in f}
    images = [name for name, kind in kinds.items() if kind == "Image" and name in schema.names]
    images = images or [name for name in IMAGES if name in schema.names]
    if len(images) != 1:
        raise KamimError(f"needs one column of images, has {', '.join(map(printable, images)) or 'none'}")
    image = schema.field(images[0]).type
    if types.is_struct(image) and image.get_field_index("bytes") >= 0:
        path, image = f"{images[0]}.bytes", image.field("bytes").type
    else:
        path = images[0]
    if not (types.is_binary(image) or types.is_large_binary(image)):
        raise KamimError(f"column {printable(path)} is {image}, not the bytes of image files")
    labels = [name for name, kind in kinds.items() if kind == "ClassLabel" and name in schema.names]
    label = next((name for name in LABELS if name in schema.names), labels[0] if len(labels) == 1 else None)
    names = features[label].get("names") if label in labels else None
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise KamimError(f"the metadata of column {printable(label or '')} does not list the names of its classes")
    return _Columns(path, label, None if names is None else tuple(names))


def _features(metadata: bytes) -> dict[str, Any]:
    """Returns the features that `datasets` recorded of each column. Raises KamimError for metadata of another form."""
    try:
        features = (json.loads(metadata).get("info") or {}).get("features") or {}
    except (ValueError, AttributeError, RecursionError) as error:
        raise KamimError(f"its metadata is not what datasets writes: {error}") from error
    if not isinstance(features, dict):
        raise KamimError("its metadata is not what datasets writes: the features are no object")
    return features


def _rows(root: Path, name: str, table: _Table, image: str) -> Iterator[Member]:
    file, time = str(root / name), (root / name).stat().st_mtime_ns
    at = 0
    for group, count in enumerate(table.rows):
        size = _mean_size(table, group, image)
        yield from (Member(f"{name}/{row}", -1, size, time, file, row) for row in range(at, at + count))
        at += count


def _labels(table: _Table, label: str | None) -> Iterator[Label]:
    for group, count in enumerate(table.rows):
        yield from [None] * count if label is None else table.column(group, label).to_pylist()


def _numbers(
    columns: _Columns, labels: list[Label], keys: Sequence[str], where: str
) -> tuple[tuple[str, ...], list[int]]:
    if columns.classes is None:
        return name_classes(labels, keys, where)
    wrong = next((n for n, label in enumerate(labels) if label is not None and type(label) is not int), None)
    if wrong is not None:
        raise KamimError(
            f"{where}: its metadata names classes, but labels are of type {type(labels[wrong]).__name__}, such as "
            f"{labels[wrong]!r:.40} of {printable(keys[wrong])}"
        )
    numbers = [-1 if label is None else int(label) for label in labels]
    wrong = next((n for n, number in enumerate(numbers) if not -1 <= number < len(columns.classes)), None)
    if wrong is not None:
        raise KamimError(
            f"{where}: labels {min(numbers)} to {max(numbers)} of {len(columns.classes)} classes, such as "
            f"{numbers[wrong]} of {printable(keys[wrong])}"
        )
    return tuple(map(printable, columns.classes)), numbers


def _read(column: str, item: Item) -> bytes:
    assert isinstance(item, Member)
    try:
        ends = list(accumulate(_held.table(item.file).rows))
        group = bisect_right(ends, item.at)
        images, mean_size = _held.images(item.file, group, column)
        image = images[item.at - (ends[group - 1] if group else 0)]
        data = image.as_buffer() if image.is_valid else None
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise OSError(errno.EIO, " ".join(str(error).split()) or type(error).__name__) from error
    if mean_size != item.size:
        raise OSError(errno.EBUSY, CHANGED)
    if data is None:
        raise OSError(errno.ENOENT, "a row without the bytes of an image")
    check_size(data.size)
    return bytes(data)
