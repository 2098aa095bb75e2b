"""The paper's encoders and a few more, by name."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from kamim import KamimError

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
