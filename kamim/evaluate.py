"""Evaluation loops: the paper's linear probe on a frozen encoder."""

from collections.abc import Callable, Iterable

import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from kamim import schedule
from kamim.batch import Batch, normalise
from kamim.config import Probe
from kamim.loop import Batches, Progress, autocast, should_compile
from kamim.models import probe_block, probe_features, probe_width

Augment = Callable[[Batch], tuple[Tensor, Tensor]]  # -> normalised images [B, 3, R, R], soft targets [B, classes]


def linprobe(
    encoder: VisionTransformer | SwinTransformer, config: Probe, train: Batches, val: Iterable[Batch], augment: Augment,
    classes: int, steps_per_epoch: int, device: torch.device, progress: Progress,
) -> dict[str, float]:  # fmt: skip
    """Trains one linear layer on frozen features; returns top1 and top5 on `val`, in per cent, of the last epoch.

    Protocol (section 4.1; released code): probe_features, AdamW, cosine, soft-label cross entropy.
    """
    block = probe_block(encoder, config.block)
    encoder = encoder.to(device).eval().requires_grad_(False)
    torch.manual_seed(config.seed)
    probe = nn.Linear(probe_width(encoder), classes).to(device)
    optimizer = torch.optim.AdamW(
        probe.parameters(), lr=config.optim.lr, betas=config.optim.betas, weight_decay=config.optim.weight_decay
    )
    scheduler = schedule.cosine(optimizer, config.optim, steps_per_epoch)

    read = torch.compile(probe_features) if should_compile(config.compute, device) else probe_features

    def features(images: Tensor) -> Tensor:
        with torch.no_grad(), autocast(config.compute, device):
            return read(encoder, images, block).float()

    total = config.optim.epochs * steps_per_epoch
    loss_sum = torch.zeros((), device=device)
    for batch in train(0, total):
        images, targets = augment(batch)
        loss = nn.functional.cross_entropy(probe(features(images)), targets)
        (loss * batch.share).backward()
        loss_sum += loss.detach() * batch.share
        if batch.last:
            scheduler.step_update(batch.step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            progress(batch.step + 1, total, {"loss": float(loss_sum)})
            loss_sum.zero_()
    return _accuracy(val, classes, device, lambda images: probe(features(images)))


def _accuracy(
    batches: Iterable[Batch], classes: int, device: torch.device, logits: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    metrics = {
        f"top{k}": MulticlassAccuracy(classes, top_k=min(k, classes), average="micro").to(device) for k in (1, 5)
    }
    with torch.no_grad():
        for batch in batches:
            scores = logits(normalise(batch.images))
            for metric in metrics.values():
                metric.update(scores, batch.labels)
    return {name: 100 * float(metric.compute()) for name, metric in metrics.items()}
