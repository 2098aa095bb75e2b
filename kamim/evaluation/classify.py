"""Training and measuring a classifier, be it one layer or the whole network."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kamim.models.places import places
from kamim.models.stochastic_depth import draw_paths
from kamim.training.config import Compute
from kamim.training.distributed import World
from kamim.training.trainer import Batches, Gradients, Steps, autocast, synchronised
from pipelines.batch import Batch, normalise

Finish = Callable[[Batch], tuple[Tensor, Tensor]]  # -> normalised images [B, 3, R, R], soft targets [B, classes]
Read = Callable[[Tensor], Tensor]  # normalised images -> what the network takes


def gradients(
    network: nn.Module, read: Read, batches: Batches, finish: Finish, compute: Compute, seed: int, world: World
) -> Gradients:
    """Of the cross entropy between network(read(images)) and finish's targets."""

    def steps(first: int, stop: int) -> Steps:
        network.train()
        total = torch.zeros((), device=world.device)
        for batch in batches(first, stop):
            images, targets = finish(batch)
            draw_paths(network, seed, batch.epoch, batch.indices, world.device)
            with synchronised(network, batch, world):
                with autocast(compute, world.device):
                    logits = network(read(images))
                loss = cross_entropy(logits.float(), targets)
                (loss * (batch.share * world.size)).backward()  # DDP averages over ranks
            total += loss.detach() * batch.share
            if batch.last:
                yield batch.step, {"loss": world.sum(total.clone())}
                total.zero_()

    return steps


def accuracy(network: nn.Module, read: Read, batches: Iterable[Batch], world: World) -> dict[str, float]:
    """top1 and top5, in per cent, over all ranks' batches. fp32, as the released code validates."""
    network.eval()
    for buffer in network.buffers():  # a BatchNorm's statistics, which every rank has of its own samples
        world.share(buffer)
    right = torch.zeros(3, dtype=torch.int64, device=world.device)  # as first, among the first 5; and of how many
    for batch in batches:
        if len(batch):  # a rank may have none of a short last step
            with torch.no_grad():
                logits = network(read(normalise(batch.images)))
            place = places(logits, batch.labels)
            right += torch.stack([(place < 1).sum(), (place < 5).sum(), (place >= 0).sum()])
    top1, top5, samples = world.sum(right).tolist()
    return {"top1": 100 * top1 / samples, "top5": 100 * top5 / samples}
