"""Eq. 2 and Eq. 3 against loops that spell them out."""

import math

import numpy as np
import pytest
import torch

from kamim.method.loss import masked_l1
from kamim.method.weighting import counts_to_weights, keypoint_weights, weights


@pytest.mark.parametrize("temperature", [0.1, 0.25, 1.0])
def test_weights_are_eq_2(temperature: float) -> None:
    counts = torch.randint(0, 65, (3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.int16)
    made = counts_to_weights(counts, 8, temperature)
    for image, w in zip(counts.tolist(), made.tolist(), strict=True):
        exponentials = [[math.exp(c / 64 / temperature) for c in row] for row in image]
        smallest = min(min(row) for row in exponentials)
        np.testing.assert_allclose(w, np.array(exponentials) / smallest, rtol=1e-5)


def test_an_image_without_keypoints_weighs_one_everywhere() -> None:
    assert (counts_to_weights(torch.zeros(2, 5, 5, dtype=torch.int16), 8, 0.25) == 1).all()


def test_extreme_temperatures_stay_finite() -> None:
    w = weights(np.array([[[0.0, 1.0]]]), 1e-3)
    assert w.flatten().tolist() == pytest.approx([1.0, math.exp(20)])


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("temperature", [1e-3, 0.1, 0.25, 1.0])
def test_numpy_and_torch_agree(temperature: float, normalize: bool) -> None:
    counts = np.random.default_rng(0).integers(0, 65, (5, 24, 24)).astype(np.int16)
    in_torch = counts_to_weights(torch.from_numpy(counts), 8, temperature, normalize)
    in_numpy = keypoint_weights(counts, 8, temperature, normalize)
    assert in_numpy.dtype == np.float32
    assert in_torch.dtype == torch.float32
    np.testing.assert_allclose(in_numpy, in_torch.numpy(), rtol=2e-6)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="must be greater than 0"):
        weights(np.zeros((1, 2, 2)), temperature)
    with pytest.raises(ValueError, match="must be greater than 0"):
        counts_to_weights(torch.zeros(1, 2, 2), 8, temperature)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_is_the_spelled_out_one(weighted: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    x, x_hat = (torch.randn(2, 3, 24, 24, generator=generator) for _ in range(2))
    mask = torch.rand(2, 3, 3, generator=generator) < 0.5
    w = 1 + torch.rand(2, 6, 6, generator=generator) if weighted else None
    total, masked = 0.0, 0
    for b in range(2):
        for i in range(24):
            for j in range(24):
                if mask[b, i // 8, j // 8]:
                    masked += 1
                    scale = 1.0 if w is None else float(w[b, i // 4, j // 4])
                    total += scale * float((x_hat[b, :, i, j] - x[b, :, i, j]).abs().sum())
    assert float(masked_l1(x, x_hat, mask, w)) == pytest.approx(total / (masked + 1e-5) / 3, rel=1e-5)


def test_the_loss_is_fp32_under_autocast() -> None:
    x = torch.randn(1, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        loss = masked_l1(x, x.to(torch.bfloat16) + 1, torch.ones(1, 1, 1, dtype=torch.bool), torch.ones(1, 2, 2))
    assert loss.dtype == torch.float32
