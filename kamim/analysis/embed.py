"""Embeds tokens in two dimensions with scikit-learn (extra: analysis)."""

import importlib
from typing import Any

import numpy as np

from kamim import KamimError

PERPLEXITY = 20.0  # the paper's figure 3


def _sklearn(module: str) -> Any:
    """Imports part of scikit-learn. Raises KamimError if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise KamimError(
            "figures 3, 8, 9 and 10 need scikit-learn: pip install 'kamim[analysis]', or choose other figures"
        ) from error


def check() -> None:
    """Raises KamimError if scikit-learn is not installed."""
    _sklearn("sklearn")


def tsne(tokens: np.ndarray, seed: int) -> np.ndarray:
    """Embeds tokens by t-SNE, random start: [n, D] -> float64 [n, 2]. Raises KamimError for too few tokens."""
    if len(tokens) <= PERPLEXITY:
        raise KamimError(f"figures = 3: {len(tokens)} tokens are too few for a t-SNE of perplexity {PERPLEXITY:g}")
    manifold = _sklearn("sklearn.manifold")
    limits = _sklearn("threadpoolctl").threadpool_limits  # multithreaded sums differ from run to run
    with limits(1):
        return (
            manifold.TSNE(perplexity=PERPLEXITY, init="random", random_state=seed).fit_transform(tokens).astype(float)
        )


def pca(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first two principal components: [n, D] -> (float64 [n, 2], shares of variance [2])."""
    decomposition = _sklearn("sklearn.decomposition").PCA(n_components=2, svd_solver="full")
    plane = decomposition.fit_transform(tokens.astype(np.float64))
    return plane, decomposition.explained_variance_ratio_
