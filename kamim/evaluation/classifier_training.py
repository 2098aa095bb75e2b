"""Trains and measures a classifier: one layer, or the whole network."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import Lars
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kamim.config.pretrain import Compute
from kamim.evaluation.options import ClassifierOptim
from kamim.evaluation.results import Accuracy
from kamim.models.stochastic_depth import draw_paths
from kamim.models.target_rank import target_rank
from kamim.runtime.device import autocast
from kamim.runtime.distributed import World
from kamim.training.trainer import Losses
from pipelines.batch import Batch

Finish = Callable[[Batch], tuple[Tensor, Tensor]]  # -> normalised images [B, 3, R, R], soft targets [B, classes]
Read = Callable[[Tensor], Tensor]  # normalised images -> the network's input


@dataclass
class CrossEntropy:
    """The cross entropy between network(read(images)) and the targets: an objective of the Trainer."""

    network: nn.Module
    read: Read
    finish: Finish
    compute: Compute
    seed: int

    def __call__(self, batch: Batch) -> Losses:
        """Returns the loss of a micro-batch."""
        images, targets = self.finish(batch)
        draw_paths(self.network, self.seed, batch.epoch, batch.indices, images.device)
        with autocast(self.compute, images.device):
            logits = self.network(self.read(images))
        return Losses(cross_entropy(logits.float(), targets))


def accuracy(network: nn.Module, inputs: Callable[[Batch], Tensor], batches: Iterable[Batch], world: World) -> Accuracy:
    """Returns the accuracy of network(inputs(batch)) over all ranks' batches, in fp32, as in the released code."""
    network.eval()
    for buffer in network.buffers():  # every rank has a BatchNorm's statistics of its own samples
        world.broadcast(buffer)
    counts = torch.zeros(3, dtype=torch.int64, device=world.device)  # correct top-1, correct top-5, samples
    for batch in batches:
        if len(batch):  # a rank may have no samples of a short last step
            with torch.no_grad():
                logits = network(inputs(batch))
            rank = target_rank(logits, batch.labels)
            counts += torch.stack([(rank < 1).sum(), (rank < 5).sum(), (rank >= 0).sum()])
    top1, top5, samples = world.sum(counts).tolist()
    return Accuracy(100 * top1 / samples, 100 * top5 / samples)


def make_optimizer(groups: list[dict[str, Any]], optim: ClassifierOptim) -> torch.optim.Optimizer:
    """Builds the optimiser of a classifier, at the learning rate before the first step."""
    if optim.algorithm == "adamw":
        return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, fused=True)
    if optim.algorithm == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr, momentum=0.9)
    parts = [part for group in groups for part in _lars_parts(group)]
    lars: torch.optim.Optimizer = Lars(parts, lr=optim.lr, momentum=0.9)
    return lars


def _lars_parts(group: dict[str, Any]) -> list[dict[str, Any]]:
    """Splits a group as MAE does: matrices adapt the rate even without decay; vectors have no decay or adaptation."""
    matrices, vectors = ([p for p in group["params"] if (p.ndim > 1) == wide] for wide in (True, False))
    return [{**group, "params": matrices, "always_adapt": True}, {**group, "params": vectors, "weight_decay": 0.0}]
