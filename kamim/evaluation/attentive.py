"""Attentive probes: learn on the cached tokens of a frozen encoder which patch tokens count.

Every probe is a pooling of the tokens, a batch norm without affine and a linear layer, trained in the same way, so that
probes of one block differ only in their pooling:

ep      efficient probing (Psomas et al., "Attention, Please!", ICLR 2026): queries that each pool a part of the values
abmilp  "Beyond [cls]" (Przewięźlikowski et al., ICCV 2025): one score per token
mean    a linear probe: all tokens have the same weight
"""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from kamim import KamimError
from kamim.evaluation.options import Attentive, AttentiveOptim, AttentivePooling
from kamim.runtime.distributed import World
from kamim.training.trainer import Batches
from pipelines.batch import Batch, upload
from pipelines.plan import Plan

QUERY_STD = 0.02
RESIDENT_BYTES = 4 << 30  # limit of the tokens that are kept on a GPU; larger ones stay in their file


class EfficientPooling(nn.Module):
    """Efficient probing. The keys are the tokens; query q pools the q-th part of one value projection's output.

    A part of the values is a linear function of the token, so tokens are pooled before they are projected: [B, Q, D]
    instead of [B, T, D] is projected, with the same output.
    """

    def __init__(self, width: int, queries: int):
        """width: D, a multiple of queries."""
        super().__init__()
        assert width % queries == 0, (width, queries)
        self.queries = nn.Parameter(QUERY_STD * torch.randn(queries, width))
        self.value = nn.Linear(width, width, bias=False)

    def attention(self, tokens: Tensor) -> Tensor:
        """Maps [B, T, D] to [B, Q, T], whose rows sum to 1."""
        scores = tokens @ (self.queries.T * self.queries.shape[1] ** -0.5)  # [B, T, Q]
        return scores.float().softmax(dim=1).transpose(1, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps [B, T, D] to [B, D], the concatenated outputs of the queries."""
        pooled = self.attention(tokens).to(tokens.dtype) @ tokens  # [B, Q, D]
        values = self.value.weight.unflatten(0, (len(self.queries), -1))  # [Q, D / Q, D]
        return (pooled.transpose(0, 1) @ values.transpose(1, 2)).transpose(0, 1).flatten(1)


class AbmilpPooling(nn.Module):
    """AbMILP: the sum of the tokens, weighted by a softmax over one score per token.

    depth: layers of the score, of the tokens' width, with tanh between them (Ilse et al. 2018).
    """

    def __init__(self, width: int, depth: int):
        super().__init__()
        hidden = [layer for _ in range(depth - 1) for layer in (nn.Linear(width, width), nn.Tanh())]
        self.score = nn.Sequential(*hidden, nn.Linear(width, 1))

    def attention(self, tokens: Tensor) -> Tensor:
        """Maps [B, T, D] to [B, 1, T], whose rows sum to 1."""
        scores: Tensor = self.score(tokens)
        return scores.float().softmax(dim=1).transpose(1, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps [B, T, D] to [B, D]."""
        pooled: Tensor = self.attention(tokens).to(tokens.dtype) @ tokens
        return pooled.squeeze(1)


class MeanPooling(nn.Module):
    """The mean of the tokens."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps [B, T, D] to [B, D]."""
        return tokens.mean(dim=1)


Pooling = EfficientPooling | AbmilpPooling | MeanPooling


class AttentiveHead(nn.Module):
    """A pooling, a batch norm without affine and a linear layer."""

    def __init__(self, pooling: Pooling, width: int, classes: int):
        super().__init__()
        self.pooling = pooling
        self.batch = nn.BatchNorm1d(width, eps=1e-6, affine=False)
        self.linear = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps float [B, T, D] to logits float32 [B, classes], in fp32 except the pooling under autocast."""
        device = tokens.device.type
        pooled: Tensor = self.pooling(tokens if torch.is_autocast_enabled(device) else tokens.float())
        with torch.autocast(device, enabled=False):
            logits: Tensor = self.linear(self.batch(pooled.float()))
        return logits


def build_head(name: AttentivePooling, width: int, classes: int, queries: int, depth: int, seed: int) -> AttentiveHead:
    """Builds a head with random weights, a pure function of its arguments. queries: of ep; depth: of abmilp."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return AttentiveHead(_pooling(name, width, queries, depth), width, classes)


def _pooling(name: AttentivePooling, width: int, queries: int, depth: int) -> Pooling:
    if name == "ep":
        return EfficientPooling(width, queries)
    return AbmilpPooling(width, depth) if name == "abmilp" else MeanPooling()


class CachedTokens:
    """Patch tokens of N samples for training: batches of row numbers, and the tokens of a batch."""

    def __init__(self, tokens: Tensor, labels: Tensor, device: torch.device):
        """tokens: [N, T, D], any float type, memory-mapped or not. labels: int64 [N]."""
        self._tokens = tokens.to(device) if tokens.nbytes <= RESIDENT_BYTES else tokens
        self._labels, self._device = labels, device

    def shuffled(self, optim: AttentiveOptim, seed: int, world: World) -> Plan:
        """Plans a training: every epoch is shuffled, and samples that do not fill a step are dropped."""
        micro_batch = even_micro_batch(optim, world.size)
        return Plan(len(self._labels), optim.batch_size, micro_batch, seed, rank=world.rank, world=world.size)

    def in_order(self, batch_size: int, world: World) -> Plan:
        """Plans one pass over all rows."""
        size = max(min(batch_size, len(self._labels)), world.size)
        return Plan(
            len(self._labels), size, size, seed=0, order="stored", drop_last=False, rank=world.rank, world=world.size
        )

    def batches(self, plan: Plan) -> Batches:
        """Returns the micro-batches of a plan of the N rows, without images: their indices are row numbers."""

        def steps(first: int, stop: int) -> Iterator[Batch]:
            for part in plan.micro_batches(first, stop):
                images = torch.empty(len(part.indices), 0, dtype=torch.uint8, device=self._device)
                labels = upload(self._labels[part.indices].numpy(), self._device)
                yield Batch(images, None, labels, part.indices, part.epoch, part.step, part.last, part.loss_weight)

        return steps

    def read(self, indices: np.ndarray) -> Tensor:
        """Returns the tokens of some rows (int64 [B]) on the device: [B, T, D], in their stored type."""
        rows = torch.from_numpy(indices).to(self._tokens.device)
        return self._tokens[rows].to(self._device)


def attention_maps(heads: Mapping[AttentivePooling, AttentiveHead], tokens: Tensor) -> dict[str, Tensor]:
    """Returns the attention maps of heads that learn attention: float32 [B, Q, g, g] on the CPU, by name.

    tokens: float [B, g * g, D], in rows of the token grid.
    """
    side = int(tokens.shape[1] ** 0.5)
    with torch.no_grad():
        return {
            name: head.pooling.attention(tokens.float()).unflatten(2, (side, side)).cpu()
            for name, head in heads.items()
            if not isinstance(head.pooling, MeanPooling)
        }


def fitted(options: Attentive, samples: int) -> Attentive:
    """Returns the options for n training samples: a step takes at most n, and optim.lr follows from blr."""
    batch = min(options.optim.batch_size, samples)
    optim = options.optim.model_copy(update={"batch_size": batch, "lr": options.blr * batch / 256})
    return options.model_copy(update={"optim": optim})


def even_micro_batch(optim: AttentiveOptim, world_size: int) -> int:
    """Returns the size of the fewest micro-batches of at most optim.micro_batch samples, as even as possible.

    Batch norm has no statistics of a single sample, which may be the remainder: this raises KamimError.
    """
    per_rank = -(-optim.batch_size // world_size)
    size = -(-per_rank // -(-per_rank // optim.micro_batch))
    if any(samples % size == 1 % size for samples in (per_rank, optim.batch_size // world_size)):
        raise KamimError(
            f"attentive.optim.micro_batch = {optim.micro_batch}: steps of {optim.batch_size} samples leave a "
            "micro-batch of one, which a batch norm cannot normalise; choose another"
        )
    return size
