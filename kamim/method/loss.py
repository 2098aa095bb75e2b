"""Training objectives, computed in float32 for any precision of the model: Eq. 1 (SimMIM), Eq. 3 (KAMIM), MAE's."""

from typing import TYPE_CHECKING

from kamim.method.masking import expand_mask

if TYPE_CHECKING:
    from torch import Tensor


def masked_l1(images: "Tensor", reconstruction: "Tensor", mask: "Tensor", weights: "Tensor | None" = None) -> "Tensor":
    """Returns the mean over masked pixels of W |x_hat - x| (Eq. 3), or of |x_hat - x| without weights (Eq. 1).

    images, reconstruction: [B, 3, R, R] in normalised units. mask: bool [B, g, g], True = masked.
    weights: [B, c, c], W of Eq. 2. Blocks and cells are repeated to pixels. The sum is divided by the number of
    masked pixels + 1e-5 and by the 3 channels, as in the released code. The result is a float32 scalar.
    """
    return _masked_mean((reconstruction.float() - images.float()).abs(), mask, weights)


def masked_l2(images: "Tensor", reconstruction: "Tensor", mask: "Tensor", weights: "Tensor | None" = None) -> "Tensor":
    """Returns the mean over masked pixels of W (x_hat - x)^2, MAE's loss if there are no weights.

    Shapes and the divisor are those of masked_l1. MAE's x are patches of mean 0 and variance 1 (normalise_patches).
    """
    return _masked_mean((reconstruction.float() - images.float()).square(), mask, weights)


def _masked_mean(error: "Tensor", mask: "Tensor", weights: "Tensor | None") -> "Tensor":
    side = error.shape[-1]
    masked = expand_mask(mask, side).unsqueeze(1).float()
    scale = masked if weights is None else masked * expand_mask(weights, side).unsqueeze(1)
    return (error * scale).sum() / (masked.sum() + 1e-5) / error.shape[1]


def normalise_patches(images: "Tensor", patch_size: int) -> "Tensor":
    """Normalises every patch of patch_size px to mean 0 and variance 1 over its pixels and channels, as in MAE.

    images: [B, 3, R, R]. Returns float32 of the same shape.
    """
    from torch.nn.functional import pixel_shuffle

    patches, mean, deviation = _patches(images, patch_size)
    return pixel_shuffle((patches - mean) / deviation, patch_size)


def denormalise_patches(normalised: "Tensor", images: "Tensor", patch_size: int) -> "Tensor":
    """Inverts normalise_patches with the mean and standard deviation of the patches of `images`."""
    from torch.nn.functional import pixel_shuffle, pixel_unshuffle

    _, mean, deviation = _patches(images, patch_size)
    return pixel_shuffle(pixel_unshuffle(normalised.float(), patch_size) * deviation + mean, patch_size)


def _patches(images: "Tensor", patch_size: int) -> "tuple[Tensor, Tensor, Tensor]":
    """Returns patches, float32 [B, 3 * p * p, R / p, R / p], their mean and deviation [B, 1, R / p, R / p]."""
    from torch.nn.functional import pixel_unshuffle

    patches = pixel_unshuffle(images.float(), patch_size)
    return patches, patches.mean(dim=1, keepdim=True), (patches.var(dim=1, keepdim=True) + 1e-6).sqrt()
