"""Logistic regression on cached features: a linear probe without a learning rate, for any number of samples.

Source: the low-shot evaluation of MSN (Assran et al. 2022, `logistic_eval.py`): centred features of unit length, no
intercept, a small L2 penalty. MSN centres each feature vector on its own mean; here all are centred on the mean of the
training features. The problem is convex, so its solution depends on no random draw.
"""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from kamim.models.target_rank import target_rank

PENALTY = 0.00025  # weight of the squared weights, relative to the cross entropy summed over the samples
ITERATIONS = 1000  # limit of L-BFGS iterations; 9,000 samples of 192 to 768 features take 300 to 600
TILE = 8192  # samples per batch of predictions
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class LogisticRegression:
    """A fitted classifier. centre: float32 [D], the mean of the training features; weight: float32 [classes, D]."""

    centre: Tensor
    weight: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """Maps [N, D] of any float type to float32 [N, classes]."""
        return normalize(features.to(self.centre.device).float() - self.centre) @ self.weight.T

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Returns the share of samples whose class has the largest logit, in per cent. labels: int64 [N]."""
        right = 0
        for at in range(0, len(labels), TILE):
            part = labels[at : at + TILE].to(self.weight.device)
            right += int((target_rank(self.logits(features[at : at + TILE]), part) == 0).sum())
        return 100 * right / len(labels)


def fit(features: Tensor, labels: Tensor, classes: int, device: torch.device) -> LogisticRegression:
    """Minimises the mean cross entropy and PENALTY / (2 N) of the squared weights, by L-BFGS from zero, in fp32.

    features: [N, D], any float type, memory-mapped or not, that fit on the device in fp32. labels: int64 [N]. Logs a
    warning if it ends at the limit of iterations, before the minimum.
    """
    known, targets = features.to(device).float(), labels.to(device)
    centre = known.mean(dim=0)
    known = normalize(known - centre)
    weight = torch.zeros(classes, features.shape[1], device=device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight],
        max_iter=ITERATIONS,
        max_eval=2 * ITERATIONS,
        tolerance_grad=1e-6,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = cross_entropy(known @ weight.T, targets) + PENALTY / (2 * len(labels)) * weight.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    state = optimizer.state[weight]
    if state["n_iter"] >= ITERATIONS or state["func_evals"] >= 2 * ITERATIONS:
        _LOG.warning(
            "the logistic regression on %d samples ended after %d iterations, before its minimum",
            len(labels),
            state["n_iter"],
        )
    return LogisticRegression(centre, weight.detach())
