"""From a batch to its loss: mask, normalisation, network, weights W, and Eq. 1, Eq. 3 or MAE's loss.

Training computes losses with `MaskedReconstruction`. Panels, replays and evaluation reconstruct with its parts.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from kamim.config.pretrain import Compute, Mask, Pretrain, Weighting
from kamim.method.loss import denormalise_patches, masked_l1, masked_l2, normalise_patches
from kamim.method.masking import block_masks, expand_mask
from kamim.method.weighting import counts_to_weights
from kamim.models.stochastic_depth import draw_paths
from kamim.runtime.device import autocast
from kamim.training.trainer import Losses
from pipelines.batch import Batch, denormalise, normalise, upload


class MaskedReconstruction:
    """The objective of pretraining: Eq. 1, Eq. 3 or MAE's loss of a micro-batch."""

    def __init__(self, config: Pretrain, forward_model: nn.Module):
        self._config = config
        self._forward_model = forward_model

    def __call__(self, batch: Batch) -> Losses:
        """Returns the loss and, to log, the loss without weights and, if there are any, the mean and largest W."""
        config = self._config
        reconstruction = reconstruct(self._forward_model, batch, config.mask, config.seed, batch.epoch, config.compute)
        target, weights = reconstruction.target(config.normalised_patches), loss_weights(batch, config.weighting)
        error = masked_error(config.method)
        loss = error(target, reconstruction.output, reconstruction.mask, weights)
        if weights is None:
            return Losses(loss, {"loss_unweighted": loss})
        unweighted = error(target, reconstruction.output.detach(), reconstruction.mask)
        return Losses(
            loss, {"loss_unweighted": unweighted, "weight_mean": weights.mean()}, {"weight_max": weights.max()}
        )


def reconstruct(
    forward_model: nn.Module, batch: Batch, mask: Mask, seed: int, epoch: int, compute: Compute
) -> "Reconstruction":
    """Masks a batch as a run with this seed does in `epoch`, and reconstructs it."""
    device = batch.images.device
    grid = batch.images.shape[1] // mask.patch_size
    masked = upload(block_masks(seed, epoch, batch.indices, grid, mask.ratio), device)
    images = normalise(batch.images)
    draw_paths(forward_model, seed, epoch, batch.indices, device)
    with autocast(compute, device):
        output = forward_model(images, masked)
    return Reconstruction(images, masked, output)


def loss_weights(batch: Batch, weighting: Weighting | None) -> Tensor | None:
    """Returns W of Eq. 2 for the batch's keypoint counts, float32 [B, c, c]; None without a weighting."""
    if weighting is None:
        return None
    assert batch.counts is not None, "KAMIM needs keypoint counts"
    return counts_to_weights(batch.counts, weighting.patch_size, weighting.temperature, weighting.normalize)


def masked_error(method: str) -> Callable[..., Tensor]:
    """Returns the loss of a method, masked_l1 or masked_l2, with their parameters."""
    return masked_l2 if method == "mae" else masked_l1


@dataclass(frozen=True)
class Reconstruction:
    """A reconstructed batch.

    images: normalised, float32 [B, 3, R, R]. mask: bool [B, g, g], True = masked. output: [B, 3, R, R].
    """

    images: Tensor
    mask: Tensor
    output: Tensor

    @property
    def masked_pixels(self) -> Tensor:
        """The mask of every pixel: bool [B, R, R]."""
        return expand_mask(self.mask, self.images.shape[-1])

    def target(self, normalised_patches: int | None) -> Tensor:
        """Returns the target of the loss, [B, 3, R, R]: the images, or their normalised patches (MAE).

        normalised_patches: side of these patches in px, or None.
        """
        return self.images if normalised_patches is None else normalise_patches(self.images, normalised_patches)

    def pixels(self, normalised_patches: int | None) -> Tensor:
        """Returns the output as images, uint8 [B, R, R, 3].

        normalised_patches: as in `target`. Such an output has no brightness of its own; its patches get the mean and
        deviation of the image's patches.
        """
        output = self.output
        if normalised_patches is not None:
            output = denormalise_patches(output, self.images, normalised_patches)
        return denormalise(output.float().nan_to_num())
