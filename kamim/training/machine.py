"""What a result was made on: processor, GPUs, versions."""

import ctypes
import json
import os
import platform
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import kamim
from kamim.training.distributed import World

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
LIBRARIES = ("torch", "timm", "numpy", "numba", "opencv-python", "simplejpeg")


def describe(libraries: Sequence[str] = LIBRARIES) -> dict[str, Any]:
    """Names and versions, for JSON. gpus: as torch names them."""
    return {
        "processor": _processor(), "cores": len(os.sched_getaffinity(0)),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "python": platform.python_version(), "kamim": kamim.__version__, **{name: _version(name) for name in libraries},
    }  # fmt: skip


def keep_memory() -> None:
    """Of this process, for itself: glibc hands large tensors back to the system after every use, and the system clears
    every page that it gives anew. Nothing happens without glibc, or on another system.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def use_threads(threads: int | None) -> None:
    """Sets the number of threads of torch's operations on a CPU; None: see kamim.training.config.Compute."""
    openmp = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # by level of nesting, of which torch has one
    default = int(openmp) if openmp.isdecimal() else len(os.sched_getaffinity(0))
    torch.set_num_threads(threads or max(default, 1))


def log_start(run: Path, step: int, steps: int, world: World) -> None:
    """Adds a line to RUN/starts.jsonl: when, from which step of how many, and on what the run goes on."""
    run.mkdir(parents=True, exist_ok=True)
    start = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"), "step": step, "steps": steps,
        "device": world.device.type, "processes": world.size, **describe(),
    }  # fmt: skip
    file = run / "starts.jsonl"
    cut_off = file.exists() and file.read_bytes()[-1:] not in (b"", b"\n")
    with file.open("a") as stream:
        stream.write(("\n" if cut_off else "") + json.dumps(start) + "\n")


def starts(run: Path) -> list[dict[str, Any]]:
    """All of them, oldest first, except lines that are not whole; none where there is no file."""
    file, found = run / "starts.jsonl", []
    for line in file.read_bytes().splitlines() if file.is_file() else ():
        with suppress(ValueError, RecursionError):  # a machine that went down, a full disk, somebody else's file
            start = json.loads(line)
            if isinstance(start, dict) and all(type(start.get(key)) is int for key in ("step", "steps", "processes")):
                found.append(start)
    return found


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
