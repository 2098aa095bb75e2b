"""The machine that a result was computed on, and process-wide settings of memory and threads."""

import ctypes
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import kamim
from kamim.storage.escape import printable
from pipelines import turbojpeg

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from glibc's malloc.h
LIBRARIES = ("torch", "timm", "numpy", "numba", "opencv-python", "simplejpeg")


def describe(libraries: Sequence[str] = LIBRARIES) -> dict[str, Any]:
    """Returns names and versions of hardware and libraries, for JSON. gpus: torch's names. libturbojpeg: its file."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "python": platform.python_version(),
        "kamim": kamim.__version__,
        **{name: _version(name) for name in libraries},
        "libturbojpeg": None if (library := turbojpeg.library()) is None else library._name,
    }


def command_line() -> str | None:
    """Returns the command of this process as a shell reads it, such as "kamim eval -c cifar10"; None if kamim is used
    as a library by another program.
    """
    program = Path(sys.argv[0])
    if program.stem != "kamim" and program.parts[-2:] != ("kamim", "__main__.py"):
        return None
    return printable(shlex.join(["kamim", *sys.argv[1:]]))


def keep_memory() -> None:
    """Keeps freed memory in this process. By default glibc returns large tensors to the system after every use, and the
    system clears every page before it hands it out again. Without glibc, or on another system, it does nothing.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def use_threads(threads: int | None) -> None:
    """Sets the number of threads of torch's operations on a CPU; None: see kamim.config.pretrain.Compute."""
    openmp = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # a list by nesting level; torch has one level
    default = int(openmp) if openmp.isdecimal() else len(os.sched_getaffinity(0))
    torch.set_num_threads(threads or max(default, 1))


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
