"""Measures without labels, of features whose spectrum is known, and against slow twins."""

import math

import numpy as np
import pytest
import torch

from kamim.models.label_free import centred, effective_rank, measures, spectral_decay, uniformity


def noise(n: int, d: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(size=(n, d)))


def with_spectrum(eigenvalues: np.ndarray, n: int) -> torch.Tensor:
    """Centred features [n, D] whose covariance has these eigenvalues, up to one factor."""
    left = torch.linalg.qr(centred(noise(n, len(eigenvalues)))).Q
    right = torch.linalg.qr(noise(len(eigenvalues), len(eigenvalues))).Q
    return left * torch.from_numpy(eigenvalues).sqrt() @ right.T + 5


def test_effective_rank_of_known_matrices() -> None:
    line = torch.outer(torch.arange(10.0), torch.tensor([1.0, 2.0, 3.0]))
    assert effective_rank(line) == pytest.approx(1)
    assert effective_rank(torch.cat([torch.eye(4), -torch.eye(4)])) == pytest.approx(4)
    assert effective_rank(torch.zeros(5, 3)) == 0
    two = torch.diag(torch.tensor([3.0, 1.0]))
    assert effective_rank(two) == pytest.approx(np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25))))


def test_rankme_sees_a_common_offset_and_the_centred_rank_does_not() -> None:
    features = noise(50, 6)
    assert effective_rank(features + 100) < 2 < 5 < effective_rank(centred(features + 100))


def test_rankme_equals_its_formula_with_the_papers_epsilon() -> None:
    features = noise(40, 9).float()
    values = np.linalg.svd(features.numpy(), compute_uv=False)
    share = values / values.sum() + 1e-7
    assert effective_rank(features) == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-5)


def test_uniformity_equals_a_loop_over_pairs() -> None:
    assert uniformity(torch.ones(5, 3)) == pytest.approx(0)
    opposite = torch.tensor([[1.0, 0.0], [-5.0, 0.0]])
    assert uniformity(opposite) == pytest.approx(-8)  # squared distance 4 on the sphere, t = 2
    features = noise(12, 4).numpy()
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    pairs = [np.exp(-2 * ((unit[i] - unit[j]) ** 2).sum()) for i in range(12) for j in range(i)]
    assert uniformity(torch.from_numpy(features)) == pytest.approx(np.log(np.mean(pairs)))


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.5])
@pytest.mark.parametrize("width", [16, 150])
def test_the_decay_of_a_power_law_is_its_exponent(alpha: float, width: int) -> None:
    features = with_spectrum(np.arange(1.0, width + 1) ** -alpha, 300)
    assert spectral_decay(features) == pytest.approx(alpha, rel=1e-6)


def test_the_decay_is_fitted_to_ranks_4_to_100_with_weights_of_their_reciprocals() -> None:
    eigenvalues = np.exp(-np.arange(150) / 40)
    eigenvalues[:3] *= 1e4
    ranks = np.arange(4, 101)
    expected = -np.polyfit(np.log(ranks), np.log(eigenvalues[3:100]), 1, w=1 / np.sqrt(ranks))[0]
    assert spectral_decay(with_spectrum(eigenvalues, 300)) == pytest.approx(expected, rel=1e-6)


def test_the_decay_of_too_few_directions_is_unknown() -> None:
    assert math.isnan(spectral_decay(with_spectrum(np.ones(4), 20)))
    assert math.isnan(spectral_decay(torch.ones(20, 9)))
    assert spectral_decay(with_spectrum(np.ones(5), 20)) == pytest.approx(0, abs=1e-9)


def test_features_that_are_not_finite_have_no_measures() -> None:
    features = noise(20, 9)
    known = measures(features)
    assert known["rankme"] == effective_rank(features) and all(map(math.isfinite, known.values()))
    features[3, 2] = torch.inf
    assert list(measures(features)) == list(known) and all(map(math.isnan, measures(features).values()))
