"""Tars are walked as Python's tarfile walks them; damaged and hostile ones are refused in a line, never followed."""

import gzip
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kamim import KamimError
from preprocess.sources import Member, tars
from preprocess.sources.tars import Entry, Tar, entries, read_member

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def member(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, "elsewhere" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
    return info


def packed(files: dict[str, bytes], kind: str = "gnu") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=FORMATS[kind]) as tar:
        for name, data in files.items():
            tar.addfile(member(name, size=len(data)), io.BytesIO(data))
    return stream.getvalue()


def walked(data: bytes) -> list[Entry]:
    return list(entries(lambda size, at: data[at : at + size], 0, len(data), "x.tar"))


def refusal(data: bytes) -> str:
    with pytest.raises(ValueError, match=r"x\.tar") as raised:
        walked(data)
    assert "\n" not in str(raised.value)
    return str(raised.value)


names = st.one_of(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=12),
    st.text("ab/", min_size=90, max_size=160),
    st.binary(min_size=1, max_size=12).filter(lambda name: 0 not in name).map(os.fsdecode),
    st.sampled_from(["../../etc/passwd", "/etc/passwd", "a b/c.jpg", "x" * 300]),
)
kinds = st.sampled_from([tarfile.REGTYPE] * 4 + [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.tuples(names, kinds, st.integers(0, 1100)), max_size=5), st.sampled_from(["gnu", "pax"]))
def test_members_are_where_tarfile_finds_them(files: list[tuple[str, bytes, int]], kind: str) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=FORMATS[kind]) as tar:
        for name, type_, size in files:
            size = size if type_ == tarfile.REGTYPE else 0
            tar.addfile(member(name, type_, size), io.BytesIO(bytes(size)))
    stream.seek(0)
    with tarfile.open(fileobj=stream) as tar:
        expected = [(i.name, i.offset_data if i.isreg() else -1, i.size) for i in tar]
    found = [(e.name.rstrip("/") if e.at < 0 else e.name, e.at, e.size) for e in walked(stream.getvalue())]
    assert [(name.rstrip("/"), at, size) for name, at, size in found] == [
        (name.rstrip("/"), at, size) for name, at, size in expected
    ]


def test_long_names_of_posix_tars() -> None:
    name = "a" * 90 + "/" + "b" * 90 + ".jpg"
    assert [entry.name for entry in walked(packed({name: b"x"}, "ustar"))] == [name]


def test_large_sizes_are_octal_binary_or_attributes() -> None:
    data = bytearray(packed({"a.jpg": b"12345"}))
    data[124:136] = b"\x80" + bytes(10) + b"\x05"
    assert walked(checked(data))[0].size == 5
    attributes = b"10 size=5\n"
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, len(attributes)
    data = bytearray(packed({"a.jpg": b"12345"}))
    data[124:136] = b"00000000000\0"  # as a file of more than 8 GiB has it
    assert walked(header.tobuf() + attributes.ljust(512, b"\0") + checked(data))[0] == Entry("a.jpg", 1536, 5)


def checked(data: bytearray, at: int = 0) -> bytes:
    """With the checksum of the header at a byte put right."""
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    return bytes(data)


def test_every_truncation_is_noticed() -> None:
    data = packed({"a.jpg": b"a" * 700, "b" * 120 + ".jpg": b"b" * 3})
    end = data.rindex(b"bbb") // 512 * 512 + 512
    for cut in (*range(0, end + 512, 64), end + 511):
        assert "truncated" in refusal(data[:cut]), cut
    assert len(walked(data[: end + 512])) == 2  # one block of zeros is end enough


@pytest.mark.parametrize("size", [b"77777777777\0", b"\x80" + b"\xff" * 11, b"-0000000001\0", b"\xff" * 12, b"wrong"])
def test_a_declared_size_leads_nowhere(size: bytes) -> None:
    data = bytearray(packed({"a.jpg": b"12345"}))
    data[124:136] = size.ljust(12, b"\0")
    assert "truncated" in (reason := refusal(checked(data))) or "not a number" in reason


@pytest.mark.parametrize("kind", [b"g", b"K"])
def test_a_skipped_header_leads_nowhere(kind: bytes, tmp_path: Path) -> None:
    """A size of 2^80 leads to an offset that the system does not take."""
    data = bytearray(packed({"a.jpg": b"12345"}))
    data[156:157], data[124:136] = kind, b"\x80" + (1 << 80).to_bytes(11, "big")
    (tmp_path / "x.tar").write_bytes(checked(data))
    with pytest.raises(KamimError, match="truncated"):
        list(Tar(tmp_path / "x.tar").entries())


def test_a_link_is_no_tar_within_a_tar(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(packed({"a.jpg": b"12345"}))
    with pytest.raises(KamimError, match=r"n01440764.tar: a link or a sparse file, not a tar"):
        list(Tar(tmp_path / "x.tar").entries(Entry("n01440764.tar", -1, 0)))


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_a_name_of_gigabytes_is_not_read(kind: bytes) -> None:
    data = bytearray(packed({"a.jpg": b"12345"}))
    data[156:157], data[124:136] = kind, b"77777777777\0"

    def read(size: int, at: int) -> bytes:
        assert size <= tars.MAX_NAMES
        return checked(data)[at : at + size]

    with pytest.raises(ValueError, match="a name of 8589934591 bytes"):
        list(entries(read, 0, 1 << 40, "x.tar"))


def test_sparse_files_are_listed_and_not_read(tmp_path: Path) -> None:
    old = bytearray(packed({"old.jpg": b"x" * 100, "after.jpg": b"y"}))
    old[156:157], old[482] = b"S", 1
    extension = bytes(504) + b"\1" + bytes(7) + bytes(512)  # two more blocks of the map
    data = checked(old)[:512] + extension + checked(old)[512:]
    assert [(e.name, e.at < 0) for e in walked(data)] == [("old.jpg", True), ("after.jpg", False)]
    header = tarfile.TarInfo("x")
    attributes = b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n"
    header.type, header.size = tarfile.XHDTYPE, len(attributes)
    data = header.tobuf() + attributes.ljust(512, b"\0") + packed({"new.jpg": b"x", "after.jpg": b"y"})
    assert [(e.name, e.at < 0) for e in walked(data)] == [("new.jpg", True), ("after.jpg", False)]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["gnu", "pax"]))
def test_damage_ends_in_a_list_or_a_refusal(seed: int, kind: str) -> None:
    random = np.random.default_rng(seed)
    data = bytearray(packed({"é" * 80: b"x" * 600, "b.jpg": b"y"}, kind))
    for at in random.integers(0, len(data) // 2, random.integers(1, 20)):
        data[at] = random.choice([0, 48, 55, 128, 255, random.integers(256)])
    for at in range(0, len(data) - 512, 512):
        if random.integers(2):
            data = bytearray(checked(data, at))  # damage that the checksum does not show
    try:
        found = walked(bytes(data))
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert all(entry.at >= -1 and entry.at + entry.size <= len(data) for entry in found)


def test_members_are_read_by_offset_within_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.tar"
    file.write_bytes(packed({"a.jpg": b"first", "b.jpg": b"second"}))
    tar = Tar(file)
    items = [tar.member(entry.name, 0, entry) for entry in tar.entries()]
    assert [read_member(item) for item in items] == [b"first", b"second"]
    assert items[0].time == file.stat().st_mtime_ns
    with pytest.raises(OSError, match="link"):
        read_member(tar.member("c.jpg", 0, Entry("c.jpg", -1, 5)))
    with pytest.raises(OSError, match="ends early"):
        read_member(tar.member("c.jpg", 0, Entry("c.jpg", file.stat().st_size - 2, 5)))
    with pytest.raises(OSError, match="more than the limit"):
        read_member(tar.member("c.jpg", 0, Entry("c.jpg", 0, 1 << 40)))
    gone = Member("d.jpg", 0, 5, 0, str(tmp_path / "gone.tar"), 0)
    with pytest.raises(FileNotFoundError):
        read_member(gone)


def test_a_tar_replaced_by_one_of_another_layout_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "x.tar"
    file.write_bytes(packed({"a.jpg": b"first", "b.jpg": b"second"}))
    tar = Tar(file)
    items = [tar.member(entry.name, 0, entry) for entry in tar.entries()]
    file.write_bytes(packed({"a longer one.jpg": bytes(2000), "b.jpg": b"second"}))
    tars._opened.cache_clear()  # as in a worker process
    for item in items:
        with pytest.raises(OSError, match="changed since it was listed"):
            read_member(item)


def test_any_number_of_long_names_may_follow_each_other() -> None:
    name = member("x", tarfile.GNUTYPE_LONGNAME, 2).tobuf(tarfile.GNU_FORMAT) + b"a".ljust(512, b"\0")
    assert [entry.name for entry in walked(5000 * name + packed({"b.jpg": b"x"}))] == ["a"]


def test_a_small_archive_that_unpacks_to_a_large_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "x.tar.gz"
    content = packed({"a.txt": bytes(4 << 20)})
    file.write_bytes(gzip.compress(content))
    monkeypatch.setattr(tars, "MAX_UNPACKED", len(content))
    assert len(tars.unpacked(file)["a.txt"]) == 4 << 20
    monkeypatch.setattr(tars, "MAX_UNPACKED", len(content) - 1)
    with pytest.raises(ValueError, match="unpacks to more than"):
        tars.unpacked(file)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ValueError, match="not a plain file"):
        tars.unpacked(file)


def test_few_tars_are_open_at_once(tmp_path: Path) -> None:
    for n in range(100):
        (tmp_path / f"{n}.tar").write_bytes(packed({"a.jpg": str(n).encode()}))
    before = len(list(Path("/proc/self/fd").iterdir()))
    for n in range(100):
        tar = Tar(tmp_path / f"{n}.tar")
        assert read_member(tar.member("a.jpg", 0, next(tar.entries()))) == str(n).encode()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 32


def test_a_pipe_is_no_tar(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.tar")
    with pytest.raises(ValueError, match="not a plain file"):
        Tar(tmp_path / "x.tar")
