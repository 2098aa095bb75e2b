"""From stored bytes to batches: against an obvious twin, on any number of threads, with faults."""

import gc
import os
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
import torch
from conftest import make_store
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as F

from kamim import KamimError
from kamim.method import geometry
from kamim.method.keypoints import keypoint_map, map_counts
from kamim.storage.store import Store
from pipelines.counts import CachedCounts, Counter, OnlineCounts
from pipelines.crop import crop_resize
from pipelines.loader import Crop, Loader, SampleError, default_workers
from pipelines.plan import Plan

pytestmark = pytest.mark.usefixtures("decoder")


@pytest.fixture(scope="module")
def store(stores: dict[str, Path]) -> Store:
    return Store(stores["zarr"])


def test_processes_of_a_machine_divide_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = len(os.sched_getaffinity(0))
    assert default_workers() == cores
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert default_workers() == max(cores // 2, 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(cores + 1))
    assert default_workers() == 1


def load(store: Store, *, counter: Counter | None = None, crop: Crop | None = Crop(), **options: int) -> list[dict]:  # noqa: B008
    plan = Plan(len(store), options.get("batch", 6), options.get("micro", 6), seed=options.get("seed", 1))
    loader = Loader(store, plan, 64, crop=crop, counter=counter, workers=options.get("workers", 2))
    steps = loader.micro_batches(options.get("first", 0), options.get("stop", plan.steps_per_epoch))
    return [
        {
            "images": batch.images.numpy().copy(),
            "counts": None if batch.counts is None else batch.counts.numpy().copy(),
            "labels": batch.labels.numpy().copy(),
            "indices": batch.indices.copy(),
            "epoch": batch.epoch,
        }
        for batch in steps
    ]


def twin(store: Store, index: int, epoch: int, seed: int) -> np.ndarray:
    """One sample by torchvision."""
    return cropped(simplejpeg.decode_jpeg(store.images.data(index)), index, epoch, seed)


def cropped(pixels: np.ndarray, index: int, epoch: int, seed: int) -> np.ndarray:
    """Crop, resize without antialias, vertical flip, horizontal flip."""
    box = geometry.crop_box(*pixels.shape[:2], 0.67, 1.0, 3 / 4, 4 / 3, seed, epoch, index)
    crop = F.resized_crop(torch.from_numpy(pixels.copy()).permute(2, 0, 1), *box, [64, 64], antialias=False)
    flip_v, flip_h = geometry.flips(seed, epoch, index)
    crop = F.vertical_flip(crop) if flip_v else crop
    crop = F.horizontal_flip(crop) if flip_h else crop
    return crop.permute(1, 2, 0).numpy()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.booleans(), st.booleans())
def test_crop_resize_is_opencvs_and_torchvisions_within_a_grey_level(seed: int, flip_v: bool, flip_h: bool) -> None:
    random = np.random.default_rng(seed)
    image = random.integers(0, 256, (int(random.integers(1, 90)), int(random.integers(1, 90)), 3), np.uint8)
    h, w = (int(random.integers(1, side + 1)) for side in image.shape[:2])
    top, left = int(random.integers(0, image.shape[0] - h + 1)), int(random.integers(0, image.shape[1] - w + 1))
    out = np.empty((64, 64, 3), np.uint8)
    crop_resize(image, np.array([top, left, h, w, flip_v, flip_h]), out)
    cut = np.ascontiguousarray(image[top : top + h, left : left + w])
    opencv = cv2.resize(cut, (64, 64), interpolation=cv2.INTER_LINEAR)
    vision = F.resize(torch.from_numpy(cut).permute(2, 0, 1), [64, 64], antialias=False).permute(1, 2, 0).numpy()
    unflipped = out[::-1] if flip_v else out
    unflipped = unflipped[:, ::-1] if flip_h else unflipped
    for other in (opencv, vision):
        assert np.abs(unflipped.astype(int) - other.astype(int)).max() <= 1


@pytest.mark.parametrize(
    "box",
    [(-1, 0, 5, 5), (0, -1, 5, 5), (6, 0, 5, 5), (0, 16, 5, 5), (0, 0, 0, 5), (0, 0, 5, -3), (0, 0, 2**62, 2**62)],
)
def test_a_crop_of_what_is_not_there_is_refused(box: tuple[int, ...]) -> None:
    image, out = np.zeros((10, 20, 3), np.uint8), np.empty((64, 64, 3), np.uint8)
    with pytest.raises(ValueError, match="the crop lies outside the image"):
        crop_resize(image, np.array([*box, 0, 0]), out)


def check_pixels(found: np.ndarray, expected: np.ndarray, decoder: str) -> None:
    """Within a grey level, if whole images are decoded to RGB; planes differ in chroma, on these photographs by 1.5."""
    difference = np.abs(found.astype(int) - expected.astype(int))
    assert difference.max() <= 1 if decoder == "pixels" else difference.mean() <= 1.5


def test_a_sample_is_what_torchvision_makes_of_its_box(store: Store, decoder: str) -> None:
    for batch in load(store, stop=4):
        for row, index in enumerate(batch["indices"]):
            check_pixels(batch["images"][row], twin(store, int(index), batch["epoch"], 1), decoder)
            assert batch["labels"][row] == store.images.labels[index]


def test_raw_images_may_be_read_only_and_end_where_their_file_does(class_folder: Path, tmp_path: Path) -> None:
    store = Store(make_store(class_folder, tmp_path / "raw", encoding="raw"))
    assert not store.images.data(0).flags.writeable
    for batch in load(store, stop=4):
        for row, index in enumerate(batch["indices"]):
            pixels = store.images.data(int(index)).reshape(*store.images.sizes[index], 3)
            expected = cropped(pixels, int(index), batch["epoch"], 1)
            assert np.abs(batch["images"][row].astype(int) - expected.astype(int)).max() <= 1


def test_planes_in_the_store_are_what_decoding_a_jpeg_of_best_quality_gives(
    class_folder: Path, tmp_path: Path, decoder: str
) -> None:
    planes, raw = (
        load(Store(make_store(class_folder, tmp_path / encoding, encoding=encoding)), stop=4)
        for encoding in ("yuv420", "raw")
    )
    for ours, exact in zip(planes, raw, strict=True):
        difference = ours["images"].astype(int) - exact["images"]
        assert np.abs(difference).mean() <= 2  # photographs of 60 to 200 px, so that edges are as sharp as they get
        assert np.abs(difference.mean(axis=(0, 1, 2))).max() <= 0.2


def test_without_a_crop_the_whole_image_is_resized(store: Store, decoder: str) -> None:
    (batch,) = load(store, crop=None, stop=1)
    for row, index in enumerate(batch["indices"]):
        pixels = simplejpeg.decode_jpeg(store.images.data(int(index)))
        check_pixels(batch["images"][row], cv2.resize(pixels, (64, 64), interpolation=cv2.INTER_LINEAR), decoder)


def test_batches_do_not_depend_on_threads_micro_batches_or_where_a_run_starts(store: Store) -> None:
    counter = CachedCounts(store.keypoints("fast"), "ring", 8)
    steps = 2 * (len(store) // 6)
    reference = load(store, counter=counter, stop=steps)
    for other in (
        load(store, counter=counter, stop=steps, workers=1),
        load(store, counter=counter, stop=steps, workers=5),
    ):
        for a, b in zip(reference, other, strict=True):
            for key in ("images", "counts", "labels", "indices"):
                np.testing.assert_array_equal(a[key], b[key])
    micro = load(store, counter=counter, stop=steps, micro=2)
    for i, batch in enumerate(reference):
        np.testing.assert_array_equal(batch["images"], np.concatenate([m["images"] for m in micro[3 * i : 3 * i + 3]]))
    for first in range(steps):
        (tail, *_) = load(store, counter=counter, first=first, stop=first + 1)
        np.testing.assert_array_equal(tail["images"], reference[first]["images"])
        np.testing.assert_array_equal(tail["counts"], reference[first]["counts"])


@pytest.mark.parametrize(("flip_v", "flip_h"), [(True, True), (True, False), (False, True), (False, False)])
def test_flips_are_drawn_and_can_be_left_out(flip_v: bool, flip_h: bool, store: Store) -> None:
    plan, sizes = Plan(len(store), 12, 12, seed=1), np.full((40, 2), 64)
    loader = Loader(store, plan, 64, crop=Crop(flip_v=flip_v, flip_h=flip_h))
    drawn = {(int(v and flip_v), int(h and flip_h)) for v in (0, 1) for h in (0, 1)}
    assert set(map(tuple, loader._views(np.arange(40), 0, sizes)[:, 4:].tolist())) == drawn


def test_a_clone_outlives_its_batch(store: Store) -> None:
    plan = Plan(len(store), 3, 3, seed=1)
    counter = CachedCounts(store.keypoints("fast"), footprint="ring", patch_size=8)
    clones, copies = [], []
    for batch in Loader(store, plan, 64, counter=counter, workers=2).micro_batches(0, 12):
        assert batch.counts is not None
        clones.append(batch.clone())
        copies.append((batch.images.tolist(), batch.counts.tolist(), batch.labels.tolist()))
    for clone, copy in zip(clones, copies, strict=True):
        assert clone.counts is not None
        assert (clone.images.tolist(), clone.counts.tolist(), clone.labels.tolist()) == copy


def test_both_backends_give_the_same_batches(stores: dict[str, Path]) -> None:
    batches = [load(Store(path)) for path in stores.values()]
    for other in batches[1:]:
        for a, b in zip(batches[0], other, strict=True):
            np.testing.assert_array_equal(a["images"], b["images"])


def test_online_counts_are_those_of_the_crop_itself(store: Store) -> None:
    for batch in load(store, counter=OnlineCounts("fast", "ring", 8), stop=2):
        for image, counts in zip(batch["images"], batch["counts"], strict=True):
            found = cv2.FastFeatureDetector_create().detect(image)
            ring = cv2.drawKeypoints(np.zeros_like(image), found, None, color=(255, 255, 255))[..., 0] > 0
            np.testing.assert_array_equal(counts, map_counts(ring, 8))


def test_cached_keypoints_stand_for_online_ones(store: Store) -> None:
    """Remapped through crop and flips they must fall where the crop's own are: far above chance."""
    cached = np.concatenate(
        [b["counts"] for b in load(store, counter=CachedCounts(store.keypoints("fast"), "ring", 8))]
    )
    online = np.concatenate([b["counts"] for b in load(store, counter=OnlineCounts("fast", "ring", 8))])
    assert np.corrcoef(cached.ravel(), online.ravel())[0, 1] > 0.75
    mirrored = np.corrcoef(cached[:, :, ::-1].ravel(), online.ravel())[0, 1]
    assert mirrored < 0.6


def test_a_painted_keypoint_lands_in_the_cell_its_weight_says(marked_store: Path) -> None:
    """A bright square in a black image, stored as a keypoint too, is bright where the counts say."""
    store = Store(marked_store)
    seen = 0
    for batch in load(store, counter=CachedCounts(store.keypoints("fast"), "point", 8), batch=4, micro=4, stop=12):
        for image, counts in zip(batch["images"], batch["counts"], strict=True):
            if counts.sum() == 0:
                continue  # cropped away
            seen += 1
            brightness = image.astype(int).sum(axis=2)
            y, x = np.unravel_index(brightness.argmax(), brightness.shape)
            cells = np.argwhere(counts > 0)
            assert np.abs(cells * 8 + 3.5 - (y, x)).max(axis=1).min() <= 8
    assert seen > 20


def test_leaving_early_stops_every_thread(store: Store) -> None:
    plan = Plan(len(store), 6, 6, seed=0)
    steps = Loader(store, plan, 64, crop=Crop(), workers=3).micro_batches(0, 1000)
    next(steps)
    steps.close()
    gc.collect()
    assert not [t for t in threading.enumerate() if t.name.startswith("kamim-loader")]


def test_a_bad_sample_is_named_and_nothing_hangs(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = store.images.lengths.copy()
    lengths[3] -= 200
    monkeypatch.setattr(store.images, "lengths", lengths)
    with pytest.raises(SampleError, match="sample 3: "):
        load(store)
    assert not [t for t in threading.enumerate() if t.name.startswith("kamim-loader")]


def test_nothing_draws_from_a_global_generator(store: Store) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    load(store, counter=CachedCounts(store.keypoints("fast"), "ring", 8), stop=2)
    assert torch.equal(before[0], torch.get_rng_state())
    np.testing.assert_array_equal(before[1], np.random.get_state()[1])


def test_keypoint_map_of_an_uncropped_view_is_the_stored_one(store: Store) -> None:
    """Whole image, no flip: remapping only scales."""
    keypoints = store.keypoints("sift")
    (batch,) = load(store, crop=None, counter=CachedCounts(keypoints, "point", 1), stop=1)
    for row, index in enumerate(batch["indices"]):
        size = store.images.sizes[index : index + 1]
        (nearest,) = geometry.nearest_frames(keypoints.frame[index][None], size, geometry.whole_views(size), 64)
        positions, _ = keypoints.image(int(index), nearest)
        scale = 64 / keypoints.frame[index, nearest][::-1]
        centres = (positions / 16 + 0.5) * scale - 0.5
        inside = ((centres > 12) & (centres < 51)).all(axis=1)  # within every blind border but the largest octaves'
        expected = keypoint_map(centres[inside].astype(np.float32), 64, 64, "point")[13:50, 13:50]
        assert (expected & ~(batch["counts"][row][13:50, 13:50] > 0)).mean() < 0.02


@pytest.mark.parametrize(
    ("resolution", "crop", "said"),
    [
        (
            128,
            Crop(),
            r"zarr: its keypoints are for resolution 64 and crop scale \[0.67, 1.0\], not 128 and \[0.67, 1.0\]",
        ),
        (128, None, "zarr: its keypoints are for resolution 64, not 128"),
        (64, Crop((0.2, 1.0)), r"crop scale \[0.67, 1.0\], not 64 and \[0.2, 1.0\]"),
        (68, Crop(), "patch_size = 8: must divide resolution = 68"),
    ],
)
def test_keypoints_for_other_crops_are_refused(store: Store, resolution: int, crop: Crop | None, said: str) -> None:
    """Their W would be wrong: they are remapped from frames of another scale."""
    plan, counter = Plan(len(store), 6, 6, seed=0), CachedCounts(store.keypoints("fast"), "ring", 8)
    with pytest.raises(KamimError, match=said):
        Loader(store, plan, resolution, crop=crop, counter=counter)


def test_keypoints_of_another_store_are_refused(store: Store, marked_store: Path) -> None:
    counter = CachedCounts(Store(marked_store).keypoints("fast"), "ring", 8)
    with pytest.raises(KamimError, match="marked: has keypoints of 12 images, the loader's store 24"):
        Loader(store, Plan(len(store), 6, 6, seed=0), 64, crop=Crop(), counter=counter)


def test_detection_on_the_crop_takes_any_crop_that_cells_divide(store: Store) -> None:
    plan, counter = Plan(len(store), 6, 6, seed=0), OnlineCounts("fast", "ring", 8)
    Loader(store, plan, 128, crop=Crop((0.2, 1.0)), counter=counter)
    with pytest.raises(KamimError, match="must divide resolution = 100"):
        Loader(store, plan, 100, crop=Crop(), counter=counter)
