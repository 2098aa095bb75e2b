"""How the project's loops are compiled, and where the machine code is kept.

numba compiles a function anew when its own file changes, but not when what it calls from other files does (a documented
limit of its cache). So the compiled code is kept in a folder named after all files with kernels: a newer version of
any of them never runs an older one.
"""

import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import config, njit

ROOT = Path(__file__).parents[1]


def kernel(function: Callable[..., Any]) -> Any:
    """A function that numba compiles for the types it is called with, once per machine; it runs without the GIL."""
    given = config.CACHE_DIR
    config.CACHE_DIR = str(_folder())
    try:
        return njit(cache=True, nogil=True)(function)
    finally:
        config.CACHE_DIR = given


@functools.cache
def _folder() -> Path:
    """Within NUMBA_CACHE_DIR where that is set, else beside this file, else, where that is read-only, in ~/.cache."""
    beside = Path(__file__).parent
    chosen = beside / "__pycache__" if os.access(beside, os.W_OK) else Path.home() / ".cache" / "kamim"
    return Path(config.CACHE_DIR or chosen, f"kernels-{_fingerprint()}")


def _fingerprint() -> str:
    """Of the content of all files with kernels: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for file in sorted(
        file for package in ("kamim", "pipelines", "preprocess") for file in (ROOT / package).rglob("*.py")
    ):
        if b"\n@kernel" in (source := file.read_bytes()) or b"\n@intrinsic" in source:
            digest.update(source)
    return digest.hexdigest()[:16]
