"""Stores of earlier schema versions are read, extended and repaired as they are."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import Inline, make_store, plan_job, small_pages

from kamim.storage.keypoints import GAPS, POSITIONS
from kamim.storage.manifest import MANIFEST, SCHEMA_VERSION, seal
from kamim.storage.store import Store
from pipelines.counts import CachedCounts
from pipelines.loader import Crop, Loader
from pipelines.plan import Plan
from preprocess import executors, plan
from preprocess.build import build
from preprocess.plan import make_job
from preprocess.repair import repair
from preprocess.sources import list_source
from preprocess.verify import problems

# What each version does not record, and the one value that its stores have.
UNRECORDED = {3: {"resize": "bilinear", "whole_pixels": "positions"}, 4: {"whole_pixels": "positions"}}


@pytest.fixture(autouse=True)
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards run in this process, on small pages."""
    monkeypatch.setattr(executors, "ProcessPoolExecutor", Inline)
    small_pages(monkeypatch)


def with_manifest(path: Path, version: int, without: tuple[str, ...] = ()) -> Path:
    fields = json.loads((path / MANIFEST).read_bytes()) | {"schema_version": version}
    for name in without:
        del fields["job"][name]
    seal(path, json.dumps(fields).encode())
    return path


def old_store(folder: Path, out: Path, version: int) -> Path:
    """The store as that version's kamim writes it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in UNRECORDED[version].items():
            patch.setitem(plan.DEFAULTS, name, value)
        return with_manifest(make_store(folder, out), version, tuple(UNRECORDED[version]))


def counts(path: Path) -> list[np.ndarray]:
    """The counts of two epochs of random crops."""
    opened = Store(path)
    counter = CachedCounts(opened.keypoints("fast"), "ring", 8)
    loader = Loader(opened, Plan(len(opened), 4, 4, seed=0), 64, crop=Crop(), counter=counter)
    return [batch.counts.numpy().copy() for batch in loader.micro_batches(0, 6) if batch.counts is not None]


@pytest.mark.parametrize("version", UNRECORDED)
def test_a_store_of_an_earlier_schema_is_read_and_extended_as_it_is(folder: Path, tmp_path: Path, version: int) -> None:
    path = old_store(folder, tmp_path / "out", version)
    opened = Store(path)
    assert opened.manifest.job.model_dump(include=set(UNRECORDED[version])) == UNRECORDED[version]
    assert opened.keypoints("fast").array == POSITIONS
    images, of_old = [opened.images.data(i).tobytes() for i in range(len(opened))], counts(path)
    assert problems(path, deep=True) == []
    listed = list_source("imagefolder", folder, "train")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("preprocess.plan.SHARD_SIZE", 5)
        job = make_job("imagefolder", "train", listed, detectors=("sift",), out=path)
    build(job, listed, path, workers=1, strict=True, progress=lambda done, total: None)
    extended = Store(path)
    assert extended.manifest.schema_version == SCHEMA_VERSION
    assert extended.manifest.job.model_dump(include=set(UNRECORDED[version])) == UNRECORDED[version]
    assert extended.detectors == ("fast", "sift")
    assert extended.keypoints("fast").array == POSITIONS
    assert [extended.images.data(i).tobytes() for i in range(len(extended))] == images
    assert problems(path, deep=True) == []
    np.testing.assert_array_equal(counts(path), of_old)


def test_gaps_hold_the_keypoints_and_give_the_counts_of_positions(folder: Path, tmp_path: Path) -> None:
    old, new = old_store(folder, tmp_path / "old", 4), make_store(folder, tmp_path / "new")
    of_old, of_new = (Store(path).keypoints("fast") for path in (old, new))
    assert (of_old.array, of_new.array) == (POSITIONS, GAPS)
    for index in range(len(Store(new))):
        for frame in range(2):
            for one, other in zip(of_old.image(index, frame), of_new.image(index, frame), strict=True):
                np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(counts(old), counts(new))


def test_a_store_of_an_earlier_schema_is_repaired_as_it_was(folder: Path, tmp_path: Path) -> None:
    path = old_store(folder, tmp_path / "out", 4)
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    page = path / "keypoints.zarr/fast/positions/c/0/0"
    page.write_bytes(before[page][::-1])
    listed = plan_job(folder)[1]
    repair(path, lambda job: listed, workers=1, progress=lambda done, total: None, say=lambda line: None)
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


def test_another_schema_is_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    path = with_manifest(make_store(folder, tmp_path / "out"), 2)
    with pytest.raises(ValueError, match="schema version 2, this kamim reads 3 to 5"):
        Store(path)
