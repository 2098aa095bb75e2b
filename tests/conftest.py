"""Small stores, made once a session from photographs that scikit-image ships, and a full disk."""

import importlib.util
import os
import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from kamim.storage.manifest import Encoding, Job
from pipelines import turbojpeg
from preprocess.build import build
from preprocess.plan import make_job
from preprocess.sources import Source, list_source

HAS_FFCV = importlib.util.find_spec("ffcv") is not None
BACKENDS = ("zarr", "ffcv")  # neither needs the ffcv package

# Several workers share two cores; spinning threads of each would fight. compute.threads defaults to the variable.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Files end after `room` bytes, as on a disk with no more; for safetensors, too, which does not ask Python."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def build_store(source: Path, out: Path, backend: str = "zarr", detectors: tuple[str, ...] = ("fast", "sift")) -> Path:
    """A store of 64 px crops of an image folder, in one worker process."""
    listed = list_source("imagefolder", source, "train")
    job = make_job(
        "imagefolder",
        "train",
        listed,
        detectors=detectors,
        container=backend,
        pixels="jpeg",
        quality=90,
        resolution=64,
        crop_scale=(0.67, 1.0),
    )
    build(job, listed, out, workers=1, strict=True, progress=lambda done, total: None)
    return out


@pytest.fixture(scope="session")
def class_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 JPEGs of various shapes in three class folders."""
    root = tmp_path_factory.mktemp("folder")
    random = np.random.default_rng(0)
    for name, photo in {"astronaut": data.astronaut(), "chelsea": data.chelsea(), "coffee": data.coffee()}.items():
        (root / name).mkdir()
        for i in range(8):
            h, w = (int(random.integers(60, 200)) for _ in range(2))
            top, left = int(random.integers(photo.shape[0] - h)), int(random.integers(photo.shape[1] - w))
            Image.fromarray(photo[top : top + h, left : left + w]).save(root / name / f"{i}.jpg", quality=92)
    return root


@pytest.fixture(scope="session")
def stores(class_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The class folder as a store, by image backend."""
    out = tmp_path_factory.mktemp("stores")
    return {backend: build_store(class_folder, out / backend, backend) for backend in BACKENDS}


@pytest.fixture(scope="session")
def marked_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Black images with one bright square each, whose corners FAST finds."""
    root = tmp_path_factory.mktemp("marked")
    random = np.random.default_rng(1)
    (root / "marked").mkdir()
    for i in range(12):
        image = np.zeros((int(random.integers(90, 140)), int(random.integers(90, 140)), 3), np.uint8)
        y, x = (int(random.integers(10, side - 20)) for side in image.shape[:2])
        image[y : y + 10, x : x + 10] = 255
        Image.fromarray(image).save(root / "marked" / f"{i}.png")
    return build_store(root, tmp_path_factory.mktemp("store") / "marked", detectors=("fast",))


@pytest.fixture(scope="module", params=["planes", "pixels"])
def decoder(request: pytest.FixtureRequest) -> Iterator[str]:
    """How the loader decodes JPEGs: with TurboJPEG to planes, or as without that library, with simplejpeg to RGB."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "pixels":
            patch.setattr(turbojpeg, "library", lambda: None)
        elif turbojpeg.library() is None:
            pytest.skip("libturbojpeg is not installed")
        yield request.param


# Below: for the tests of preprocessing and of the store.

has_ffcv = pytest.mark.skipif(not HAS_FFCV, reason="the ffcv package is not installed")


class Inline(ThreadPoolExecutor):
    """Stands in for the process pool of preprocess.executors: shards run one by one in this process."""

    def __init__(self, workers: int, mp_context: object, initializer: object):
        super().__init__(1)


def plan_job(
    source: Path,
    backend: str | None = "zarr",
    *,
    shard_size: int = 5,
    detectors: tuple[str, ...] = ("fast",),
    encoding: Encoding | None = "jpeg",
    quality: int = 90,
    resolution: int = 64,
) -> tuple[Job, Source]:
    """The job that makes a small store of an image folder, and its listed source."""
    listed = list_source("imagefolder", source, "train")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("preprocess.plan.SHARD_SIZE", shard_size)
        job = make_job(
            "imagefolder",
            "train",
            listed,
            detectors=detectors,
            container=backend,
            pixels=encoding,
            quality=quality,
            resolution=resolution,
            crop_scale=(0.67, 1.0),
        )
    return job, listed


def make_store(source: Path, out: Path, backend: str | None = "zarr", **options: Any) -> Path:
    """Builds the store of plan_job in this process, on small pages."""
    job, listed = plan_job(source, backend, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("preprocess.executors.ProcessPoolExecutor", Inline)
        small_pages(patch)
        build(job, listed, out, workers=1, strict=False, progress=lambda done, total: None)
    return out


def small_pages(patch: pytest.MonkeyPatch) -> None:
    """Pages of zarr arrays that small stores fill more than one of."""
    patch.setattr("kamim.storage.images.PAGE_BYTES", 1 << 15)
    patch.setattr("kamim.storage.keypoints.PAGE_ROWS", 1 << 11)


@pytest.fixture(scope="session")
def photos() -> list[np.ndarray]:
    """RGB photographs that scikit-image ships: uint8 [H, W, 3]."""
    return [data.astronaut(), data.coffee(), data.chelsea()]


@pytest.fixture(scope="session")
def folder(photos: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders a, b, c of 4 images each, JPEG and PNG, of 30 to 180 px a side."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(2)
    for name, photo in zip("abc", photos, strict=True):
        (root / name).mkdir()
        for i, suffix in enumerate((".jpg", ".png", ".JPEG", ".jpg")):
            h, w = (int(side) for side in random.integers(*((30, 70) if i == 0 else (90, 180)), 2))
            top, left = int(random.integers(photo.shape[0] - h)), int(random.integers(photo.shape[1] - w))
            Image.fromarray(photo[top : top + h, left : left + w]).save(root / name / f"{i}{suffix}")
    return root


def listing(source: Source) -> tuple[tuple[str, int, int], ...]:
    """What tells two listed sources apart: key, label and size of every item."""
    return tuple((item.key, item.label, item.size) for item in source.items)
