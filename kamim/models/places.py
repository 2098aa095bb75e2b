"""Where the true class stands among the scores, from which every top-k accuracy follows."""

import torch
from torch import Tensor


def places(scores: Tensor, labels: Tensor) -> Tensor:
    """Place of the true class by score, from 0: scores [..., C], labels int64 [...] -> int64 [...].

    Equal scores stand in the order of their classes. A NaN stands before every number and a true class that has
    one stands last, so that a model which diverged is never right by accident.
    """
    true = scores.gather(-1, labels[..., None])
    earlier = torch.arange(scores.shape[-1], device=scores.device) < labels[..., None]
    return (~(scores <= true) | ((scores == true) & earlier)).sum(dim=-1)
