"""What is announced to the kernel: all pages that are needed, hardly others, in pieces that it reads as a whole."""

import ctypes
import mmap
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kamim.storage import read_ahead
from kamim.storage.read_ahead import GAP, PIECE, madvise, will_need

PAGE = mmap.PAGESIZE
MADVISE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_int)
Calls = list[tuple[int, int, int]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """The arguments of each call of a stand-in for the C function madvise."""
    recorded: Calls = []

    def record(*arguments: int) -> int:
        recorded.append(arguments)
        return -1  # errors are ignored

    function = MADVISE(record)
    monkeypatch.setattr(read_ahead, "madvise", lambda: ctypes.cast(function, ctypes.c_void_p).value)
    yield recorded


RANGES = st.lists(st.tuples(st.integers(1, 1 << 22), st.integers(1, 3 * PIECE)), max_size=40)


@settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(RANGES)
def test_needed_pages_are_announced_once_in_pieces(calls: Calls, ranges: list[tuple[int, int]]) -> None:
    calls.clear()
    will_need(*np.array(ranges, np.int64).reshape(-1, 2).T.astype(np.uint64))
    needed = {page for start, length in ranges for page in range(start // PAGE, (start + length - 1) // PAGE + 1)}
    announced = [page for start, length, _ in calls for page in range(start // PAGE, -(-(start + length) // PAGE))]
    assert all(start % PAGE == 0 and 0 < length <= PIECE and advice == 3 for start, length, advice in calls)
    assert len(announced) == len(set(announced))
    assert needed <= set(announced)
    room = GAP // PAGE + 1
    for page in set(announced) - needed:  # between two ranges that are close together
        assert needed & set(range(page - room, page)) and needed & set(range(page + 1, page + room + 1))


def test_neighbours_make_one_request_and_what_has_no_address_none(calls: Calls) -> None:
    calls.clear()
    will_need(np.array([9 * PAGE, 0, 8 * PAGE + 5, 7 * PAGE], np.uint64), np.array([100, 10**12, PAGE - 5, PAGE]))
    assert calls == [(7 * PAGE, 2 * PAGE + 100, 3)]
    calls.clear()
    will_need(np.zeros(3, np.uint64), np.ones(3, np.int64))
    will_need(np.empty(0, np.uint64), np.empty(0, np.int64))
    assert calls == []


def test_other_systems_announce_nothing(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    calls.clear()
    monkeypatch.setattr("sys.platform", "darwin")
    assert madvise.__wrapped__() == 0
    monkeypatch.setattr(read_ahead, "madvise", lambda: 0)
    will_need(np.array([PAGE], np.uint64), np.array([10]))
    assert calls == []


def in_memory(mapped: np.ndarray) -> np.ndarray:
    """Which pages of a mapped file are in memory: bool [pages]."""
    pages = np.zeros(-(-mapped.nbytes // PAGE), np.uint8)
    pointers = (ctypes.c_void_p(mapped.ctypes.data), ctypes.c_size_t(mapped.nbytes), ctypes.c_void_p(pages.ctypes.data))
    assert ctypes.CDLL(None).mincore(*pointers) == 0
    return (pages & 1).astype(bool)


@pytest.mark.skipif(not madvise(), reason="this system has no MADV_WILLNEED")
def test_the_kernel_reads_what_is_announced(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(256 * PAGE))
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        mapped = np.asarray(np.memmap(opened, np.uint8, "r"))
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if in_memory(mapped).any():
        pytest.skip("this file system keeps files in memory")
    will_need(np.array([mapped.ctypes.data + 100 * PAGE + 7], np.uint64), np.array([3 * PAGE]))
    deadline = time.monotonic() + 30
    while in_memory(mapped).sum() < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(range(100, 104)) <= set(np.flatnonzero(in_memory(mapped)).tolist())
