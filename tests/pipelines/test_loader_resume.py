"""Where a loader goes on: after any step, on other numbers of threads and ranks, after errors and early ends."""

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kamim.method.masking import block_masks
from kamim.storage.store import Store
from pipelines import turbojpeg
from pipelines.batch import Batch
from pipelines.chunk import Crops, Scratch
from pipelines.counts import CachedCounts, Counter
from pipelines.loader import Crop, Loader, SampleError, _groups
from pipelines.plan import ORDERS, Order, Plan

SIDE, BATCH, SEED = 64, 9, 3  # of 24 samples: two batches of 9 and one of 6, which is short of 8 ranks
Seen = list[tuple[int, int, bytes]]  # (sample, epoch, what was made of it), in global order


pytestmark = pytest.mark.usefixtures("decoder")


@pytest.fixture(scope="module")
def store(stores: dict[str, Path]) -> Store:
    return Store(stores["zarr"])


def loader(store: Store, *, rank: int = 0, world: int = 1, workers: int = 2, drop_last: bool = False) -> Loader:
    plan = Plan(len(store), BATCH, 3, SEED, rank=rank, world=world, drop_last=drop_last)
    counter = CachedCounts(store.keypoints("fast"), "ring", 8)
    return Loader(store, plan, SIDE, crop=Crop(), counter=counter, workers=workers)


def samples(batch: Batch) -> Seen:
    assert batch.counts is not None
    masks = block_masks(SEED, batch.epoch, batch.indices, SIDE // 32, 0.6)
    rows = zip(
        batch.indices.tolist(), batch.images.numpy(), batch.counts.numpy(), batch.labels.numpy(), masks, strict=True
    )
    return [(i, batch.epoch, b"".join(made.tobytes() for made in rest)) for i, *rest in rows]


def over(batches: Iterator[Batch]) -> dict[int, Seen]:
    """By step."""
    steps: dict[int, Seen] = {}
    for batch in batches:
        steps.setdefault(batch.step, []).extend(samples(batch))
    return steps


@pytest.fixture(scope="module", params=[False, True], ids=["short_last", "drop_last"])
def undisturbed(request: pytest.FixtureRequest, store: Store, decoder: str) -> tuple[bool, dict[int, Seen]]:
    """Nine steps."""
    return request.param, over(loader(store, drop_last=request.param).micro_batches(0, 9))


def test_any_step_can_be_the_first_on_any_number_of_threads(
    store: Store, undisturbed: tuple[bool, dict[int, Seen]]
) -> None:
    drop_last, expected = undisturbed
    for first in range(9):
        assert over(loader(store, workers=1 + first % 4, drop_last=drop_last).micro_batches(first, 9)) == {
            step: expected[step] for step in range(first, 9)
        }


def test_other_numbers_of_ranks_go_on_with_the_same_samples_in_the_same_order(
    store: Store, undisturbed: tuple[bool, dict[int, Seen]]
) -> None:
    """8 ranks to step 2, 2 ranks across the end of an epoch to step 5, 4 ranks to the end."""
    drop_last, expected = undisturbed
    seen: dict[int, Seen] = {}
    for first, stop, world in ((0, 2, 8), (2, 5, 2), (5, 9, 4)):
        for rank in range(world):
            part = over(
                loader(store, rank=rank, world=world, workers=1, drop_last=drop_last).micro_batches(first, stop)
            )
            for step, made in part.items():
                seen.setdefault(step, []).extend(made)
    assert seen == expected


def test_iterating_follows_epochs_and_a_saved_step_restores_it(store: Store) -> None:
    expected = over(loader(store).micro_batches(0, 6))
    for stop in range(6):
        first = loader(store)
        seen: dict[int, Seen] = {}
        while first.step < stop:  # as a loop of one's own would run, and save first.step after an update
            for batch in first:
                seen.setdefault(batch.step, []).extend(samples(batch))
                if batch.last and first.step == stop:
                    break
        second = loader(store, workers=1)
        second.step = first.step
        for _ in range(2):  # restored twice
            third = loader(store, workers=3)
            third.step = second.step
            second = third
        while second.step < 6:
            for batch in second:
                seen.setdefault(batch.step, []).extend(samples(batch))
        assert seen == expected


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_leaving_early_leaves_nothing_behind(store: Store) -> None:
    made = loader(store, workers=3)
    before = open_files(), threading.active_count()
    for _ in range(3):
        for number, _batch in enumerate(made.micro_batches(0, 100)):
            if number == 2:
                break
    assert (open_files(), threading.active_count()) == before


class Watched:
    """Counts nothing, and records when which samples are announced and counted."""

    patch_size = 8

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []

    def check_crops(self, images: int, resolution: int, crop_scale: tuple[float, float] | None) -> None:
        """Counts on any crop."""

    def count(self, crops: Crops, scratch: Scratch, out: np.ndarray) -> None:
        self.events += [("counted", index) for index in crops.indices.tolist()]
        out[:] = 0

    def will_need(self, indices: np.ndarray) -> None:
        self.events += [("announced", index) for index in indices.tolist()]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("read_ahead", [1, 5, 1000])
def test_every_sample_is_announced_once_before_it_is_read(
    store: Store, monkeypatch: pytest.MonkeyPatch, order: Order, read_ahead: int
) -> None:
    monkeypatch.setattr("pipelines.loader.READ_AHEAD", read_ahead)
    requested: list[int] = []
    monkeypatch.setattr("kamim.storage.read_ahead.will_need", lambda at, lengths: requested.extend(at.tolist()))
    watched = Watched()
    plan = Plan(len(store), BATCH, 4, SEED, order, drop_last=False, rank=1, world=2)
    loaded = [
        i for batch in Loader(store, plan, SIDE, counter=watched).micro_batches(1, 8) for i in batch.indices.tolist()
    ]
    for kind in ("announced", "counted"):
        assert sorted(i for what, i in watched.events if what == kind) == sorted(loaded)
    pending: list[int] = []
    for what, index in watched.events:
        if what == "announced":
            pending.append(index)
        else:
            pending.remove(index)
    assert sorted(requested) == sorted(store.images.addresses(np.array(loaded)).tolist())


def test_groups_of_samples_to_read_together_end_with_their_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.loader.READ_AHEAD", 100)
    sizes = {
        order: [sum(len(part.indices) for part in group) for group in _groups(plan.micro_batches(1, 11))]
        for order, plan in ((order, Plan(40_000, 4000, 40, SEED, order)) for order in ORDERS)
    }
    assert sizes["shuffled"] == sizes["stored"] == [120] * (40_000 // 120) + [40_000 % 120]
    assert sizes["chunked"] == [16_000, 20_000, 4000]  # the rest of the first window, the second, and of epoch 1


class Failing:
    """Counts, but not of some samples."""

    patch_size = 8

    def __init__(self, bad: set[int]):
        self.bad = bad

    def check_crops(self, images: int, resolution: int, crop_scale: tuple[float, float] | None) -> None:
        """Counts on any crop."""

    def count(self, crops: Crops, scratch: Scratch, out: np.ndarray) -> None:
        if self.bad & set(crops.indices.tolist()):
            raise LookupError("no keypoints")
        out[:] = crops.indices[:, None, None]

    def will_need(self, indices: np.ndarray) -> None:
        pass


def damaged(store: Store, monkeypatch: pytest.MonkeyPatch, cut: dict[int, int]) -> None:
    """Cuts images to some of their bytes, or takes some off."""
    lengths = store.images.lengths.copy()
    for index, length in cut.items():
        lengths[index] = length if length >= 0 else lengths[index] + length
    monkeypatch.setattr(store.images, "lengths", lengths)


def skipping(store: Store, counter: Counter | None = None) -> Loader:
    plan = Plan(len(store), BATCH, BATCH, SEED, drop_last=False)
    return Loader(store, plan, SIDE, crop=Crop(), counter=counter, workers=2, on_error="skip")


def test_what_cannot_be_loaded_is_left_out_counted_and_logged(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = {i: made for step in over(loader(store).micro_batches(0, 3)).values() for i, _, made in step}
    damaged(store, monkeypatch, {3: -300, 11: 0, 12: 40})
    counter = CachedCounts(store.keypoints("fast"), "ring", 8)
    made = skipping(store, counter)
    seen = {i: rest for step in over(made.micro_batches(0, 3)).values() for i, _, rest in step}
    assert seen == {i: rest for i, rest in whole.items() if i not in (3, 11, 12)}
    assert made.skipped == 3
    assert sorted(record.getMessage().split(": ")[1] for record in caplog.records) == [
        "sample 11",
        "sample 12",
        "sample 3",
    ]
    assert len(list(made.micro_batches(3, 6))) == 3  # buffers are sound afterwards
    assert made.skipped == 6


def test_a_sample_that_cannot_be_counted_is_found_among_its_chunk(store: Store) -> None:
    made = skipping(store, Failing({5, 20}))
    for batch in made.micro_batches(0, 3):
        assert batch.counts is not None
        assert not {5, 20} & set(batch.indices.tolist())
        np.testing.assert_array_equal(batch.counts[:, 0, 0], batch.indices)
    assert made.skipped == 2
    plan = Plan(len(store), BATCH, BATCH, SEED)
    with pytest.raises(SampleError, match=r"sample 5: no keypoints"):
        list(Loader(store, plan, SIDE, counter=Failing({5})).micro_batches(0, 3))


def test_keypoints_outside_their_files_are_left_out(store: Store) -> None:
    keypoints = store.keypoints("fast")
    keypoints._start[5] = 1 << 40
    made = skipping(store, CachedCounts(keypoints, "ring", 8))
    assert all(5 not in batch.indices for batch in made.micro_batches(0, 3))
    assert made.skipped == 1


@pytest.mark.parametrize("crop", [Crop(), None])
def test_an_image_of_no_pixels_is_left_out(store: Store, crop: Crop | None) -> None:
    sizes = store.images.sizes
    before, sizes[5] = sizes[5].copy(), 0
    try:
        plan = Plan(len(store), BATCH, BATCH, SEED, drop_last=False)
        counter = CachedCounts(store.keypoints("fast"), "ring", 8)
        made = Loader(store, plan, SIDE, crop=crop, counter=counter, workers=2, on_error="skip")
        assert sorted(i for batch in made.micro_batches(0, plan.steps_per_epoch) for i in batch.indices) == [
            i for i in range(len(store)) if i != 5
        ]
        assert made.skipped == 1
    finally:
        sizes[5] = before


def test_a_batch_of_nothing_but_damage_stops_even_so(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged(store, monkeypatch, dict.fromkeys(range(len(store)), 30))
    with pytest.raises(SampleError, match="sample"):
        list(skipping(store).micro_batches(0, 1))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kamim-loader")]


def test_a_worker_that_runs_out_of_memory_is_reported(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(index: int) -> np.ndarray:
        raise MemoryError("no room")

    monkeypatch.setattr(turbojpeg, "library", lambda: None)
    monkeypatch.setattr(store.images, "data", fails)
    with pytest.raises(MemoryError, match="no room"):  # the machine's fault, not the sample's
        list(Loader(store, Plan(len(store), 8, 8, 0), SIDE, crop=Crop()).micro_batches(0, 1))


@pytest.mark.parametrize("backend", ["zarr", "ffcv"])
def test_a_file_that_was_cut_or_is_gone_is_said_when_the_store_is_opened(
    stores: dict[str, Path], backend: str, tmp_path: Path
) -> None:
    if backend not in stores:
        pytest.skip("the ffcv package is not installed")
    for number, harm in enumerate((lambda file: file.unlink(), lambda file: os.truncate(file, 5000))):
        copy = shutil.copytree(stores[backend], tmp_path / f"{backend}{number}")
        harm(next(file for file in (copy / "images.beton", copy / "images.zarr/data/c/0") if file.exists()))
        with pytest.raises((ValueError, OSError)):
            Loader(Store(copy), Plan(24, 8, 8, 0), SIDE)
