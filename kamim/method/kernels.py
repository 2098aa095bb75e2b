"""The `kernel` decorator: compiles loops with numba and caches the machine code.

numba recompiles a function when its own file changes, but not when a function it calls from another file changes (a
documented limit of its cache). The cache folder is therefore named after the content of all files with kernels, so a
change to any of them never runs stale code.
"""

import functools
import hashlib
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from numba import config, njit

ROOT = Path(__file__).parents[2]
_MARKS = (b"\n@kernel", b"\n@bare_kernel", b"\n@intrinsic")  # of files with kernels
_LOG = logging.getLogger(__name__)


def kernel(function: Callable[..., Any]) -> Any:
    """Compiles a function with numba for the types it is called with, once per machine. It runs without the GIL."""
    return _compiled(function, counts_references=True)


def bare_kernel(function: Callable[..., Any]) -> Any:
    """Compiles a kernel that counts no references to arrays, and can therefore neither allocate nor return any.

    Otherwise numba counts, by atomic operations, the references to every view of an array, such as a row in a loop.
    That takes as long as a short loop over the row.
    """
    return _compiled(function, counts_references=False)


def _compiled(function: Callable[..., Any], counts_references: bool) -> Any:
    configured, folder = config.CACHE_DIR, _cache_folder()
    config.CACHE_DIR = str(folder or "")
    try:
        compiled = njit(cache=folder is not None, nogil=True, _nrt=counts_references)(function)
    finally:
        config.CACHE_DIR = configured
    if folder is not None:
        compiled._cache.save_overload = functools.partial(_save_or_warn, compiled._cache.save_overload)
    return compiled


def _save_or_warn(save: Callable[..., None], *overload: Any) -> None:
    """Saves machine code to the cache. A full disk only logs a warning, so the caller's work continues."""
    try:
        save(*overload)
    except OSError as error:
        _warn(f"compiled loops cannot be kept, so that the next start takes longer: {error.strerror}")


@functools.cache
def _warn(line: str) -> None:
    """Logs a warning, once per process."""
    _LOG.warning(line)


@functools.cache
def _cache_folder() -> Path | None:
    """Returns the first writable cache folder: in NUMBA_CACHE_DIR if set, in this package, in ~/.cache/kamim.

    Logs a warning and returns None if none is writable: every process then compiles for itself.
    """
    package, name = Path(__file__).parent / "__pycache__", f"kernels-{_fingerprint()}"
    for parent in filter(None, (config.CACHE_DIR, package, "~/.cache/kamim")):
        with suppress(OSError, RuntimeError):  # RuntimeError: a user without a home
            folder = Path(parent, name).expanduser()
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    _warn("compiled loops cannot be kept, so that every start takes longer; set NUMBA_CACHE_DIR to your folder")
    return None


def _fingerprint() -> str:
    """Returns a hash of the content of all files with kernels: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for file in sorted(
        file for package in ("kamim", "pipelines", "preprocess") for file in (ROOT / package).rglob("*.py")
    ):
        if any(mark in (source := file.read_bytes()) for mark in _MARKS):
            digest.update(source)
    return digest.hexdigest()[:16]
