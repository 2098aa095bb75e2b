"""How the project's loops are compiled, and where the machine code is kept.

numba compiles a function anew when its own file changes, but not when what it calls from other files does (a documented
limit of its cache). So the compiled code is kept in a folder named after all files with kernels: a newer version of
any of them never runs an older one.
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
log = logging.getLogger(__name__)


def kernel(function: Callable[..., Any]) -> Any:
    """A function that numba compiles for the types it is called with, once per machine; it runs without the GIL."""
    given, folder = config.CACHE_DIR, _folder()
    config.CACHE_DIR = str(folder or "")
    try:
        compiled = njit(cache=folder is not None, nogil=True)(function)
    finally:
        config.CACHE_DIR = given
    if folder is not None:
        compiled._cache.save_overload = functools.partial(_keep, compiled._cache.save_overload)
    return compiled


def _keep(save: Callable[..., None], *overload: Any) -> None:
    """Keeps machine code where there is room for it: a full disk must not end the work that the loop is for."""
    try:
        save(*overload)
    except OSError as error:
        _warn(f"compiled loops cannot be kept, so that the next start takes longer: {error.strerror}")


@functools.cache
def _warn(line: str) -> None:
    """Logs a line, once per process."""
    log.warning(line)


@functools.cache
def _folder() -> Path | None:
    """Within NUMBA_CACHE_DIR where that is set, else beside this file, else, where that is read-only, in ~/.cache.

    None, and a warning, where none of them can be written to: every process then compiles for itself.
    """
    beside, name = Path(__file__).parent / "__pycache__", f"kernels-{_fingerprint()}"
    for chosen in filter(None, (config.CACHE_DIR, beside, "~/.cache/kamim")):
        with suppress(OSError, RuntimeError):  # RuntimeError: a user without a home
            folder = Path(chosen, name).expanduser()
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    _warn("compiled loops cannot be kept, so that every start takes longer; set NUMBA_CACHE_DIR to your folder")
    return None


def _fingerprint() -> str:
    """Of the content of all files with kernels: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for file in sorted(
        file for package in ("kamim", "pipelines", "preprocess") for file in (ROOT / package).rglob("*.py")
    ):
        if b"\n@kernel" in (source := file.read_bytes()) or b"\n@intrinsic" in source:
            digest.update(source)
    return digest.hexdigest()[:16]
