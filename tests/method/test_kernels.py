"""Cached machine code is never older than its sources, and a missing cache does not stop a command."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import full_disk
from numba.core.errors import NumbaError

from kamim.method import kernels

CALLER = """
from kamim.callee import callee
from kamim.method.kernels import kernel

@kernel
def caller():
    return callee()
"""
CALLEE = """
from kamim.method.kernels import kernel

@kernel
def callee():
    return {}
"""
ASK = "from kamim.caller import caller; print(caller(), sum(caller.stats.cache_hits.values()))"


def test_a_kernel_is_compiled_anew_when_what_it_calls_in_another_file_changes(tmp_path: Path) -> None:
    package = tmp_path / "kamim"
    (package / "method").mkdir(parents=True)
    shutil.copy(kernels.__file__, package / "method")
    for folder in (package, package / "method"):
        (folder / "__init__.py").touch()
    (package / "caller.py").write_text(CALLER)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for answer, cached in ((1, 0), (1, 1), (2, 0)):
        (package / "callee.py").write_text(CALLEE.format(answer))
        run = [sys.executable, "-c", ASK]
        printed = subprocess.run(run, env=environment, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
        assert printed.split() == [str(answer), str(cached)]


def _double(x: int) -> int:
    return 2 * x


def test_where_nothing_can_be_kept_loops_are_compiled_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In another user's read-only checkout, ~/.cache is used; without it, nothing is cached."""
    kernels._warn.cache_clear()
    choose, blocked = kernels._cache_folder.__wrapped__, tmp_path / "file"
    blocked.touch()
    monkeypatch.setattr(kernels.config, "CACHE_DIR", "")
    monkeypatch.setattr(kernels, "__file__", str(blocked / "kernels.py"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert choose() == tmp_path / ".cache/kamim" / f"kernels-{kernels._fingerprint()}"
    monkeypatch.setenv("HOME", str(blocked))
    assert choose() is None
    assert "set NUMBA_CACHE_DIR" in caplog.text
    monkeypatch.setattr(kernels, "_cache_folder", lambda: None)
    assert kernels.kernel(_double)(21) == 42


def _triple(x: int) -> int:
    return 3 * x


def test_where_the_disk_is_full_loops_are_compiled_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernels._warn.cache_clear()
    monkeypatch.setattr(kernels, "_cache_folder", lambda: tmp_path)
    with full_disk(10):
        assert kernels.kernel(_triple)(14) == 42
    assert "compiled loops cannot be kept, so that the next start takes longer: File too large" in caplog.text


def _sum_of_rows(matrix: np.ndarray) -> float:
    total = 0.0
    for y in range(len(matrix)):
        row = matrix[y]
        for x in range(len(row)):
            total += row[x]
    return total


def _first_of_copy(values: np.ndarray) -> float:
    copy = np.empty_like(values)
    copy[0] = values[0]
    return float(copy[0])


def test_a_bare_kernel_takes_views_and_cannot_allocate() -> None:
    matrix = np.arange(12.0).reshape(3, 4)
    assert kernels.bare_kernel(_sum_of_rows)(matrix) == 66
    with pytest.raises(NumbaError, match="No implementation of function"):
        kernels.bare_kernel(_first_of_copy)(matrix[0])
