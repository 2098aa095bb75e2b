"""k nearest neighbours by cosine similarity, exact, in bounded memory."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from kamim import KamimError
from kamim.models.target_rank import target_rank

KS = (5, 10, 20, 100)
TEMPERATURE = 0.07
TILE = 2048  # samples of either side that are compared at once
_LOW = 0xFFFFFFFF


def knn(
    train: Tensor,
    train_labels: Tensor,
    val: Tensor,
    val_labels: Tensor,
    classes: int,
    device: torch.device,
    progress: Callable[[int, int], None],
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
    tile: int = TILE,
) -> dict[str, dict[str, float]]:
    """Returns top1 and top5 on val, in per cent, by k (as text, for JSON).

    train: [N, D], val: [M, D], any float type, memory-mapped or not; labels: int64. A neighbour votes for its class
    with exp(similarity / temperature), as in DINO (Caron et al. 2021). Of equally similar neighbours the one with
    the lower index in train is nearer; a class without a vote is never correct. fp32 throughout.
    progress(val samples done, M). Raises KamimError unless every k is 1 to N.
    """
    for k in ks:
        if not 1 <= k <= len(train):
            raise KamimError(f"k = {k}: must be 1 to {len(train)}, the number of training samples")
    train_labels = train_labels.to(device)
    right = {k: torch.zeros(2, dtype=torch.int64, device=device) for k in ks}
    for at in range(0, len(val), tile):
        queries, labels = _unit(val[at : at + tile], device), val_labels[at : at + tile].to(device)
        similarity, index = _nearest(queries, train, max(ks), tile)
        for k, votes in _votes(similarity, train_labels[index], classes, temperature):
            if k in right:
                rank = target_rank(votes, labels).where(votes.gather(1, labels[:, None])[:, 0] > 0, classes)
                right[k] += torch.stack([(rank < top).sum() for top in (1, 5)])
        progress(at + len(labels), len(val))
    return {
        str(k): {f"top{top}": 100 * int(count) / len(val) for top, count in zip((1, 5), right[k], strict=True)}
        for k in ks
    }


def _unit(features: Tensor, device: torch.device) -> Tensor:
    return normalize(features.to(device, torch.float32))


def _nearest(queries: Tensor, train: Tensor, k: int, tile: int) -> tuple[Tensor, Tensor]:
    """Returns similarity (fp32) and index in train of the k nearest, nearest first: [m, k] each."""
    best = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for at in range(0, len(train), tile):
        similarity = queries @ _unit(train[at : at + tile], queries.device).T
        keys = torch.cat([best, _keys(similarity, at)], dim=1)
        best = keys.topk(min(k, keys.shape[1]), dim=1).values
    return _from_keys(best)


def _keys(similarity: Tensor, first: int) -> Tensor:
    """Returns int64 keys that order by similarity, then by index (first + column), lower indices higher; all differ."""
    bits = _flip((similarity + 0.0).view(torch.int32))  # + 0.0: no negative zero
    place = torch.arange(first, first + similarity.shape[1], device=similarity.device)
    return bits.long().bitwise_left_shift_(32).sub_(place)


def _from_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    place = -keys & _LOW
    return _flip((keys + place >> 32).int()).view(torch.float32), place


def _flip(bits: Tensor) -> Tensor:
    """Maps the bits of floats to integers of the same order, and back."""
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _votes(similarity: Tensor, labels: Tensor, classes: int, temperature: float) -> Iterator[tuple[int, Tensor]]:
    """Yields (k, votes [m, classes]) of the k nearest for k = 1, 2, ...; all are views of one buffer.

    Votes are relative to the nearest neighbour's, which changes no order and cannot overflow.
    """
    weights = ((similarity - similarity[:, :1]) / temperature).exp()
    votes = weights.new_zeros(len(weights), classes)
    for i in range(weights.shape[1]):
        yield i + 1, votes.scatter_add_(1, labels[:, i : i + 1], weights[:, i : i + 1])
