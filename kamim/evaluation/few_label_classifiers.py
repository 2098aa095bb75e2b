"""A linear and a neighbour classifier on cached features, for the modes with few labels and corruptions."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kamim.evaluation import logistic
from kamim.models.knn import knn


@dataclass(frozen=True)
class CachedClassifiers:
    """A logistic regression and k nearest neighbours fitted to the same samples.

    features: [N, D], any float type, memory-mapped or not. labels: int64 [N]. k: all N if they are fewer.
    """

    features: Tensor
    labels: Tensor
    classes: int
    k: int
    temperature: float
    device: torch.device

    @cached_property
    def regression(self) -> logistic.LogisticRegression:
        """The fitted regression."""
        return logistic.fit(self.features, self.labels, self.classes, self.device)

    def top1(self, features: Tensor, labels: Tensor) -> tuple[float, float]:
        """Returns the accuracies of the regression and of the neighbours on other samples, in per cent."""
        k = min(self.k, len(self.labels))
        accuracies = knn(
            self.features,
            self.labels,
            features,
            labels,
            self.classes,
            self.device,
            lambda done, total: None,
            [k],
            self.temperature,
        )
        return self.regression.accuracy(features, labels), accuracies[str(k)]["top1"]
