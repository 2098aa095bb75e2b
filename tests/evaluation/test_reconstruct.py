"""PSNR and SSIM against scikit-image, torchmetrics and plain arithmetic."""

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image import PeakSignalNoiseRatio

from kamim.evaluation.reconstruct import CONVENTIONS, MaskedOnly, WholeImage
from pipelines.batch import IMAGENET_MEAN, IMAGENET_STD, denormalise, normalise

CPU = torch.device("cpu")
SIDE = 64


@pytest.fixture(scope="module")
def sample(photos: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Six photographs, noisy reconstructions that leave [0, 1], and masks that stay clear of the border."""
    random = np.random.default_rng(0)
    crops = [photo[60 * i : 60 * i + SIDE, 80 : 80 + SIDE] for photo in photos for i in (0, 2)]
    originals = torch.from_numpy(np.stack(crops))
    noise = torch.from_numpy(random.normal(scale=0.6, size=(6, 3, SIDE, SIDE)).astype(np.float32))
    cells = torch.from_numpy(random.random((6, SIDE // 8, SIDE // 8)) < 0.5)
    cells[:, [0, -1]] = cells[:, :, [0, -1]] = False
    return originals, normalise(originals) + noise, cells.repeat_interleave(8, 1).repeat_interleave(8, 2)


def measure(kind, originals, made, masks, sizes=(2, 4)):
    metric, at = kind(CPU), 0
    for size in sizes:
        metric.update(*(part[at : at + size] for part in (originals, made, masks)))
        at += size
    return metric.compute()


def plain(made: torch.Tensor) -> np.ndarray:
    """[B, H, W, 3] in [0, 1], float64."""
    return np.clip(made.permute(0, 2, 3, 1).double().numpy() * IMAGENET_STD + IMAGENET_MEAN, 0, 1)


def test_honest_equals_scikit_image(sample) -> None:
    originals, made, masks = sample
    target, hidden = originals.numpy() / 255, masks.numpy()[..., None].repeat(3, 3)
    shown = np.where(hidden, plain(made), target)
    found = measure(MaskedOnly, originals, made, masks)
    expected = peak_signal_noise_ratio(target[hidden], shown[hidden], data_range=1.0)
    assert found.psnr == pytest.approx(expected, abs=1e-5)
    maps = [
        structural_similarity(
            a,
            b,
            data_range=1.0,
            channel_axis=2,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            full=True,
        )[1]
        for a, b in zip(target, shown, strict=True)
    ]
    assert found.ssim == pytest.approx(np.stack(maps)[hidden].mean(), abs=1e-5)


def test_honest_sees_masked_pixels_only(sample) -> None:
    originals, made, masks = sample
    elsewhere = torch.where(masks[:, None], made, 100.0)
    assert measure(MaskedOnly, originals, elsewhere, masks) == measure(MaskedOnly, originals, made, masks)
    beyond = torch.where(made > normalise(torch.full_like(originals, 255)), 1e6, made)
    assert measure(MaskedOnly, originals, beyond, masks) == measure(MaskedOnly, originals, made, masks)


def test_paper_equals_torchmetrics_with_the_range_given(sample) -> None:
    originals, made, masks = sample
    target = normalise(originals)
    found = measure(WholeImage, originals, made, masks)
    psnr = PeakSignalNoiseRatio(data_range=float(target.max() - target.min()))
    assert found.psnr == pytest.approx(float(psnr(made, target)), abs=1e-5)
    ssim = [
        structural_similarity_index_measure(m, t, reduction="none")
        for m, t in zip(made.split((2, 4)), target.split((2, 4)), strict=True)
    ]
    assert found.ssim == pytest.approx(float(torch.cat(ssim).mean()), abs=1e-5)


def test_the_range_of_the_paper_takes_in_zero_and_every_batch(sample) -> None:
    _, made, masks = sample
    bright = torch.full((6, SIDE, SIDE, 3), 250, dtype=torch.uint8)
    bright[5] = 200
    target = normalise(bright).double()
    error = float(((made - target) ** 2).mean())
    assert float(target.min()) > 0
    expected = 10 * np.log10(float(target.max()) ** 2 / error)
    for sizes in ((6,), (1, 5), (5, 1)):
        assert measure(WholeImage, bright, made, masks, sizes).psnr == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_batches_add_up(convention: str, sample) -> None:
    originals, made, masks = sample
    whole, parts = (measure(CONVENTIONS[convention], originals, made, masks, sizes) for sizes in ((6,), (1, 2, 3)))
    assert parts.psnr == pytest.approx(whole.psnr, abs=1e-5)
    if convention == "honest":  # the paper's SSIM depends on the batch
        assert parts.ssim == pytest.approx(whole.ssim, abs=1e-6)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_better_is_higher(convention: str, sample) -> None:
    originals, made, masks = sample
    close = normalise(originals) + (made - normalise(originals)) / 10
    worse, better = (measure(CONVENTIONS[convention], originals, m, masks) for m in (made, close.bfloat16()))
    assert better.psnr > worse.psnr + 10
    assert better.ssim > worse.ssim
    exact = normalise(denormalise(normalise(originals)))
    assert measure(CONVENTIONS[convention], originals, exact, masks).ssim == pytest.approx(1, abs=1e-5)
