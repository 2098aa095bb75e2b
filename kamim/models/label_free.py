"""Measures of features that need no labels. Sums are float64; features stay on the device that they are on."""

import torch
from torch import Tensor

UNIFORMITY_T = 2.0  # Wang and Isola 2020
ALPHA_RANKS = (4, 100)  # of the eigenvalues that alpha is fitted to: the default of alpha-ReQ's code


def centred(features: Tensor) -> Tensor:
    """Subtracts the mean from features [n, D]: float64 [n, D]."""
    features = features.double()
    return features - features.mean(dim=0)


def effective_rank(features: Tensor) -> float:
    """Returns exp of the entropy of the normalised singular values of features [n, D] (Roy and Vetterli 2007).

    Between 1, if all features are multiples of one vector, and min(n, D); 0 for features that are all zero. On features
    that are not centred this is RankMe (Garrido et al. 2023), whose epsilon of 1e-7 is left out.
    """
    values = torch.linalg.svdvals(features.double())
    if float(values.sum()) == 0:
        return 0.0
    share = values / values.sum()
    return float(torch.exp(-torch.xlogy(share, share).sum()))


def uniformity(features: Tensor) -> float:
    """Returns log mean exp(-2 |a - b|²) over pairs of unit-length features [n, D], n at least 2 (Wang and Isola 2020).

    0 if all of them point in one direction; the more negative, the more evenly they cover the sphere; about -4 at best.
    """
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    squared = torch.pdist(unit).square()
    return float((-UNIFORMITY_T * squared).exp().mean().log())


def spectral_decay(features: Tensor) -> float:
    """Returns alpha of alpha-ReQ (Agrawal et al. 2022): eigenvalue i of the covariance of features [n, D] ~ i^-alpha.

    A least squares fit of log eigenvalues to log ranks with weights 1 / rank, over ALPHA_RANKS as far as there are
    eigenvalues above rounding; NaN if fewer than two of these ranks have one. The paper finds the best features near 1;
    larger values mean that fewer directions vary.
    """
    values = torch.linalg.svdvals(centred(features))
    values = values[values > values.max() * max(features.shape) * torch.finfo(torch.float64).eps]
    first, last = ALPHA_RANKS
    y = values[first - 1 : last].square().log()
    if len(y) < 2:
        return float("nan")
    ranks = torch.arange(first, first + len(y), dtype=torch.float64, device=y.device)
    x, weights = ranks.log(), ranks.reciprocal() / ranks.reciprocal().sum()
    x, y = x - (weights * x).sum(), y - (weights * y).sum()
    return float(-(weights * x * y).sum() / (weights * x * x).sum())


def measures(features: Tensor) -> dict[str, float]:
    """Returns rankme, uniformity and alpha_req of features [n, D], n at least 2; all NaN if a feature is not finite."""
    if not features.isfinite().all():
        return dict.fromkeys(("rankme", "uniformity", "alpha_req"), float("nan"))
    return {
        "rankme": effective_rank(features),
        "uniformity": uniformity(features),
        "alpha_req": spectral_decay(features),
    }
