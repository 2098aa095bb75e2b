"""What looks at a model while it trains: pictures of what it makes of a few samples, and what its features are worth.

Neither trains anything, draws from a generator or leaves a trace in the model, so a run with them is the run without.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kamim.method.keypoints import map_counts
from kamim.method.masking import block_masks
from kamim.method.weighting import counts_to_weights
from kamim.models.knn import knn
from kamim.models.masked_image_model import MaskedImageModel, expand_mask
from kamim.models.readout import Readout, blocks, fixed, resolve
from kamim.reporting import plots
from kamim.training.config import Compute, Pretrain
from kamim.training.metrics import Metrics
from kamim.training.pretrain import to_pixels
from kamim.training.trainer import Observer, autocast
from pipelines.batch import Batch, normalise, upload

NEIGHBOURS = 20


def panel(config: Pretrain, model: MaskedImageModel, every: int, samples: Callable[[], Batch]) -> Observer:
    """Shows the samples every so many steps: masked, reconstructed, and for KAMIM their keypoints and weights.

    samples: always the same, on the model's device; counts, if any, in cells of one pixel, which is the map F.
    """

    def look(step: int, metrics: Metrics) -> None:
        batch = samples()
        device = batch.images.device
        grid = config.data.resolution // config.mask.patch_size
        mask = upload(block_masks(config.seed, 0, batch.indices, grid, config.mask.ratio), device)
        images = normalise(batch.images)
        with _looked_at(model), autocast(config.compute, device):
            made = model.forward(images, mask)  # not compiled: it would be once more, for this size
        bitmaps = weights = None
        if config.weighting is not None and batch.counts is not None:
            bitmaps = batch.counts.cpu().numpy() > 0
            counts = torch.stack([torch.from_numpy(map_counts(f, config.weighting.patch_size)) for f in bitmaps])
            weights = counts_to_weights(counts, config.weighting.patch_size, config.weighting.temperature).numpy()
        figure = plots.panel_sheet(
            batch.images.cpu().numpy(), expand_mask(mask, config.data.resolution).cpu().numpy(),
            to_pixels(config, made, images).cpu().numpy(), bitmaps, weights, f"after {step} steps",
        )  # fmt: skip
        metrics.panel(step, plots.pixels(figure))

    return Observer(every, look)


def knn_probe(
    compute: Compute, model: MaskedImageModel, every: int, classes: int, train: Callable[[], Iterable[Batch]],
    val: Callable[[], Iterable[Batch]],
) -> Observer:  # fmt: skip
    """Notes knn_top1 every so many steps: per cent of val whose class NEIGHBOURS samples of train vote for.

    Features are those of `kamim eval --mode knn`. train, val: labelled batches on the model's device.
    """
    encoder = model.encoder
    readout = Readout(resolve(encoder, "paper"), "mean", "none")

    def features(batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
        found, labels = [], []
        for batch in batches:
            with autocast(compute, batch.images.device):
                *_, (_, tokens) = blocks(encoder, normalise(batch.images), readout.block)
                found.append(fixed(encoder, tokens, readout).float())
            labels.append(batch.labels.clone())  # the loader may use its memory again
        return torch.cat(found), torch.cat(labels)

    def look(step: int, metrics: Metrics) -> None:
        with _looked_at(model):
            known, known_labels = features(train())
            asked, labels = features(val())
            k = min(NEIGHBOURS, len(known))
            made = knn(
                known, known_labels, asked, labels, classes, known.device, lambda done, total: None, ks=(k,)
            )  # fmt: skip
        metrics.note({"knn_top1": made[str(k)]["top1"]})

    return Observer(every, look)


@contextmanager
def _looked_at(model: MaskedImageModel) -> Iterator[None]:
    """Inside, the model evaluates and keeps no gradients; behind it, it trains again if it did."""
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was)
