"""Tar files, read in place: one pass over the headers, then members by their offsets.

Formats: v7, POSIX ustar and pax, GNU (the paxutils manual). Listing reads only headers, none longer than MAX_NAMES, and
nothing is ever written, so a hostile tar cannot exhaust memory or write outside a folder. The standard library's
tarfile is no substitute: it reads names of any declared size into memory, recurses for every long name that follows
another, takes 2.4 times as long, and in Python 3.11.9 and older quadratic time for pax headers.
"""

import errno
import gzip
import os
import re
import stat
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

from kamim import KamimError
from preprocess.sources.base import CHANGED, Item, Member, check_size, printable

BLOCK = 512
MAX_NAMES = 1 << 20  # bytes of a header that holds a long name or attributes
MAX_UNPACKED = 1 << 28  # bytes of a small archive that is unpacked in memory
MAX_AFTER = 1 << 20  # bytes after the end mark that are looked at; tar fills the last 10 KiB with zeros
# Programs that decompress, by the first bytes and by the suffix of a file.
MAGIC = {b"\x1f\x8b": "zcat", b"BZh": "bzcat", b"\xfd7zXZ": "xzcat", b"(\xb5/\xfd": "zstdcat"}
PACKED = {".gz": "zcat", ".tgz": "zcat", ".bz2": "bzcat", ".xz": "xzcat", ".zst": "zstdcat"}
PLAIN, LINKS_AND_SUCH, NAMES, SKIPPED = b"0\x007", b"123456", b"xL", b"gK"
_RECORD = re.compile(rb"(\d{1,9}) ([^=\n]+)=")

ReadAt = Callable[[int, int], bytes]  # size, offset


class Entry(NamedTuple):
    """A member: its name (undecodable bytes escaped), the offset of its bytes (-1: not a plain file), and its size."""

    name: str
    at: int
    size: int


@lru_cache(maxsize=32)
def _opened(file: str) -> BinaryIO:
    return open(file, "rb", buffering=0)


def _read_at(file: str, size: int, at: int) -> bytes:
    opened = _opened(file)  # held here, so that it stays open while other threads open files
    return os.pread(opened.fileno(), size, at)


def read_member(item: Item) -> bytes:
    """Returns the bytes of an image within a tar.

    Raises OSError for a link or a sparse file, and if the tar was truncated or replaced by one of another layout.
    """
    assert isinstance(item, Member)
    if item.at < 0:
        raise OSError(errno.EINVAL, "a link or a sparse file within a tar")
    check_size(item.size)
    data = _read_at(item.file, BLOCK + item.size, item.at - BLOCK)
    if len(data) < BLOCK + item.size:
        raise OSError(errno.EIO, "its tar ends early")
    header, content = data[:BLOCK], data[BLOCK:]
    try:
        _check(header, item.file)
        listed = _number(header[124:136], item.file) == item.size
    except KamimError:
        listed = False
    if not listed:
        raise OSError(errno.EBUSY, f"its tar {CHANGED}")
    return content


class Tar:
    """A tar file. Raises KamimError for a compressed one, in which nothing can be sought.

    continued: whether more than zeros follow the end mark, as if tars were joined by cat; known once its entries are.
    """

    def __init__(self, file: Path):
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            raise KamimError(f"{printable(str(file))}: not a plain file")
        self.file, self.time, self._size = str(file.resolve()), status.st_mtime_ns, status.st_size
        self.name = printable(str(file))
        self.continued = False
        with open(file, "rb") as stream:
            first = stream.read(max(map(len, MAGIC)))
        program = next((MAGIC[magic] for magic in MAGIC if first.startswith(magic)), PACKED.get(file.suffix))
        if program:
            raise KamimError(
                printable(f"{file}: is compressed, so it cannot be sought in; first: {_unpack(program, file)}")
            )

    def entries(self, within: Entry | None = None) -> Iterator[Entry]:
        """Yields the members of the tar, or of a tar within it, in order. Raises KamimError for a damaged one."""
        if within is not None and within.at < 0:
            raise KamimError(f"{self.name}: {printable(within.name)}: a link or a sparse file, not a tar")
        start, stop = (0, self._size) if within is None else (within.at, within.at + within.size)
        end = yield from entries(partial(_read_at, self.file), start, stop, self.name)
        self.continued |= any(_read_at(self.file, min(stop - end, MAX_AFTER), end))

    def member(self, key: str, label: int, entry: Entry) -> Member:
        """Returns the item of a member."""
        return Member(key, label, entry.size, self.time, self.file, entry.at)

    def bytes(self, entry: Entry, limit: int) -> bytes:
        """Returns a small member's content. Raises KamimError if it is larger than `limit`, or not a plain file."""
        if entry.at < 0 or entry.size > limit:
            raise KamimError(f"{self.name}: {printable(entry.name)}: not a plain file of at most {limit} bytes")
        return _read_at(self.file, entry.size, entry.at)


def _unpack(program: str, file: Path) -> str:
    """Returns the shell command that decompresses a file beside it, or in place if its suffix is not one of PACKED."""
    if file.suffix not in PACKED:
        return f"{program} {file} > {file}.new && mv {file}.new {file}"
    return f"{program} {file} > {file.with_suffix('.tar' if file.suffix == '.tgz' else '')}"


def on_continued(tars: Sequence[Tar]) -> str:
    """Returns a remark on tars of which more follows the end mark, or ""."""
    names = [tar.name for tar in tars if tar.continued]
    if not names:
        return ""
    some = f"{len(names):,} of {len(tars):,} tars, such as {names[0]}," if len(names) > 1 else names[0]
    return f"what follows the end mark of {some} is not read; join tars by tar --concatenate, not by cat"


def unpacked(file: Path) -> dict[str, memoryview]:
    """Returns the plain files in a small .tar.gz. Raises KamimError if it is damaged or unpacks to a large one."""
    if not file.is_file():
        raise KamimError(f"{printable(str(file))}: not a plain file")
    try:
        with gzip.open(file) as stream:
            data = stream.read(MAX_UNPACKED + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise KamimError(f"{printable(str(file))}: cannot be unpacked: {error}") from error

    if len(data) > MAX_UNPACKED:
        raise KamimError(f"{printable(str(file))}: unpacks to more than {MAX_UNPACKED} bytes")

    def read(size: int, at: int) -> bytes:
        return data[at : at + size]

    members = entries(read, 0, len(data), printable(str(file)))
    return {entry.name: memoryview(data)[entry.at : entry.at + entry.size] for entry in members if entry.at >= 0}


def entries(read: ReadAt, at: int, stop: int, where: str) -> Generator[Entry, None, int]:
    """Yields the members of a tar that spans the bytes `at` to `stop` of a file; returns where its end mark begins.

    Raises KamimError if it is damaged or truncated: a tar ends with a block of zeros.
    """

    def block(at: int) -> bytes:
        data = read(BLOCK, at) if at + BLOCK <= stop else b""  # the system takes no offset of 2^63 or more
        if len(data) < BLOCK:
            raise KamimError(f"{where}: ends at byte {at} without an end mark, so it is truncated; get it again")
        return data

    names: dict[bytes, bytes] = {}
    while (header := block(at)) != bytes(BLOCK):
        _check(header, f"{where}: damaged at byte {at}")
        kind, size = header[156:157], _number(header[124:136], f"{where}: damaged at byte {at}")
        start = at + BLOCK
        if kind in NAMES:
            if size > MAX_NAMES:
                raise KamimError(f"{where}: a name of {size} bytes at byte {at}")
            data = read(size, start)
            names |= {b"path": data.partition(b"\0")[0]} if kind == b"L" else _attributes(data)
        elif kind not in SKIPPED:
            if kind == b"S":  # GNU sparse: its map may continue in further blocks
                more = header[482]
                while more:
                    more = block(start)[504]
                    start += BLOCK
            if b"size" in names:
                size = _number(names[b"size"].rjust(12), f"{where}: damaged at byte {at}", 10)
            plain = kind in PLAIN and not any(name.startswith(b"GNU.sparse.") for name in names)
            name = names.get(b"path") or _name(header)
            names = {}
            size = 0 if kind in LINKS_AND_SUCH else size
            if start + size > stop:
                raise KamimError(
                    f"{where}: {printable(os.fsdecode(name))} goes past its end, so it is truncated; get it again"
                )
            yield Entry(os.fsdecode(name), start if plain else -1, size)
        at = start + -(-size // BLOCK) * BLOCK
    return at


def _check(header: bytes, where: str) -> None:
    if _number(header[148:156], where) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        raise KamimError(f"{where}: not a tar header")


def _number(field: bytes, where: str, base: int = 8) -> int:
    """Parses a number in octal digits or, as GNU tar writes large ones, in binary after a byte of 0x80."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip()
    try:
        value = int(digits or b"0", base)
    except ValueError:
        value = -1
    if value < 0:
        raise KamimError(f"{where}: {digits!r} is not a number")
    return value


def _name(header: bytes) -> bytes:
    name, prefix = (field.partition(b"\0")[0] for field in (header[:100], header[345:500]))
    return prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name


def _attributes(data: bytes) -> dict[bytes, bytes]:
    """Returns the records "length key=value\\n" of a pax header."""
    attributes = {}
    at = 0
    while record := _RECORD.match(data, at):
        end = at + int(record[1])
        if end <= record.end():
            break
        attributes[record[2]] = data[record.end() : end - 1]
        at = end
    return attributes
