"""Samples of a store and their classes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kamim import KamimError
from kamim.method import rng
from kamim.storage.store import Store


@dataclass(frozen=True)
class Samples:
    """A selection of a store's samples. indices: int64 [N], ascending, in the store."""

    store: Store
    indices: np.ndarray

    @property
    def labels(self) -> Tensor:
        """int64 [N], -1 without labels."""
        return torch.from_numpy(self.store.images.labels[self.indices])

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, by label."""
        return self.store.manifest.classes

    @property
    def about(self) -> Mapping[str, Any]:
        """The record of the samples in a result."""
        manifest = self.store.manifest
        return {
            "store": str(self.store.path),
            "dataset": manifest.job.dataset,
            "images": len(self.indices),
            "fingerprint": manifest.source,
        }


def all_samples(store: Store) -> Samples:
    """Returns every sample of a store."""
    return Samples(store, np.arange(len(store)))


def some_per_class(store: Store, n: int, seed: int) -> Samples:
    """Selects n samples of every class if all samples have a label, else all samples.

    Raises KamimError if a class has fewer than n samples, but some.
    """
    labels = store.images.labels
    if (labels < 0).any():
        return all_samples(store)
    counts = np.bincount(labels)
    for label, count in enumerate(counts.tolist()):
        if 0 < count < n:
            name = store.manifest.classes[label]
            raise KamimError(
                f"per_class = {n}: class {name!r} has {count} samples; choose at most {counts[counts > 0].min()}"
            )
    return Samples(store, n_per_class(labels, n, seed))


def n_per_class(labels: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Returns the indices of n samples of every class, or of all if a class has fewer: int64, ascending.

    labels: int64 [N], at least 0. A pure function.
    """
    counts = np.bincount(labels)
    order = rng.permutation(seed, 0, len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    rank_in_class = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.sort(by_class[rank_in_class < n])
