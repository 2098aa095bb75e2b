"""The preprocessing job: a listed source -> a published store.

The source is cut into shards. Each shard is one idempotent task that reads its images, resizes and encodes
them, finds keypoints, and leaves one file named by its own checksum in OUT.partial/shards. When all are
there they are joined, in order, into OUT.partial/store, which is renamed to OUT. So the bytes do not depend
on the number of workers or restarts, and OUT exists only when it is whole.
"""

import csv
import ctypes
import importlib.util
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
import zarr
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import kamim
from kamim import beton, geometry, paged, store
from kamim.detectors import detector
from kamim.store import Job
from preprocess.decode import Undecodable, decode
from preprocess.record import Record, record
from preprocess.sources import Item, Read, Source, printable

SHARD_SIZE = 128
Progress = Callable[[int, int], None]  # images done, images in all


def make_job(
    dataset: str, split: str, source: Source, *, detectors: Sequence[str], images: str, encoding: store.Encoding,
    quality: int, resolution: int, crop_scale: tuple[float, float], out: Path | None = None,
) -> Job:  # fmt: skip
    """Checks the parameters and resolves `images`: ffcv, zarr, or auto.

    auto is what `out`, begun or finished, holds already, else ffcv where it imports.

    Raises ValueError naming the parameter, its value and what is allowed.
    """
    for name in detectors:
        detector(name)
    if len(set(detectors)) != len(detectors):
        raise ValueError(f"--detectors {','.join(detectors)}: names one twice")
    if images not in ("auto", "ffcv", "zarr"):
        raise ValueError(f"--images {images}: must be one of auto, ffcv, zarr")
    has_ffcv = importlib.util.find_spec("ffcv") is not None
    if images == "ffcv" and not has_ffcv:
        raise ValueError(
            "--images ffcv: the ffcv package is not installed; pip install 'kamim[ffcv]', or --images zarr"
        )
    if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
        raise ValueError(f"--crop-scale {crop_scale[0]},{crop_scale[1]}: needs 0 < smallest <= largest <= 1")
    if not 16 <= resolution <= 1024:
        raise ValueError(f"--resolution {resolution}: must be 16 to 1024")
    if not 1 <= quality <= 100:
        raise ValueError(f"--quality {quality}: must be 1 to 100")
    if encoding == "raw" and 3.1 * geometry.stored_area(resolution, crop_scale) > beton.PAGE_SIZE:
        raise ValueError(
            f"--raw: images for --resolution {resolution} and --crop-scale {crop_scale[0]},{crop_scale[1]} "
            f"are larger than a page of the store, {beton.PAGE_SIZE} bytes; store JPEGs, or smaller images"
        )
    return Job(
        dataset=dataset, split=split, source=source.location, fingerprint=source.fingerprint(), items=len(source.items),
        detectors=tuple(detectors), images=_backend(images, has_ffcv, out),
        encoding=encoding, quality=quality, resolution=resolution, crop_scale=crop_scale, shard_size=SHARD_SIZE,
    )  # fmt: skip


def _backend(images: str, has_ffcv: bool, out: Path | None) -> store.Backend:
    begun = None if out is None else _job_at(out) or _job_at(_partial(out))
    if images == "auto" and begun is not None:
        return begun.images
    return "ffcv" if images == "ffcv" or (images == "auto" and has_ffcv) else "zarr"


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _job_at(path: Path) -> Job | None:
    """The job of a store, or of a partial one, at `path`."""
    if (path / "manifest.json").exists():
        return store.read_manifest(path).job
    file = path / "job.json"
    return Job.model_validate_json(file.read_text()) if file.exists() else None


def build(job: Job, source: Source, out: Path, *, workers: int, strict: bool, progress: Progress) -> bool:
    """Runs the job, or what is left of it. Returns False where `out` is this job's store already.

    Raises ValueError where `out` or its partial state belongs to something else, where no image is readable,
    and, with strict, at the first unreadable image; RuntimeError where a worker process dies.
    """
    partial = _partial(out)
    if out.exists():
        if not (out / "manifest.json").exists():
            raise ValueError(f"--out {out}: is there already and is not a kamim store; choose another --out")
        _refuse_other_job(store.read_manifest(out).job, job, out)
        shutil.rmtree(partial, ignore_errors=True)
        return False
    _claim(partial, job)
    shards = _run_shards(job, source, partial / "shards", workers, strict, progress)
    _assemble(job, source, shards, partial / "store")
    store.publish(partial / "store", out)
    shutil.rmtree(partial)
    return True


def _claim(partial: Path, job: Job) -> None:
    file = partial / "job.json"
    if file.exists():
        _refuse_other_job(Job.model_validate_json(file.read_text()), job, partial)
        return
    if partial.exists() and not {entry.name for entry in partial.iterdir()} <= {"shards", "job.json.tmp"}:
        raise ValueError(f"{partial}: is not this job's; remove it or choose another --out")
    shutil.rmtree(partial / "shards", ignore_errors=True)  # without job.json nobody knows whose they were
    (partial / "shards").mkdir(parents=True)
    staged = partial / "job.json.tmp"
    staged.write_text(job.model_dump_json(indent=2))
    store.fsync(staged)
    staged.rename(file)


def _refuse_other_job(there: Job, asked: Job, where: Path) -> None:
    old, new = there.model_dump(), asked.model_dump()
    differences = [f"{name} {old[name]!r}, asked for {new[name]!r}" for name in old if old[name] != new[name]]
    if differences:
        raise ValueError(
            f"--out {where}: is there already, of another job ({'; '.join(differences)}); "
            "remove it or choose another --out"
        )


def _run_shards(job: Job, source: Source, folder: Path, workers: int, strict: bool, progress: Progress) -> list[Path]:
    """Every shard's file, in order; runs those that are missing or damaged."""
    parts = [source.items[at : at + job.shard_size] for at in range(0, len(source.items), job.shard_size)]
    files: dict[int, Path] = {}
    for number in range(len(parts)):
        found = _finished_shard(folder, number)
        if found is not None:
            files[number] = found
    done = sum(len(parts[number]) for number in files)
    progress(done, len(source.items))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start_worker) as executor:
        tasks: dict[Future[Path], int] = {
            executor.submit(run_shard, job, source.read, part, number, folder, strict): number
            for number, part in enumerate(parts)
            if number not in files
        }
        try:
            for task in as_completed(tasks):
                files[tasks[task]] = task.result()
                done += len(parts[tasks[task]])
                progress(done, len(source.items))
        except BrokenProcessPool as error:
            raise RuntimeError("a worker process died (out of memory?); the same command again continues") from error
        finally:
            executor.shutdown(wait=True, cancel_futures=True)
    return [files[number] for number in range(len(parts))]


def _start_worker() -> None:
    """A worker leaves SIGINT to its parent, and dies with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _finished_shard(folder: Path, number: int) -> Path | None:
    for file in folder.glob(f"{number:06d}-*.safetensors"):
        if store.checksum(file) == file.stem.partition("-")[2]:
            return file
        file.unlink()
    return None


def run_shard(job: Job, read: Read, items: Sequence[Item], number: int, folder: Path, strict: bool) -> Path:
    """Processes the shard's items and leaves folder/<number>-<sha256>.safetensors."""
    cv2.setNumThreads(1)
    records: list[Record] = []
    labels: list[int] = []
    rejects: list[tuple[str, str]] = []
    for item in items:
        try:
            records.append(record(job, decode(read(item))))
            labels.append(item.label)
        except (Undecodable, OSError) as error:
            reason = str(error) if isinstance(error, Undecodable) else f"cannot be read: {error.strerror}"
            if strict:
                raise ValueError(f"{printable(item.key)}: {reason} (--strict)") from error
            rejects.append((printable(item.key), reason))
    tensors = {
        "data": np.concatenate([np.empty(0, np.uint8), *(r.data for r in records)]),
        "length": np.array([len(r.data) for r in records], np.int64),
        "size": np.array([r.size for r in records], np.int64).reshape(-1, 2),
        "frame": np.array([r.frame for r in records], np.uint16).reshape(-1, 2),
        "label": np.array(labels, np.int64),
    }
    for d, name in enumerate(job.detectors):
        groups = len(detector(name).rules.groups)
        tensors[f"{name}.positions"] = np.concatenate(
            [np.empty((0, 2), np.uint16), *(r.keypoints[d][0] for r in records)]
        )
        tensors[f"{name}.counts"] = np.array([r.keypoints[d][1] for r in records], np.int64).reshape(-1, groups)
    staged = folder / f"{number:06d}.{os.getpid()}.tmp"
    save_file(tensors, staged, metadata={"rejects": json.dumps(rejects)})
    store.fsync(staged)
    final = folder / f"{number:06d}-{store.checksum(staged)}.safetensors"
    staged.rename(final)
    store.fsync(folder)
    return final


def _column(shards: Sequence[Path], name: str) -> np.ndarray:
    """One small tensor of every shard, joined."""
    parts = []
    for shard in shards:
        with safe_open(shard, framework="numpy") as tensors:
            parts.append(tensors.get_tensor(name))
    return np.concatenate(parts)


def _images(shards: Sequence[Path], raw: bool) -> Iterator[tuple[np.ndarray, int, int, int, bool]]:
    for shard in shards:
        tensors = load_file(shard)
        end = np.cumsum(tensors["length"])
        for i, (height, width) in enumerate(tensors["size"]):
            data = tensors["data"][end[i] - tensors["length"][i] : end[i]]
            yield data, int(height), int(width), int(tensors["label"][i]), raw


def _keypoints(shards: Sequence[Path], name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for shard in shards:
        tensors = load_file(shard)
        counts = tensors[f"{name}.counts"]
        end = np.cumsum(counts.sum(axis=1))
        for i in range(len(counts)):
            yield tensors[f"{name}.positions"][end[i] - counts[i].sum() : end[i]], counts[i]


def _assemble(job: Job, source: Source, shards: Sequence[Path], folder: Path) -> None:
    """Joins the shards into a store at `folder`, the manifest last."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    frame = _column(shards, "frame")
    if len(frame) == 0:
        raise ValueError(f"--source {source.location}: none of its {len(source.items)} files is a readable image")
    if job.images == "ffcv":
        beton.write(folder / "images.beton", len(frame), _images(shards, job.encoding == "raw"))
    else:
        total = int(_column(shards, "length").sum())
        store.write_zarr_images(folder / "images.zarr", _images(shards, job.encoding == "raw"), total, job.encoding)
    paged.create(zarr.create_group(folder / "keypoints.zarr"), "frame", frame)
    for name in job.detectors:
        total = int(_column(shards, f"{name}.counts").sum())
        store.write_keypoints(folder / "keypoints.zarr", name, _keypoints(shards, name), total)
    rejects = _write_rejects(folder / "rejects.csv", shards)
    manifest = store.Manifest(
        schema_version=store.SCHEMA_VERSION, kamim_version=kamim.__version__, job=job, count=len(frame),
        classes=source.classes, rejects=rejects,
        stored_area=geometry.stored_area(job.resolution, job.crop_scale),
        canonical_area=geometry.canonical_area(job.resolution, job.crop_scale),
        rules={name: detector(name).rules for name in job.detectors},
        opencv_version=cv2.__version__, checksums=store.checksums(folder),
    )  # fmt: skip
    (folder / "manifest.json").write_text(manifest.model_dump_json(indent=2))


def _write_rejects(file: Path, shards: Sequence[Path]) -> int:
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(("file", "reason"))
        count = 0
        for shard in shards:
            with safe_open(shard, framework="numpy") as tensors:
                rows = json.loads(tensors.metadata()["rejects"])
            writer.writerows(rows)
            count += len(rows)
    return count
