"""Many linear probes on cached features, trained at the same time.

Every readout (block, pooling, norm) is probed at every learning rate. Probes of one readout share their features, so
an update of R readouts and L rates is one batched product [R, B, D] @ [R, D, L * C] and its transpose: 4 R L N D C
floating-point operations an epoch, 0.55 TFLOP for 36 readouts, 10 rates, 50,000 samples, D 768 and 10 classes.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import count, groupby

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kamim import KamimError
from kamim.config.pretrain import Optim
from kamim.evaluation.results import SweepRow
from kamim.method import rng
from kamim.models.readout import Readout
from kamim.models.target_rank import target_rank
from kamim.training import schedule

GROUP_BYTES = 4 << 30  # limit of the features, parameters and scores that are trained together

Features = Mapping[Readout, tuple[Tensor, Tensor]]  # train [N, D] and val [M, D], any float type, memory-mapped or not


def sweep(
    features: Features,
    train_labels: Tensor,
    val_labels: Tensor,
    classes: int,
    lrs: Sequence[float],
    optim: Optim,
    seed: int,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> list[SweepRow]:
    """Trains and measures a probe for every readout and learning rate. labels: int64 [N], [M].

    Each probe ends with the weights, up to float rounding, that it would have if it were trained alone: an nn.Linear
    initialised under `seed`, AdamW with `optim` except lr and clip_grad, schedule.cosine, cross entropy, fp32. All
    probes see the same batches; the incomplete batch of an epoch is dropped. The best of many rows is selected
    on val and therefore biased upwards. progress(updates done, in all). Raises KamimError if a batch is larger than N.
    """
    if optim.batch_size > len(train_labels):
        raise KamimError(f"batch_size = {optim.batch_size}: is more than the {len(train_labels)} training samples")
    groups = list(_groups(features, classes * len(lrs), optim.batch_size))
    steps = optim.epochs * (len(train_labels) // optim.batch_size)
    done, rows = count(1), []
    for group in groups:
        probes = Probes([features[r][0] for r in group], classes, lrs, seed, device)
        probes.train(train_labels, optim, seed, lambda: progress(next(done), len(groups) * steps))
        accuracy = probes.accuracy([features[r][1] for r in group], val_labels, optim.batch_size)
        for readout, of_rates in zip(group, accuracy.tolist(), strict=True):
            for lr, (top1, top5) in zip(lrs, of_rates, strict=True):
                rows.append(SweepRow(**asdict(readout), lr=lr, top1=top1, top5=top5))
    return rows


def _groups(features: Features, scores: int, batch: int) -> Iterable[list[Readout]]:
    """Yields groups of readouts of one width that fit into GROUP_BYTES together. scores: per sample and readout."""

    def width(readout: Readout) -> int:
        return features[readout][0].shape[1]

    for d, same in groupby(sorted(features, key=lambda r: (width(r), r)), key=width):
        readouts = list(same)
        stored = max(features[r][0].nbytes for r in readouts)
        size = max(1, GROUP_BYTES // (stored + 4 * scores * (4 * d + 4 * batch)))  # weights and scores, fp32, 4 of each
        yield from (readouts[at : at + size] for at in range(0, len(readouts), size))


class Probes:
    """R readouts times L learning rates of linear probes. weights: L of [R, D, C]; biases: L of [R, 1, C]."""

    def __init__(self, features: Sequence[Tensor], classes: int, lrs: Sequence[float], seed: int, device: torch.device):
        self.features = [f.to(device) for f in features]
        self.classes, self.lrs, self.device = classes, lrs, device
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            layer = nn.Linear(features[0].shape[1], classes)
        weight, bias = (p.detach().to(device) for p in (layer.weight.T, layer.bias[None]))
        self.weights, self.biases = (
            [start.expand(len(features), *start.shape).clone().requires_grad_() for _ in lrs]
            for start in (weight, bias)
        )

    def train(self, labels: Tensor, optim: Optim, seed: int, tick: Callable[[], None]) -> None:
        """Trains every probe for optim.epochs and calls tick() after each update."""
        labels = labels.to(self.device)
        groups = [{"params": p, "lr": lr} for *p, lr in zip(self.weights, self.biases, self.lrs, strict=True)]
        optimizer = torch.optim.AdamW(groups, betas=optim.betas, weight_decay=optim.weight_decay, fused=True)
        steps_per_epoch = len(labels) // optim.batch_size
        scheduler = schedule.cosine(optimizer, optim, steps_per_epoch)
        for step in range(optim.epochs * steps_per_epoch):
            epoch, within = divmod(step, steps_per_epoch)
            if within == 0:
                order = torch.from_numpy(rng.permutation(seed, epoch, len(labels))).to(self.device)
            batch = order[within * optim.batch_size : (within + 1) * optim.batch_size]
            scores = self._scores([f[batch] for f in self.features])
            targets = labels[batch, None].expand(scores.shape[:-1])
            loss = cross_entropy(scores.flatten(0, 2), targets.flatten(), reduction="sum") / len(batch)
            loss.backward()
            scheduler.step_update(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            tick()

    @torch.no_grad()
    def accuracy(self, features: Sequence[Tensor], labels: Tensor, batch: int) -> Tensor:
        """Returns top1 and top5 in per cent: [R, L, 2]. features: R of [M, D]."""
        correct = torch.zeros(len(features), len(self.lrs), 2, dtype=torch.float64)
        for at in range(0, len(labels), batch):
            scores = self._scores([f[at : at + batch].to(self.device) for f in features])
            targets = labels[at : at + batch, None].to(self.device).expand(scores.shape[:-1])
            rank = target_rank(scores, targets)
            correct += torch.stack([(rank < top).sum(dim=1) for top in (1, 5)], dim=-1).cpu()
        return 100 * correct / len(labels)

    def _scores(self, features: Sequence[Tensor]) -> Tensor:
        """Maps R of [B, D] to [R, B, L, C]."""
        weight, bias = torch.cat(self.weights, dim=2), torch.cat(self.biases, dim=2)
        scores = torch.baddbmm(bias, torch.stack(list(features)).float(), weight)
        return scores.unflatten(2, (len(self.lrs), self.classes))
