"""The encoders by name, and what can be read from one. Checking a preset's name imports neither torch nor timm."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from kamim import KamimError

Pooling = Literal["mean", "cls", "max", "cls_mean"]
Norm = Literal["none", "token", "joint", "batch", "final"]
Block = int | Literal["paper", "last"]
Positions = Literal["learned", "sincos", "relative"]


@dataclass(frozen=True)
class Architecture:
    """A timm model and the options that it is created with.

    patch_size: side of a model patch in px. stride: px of the image per token of the encoder's output. multiple: what
    the side of the images must be a multiple of, in px: a ViT's patch, and for a Swin whole windows at every stage.
    norm_eps: the epsilon of every LayerNorm; None is timm's. prefix: class and register tokens before the patches.
    positions: those of a ViT's patches, see kamim.models.positions; None is as timm creates the model.
    """

    timm_name: str
    patch_size: int
    stride: int
    multiple: int
    options: Mapping[str, Any] = field(hash=False)
    norm_eps: float | None = None
    prefix: int = 1
    positions: Positions | None = None

    @property
    def is_vit(self) -> bool:
        """Whether it is a plain ViT, whose tokens have the size of its patches; otherwise it is a Swin."""
        return self.stride == self.patch_size

    def with_positions(self, positions: Positions | None) -> "Architecture":
        """Returns it with these positions; None leaves its own. Raises KamimError if it cannot have them."""
        if positions is None:
            return self
        if not self.is_vit:
            raise KamimError(
                f"positions = {positions}: {self.timm_name} is a Swin, whose windows have positions of their own; "
                "leave model.positions out"
            )
        if positions == "relative" and self.prefix != 1:
            raise KamimError(
                f"positions = relative: {self.timm_name} has {self.prefix} tokens before its patches, must be 1, the "
                "class token; choose sincos or learned"
            )
        return replace(self, positions=positions)

    def check_resolution(self, resolution: int, key: str = "data.resolution") -> None:
        """Raises KamimError, which names the key, if the encoder cannot take images of this side in px."""
        if resolution % self.multiple:
            nearest = max(1, round(resolution / self.multiple)) * self.multiple
            raise KamimError(
                f"{key} = {resolution}: {self.timm_name} needs a multiple of {self.multiple} px, such as {nearest}"
            )


def _vit(
    timm_name: str, norm_eps: float | None = 1e-12, positions: Positions = "learned", **options: Any
) -> Architecture:
    """Returns a ViT with patches of 16 px, or of options' patch_size.

    norm_eps: by default that of Hugging Face's ViT, which the released code trains.
    """
    patch = options.get("patch_size", 16)
    return Architecture(timm_name, patch, patch, patch, options=options, norm_eps=norm_eps, positions=positions)


def _swin(timm_name: str) -> Architecture:
    """Returns a Swin with patches of 4 px and windows of 6 tokens, as the released code has it for 192 px."""
    return Architecture(timm_name, patch_size=4, stride=32, multiple=192, options={"window_size": 6})


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "vit_tiny": _vit("vit_tiny_patch16_224"),
        "vit_small": _vit("vit_small_patch16_224"),
        "vit_base": _vit("vit_base_patch16_224"),
        "swin_tiny": _swin("swin_tiny_patch4_window7_224"),
        "swin_base": _swin("swin_base_patch4_window7_224"),
        # Small enough for a CPU: `make demo` and tests.
        "vit_demo": _vit("vit_tiny_patch16_224", embed_dim=128, depth=6, num_heads=4),
        # Small enough for a CPU with the paper's grid of 12 x 12 patches, at 96 px.
        "vit_demo_patch8": _vit("vit_tiny_patch16_224", patch_size=8, embed_dim=128, depth=6, num_heads=4),
        # microsoft/SimMIM's ViT-B: no absolute positions, layer scale, timm's epsilon.
        "vit_base_relpos": _vit("vit_base_patch16_224", norm_eps=None, positions="relative", init_values=0.1),
        # MoCo v3's ViT-S, whose 12 heads are half as wide as those of timm's.
        "vit_small_moco": _vit("vit_small_patch16_224", norm_eps=None, num_heads=12),
    }
)


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
