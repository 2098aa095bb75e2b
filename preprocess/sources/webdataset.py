"""WebDataset tar shards, https://github.com/webdataset/webdataset: files of one name up to its first dot are a sample.

The rest of the name is a field. A sample has one image, in a field such as jpg; the only image may have any field. Its
label is in the field cls, a number or a name, or under "label" in the field json. Images keep the order they have in
the shards, so that reading is sequential.
"""

import itertools
import json
import math
import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

from kamim import KamimError
from preprocess.sources.base import (
    HIDDEN,
    SHOWN,
    SUFFIXES,
    Label,
    Member,
    Source,
    existing,
    is_hidden,
    is_image,
    name_classes,
    of_split,
    printable,
)
from preprocess.sources.tars import PACKED, Entry, Tar, on_continued, read_member

MAX_SHARDS = 1_000_000
MAX_LABEL_BYTES = 1 << 20
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")


def list_images(source: Path | None, split: str) -> Source:
    """Lists SOURCE, a folder of .tar files, or a pattern such as /data/train-{000..146}.tar.

    If the folder's files or folders are named train, val or test, those of the split are used.
    Raises KamimError for missing, damaged or compressed shards, for a sample of several images, for a label without an
    image, and if only some images have a label.
    """
    if source is not None and "{" in str(source):
        root, location = Path(str(source).partition("{")[0]).parent.resolve(), source.absolute()
        shards = [os.path.relpath(shard, root) for shard in braces(str(source))]
    else:
        root = location = existing(source, "webdataset")
        shards = of_split(_shards(root), split, printable(str(root)))
    where = f"source = {printable(str(location))}"
    items: list[Member] = []
    labels: list[Label] = []
    skipped: Counter[str] = Counter()
    tars = [Tar(root / shard) for shard in shards]
    for shard, tar in zip(shards, tars, strict=True):
        for item, label in _samples(shard, tar, skipped):
            items.append(item)
            labels.append(label)
    if not items:
        raise KamimError(f"{where}: {len(shards)} .tar files, and no images in them")
    classes, numbers = name_classes(labels, [item.key for item in items], where)
    listed = [replace(item, label=number) for item, number in zip(items, numbers, strict=True)]
    return Source(printable(str(location)), classes, listed, read_member, skipped, on_continued(tars))


def _shards(root: Path) -> list[str]:
    """Returns the tars below a folder. Compressed ones are among them, so that Tar can say what to do."""
    files = (file for pattern in ("*.tar", "*.tar.*", "*.tgz") for file in root.rglob(pattern))
    names = [os.fspath(file.relative_to(root)) for file in files if file.suffix in (".tar", *PACKED)]
    return [name for name in names if not is_hidden(name)]


def _samples(shard: str, tar: Tar, skipped: Counter[str]) -> list[tuple[Member, Label]]:
    """Returns a shard's images and their labels. The last of several members of one name counts, as when extracted."""
    images: dict[str, dict[str, Entry]] = {}
    labels: dict[str, Label] = {}
    files: list[Entry] = []  # that hold labels, or seem to
    for entry in tar.entries():
        sample, field = _split(entry.name)
        if is_hidden(entry.name):
            skipped[HIDDEN] += 1
        elif is_image(entry.name):
            images.setdefault(sample, {})[entry.name] = entry
        elif field.endswith(("cls", "json")):
            files.append(entry)
            if field == "cls":
                labels[sample] = _number_or_name(tar.bytes(entry, MAX_LABEL_BYTES))
            elif field == "json":
                labels.setdefault(sample, _label(tar, entry))
    chosen = {sample: _image(entries, tar) for sample, entries in images.items()}
    for entry in files:
        _check_read(entry, chosen, labels, tar)
    return [(tar.member(f"{shard}/{entry.name}", -1, entry), labels.get(name)) for name, entry in chosen.items()]


def _image(entries: dict[str, Entry], tar: Tar) -> Entry:
    """Returns the image of a sample. Raises KamimError if it has several."""
    usual = [name for name in entries if f".{_split(name)[1]}" in SUFFIXES]
    names = usual or [*entries]
    if len(names) > 1:
        raise KamimError(
            f"{tar.name}: {', '.join(map(printable, names[:SHOWN]))} are images of one sample, as its name ends at the "
            "first dot; a sample has one image NAME.jpg or the like, beside which others, NAME.FIELD.png, are not read"
        )
    return entries[names[0]]


def _check_read(file: Entry, images: dict[str, Entry], labels: dict[str, Label], tar: Tar) -> None:
    """Raises KamimError if a file of a label has no image, or is of another field, such as A.B.cls beside A.B.jpg."""
    sample, field = _split(file.name)
    image, label = images.get(sample), labels.get(sample)
    if field in ("cls", "json"):
        lost = image is None and label is not None
    else:
        beside = image is not None and image.name.rpartition(".")[0] == file.name.rpartition(".")[0]
        lost = label is None and (field.endswith(".cls") or (beside and _label(tar, file) is not None))
    if lost:
        raise KamimError(
            f"{tar.name}: {printable(file.name)} is the label of no image: it is the field {printable(field)} of the "
            f"sample {printable(sample.removeprefix('/'))}, as a sample's name ends at the first dot; rename its files"
        )


def _split(name: str) -> tuple[str, str]:
    folder, _, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return f"{folder}/{stem}", suffix.lower()


def _number_or_name(data: bytes) -> int | str | None:
    text = data.decode(errors="backslashreplace").strip()
    return int(text) if re.fullmatch(r"[+-]?[0-9]{1,9}", text) else text or None


def _label(tar: Tar, entry: Entry) -> int | str | None:
    where = f"{tar.name}: {printable(entry.name)}"
    try:
        held = json.loads(tar.bytes(entry, MAX_LABEL_BYTES))
    except (ValueError, RecursionError) as error:
        raise KamimError(f"{where}: is not JSON: {error}") from error
    label = held.get("label") if isinstance(held, dict) else None
    if label is not None and type(label) not in (int, str):
        raise KamimError(f"{where}: its label is neither a number nor a name")
    return label


def braces(pattern: str) -> list[str]:
    """Expands {000..146} and {a,b} as bash does, and leaves other braces unchanged. Nested braces are not expanded.

    Raises KamimError for a range that counts down, and for more than MAX_SHARDS names, which the library braceexpand
    does not limit.
    """
    parts = _BRACES.split(pattern)  # alternately outside and inside of braces
    choices = [_choices(part) if n % 2 else [part] for n, part in enumerate(parts)]
    count = math.prod(map(len, choices))
    if count > MAX_SHARDS:
        raise KamimError(f"source = {printable(pattern)}: stands for {count} files, not 1 to {MAX_SHARDS}")
    return ["".join(names) for names in itertools.product(*choices)]


def _choices(inside: str) -> list[str]:
    limits = _RANGE.fullmatch(inside)
    if limits is None:
        return inside.split(",") if "," in inside else [f"{{{inside}}}"]
    first, last = map(int, limits.groups())
    if not 0 <= last - first < MAX_SHARDS:
        raise KamimError(f"source: {{{inside}}} stands for {last - first + 1} files, not 1 to {MAX_SHARDS}")
    padded = any(limit.startswith("0") and limit != "0" for limit in limits.groups())
    width = max(map(len, limits.groups())) if padded else 0
    return [f"{n:0{width}}" for n in range(first, last + 1)]
