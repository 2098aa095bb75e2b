"""The encoders by name, and what can be read of one. Neither torch nor timm is imported to check a name."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from kamim import KamimError

Pooling = Literal["mean", "cls", "max", "cls_mean"]
Norm = Literal["none", "token", "joint", "batch", "final"]
Block = int | Literal["paper", "last"]


@dataclass(frozen=True)
class Architecture:
    """A timm model and how it is made. stride: px of the image per token of the encoder's output.

    norm_eps: the epsilon of every LayerNorm where timm's is not the released code's (Hugging Face's ViT: 1e-12).
    """

    timm_name: str
    patch_size: int
    stride: int
    options: Mapping[str, Any]
    norm_eps: float | None = None

    def check_resolution(self, resolution: int) -> None:
        """Raises ValueError where the encoder cannot take images of this side."""
        window = self.options.get("window_size", 1)
        if resolution % (self.stride * window):
            raise KamimError(
                f"data.resolution = {resolution}: {self.timm_name} needs a multiple of {self.stride * window}"
            )


def _vit(timm_name: str, **options: Any) -> Architecture:
    return Architecture(timm_name, patch_size=16, stride=16, options=options, norm_eps=1e-12)


def _swin(timm_name: str) -> Architecture:
    return Architecture(timm_name, patch_size=4, stride=32, options={"window_size": 6})


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "vit_tiny": _vit("vit_tiny_patch16_224"),
        "vit_small": _vit("vit_small_patch16_224"),
        "vit_base": _vit("vit_base_patch16_224"),
        "swin_tiny": _swin("swin_tiny_patch4_window7_224"),
        "swin_base": _swin("swin_base_patch4_window7_224"),
        # Small enough for a CPU: `make demo` and tests.
        "vit_demo": _vit("vit_tiny_patch16_224", embed_dim=128, depth=6, num_heads=4),
    }
)
