"""Masking a batch and having it reconstructed: the step that training, panels, replays and evaluation share."""

from dataclasses import dataclass

from torch import Tensor, nn

from kamim.method.masking import block_masks, expand_mask
from kamim.method.objective import denormalise_patches, normalise_patches
from kamim.models.stochastic_depth import draw_paths
from kamim.training.config import Compute, Mask
from kamim.training.trainer import autocast
from pipelines.batch import Batch, denormalise, normalise, upload


@dataclass(frozen=True)
class Reconstruction:
    """images: normalised, float32 [B, 3, R, R]. mask: bool [B, g, g], True where masked. output: [B, 3, R, R]."""

    images: Tensor
    mask: Tensor
    output: Tensor

    @property
    def masked_pixels(self) -> Tensor:
        """The mask, for every pixel: bool [B, R, R]."""
        return expand_mask(self.mask, self.images.shape[-1])

    def target(self, normalised_patches: int | None) -> Tensor:
        """What the output is compared with: the images, or their normalised patches (MAE's): [B, 3, R, R].

        normalised_patches: side of these patches in px, or None.
        """
        return self.images if normalised_patches is None else normalise_patches(self.images, normalised_patches)

    def pixels(self, normalised_patches: int | None) -> Tensor:
        """The output as an image: uint8 [B, R, R, 3].

        An output that was trained on normalised patches has no brightness of its own: its patches get the mean and
        deviation of the image's.
        """
        output = self.output
        if normalised_patches is not None:
            output = denormalise_patches(output, self.images, normalised_patches)
        return denormalise(output.float().nan_to_num())


def reconstruct(
    network: nn.Module, batch: Batch, mask: Mask, seed: int, epoch: int, compute: Compute
) -> Reconstruction:
    """Masks the batch's images as a run of this seed masks them in `epoch`, and reconstructs them."""
    device = batch.images.device
    grid = batch.images.shape[1] // mask.patch_size
    masked = upload(block_masks(seed, epoch, batch.indices, grid, mask.ratio), device)
    images = normalise(batch.images)
    draw_paths(network, seed, epoch, batch.indices, device)
    with autocast(compute, device):
        output = network(images, masked)
    return Reconstruction(images, masked, output)
