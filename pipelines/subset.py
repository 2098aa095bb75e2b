"""A few labelled samples of each class."""

import numpy as np

from kamim.method import rng


def n_per_class(labels: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Places of n samples of every class 0 .. max(labels), ascending: int64 [classes * n]. Pure.

    Raises ValueError where a class has fewer.
    """
    counts = np.bincount(labels)
    for label, count in enumerate(counts.tolist()):
        if count < n:
            raise ValueError(f"per_class = {n}: class {label} has {count} samples; choose at most {counts.min()}")
    order = rng.permutation(seed, 0, len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    first = np.cumsum(counts) - counts
    return np.sort(by_class[(first[:, None] + np.arange(n)).ravel()])
