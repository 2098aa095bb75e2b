"""pipelines.operations and pipelines.augment against torchvision, and their draws against the definitions."""

import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import skimage.data
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from kamim.method import rng
from kamim.storage.store import Store
from pipelines import augment
from pipelines.batch import IMAGENET_MEAN, IMAGENET_STD, Batch
from pipelines.loader import Crop, Loader, OnError
from pipelines.operations import OPS, apply_operation, tables
from pipelines.plan import ORDERS, Order, Plan

SEED, EPOCH = 11, 3


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The tensors are small: on busy cores torch's threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def photographs(height: int, width: int) -> Tensor:
    """uint8 [3, 3, H, W]: three photographs, cut to a square and resized."""
    pictures = [skimage.data.astronaut(), skimage.data.coffee()[:, 100:500], skimage.data.chelsea()[:, 75:375]]
    tensors = [torch.from_numpy(np.ascontiguousarray(p)).permute(2, 0, 1) for p in pictures]
    return torch.stack([F.resize(t, [height, width], antialias=True) for t in tensors])


def hard_cases(size: int) -> Tensor:
    """uint8 [3, 3, S, S]: one value a channel; two values a channel, one of them rare; noise of full range."""
    flat = torch.tensor([0, 7, 255], dtype=torch.uint8).view(3, 1, 1).expand(3, size, size)
    two = flat.clone()
    two[:, 0, :3] = 100
    noise = torch.randint(0, 256, (3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return torch.stack([flat, two, noise])


def all_pairs() -> Tensor:
    """uint8 [1, 3, 256, 256]: every value beside every other in the channels of a pixel."""
    y, x = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    return torch.stack([y, x, y * 7 + x * 3 & 255])[None].to(torch.uint8)


def batch_of(count: int, size: int) -> Tensor:
    """uint8 [count, 3, S, S]: `count` different windows of the photographs."""
    large = photographs(size + 20, size + 20)
    offsets = [(k // 3 % 20, k // 7 % 20) for k in range(count)]
    return torch.stack([large[k % 3, :, y : y + size, x : x + size] for k, (y, x) in enumerate(offsets)])


def rows(images: Tensor) -> np.ndarray:
    """[n, 3, H, W] -> a new [n, H, W, 3], as the loader makes it."""
    return images.permute(0, 2, 3, 1).contiguous().numpy().copy()


def planes(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)


def chi_square(counts: np.ndarray) -> float:
    expected = counts.sum() / counts.size
    return float(((counts - expected) ** 2 / expected).sum())


# ---- TrivialAugmentWide


def torchvision_operation(image: Tensor, op: str, setting: int) -> Tensor:
    """The operation at its bin `setting` % 31, negated from 31 on where it has a sign."""
    library = v2.TrivialAugmentWide()
    bins_of, signed = library._AUGMENTATION_SPACE[op]
    bins = bins_of(31, *image.shape[-2:])
    magnitude = 0.0 if bins is None else float(bins[setting % 31])
    if signed and setting >= 31:
        magnitude *= -1
    return library._apply_image_or_video_transform(
        image, op, magnitude, interpolation=v2.InterpolationMode.NEAREST, fill=library._fill
    )


def test_the_operations_are_torchvisions() -> None:
    assert tuple(v2.TrivialAugmentWide._AUGMENTATION_SPACE) == OPS


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", ["photographs", "large", "odd", "hard", "thin"])
def test_every_operation_bin_and_sign_equals_torchvision(op: str, case: str) -> None:
    images = {
        "photographs": lambda: photographs(96, 96),
        "large": lambda: photographs(192, 192)[:1],
        "odd": lambda: photographs(37, 53)[1:2],
        "hard": lambda: hard_cases(24),
        "thin": lambda: photographs(5, 2)[:1],
    }[case]()
    changed = set()
    for image, row in zip(images, rows(images), strict=True):
        for setting in range(62):
            ours = row.copy()
            apply_operation(ours, OPS.index(op), setting, tables(*row.shape[:2]))
            assert torch.equal(planes(ours), torchvision_operation(image, op, setting)), setting
            if (ours != row).any():
                changed.add(setting)
    if case in ("photographs", "large"):  # the smallest magnitudes, and some more of these, change nothing
        assert len(changed) >= {"Identity": 0, "Posterize": 50, "AutoContrast": 0}.get(op, 56)


@pytest.mark.parametrize("op", OPS[6:])
def test_every_pair_of_values_equals_torchvision(op: str) -> None:
    (image,), (row,) = all_pairs(), rows(all_pairs())
    for setting in range(62):
        ours = row.copy()
        apply_operation(ours, OPS.index(op), setting, tables(8, 8))  # these operations ask for no sources
        assert torch.equal(planes(ours), torchvision_operation(image, op, setting)), setting


def test_images_equal_torchvisions_given_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole, through the library's own forward: operation, bin, sign; then whether to erase, and where."""
    count, size = 160, 64
    images, indices = batch_of(count, size), np.arange(1000, 1000 + count)
    draws, erasing = rng.units(SEED, EPOCH, indices, rng.AUGMENT, 3), rng.units(SEED, EPOCH, indices, rng.ERASE, 41)
    trivial, erase, ours = v2.TrivialAugmentWide(), v2.RandomErasing(scale=(0.02, 0.33), ratio=(0.3, 3.3)), rows(images)
    transform, boxes = augment.Augment(size), 0
    for image, row, index, (op, magnitude, sign), u in zip(images, ours, indices, draws, erasing, strict=True):
        transform(row[None], SEED, EPOCH, np.array([index]))
        numbers = iter([op, magnitude])
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randint", lambda n, size, numbers=numbers: torch.tensor(int(next(numbers) * n)))
            patch.setattr(torch, "rand", lambda size, sign=sign: torch.tensor(sign, dtype=torch.float64))
            theirs = trivial(image)
        with monkeypatch.context() as patch:
            erasing_draws(patch, u[1:].reshape(10, 4))
            patch.setattr(torch, "rand", lambda size, p=u[0]: torch.tensor([p], dtype=torch.float64))
            erased = erase(theirs)
        assert torch.equal(planes(row), erased)
        boxes += not torch.equal(erased, theirs)
    assert 60 < boxes < 100
    assert {augment.draw_operation(SEED, EPOCH, index)[0] for index in indices} == set(range(14))


def test_operations_bins_and_signs_are_drawn_evenly() -> None:
    drawn = np.array([augment.draw_operation(SEED, EPOCH, index) for index in range(56_000)])
    ops, settings = drawn.T
    bins, negative = settings % 31, settings // 31
    # 99.9 % points of chi-square with 13, 30, 1 and 867 degrees of freedom.
    assert chi_square(np.bincount(ops, minlength=14)) < 34.5
    assert chi_square(np.bincount(bins, minlength=31)) < 59.7
    assert chi_square(np.bincount(negative, minlength=2)) < 10.8
    assert chi_square(np.bincount(ops * 62 + settings, minlength=14 * 62)) < 1000


def test_draws_are_pinned() -> None:
    pinned = [(7, 56), (11, 44), (1, 54), (5, 53), (2, 6), (5, 18), (10, 29), (9, 6)]
    assert [augment.draw_operation(SEED, EPOCH, index) for index in range(8)] == pinned
    boxes = [(80, 2, 87, 83), (42, 14, 116, 82), (78, 73, 42, 22), (29, 78, 115, 89)]
    given = (192, 192, augment.ERASE_SCALE, augment.ERASE_RATIO, SEED, EPOCH)
    assert [augment.erasing_box(*given, index) for index in range(4)] == boxes


# ---- random erasing


def erasing_draws(patch: pytest.MonkeyPatch, u: np.ndarray) -> Iterator[np.ndarray]:
    """Lets torchvision's RandomErasing draw u, float64 [10, 4], row by row; returns what is left."""
    drawn = iter(u)
    row: list[float] = []

    class Empty:
        def uniform_(self, low: float, high: float) -> Tensor:
            if len(row) in (0, 2, 4):  # the first number of a new attempt
                row[:] = [float(v) for v in next(drawn)]
            return torch.tensor(float(low) + float(high - low) * row.pop(0), dtype=torch.float64)

    patch.setattr(torch, "empty", lambda size: Empty())
    patch.setattr(torch, "randint", lambda low, high, size: torch.tensor(low + int(row.pop(0) * (high - low))))
    return drawn


@pytest.mark.parametrize(
    ("scale", "ratio"), [((0.02, 0.33), (0.3, 3.3)), ((0.3, 1.0), (0.05, 20.0)), ((0.9, 1.0), (0.3, 0.5))]
)
def test_boxes_equal_torchvision_given_the_same_draws(
    monkeypatch: pytest.MonkeyPatch, scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    height, width = 48, 64
    library, image = v2.RandomErasing(scale=scale, ratio=ratio), torch.zeros(3, height, width)
    later = none = 0
    for index in range(400):
        ours = augment.erasing_box(height, width, scale, ratio, SEED, EPOCH, index)
        u = rng.units(SEED, EPOCH, np.array([index]), rng.ERASE, 41)[0, 1:].reshape(10, 4)
        with monkeypatch.context() as patch:
            left = erasing_draws(patch, u)
            params = library.make_params([image])
            attempts = 10 - len(list(left))
        if params["v"] is None:
            none += 1
            assert ours == (0, 0, 0, 0)
        else:
            later += attempts > 1
            assert ours == tuple(params[k] for k in "ijhw")
    if ratio == (0.05, 20.0):
        assert later > 50
    assert none == 400 if scale == (0.9, 1.0) else none < 100


def test_erasing_area_aspect_and_place() -> None:
    size = 64
    given = (size, size, augment.ERASE_SCALE, augment.ERASE_RATIO, SEED, EPOCH)
    top, left, h, w = np.array([augment.erasing_box(*given, index) for index in range(6000)]).T
    share = h * w / size**2
    assert 0.018 < share.min() < 0.03 and 0.31 < share.max() < 0.345
    eighths = np.histogram(share, np.linspace(0.02, 0.33, 9))[0]
    assert np.abs(eighths / len(share) - 1 / 8).max() < 0.025
    aspect = np.log(h / w)
    assert abs(aspect.mean()) < 0.05 and abs(aspect.std() - math.log(3.3 / 0.3) / math.sqrt(12)) < 0.04
    assert np.exp(aspect).min() < 0.36 and np.exp(aspect).max() > 2.9
    for start, length in ((top, h), (left, w)):
        place = start / (size - length)  # 0 at one border, 1 at the other
        assert place.min() == 0 and place.max() == 1 and abs(place.mean() - 0.5) < 0.02


def test_half_of_the_images_have_a_box_of_zeros() -> None:
    image = np.random.default_rng(0).integers(1, 256, (32, 32, 3), np.uint8)
    transform, erased = augment.Augment(32), 0
    for index in range(3000):
        made, plain = image.copy(), image.copy()
        transform(made[None], SEED, EPOCH, np.array([index]))
        apply_operation(plain, *augment.draw_operation(SEED, EPOCH, index), tables(32, 32))
        differs = (made != plain).any(2)
        assert not made[differs].any()
        erased += differs.any()
    assert abs(erased / 3000 - 0.5) < 0.035


# ---- MixUp and CutMix


def test_mixes_equal_torchvision_given_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(5, 3, 24, 40, generator=generator), torch.tensor([3, 0, 3, 6, 1])
    seen = {v2.MixUp: 0, v2.CutMix: 0}
    for step in range(60):
        choice, share, x, y = (rng.unit(SEED, EPOCH, step, rng.MIX, k) for k in range(4))
        before = images.clone()
        ours, targets = augment.mixup_or_cutmix(images, labels, 7, SEED, EPOCH, step)
        assert torch.equal(images, before)
        kind = v2.MixUp if choice < 0.5 else v2.CutMix
        seen[kind] += 1
        library, centre = kind(alpha=1.0, num_classes=7), iter([x, y])
        library._dist = SimpleNamespace(sample=lambda _, share=share: torch.tensor([share], dtype=torch.float64))
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randint", lambda n, size, draws=centre: torch.tensor([int(next(draws) * n)]))
            theirs, their_targets = library(images, labels)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0 if kind is v2.CutMix else 1e-6)
        assert torch.equal(targets, their_targets)
        assert targets.dtype == torch.float32 and targets.shape == (5, 7)
    assert min(seen.values()) > 20


def test_the_mix_and_its_share_are_drawn_evenly() -> None:
    steps, size = 3000, 64
    images, labels = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, size, size), torch.tensor([0, 1])
    shares: dict[bool, list[float]] = {True: [], False: []}
    for step in range(steps):
        mixed, targets = augment.mixup_or_cutmix(images, labels, 2, SEED, EPOCH, step)
        cut = bool(((mixed == 0) | (mixed == 1)).all())
        shares[cut].append(targets[0, 0].item())
        if cut:  # the targets say what is seen
            assert targets[1, 1].item() == pytest.approx(mixed[1].mean().item(), abs=1e-6)
    assert abs(len(shares[True]) / steps - 0.5) < 0.03
    assert chi_square(np.histogram(shares[False], 10, (0, 1))[0]) < 27.9  # 99.9 % point, 9 degrees of freedom
    # A side of s = sqrt(1 - share) is clipped to s - s * s / 4 on average, so the mean share left is 0.679; whole
    # pixels make the box a little smaller still.
    assert 0.67 < np.mean(shares[True]) < 0.71
    assert min(shares[True]) < 0.2 and max(shares[True]) == 1


def test_steps_and_epochs_mix_differently() -> None:
    images, labels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2)), torch.arange(4)
    mixes = [augment.mixup_or_cutmix(images, labels, 4, SEED, e, s)[0] for e, s in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert torch.equal(mixes[0], mixes[3])
    assert not torch.equal(mixes[0], mixes[1]) and not torch.equal(mixes[0], mixes[2])


@pytest.mark.parametrize("step", range(4))
def test_mixed_batch_is_its_parts(step: int) -> None:
    given = batch_of(24, 48)
    batch = Batch(
        torch.from_numpy(rows(given)),
        None,
        torch.arange(24) % 10,
        np.arange(24),
        EPOCH,
        step,
        last=True,
        loss_weight=1.0,
    )
    images, targets = augment.mixed_batch(batch, 10, SEED)
    assert images.dtype == targets.dtype == torch.float32
    assert images.shape == (24, 3, 48, 48) and targets.shape == (24, 10)
    assert torch.allclose(targets.sum(1), torch.ones(24))
    normalised = F.normalize(given.float() / 255, list(IMAGENET_MEAN), list(IMAGENET_STD))
    expected, soft = augment.mixup_or_cutmix(normalised, batch.labels, 10, SEED, EPOCH, step)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
    assert torch.equal(targets, soft)


# ---- in the loader


@pytest.fixture(scope="module")
def store(stores: dict[str, Path]) -> Store:
    return Store(stores["zarr"])


def test_a_sample_is_augmented_alike_in_any_batch_order_and_thread(store: Store) -> None:
    in_order = Loader(store, Plan(len(store), len(store), len(store), seed=0, order="stored"), 64)
    plain = next(iter(in_order.micro_batches(0, 1))).images.numpy().copy()

    @cache
    def alone(seed: int, epoch: int, index: int) -> np.ndarray:
        image = plain[index].copy()
        augment.Augment(64)(image[None], seed, epoch, np.array([index]))
        return image

    @settings(max_examples=40, deadline=None)
    @given(
        seed=st.integers(0, 3),
        batch_size=st.integers(1, 24),
        micro_batch=st.integers(1, 24),
        workers=st.integers(1, 4),
        order=st.sampled_from(ORDERS),
        world=st.integers(1, 3),
        first=st.integers(0, 30),
    )
    def check(seed: int, batch_size: int, micro_batch: int, workers: int, order: Order, world: int, first: int) -> None:
        ranks, seen = min(world, batch_size), 0
        for rank in range(ranks):
            plan = Plan(len(store), batch_size, micro_batch, seed=seed, order=order, rank=rank, world=ranks)
            loader = Loader(store, plan, 64, augment=augment.Augment(64), workers=workers)
            for batch in loader.micro_batches(first, first + 2):
                for image, index in zip(batch.images.numpy(), batch.indices.tolist(), strict=True):
                    assert np.array_equal(image, alone(seed, batch.epoch, index))
                seen += len(batch)
        assert seen == 2 * batch_size

    check()
    distinct = [alone(seed, epoch, 5) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert not any(np.array_equal(a, b) for a, b in zip(distinct, distinct[1:] + distinct[:1], strict=True))


def test_crops_are_augmented_too(store: Store) -> None:
    plan = Plan(len(store), 8, 8, seed=SEED)
    plain, augmented = (
        [
            batch.images.numpy().copy()
            for batch in Loader(store, plan, 64, crop=Crop(), augment=given).micro_batches(0, 3)
        ]
        for given in (None, augment.Augment(64))
    )
    for images, indices in zip(plain, (plan.step_indices(step) for step in range(3)), strict=True):
        augment.Augment(64)(images, SEED, 0, indices)
    assert np.array_equal(plain, augmented)


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_an_error_of_the_augmentation_is_raised_unchanged(store: Store, on_error: OnError) -> None:
    """It is no fault of a sample, so nothing is left out because of it."""

    def fails(images: np.ndarray, seed: int, epoch: int, indices: np.ndarray) -> None:
        if 5 in indices:
            raise ValueError("of the test")

    plan = Plan(len(store), 8, 8, seed=0, order="stored")
    with pytest.raises(ValueError, match=r"^of the test$"):
        list(Loader(store, plan, 64, augment=fails, on_error=on_error).micro_batches(0, 1))


def test_no_global_generator_is_touched() -> None:
    tables.cache_clear()  # the tables are made within the test
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()
    images, transform = rows(batch_of(40, 40)), augment.Augment(40)
    transform(images, SEED, EPOCH, np.arange(40))
    for step in range(4):
        augment.mixed_batch(
            Batch(torch.from_numpy(images), None, torch.zeros(40).long(), np.arange(40), EPOCH, step, True, 1.0), 10, 0
        )
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy_state, strict=True))
