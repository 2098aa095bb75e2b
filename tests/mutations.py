"""Changes stores and updates their checksums: one thing on purpose, or anything at random."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from kamim.storage import mmap_array
from kamim.storage.manifest import BACKUP, MANIFEST, backup_of, file_checksums, seal, tree_entries

Random = np.random.Generator

Change = Callable[[Path], object]

NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    63,
    255,
    4095,
    4096,
    65535,
    2**20,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**63 - 1,
    2**63,
    2**64 - 10,
    2**64 - 1,
)
VALUES: tuple[Any, ...] = (
    0,
    1,
    -1,
    2,
    400,
    10**11,
    10**30,
    -(10**30),
    0.5,
    -0.0,
    1e-300,
    1e300,
    float("nan"),
    float("inf"),
    True,
    None,
    "",
    "0",
    "../x",
    "/etc/passwd",
    "\x1b[31m",
    "a\nb",
    "é",
    "x" * 5000,
    [],
    [0],
    [[]],
    [-1, 2**63],
    {},
    {"a": 1},
    "zarr",
    "ffcv",
    "raw",
    "jpeg",
    "fast",
    "sift",
)


# One thing on purpose


def edited(edit: Callable[[dict[str, Any]], object]) -> Change:
    """Edits the manifest."""

    def change(path: Path) -> None:
        fields = json.loads((path / MANIFEST).read_bytes())
        edit(fields)
        seal(path, json.dumps(fields).encode())

    return change


def reseal(path: Path) -> None:
    """Updates all checksums."""
    edited(lambda fields: fields.update(checksums=file_checksums(path)))(path)


def field(key: str, value: Any) -> Change:
    """Replaces one value of the manifest; the key is a path with dots."""

    def edit(fields: Any) -> None:
        *outer, last = (int(part) if part.isdigit() else part for part in key.split("."))
        for part in outer:
            fields = fields[part]
        fields[last] = value

    return edited(edit)


def element(name: str, index: Any, value: Any) -> Change:
    """Replaces elements of a zarr array."""

    def change(path: Path) -> None:
        zarr.open_array(path / name, mode="r+")[index] = value
        reseal(path)

    return change


def array(name: str, dtype: str, values: Any = None) -> Change:
    """Replaces an array by one of another type, with the same values unless others are given."""

    def change(path: Path) -> None:
        held = np.asarray(zarr.open_array(path / name, mode="r")) if values is None else values
        shutil.rmtree(path / name)
        folder, _, last = name.rpartition("/")
        mmap_array.create(zarr.open_group(path / folder), last, held.astype(dtype))
        reseal(path)

    return change


def metadata(name: str, **changes: Any) -> Change:
    """Replaces values of a zarr.json."""

    def change(path: Path) -> None:
        file = path / name / "zarr.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        reseal(path)

    return change


def number(name: str, at: int, dtype: str, value: int) -> Change:
    """Replaces a number in a file; at < 0: from its end."""

    def change(path: Path) -> None:
        content = bytearray((path / name).read_bytes())
        start = at % len(content)
        content[start : start + np.dtype(dtype).itemsize] = np.array(value, dtype).tobytes()
        (path / name).write_bytes(content)
        reseal(path)

    return change


def resized(name: str, by: int) -> Change:
    """Makes a file longer or shorter."""

    def change(path: Path) -> None:
        os.truncate(path / name, (path / name).stat().st_size + by)
        reseal(path)

    return change


def linked(name: str) -> Change:
    """Moves a file or a folder elsewhere, and leaves a link to it."""

    def change(path: Path) -> None:
        elsewhere = path.parent.parent / f"elsewhere-{path.name}"
        shutil.move(path / name, elsewhere)
        (path / name).symlink_to(elsewhere)

    return change


def piped(name: str) -> Change:
    """Puts a named pipe in the place of a file."""

    def change(path: Path) -> None:
        (path / name).unlink()
        os.mkfifo(path / name)

    return change


def both(*changes: Change) -> Change:
    return lambda path: [change(path) for change in changes]


# Anything at random


def mutate(path: Path, random: Random) -> str:
    """Changes the store at `path` at random and returns a description of the changes."""
    done = []
    if random.random() < 0.85:
        done += [_choose(random, CHANGES)(path, random) for _ in range(_choose(random, (1, 1, 1, 1, 2, 3)))]
        done += [_sealed(path)] if random.random() < 0.9 else []
    if not done or random.random() < 0.1:
        done.append(_of_manifest(path, random))
    return ", ".join(done)


def _choose(random: Random, choices: Any) -> Any:
    return choices[int(random.integers(len(choices)))]


def _file(path: Path, random: Random, *suffixes: str) -> Path:
    names = sorted(tree_entries(path)[0])
    return path / _choose(random, [name for name in names if name.endswith(suffixes)] or names)


def _flip(path: Path, random: Random) -> str:
    file = _file(path, random)
    content = np.frombuffer(file.read_bytes(), np.uint8).copy()
    for _ in range(int(random.integers(1, 5)) if len(content) else 0):
        content[random.integers(len(content))] ^= 1 << random.integers(8)
    _replace(file, content.tobytes())
    return f"bits of {file.name}"


def _number(path: Path, random: Random) -> str:
    """Replaces an aligned number, mostly within the first or last 400 bytes, where headers and tables are."""
    file = _file(path, random, "0", "0", "beton", ".npy")
    content, size = bytearray(file.read_bytes()), _choose(random, (1, 2, 4, 8))
    if len(content) >= size:
        reach = min(len(content), _choose(random, (400, 400, 1 << 30)))
        at = int(random.integers(reach)) if random.random() < 0.5 else len(content) - 1 - int(random.integers(reach))
        at = min(at // size * size, len(content) - size)
        content[at : at + size] = (_choose(random, NUMBERS) % 2 ** (8 * size)).to_bytes(size, "little")
        _replace(file, bytes(content))
    return f"number in {file.relative_to(path)}"


def _length(path: Path, random: Random) -> str:
    file = _file(path, random)
    content = file.read_bytes()
    cut = int(random.integers(len(content) + 1))
    _replace(
        file, _choose(random, (b"", content[:cut], content + content[:cut], content + bytes(8), bytes(len(content))))
    )
    return f"length of {file.relative_to(path)}"


def _exchange(path: Path, random: Random) -> str:
    one, other = _file(path, random), _file(path, random)
    contents = one.read_bytes(), other.read_bytes()
    _replace(other, contents[0])
    _replace(one, contents[1])
    return f"exchanged {one.relative_to(path)}, {other.relative_to(path)}"


def _special(path: Path, random: Random) -> str:
    """Removes a file, or replaces it by a link, a pipe or a folder."""
    file = _file(path, random)
    content = file.read_bytes()
    file.unlink()
    kind = _choose(random, ("gone", "link", "pipe", "folder"))
    if kind == "link":
        elsewhere = path.parent.parent / f"elsewhere-{path.name}-{file.name}"
        elsewhere.write_bytes(content)
        file.symlink_to(elsewhere)
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    return f"{file.relative_to(path)} {kind}"


def _json(path: Path, random: Random) -> str:
    file = _file(path, random, "zarr.json")
    return _edit(file, random) if file.name == "zarr.json" else _flip(path, random)


def _edit(file: Path, random: Random) -> str:
    """Replaces, removes or adds a value of a JSON file."""
    try:
        fields = json.loads(file.read_bytes())
    except ValueError:
        return "nothing"
    outer, key = _choose(random, list(_leaves(fields)) or [({}, "")])
    kind = _choose(random, ("replace", "replace", "replace", "remove", "add"))
    if kind == "replace":
        outer[key] = _choose(random, VALUES)
    elif kind == "remove":
        del outer[key]
    elif isinstance(outer, dict):
        outer[_choose(random, ("x", "consolidated_metadata", "dimension_names", "../x"))] = _choose(random, VALUES)
    else:
        outer.append(_choose(random, VALUES))
    _replace(file, json.dumps(fields).encode())
    return f"{kind} {key} of {file.parent.name}/{file.name}"


def _leaves(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _leaves(value[key])


def _of_manifest(path: Path, random: Random) -> str:
    """Edits the manifest and, in most cases, its backup."""
    file = path / MANIFEST
    done = _edit(file, random) if file.is_file() else "nothing"
    if random.random() < 0.9 and file.is_file():
        _replace(path / BACKUP, backup_of(file.read_bytes()))
    return done


def _sealed(path: Path) -> str:
    try:
        if (path / MANIFEST).is_file():  # neither gone nor a pipe
            reseal(path)
            return "sealed"
    except (OSError, ValueError, AttributeError):  # its backup is a folder, or it holds something else
        pass
    return "not sealed"


def _replace(file: Path, content: bytes) -> None:
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file)
    file.unlink(missing_ok=True)
    file.write_bytes(content)


CHANGES: tuple[Callable[[Path, Random], str], ...] = (
    _flip,
    _number,
    _number,
    _number,
    _number,
    _json,
    _length,
    _exchange,
    _special,
)
