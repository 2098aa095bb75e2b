"""The encoders by name, and what can be read from one. Checking a preset's name imports neither torch nor timm."""

import math
from typing import Literal

from kamim import KamimError
from kamim.models.presets import ARCHITECTURES, Architecture, Positions

Pooling = Literal["mean", "cls", "max", "cls_mean"]
Norm = Literal["none", "token", "joint", "batch", "final"]
Block = int | Literal["paper", "last"]


def architecture(name: str, positions: Positions | None = None) -> Architecture:
    """Returns the preset `name`, or timm's ViT or Swin of that name as timm creates it, LayerNorm epsilon included.

    positions: those of its patches; None is its own. Only a name that is not a preset's imports timm, which takes
    seconds. Raises KamimError, with the nearest names, for one that is neither, for a model that cannot be trained as a
    masked image model here, and for positions that the model cannot have.
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name].with_positions(positions)
    from kamim.models.timm_models import describe

    return describe(name).with_positions(positions)


def check_patches(patch_size: int, mask_patch_size: int, weight_patch_size: int | None, resolution: int) -> None:
    """Raises KamimError, with the sizes that are possible, unless patches, mask blocks and weight cells fit an image.

    patch_size: a model patch. mask_patch_size: a block of SimMIM's mask. weight_patch_size: w_ps, a cell of W, or None.
    All in px.
    """
    if resolution % patch_size:
        raise KamimError(
            f"data.resolution = {resolution}: must be a multiple of model patch = {patch_size}, such as "
            f"{max(1, round(resolution / patch_size)) * patch_size}"
        )
    for key, size in (("mask.patch_size", mask_patch_size), ("weighting.patch_size", weight_patch_size)):
        if size is not None and resolution % size:
            unit = patch_size if key == "mask.patch_size" else 1
            raise KamimError(
                f"data.resolution = {resolution}: must be a multiple of {key} = {size}; sizes that fit are "
                f"{_divisors(resolution, unit)}"
            )
    if mask_patch_size % patch_size:
        raise KamimError(
            f"mask.patch_size = {mask_patch_size}: must be a multiple of model patch = {patch_size}; sizes that fit "
            f"are {_divisors(resolution, patch_size)}"
        )


def check_maskable(name: str, positions: Positions | None = None) -> None:
    """Raises KamimError unless an encoder can see the visible patches alone, as MAE's: a ViT of absolute positions."""
    known = architecture(name, positions)
    if not known.is_vit:
        raise KamimError(
            f"method = mae: {known.timm_name} is a Swin, which cannot leave out masked patches; choose a ViT"
        )
    if known.positions == "relative":
        raise KamimError("method = mae: cannot have relative positions; set model.positions = sincos or learned")


def _divisors(whole: int, unit: int) -> str:
    """Returns the divisors of `whole` that are multiples of `unit`, the largest 8 below the whole, ascending."""
    divisors = {d for small in range(1, math.isqrt(whole) + 1) if whole % small == 0 for d in (small, whole // small)}
    return ", ".join(map(str, sorted(d for d in divisors if d % unit == 0)[:-1][-8:])) or str(whole)
