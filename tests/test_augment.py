"""pipelines.augment against torchvision, bit for bit, and its draws against the definitions."""

import math
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import skimage.data
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from kamim import rng
from kamim.batch import IMAGENET_MEAN, IMAGENET_STD, Batch
from pipelines import augment

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


def batch_of(count: int, size: int) -> Tensor:
    """uint8 [count, 3, S, S]: `count` different windows of the photographs."""
    large = photographs(size + 20, size + 20)
    offsets = [(k // 3 % 20, k // 7 % 20) for k in range(count)]
    return torch.stack([large[k % 3, :, y : y + size, x : x + size] for k, (y, x) in enumerate(offsets)])


def chi_square(counts: np.ndarray) -> float:
    expected = counts.sum() / counts.size
    return float(((counts - expected) ** 2 / expected).sum())


# ---- TrivialAugmentWide


@pytest.mark.parametrize("op", augment.OPS)
@pytest.mark.parametrize("case", ["photographs", "large", "odd", "hard"])
def test_every_operation_bin_and_sign_equals_torchvision(op: str, case: str) -> None:
    images = {
        "photographs": lambda: photographs(96, 96),
        "large": lambda: photographs(192, 192)[:1],
        "odd": lambda: photographs(37, 53)[1:2],
        "hard": lambda: hard_cases(24),
    }[case]()
    library = v2.TrivialAugmentWide()
    bins_of, signed = library._AUGMENTATION_SPACE[op]
    bins = bins_of(31, *images.shape[-2:])
    for image in images:
        ours = augment.apply_operation(op, image.repeat(62, 1, 1, 1), torch.arange(62))
        for setting in range(62):
            magnitude = 0.0 if bins is None else float(bins[setting % 31])
            if signed and setting >= 31:
                magnitude *= -1
            theirs = library._apply_image_or_video_transform(
                image, op, magnitude, interpolation=v2.InterpolationMode.NEAREST, fill=library._fill
            )
            assert torch.equal(ours[setting], theirs), (op, setting)


def test_batch_equals_torchvision_given_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    images, indices = batch_of(96, 64), np.arange(1000, 1096)
    ours = augment.trivial_augment_wide(images, SEED, EPOCH, indices)
    u = rng.units(SEED, EPOCH, indices, rng.AUGMENT, 3)
    library = v2.TrivialAugmentWide()
    for image, result, (op, *rest) in zip(images, ours, u, strict=True):
        numbers = iter([op, rest[0]])  # torchvision draws the operation, the bin, and whether it is negative
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randint", lambda n, size, numbers=numbers: torch.tensor(int(next(numbers) * n)))
            patch.setattr(torch, "rand", lambda size, sign=rest[1]: torch.tensor(sign, dtype=torch.float64))
            theirs = library(image)
        assert torch.equal(result, theirs)
    assert len(set(augment.draw_operations(SEED, EPOCH, indices)[0])) == 14  # every operation was compared


def test_operations_bins_and_signs_are_drawn_evenly() -> None:
    ops, settings = augment.draw_operations(SEED, EPOCH, np.arange(56_000))
    bins, negative = settings % 31, settings // 31
    # 99.9 % points of chi-square with 13, 30, 1 and 867 degrees of freedom.
    assert chi_square(np.bincount(ops, minlength=14)) < 34.5
    assert chi_square(np.bincount(bins, minlength=31)) < 59.7
    assert chi_square(np.bincount(negative, minlength=2)) < 10.8
    assert chi_square(np.bincount(ops * 62 + settings, minlength=14 * 62)) < 1000


# ---- random erasing


def torchvision_box(
    patch: pytest.MonkeyPatch, library: v2.RandomErasing, image: Tensor, u: np.ndarray
) -> tuple[int, int, int, int]:
    """What torchvision's RandomErasing.make_params answers when it draws u, float64 [10, 4], row by row."""
    drawn = iter(u)
    row: list[float] = []

    class Empty:
        def uniform_(self, low: float, high: float) -> Tensor:
            if len(row) in (0, 2, 4):  # the first number of a new attempt
                row[:] = [float(v) for v in next(drawn)]
            return torch.tensor(float(low) + float(high - low) * row.pop(0), dtype=torch.float64)

    patch.setattr(torch, "empty", lambda size: Empty())
    patch.setattr(torch, "randint", lambda low, high, size: torch.tensor(low + int(row.pop(0) * (high - low))))
    params = library.make_params([image])
    return (0, 0, 0, 0) if params["v"] is None else tuple(params[k] for k in "ijhw")


@pytest.mark.parametrize(
    ("scale", "ratio"), [((0.02, 0.33), (0.3, 3.3)), ((0.3, 1.0), (0.05, 20.0)), ((0.9, 1.0), (0.3, 0.5))]
)
def test_boxes_equal_torchvision_given_the_same_draws(
    monkeypatch: pytest.MonkeyPatch, scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    height, width = 48, 64
    library, image = v2.RandomErasing(scale=scale, ratio=ratio), torch.zeros(3, height, width)
    u = np.random.default_rng(5).random((400, 10, 4))
    ours = augment.erasing_boxes(u, height, width, scale, ratio)
    for box, draws in zip(ours, u, strict=True):
        with monkeypatch.context() as patch:
            assert tuple(box) == torchvision_box(patch, library, image, draws)
    if ratio == (0.05, 20.0):  # boxes of later attempts were among those compared
        attempts = augment.erasing_boxes(u[:, :1].repeat(10, 1), height, width, scale, ratio)
        assert (attempts[:, 2] == 0).sum() > 50 and (attempts != ours).any(1).sum() > 50
    if scale == (0.9, 1.0):
        assert (ours == 0).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_erasing_equals_torchvision_erase(dtype: torch.dtype) -> None:
    images, indices = batch_of(64, 48)[..., :40].to(dtype), np.arange(64)
    ours = augment.random_erasing(images, SEED, EPOCH, indices, p=0.7)
    u = rng.units(SEED, EPOCH, indices, rng.ERASE, 41)
    boxes = augment.erasing_boxes(u[:, 1:].reshape(-1, 10, 4), 48, 40, (0.02, 0.33), (0.3, 3.3))
    chosen = u[:, 0] < 0.7
    assert 30 < chosen.sum() < 60
    for image, result, box, erase in zip(images, ours, boxes.tolist(), chosen, strict=True):
        theirs = F.erase(image, *box, v=torch.zeros(1, 1, 1, dtype=dtype)) if erase else image
        assert result.dtype == dtype and torch.equal(result, theirs)


def test_erasing_probability_area_aspect_and_place() -> None:
    n, size = 6000, 64
    erased = augment.random_erasing(torch.ones(n, 1, size, size, dtype=torch.uint8), SEED, EPOCH, np.arange(n)) == 0
    rows, columns = erased.any(3).squeeze(1), erased.any(2).squeeze(1)
    hit = rows.any(1)
    assert abs(hit.float().mean().item() - 0.5) < 0.02
    rows, columns = rows[hit], columns[hit]
    h, w = rows.sum(1).double(), columns.sum(1).double()
    share = (h * w / size**2).numpy()
    assert 0.018 < share.min() < 0.03 and 0.31 < share.max() < 0.345
    eighths = np.histogram(share, np.linspace(0.02, 0.33, 9))[0]
    assert np.abs(eighths / len(share) - 1 / 8).max() < 0.025
    aspect = torch.log(h / w).numpy()
    assert abs(aspect.mean()) < 0.05 and abs(aspect.std() - math.log(3.3 / 0.3) / math.sqrt(12)) < 0.04
    assert np.exp(aspect).min() < 0.36 and np.exp(aspect).max() > 2.9
    for side, length in ((rows, h), (columns, w)):
        place = side.to(torch.uint8).argmax(1) / (size - length)  # 0 at one border, 1 at the other
        assert place.min() == 0 and place.max() == 1 and abs(place.mean().item() - 0.5) < 0.02


def test_erasing_never_and_always() -> None:
    images, indices = torch.ones(50, 3, 32, 32, dtype=torch.uint8), np.arange(50)
    assert torch.equal(augment.random_erasing(images, SEED, EPOCH, indices, p=0.0), images)
    assert (augment.random_erasing(images, SEED, EPOCH, indices, p=1.0) == 0).flatten(1).any(1).all()


# ---- MixUp and CutMix


def test_mixes_equal_torchvision_given_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(5, 3, 24, 40, generator=generator), torch.tensor([3, 0, 3, 6, 1])
    seen = {v2.MixUp: 0, v2.CutMix: 0}
    for step in range(60):
        choice, share, x, y = (rng.unit(SEED, EPOCH, step, rng.MIX, k) for k in range(4))
        ours, targets = augment.mixup_or_cutmix(images, labels, 7, SEED, EPOCH, step)
        kind = v2.MixUp if choice < 0.5 else v2.CutMix
        seen[kind] += 1
        library, centre = kind(alpha=1.0, num_classes=7), iter([x, y])
        library._dist = SimpleNamespace(sample=lambda _, share=share: torch.tensor([share], dtype=torch.float64))
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randint", lambda n, size, draws=centre: torch.tensor([int(next(draws) * n)]))
            theirs, their_targets = library(images, labels)
        assert torch.equal(ours, theirs) and torch.equal(targets, their_targets)
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


# ---- purity


def test_a_sample_is_augmented_alike_in_any_batch() -> None:
    images, indices = batch_of(60, 48), np.arange(500, 560)

    def both(x: Tensor, numbers: np.ndarray, epoch: int = EPOCH, seed: int = SEED) -> Tensor:
        return augment.random_erasing(augment.trivial_augment_wide(x, seed, epoch, numbers), seed, epoch, numbers)

    whole, before = both(images, indices), images.clone()
    order = np.random.default_rng(0).permutation(60)
    assert torch.equal(both(images[torch.from_numpy(order)], indices[order]), whole[torch.from_numpy(order)])
    assert torch.equal(torch.cat([both(images[k : k + 1], indices[k : k + 1]) for k in range(60)]), whole)
    channels_last = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(both(channels_last, indices), whole)
    assert torch.equal(images, before)
    for other in (both(images, indices, epoch=EPOCH + 1), both(images, indices, seed=SEED + 1)):
        assert (other != whole).flatten(1).any(1).sum() > 50


def test_steps_and_epochs_mix_differently() -> None:
    images, labels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2)), torch.arange(4)
    mixes = [augment.mixup_or_cutmix(images, labels, 4, SEED, e, s)[0] for e, s in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert torch.equal(mixes[0], mixes[3])
    assert not torch.equal(mixes[0], mixes[1]) and not torch.equal(mixes[0], mixes[2])


def make_batch(count: int, size: int, step: int) -> Batch:
    images = batch_of(count, size).permute(0, 2, 3, 1).contiguous()
    return Batch(images, None, torch.arange(count) % 10, np.arange(count) + 70, EPOCH, step, last=True, share=1.0)


def test_no_global_generator_is_touched() -> None:
    augment._sources.cache_clear()  # the tables are drawn within the test
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()
    for step in range(4):
        augment.probe_augment(make_batch(40, 40, step), 10, SEED)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy_state, strict=True))


# ---- the whole


@pytest.mark.parametrize("step", range(4))
def test_probe_augment_is_its_parts_sample_by_sample(step: int) -> None:
    batch = make_batch(24, 48, step)
    images, targets = augment.probe_augment(batch, 10, SEED)
    assert images.dtype == targets.dtype == torch.float32
    assert images.shape == (24, 3, 48, 48) and targets.shape == (24, 10)
    assert torch.allclose(targets.sum(1), torch.ones(24))
    alone = []
    for k in range(24):
        image = batch.images[k].permute(2, 0, 1)[None]
        image = augment.trivial_augment_wide(image, SEED, EPOCH, batch.indices[k : k + 1])
        image = augment.random_erasing(image, SEED, EPOCH, batch.indices[k : k + 1])
        alone.append(F.normalize(image.float() / 255, list(IMAGENET_MEAN), list(IMAGENET_STD)))
    expected, soft = augment.mixup_or_cutmix(torch.cat(alone), batch.labels, 10, SEED, EPOCH, step)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
    assert torch.equal(targets, soft)
