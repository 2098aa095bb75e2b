"""Computes the features of all samples once and stores them in memory-mapped files."""

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kamim.config.pretrain import Compute
from kamim.evaluation.dense import DenseLoader
from kamim.models.readout import Encoder, Readout, blocks, fixed
from kamim.runtime.device import autocast
from kamim.runtime.distributed import World
from kamim.storage.files import write_whole
from kamim.storage.ownership import open_own
from kamim.training.trainer import Progress
from pipelines.batch import normalise
from pipelines.loader import Loader

SAVE_EVERY = 100  # steps between two records of the progress


def extract(
    encoder: Encoder,
    readouts: Sequence[Readout],
    loader: Loader | DenseLoader,
    samples: np.ndarray,
    compute: Compute,
    world: World,
    folder: Path,
    progress: Progress,
) -> dict[Readout, Tensor]:
    """Computes every readout's features, bfloat16 [N, D], of the N samples with the ascending numbers `samples`.

    One epoch of the loader covers the samples, and each rank writes its own rows. The features are memory-mapped from
    `folder`. An interrupted extraction resumes from it, in steps of the same size; a complete one is only mapped.
    """
    encoder = encoder.to(world.device).eval().requires_grad_(False)
    mark = folder / "done.json"
    done = json.loads(mark.read_text())["steps"] if mark.exists() else 0
    world.barrier()  # all ranks have read the mark
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
    world.barrier()
    last = max(readout.block for readout in readouts)
    files: dict[Readout, np.memmap] = {}
    steps = loader.plan.steps_per_epoch
    for batch in loader.micro_batches(done, steps):
        with torch.no_grad(), autocast(compute, world.device):
            features: dict[Readout, Tensor] = {}
            for number, tokens in blocks(encoder, normalise(batch.images), last):
                features |= {r: fixed(encoder, tokens, r) for r in readouts if r.block == number}
        rows = np.searchsorted(samples, batch.indices)
        if not files:
            files = {r: _file(folder, r, len(samples), f.shape[1], world) for r, f in features.items()}
        for readout, values in features.items():
            files[readout][rows] = values.to(torch.bfloat16).view(torch.int16).cpu().numpy()
        progress(batch.step + 1, steps, {})
        if batch.last and ((batch.step + 1) % SAVE_EVERY == 0 or batch.step + 1 == steps):
            _mark(mark, batch.step + 1, files, world)
    return {readout: _map(folder / str(readout), len(samples)) for readout in readouts}


def _file(folder: Path, readout: Readout, rows: int, width: int, world: World) -> np.memmap:
    file = folder / str(readout)
    if world.is_main:
        reserve(file, 2 * rows * width)
    world.barrier()
    return np.memmap(file, np.int16, "r+", shape=(rows, width))


def reserve(file: Path, size: int) -> None:
    """Allocates all `size` bytes of a new or existing file on the disk.

    A write through a memory map on a full disk would kill the process (SIGBUS). Raises OSError if the disk is full.
    """
    existed = file.exists()
    descriptor = open_own(file, os.O_RDWR | os.O_CREAT)
    try:
        _allocate(descriptor, size)
    except OSError as error:
        if not existed:
            file.unlink()
        raise OSError(
            f"{file}: needs {size:,} bytes: {error.strerror}; free some space and rerun the command to resume"
        ) from error
    finally:
        os.close(descriptor)


def _allocate(descriptor: int, size: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, size)
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise
        at = os.lseek(descriptor, 0, os.SEEK_END)  # file systems without preallocation get zeros
        while at < size:
            at += os.write(descriptor, bytes(min(size - at, 1 << 20)))


def _mark(mark: Path, steps: int, files: dict[Readout, np.memmap], world: World) -> None:
    """Records that the rows of the first `steps` steps of all ranks are on disk."""
    for file in files.values():
        file.flush()
    world.barrier()
    if world.is_main:
        write_whole(mark, json.dumps({"steps": steps}).encode())
    world.barrier()


def _map(file: Path, rows: int) -> Tensor:
    mapped = np.memmap(file, np.int16, "c")  # private pages: torch wants writable memory
    return torch.from_numpy(mapped.reshape(rows, -1)).view(torch.bfloat16)
