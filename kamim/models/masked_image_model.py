"""SimMIM on timm backbones: encoder with a mask token, and a one-layer pixel head."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import linear

from kamim.method.masking import expand_mask
from kamim.models.stochastic_depth import replace_drop_paths


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
            raise ValueError(
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


def build_encoder(name: str, resolution: int, drop_path: float = 0.0) -> VisionTransformer | SwinTransformer:
    """The timm backbone `name` for images of side `resolution`, random weights, no classifier.

    drop_path: stochastic depth rate of the last block. With one, stochastic_depth.draw_paths has to be called before
    every training batch.
    """
    architecture = ARCHITECTURES[name]
    options = dict(architecture.options)
    if architecture.norm_eps is not None:
        options["norm_layer"] = partial(nn.LayerNorm, eps=architecture.norm_eps)
    encoder = timm.create_model(
        architecture.timm_name, img_size=resolution, num_classes=0, drop_path_rate=drop_path, **options
    )
    assert isinstance(encoder, VisionTransformer | SwinTransformer)
    replace_drop_paths(encoder)
    return encoder


class MaskedImageModel(nn.Module):
    """Encoder, mask token and pixel head, as SimMIM: masked patches are replaced after patch embedding.

    The head is a 1x1 convolution from every output token to stride x stride x 3 pixels, and a pixel shuffle. It is
    computed as a matrix product: a convolution of tokens, whose channels come last, gives its weight a gradient with
    strides that are not the weight's, which DDP would copy at every step.
    """

    def __init__(self, name: str, resolution: int, drop_path: float = 0.0):
        super().__init__()
        self.name = name
        self.resolution = resolution
        self.encoder = build_encoder(name, resolution, drop_path)
        stride = ARCHITECTURES[name].stride
        embedding = self.encoder.patch_embed.proj
        self.mask_token = nn.Parameter(torch.zeros(embedding.out_channels))
        pixels = nn.Conv2d(self.encoder.num_features, stride * stride * 3, kernel_size=1)
        self.head = nn.Sequential(pixels, nn.PixelShuffle(stride))
        for convolution in (embedding, pixels):
            assert convolution.bias is not None
            nn.init.trunc_normal_(convolution.weight, std=0.02)
            nn.init.zeros_(convolution.bias)

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """Reconstruction of every pixel.

        images: float [B, 3, R, R], normalised. mask: bool [B, g, g], True where masked, g dividing the
        encoder's patch grid. Returns [B, 3, R, R] in normalised units.
        """
        if isinstance(self.encoder, VisionTransformer):
            tokens = self._encode_vit(self.encoder, images, mask)
        else:
            tokens = self._encode_swin(self.encoder, images, mask)
        pixels, shuffle = self.head
        assert isinstance(pixels, nn.Conv2d)
        made = linear(tokens, pixels.weight.flatten(1), pixels.bias)
        reconstruction: Tensor = shuffle(made.permute(0, 3, 1, 2))
        return reconstruction

    def _encode_vit(self, vit: VisionTransformer, images: Tensor, mask: Tensor) -> Tensor:
        tokens = vit.patch_embed(images)  # [B, N, D]
        grid = int(tokens.shape[1] ** 0.5)
        masked = expand_mask(mask, grid).flatten(1).unsqueeze(-1)
        tokens = torch.where(masked, self.mask_token.to(tokens.dtype), tokens)
        tokens = vit.norm_pre(vit._pos_embed(tokens))
        tokens = vit.norm(vit.blocks(tokens))[:, vit.num_prefix_tokens :]
        return tokens.unflatten(1, (grid, grid))

    def _encode_swin(self, swin: SwinTransformer, images: Tensor, mask: Tensor) -> Tensor:
        tokens = swin.patch_embed(images)  # [B, g, g, D]
        masked = expand_mask(mask, tokens.shape[1]).unsqueeze(-1)
        tokens = torch.where(masked, self.mask_token.to(tokens.dtype), tokens)
        normed: Tensor = swin.norm(swin.layers(tokens))
        return normed
