"""The measures of the analysis. Sums are float64; tensors stay on their device.

Attention distance, NMI and the Fourier curve follow Park et al. 2023 ("What do self-supervised vision
transformers learn?") as KAMIM's authors compute them; docs/analysis.md has the formulas.
"""

import numpy as np
import torch
from torch import Tensor

from kamim.method import rng
from kamim.models.attention import patch_attention
from kamim.models.label_free import centred

NMI_EPSILON = 1e-8  # added to every weight, so that the logarithm of zeros is defined
FOURIER_EPSILON = 1e-6
RESAMPLES = 1000
CONFIDENCE = 0.95


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
