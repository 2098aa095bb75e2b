"""The measures of the analysis. Sums are float64; tensors stay on their device.

Attention distance, NMI and the Fourier curve follow Park et al. 2023 ("What do self-supervised vision
transformers learn?") as KAMIM's authors compute them; docs/analysis.md has the formulas.
"""

import numpy as np
import torch
from torch import Tensor

from kamim.method import rng
from kamim.models.label_free import centred

NMI_EPSILON = 1e-8  # added to every weight, so that the logarithm of zeros is defined
FOURIER_EPSILON = 1e-6
RESAMPLES = 1000
CONFIDENCE = 0.95


def patch_attention(weights: Tensor, prefix: int) -> Tensor:
    """Returns attention among patch tokens, rows renormalised: [.., N, N] -> float64 [.., N - prefix, N - prefix].

    A query whose whole weight is on prefix tokens counts as uniform attention, as with the released code's 1e-32.
    """
    kept = weights[..., prefix:, prefix:].double()
    total = kept.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, kept / total, 1 / kept.shape[-1])


def token_distances(side: int, patch: float) -> Tensor:
    """Returns Euclidean distances (px) between tokens of a side x side grid of `patch` px: float64 [side², side²]."""
    at = torch.arange(side, dtype=torch.float64) * patch
    xy = torch.cartesian_prod(at, at)
    return torch.linalg.vector_norm(xy[:, None] - xy[None], dim=-1)


def uniform_distance(side: int, patch: float) -> float:
    """Returns the mean distance in px under uniform attention; 99.75 for 12 x 12 tokens of 16 px."""
    return float(token_distances(side, patch).mean())


def attention_distance(attention: Tensor, distances: Tensor) -> Tensor:
    """Returns the mean distance from query to key, weighted by attention: [.., N, N] -> [..], px."""
    return (attention * distances).sum(dim=-1).mean(dim=-1)


def normalised_mutual_information(weights: Tensor, prefix: int) -> Tensor:
    """Computes I(q; k) / sqrt(H(q) H(k)) with uniform queries: [.., N, N] -> float64 [..].

    It is 0 if queries attend alike, 1 if query and key determine each other. Prefix tokens are dropped, then 1e-8 is
    added and rows are renormalised.
    """
    attention = patch_attention(weights.double() + NMI_EPSILON, prefix)
    received = attention.mean(dim=-2)
    key = -torch.xlogy(received, received).sum(dim=-1)
    key_given_query = -torch.xlogy(attention, attention).sum(dim=-1).mean(dim=-1)
    return (key - key_given_query) / (key * np.log(attention.shape[-1])).sqrt()


def log_amplitude(tokens: Tensor) -> Tensor:
    """Returns the log amplitude on the half diagonal of the 2D spectrum: [B, s, s, D] -> float64 [B, s - s // 2].

    Entry i is spatial frequency (2 i / s) pi per token, along both axes; mean over channels. The released code calls
    this minus its first entry the relative log amplitude.
    """
    side = tokens.shape[1]
    spectrum = (torch.fft.fft2(tokens.double(), dim=(1, 2)).abs() + FOURIER_EPSILON).log().mean(dim=-1)
    centred = torch.fft.fftshift(spectrum, dim=(1, 2))
    return centred.diagonal(dim1=1, dim2=2)[:, side // 2 :]


def normalised_gram(features: Tensor) -> Tensor:
    """Returns the centred Gram matrix of features [n, D], of Frobenius norm 1 (or 0): float64 [n, n]."""
    residuals = centred(features)
    gram = residuals @ residuals.T
    norm = torch.linalg.matrix_norm(gram)
    return gram / norm if float(norm) > 0 else gram


def linear_cka(one: list[Tensor], other: list[Tensor]) -> np.ndarray:
    """Computes linear CKA (Kornblith et al. 2019) of all pairs: lists of [n, D] of n samples -> [a, b] in [0, 1]."""
    grams, others = (torch.stack([normalised_gram(f) for f in side]).flatten(1) for side in (one, other))
    return (grams @ others.T).cpu().numpy()


def correlation(one: Tensor, other: Tensor) -> Tensor:
    """Computes Pearson's r over the last dimension: [.., n] and [.., n] -> float64 [..], NaN if either is constant."""
    one, other = (x.double() - x.double().mean(dim=-1, keepdim=True) for x in (one, other))
    norms = torch.linalg.vector_norm(one, dim=-1) * torch.linalg.vector_norm(other, dim=-1)
    return torch.where(norms > 0, (one * other).sum(dim=-1) / norms, torch.nan)


def bootstrap_means(values: np.ndarray, seed: int) -> np.ndarray:
    """Returns the means of RESAMPLES resamples with replacement: values [n, ..] -> [RESAMPLES, ..]."""
    n = len(values)
    flat = values.reshape(n, -1)
    means = np.empty((RESAMPLES, flat.shape[1]))
    for i in range(RESAMPLES):
        drawn = (rng.units(seed, 0, np.array([i]), rng.BOOTSTRAP, n)[0] * n).astype(np.int64)
        means[i] = np.bincount(drawn, minlength=n) @ flat / n
    return means.reshape(RESAMPLES, *values.shape[1:])


def interval(resampled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the middle 95 % over the first axis: (low, high)."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, (tail, 1 - tail), axis=0)
    return low, high
