"""The rank of the true class among the scores, from which every top-k accuracy follows."""

import torch
from torch import Tensor


def target_rank(scores: Tensor, labels: Tensor) -> Tensor:
    """Returns the rank of the true class by descending score, from 0: int64 [...].

    scores: [..., C]. labels: int64 [...].

    Equal scores rank in the order of their classes. NaN ranks above every number, and a true class with a NaN score
    ranks last, so a diverged model is never right by accident.
    """
    true = scores.gather(-1, labels[..., None])
    earlier = torch.arange(scores.shape[-1], device=scores.device) < labels[..., None]
    return (~(scores <= true) | ((scores == true) & earlier)).sum(dim=-1)
