"""WebDataset tar shards, https://github.com/webdataset/webdataset: files of one name up to its first dot are a sample.

An image's label is in the .cls of its sample, a number or a name, or under "label" in its .json. Images keep the order
they have in the shards, so that reading is sequential.
"""

import itertools
import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path

from kamim import KamimError
from preprocess.sources.base import Member, Source, existing, is_image, name_classes, of_split, printable
from preprocess.sources.tars import Entry, Tar, read_member

MAX_SHARDS = 1_000_000
MAX_LABEL_BYTES = 1 << 20
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")


def list_images(source: Path | None, split: str) -> Source:
    """Lists SOURCE, a folder of .tar files, or a pattern such as /data/train-{000..146}.tar.

    If the folder's files or folders are named train, val or test, those of the split are used.
    Raises KamimError for missing or damaged shards, and if only some images have a label.
    """
    if source is not None and "{" in str(source):
        root, location = Path(str(source).partition("{")[0]).parent.resolve(), source.absolute()
        shards = [os.path.relpath(shard, root) for shard in braces(str(source))]
    else:
        root = location = existing(source, "webdataset")
        tars = (os.fspath(file.relative_to(root)) for file in root.rglob("*.tar"))
        shards = of_split(tars, split, printable(str(root)))
    where = f"source = {printable(str(location))}"
    items: list[Member] = []
    labels: list[int | str | None] = []
    for shard in shards:
        for item, label in _samples(shard, Tar(root / shard)):
            items.append(item)
            labels.append(label)
    if not items:
        raise KamimError(f"{where}: {len(shards)} .tar files, and no images in them")
    classes, numbers = name_classes(labels, where)
    listed = [replace(item, label=number) for item, number in zip(items, numbers, strict=True)]
    return Source(printable(str(location)), classes, listed, read_member)


def _samples(shard: str, tar: Tar) -> list[tuple[Member, int | str | None]]:
    """Returns a shard's images and their labels. The last of several members of one name counts, as when extracted."""
    images: dict[str, Entry] = {}
    labels: dict[str, int | str | None] = {}
    for entry in tar.entries():
        sample, suffix = _split(entry.name)
        if is_image(entry.name):
            images[entry.name] = entry
        elif suffix == "cls":
            labels[sample] = _number_or_name(tar.bytes(entry, MAX_LABEL_BYTES))
        elif suffix == "json":
            labels.setdefault(sample, _label(tar.bytes(entry, MAX_LABEL_BYTES), f"{tar.name}: {printable(entry.name)}"))
    return [(tar.member(f"{shard}/{name}", -1, entry), labels.get(_split(name)[0])) for name, entry in images.items()]


def _split(name: str) -> tuple[str, str]:
    folder, _, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return f"{folder}/{stem}", suffix.lower()


def _number_or_name(data: bytes) -> int | str:
    text = data.decode(errors="backslashreplace").strip()
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else text


def _label(data: bytes, where: str) -> int | str | None:
    try:
        held = json.loads(data)
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
