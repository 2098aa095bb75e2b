"""SimMIM (Xie et al. 2022) on timm backbones: an encoder with a mask token, and a one-layer pixel head."""

from functools import partial

import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import linear

from kamim.method.masking import expand_mask
from kamim.models.architectures import architecture
from kamim.models.positions import BiasedAttention, fix_sincos, share_position_bias
from kamim.models.presets import Positions
from kamim.models.stochastic_depth import replace_drop_paths


def build_encoder(
    name: str, resolution: int, drop_path: float = 0.0, positions: Positions | None = None
) -> VisionTransformer | SwinTransformer:
    """Builds the encoder `name` for images of side `resolution`, with random weights and without a classifier.

    name, positions: see architectures.architecture, which says what it raises. drop_path: stochastic depth rate of the
    last block. If it is not 0, stochastic_depth.draw_paths has to be called before every training batch.
    """
    known = architecture(name, positions)
    options = dict(known.options)
    if known.norm_eps is not None:
        options["norm_layer"] = partial(nn.LayerNorm, eps=known.norm_eps)
    if known.positions is not None:
        options["pos_embed"] = "none" if known.positions == "relative" else "learn"
    if known.positions == "relative":
        options["attn_layer"] = BiasedAttention
    encoder = timm.create_model(
        known.timm_name, img_size=resolution, num_classes=0, drop_path_rate=drop_path, **options
    )
    assert isinstance(encoder, VisionTransformer | SwinTransformer)
    if known.positions == "relative":
        share_position_bias(encoder)
    if known.positions == "sincos":
        fix_sincos(encoder)
    replace_drop_paths(encoder)
    return encoder


class MaskedImageModel(nn.Module):
    """Encoder, mask token and pixel head, as SimMIM: masked patches are replaced after patch embedding.

    The head is a 1x1 convolution from every output token to stride x stride x 3 pixels, and a pixel shuffle. It is
    computed as a matrix product: a convolution of tokens, whose channels come last, gives its weight a gradient with
    strides that are not the weight's, which DDP would copy at every step.
    """

    def __init__(self, name: str, resolution: int, drop_path: float = 0.0, positions: Positions | None = None):
        super().__init__()
        self.name = name
        self.resolution = resolution
        self.encoder = build_encoder(name, resolution, drop_path, positions)
        stride = architecture(name).stride
        embedding = self.encoder.patch_embed.proj
        self.mask_token = nn.Parameter(torch.zeros(embedding.out_channels))
        pixels = nn.Conv2d(self.encoder.num_features, stride * stride * 3, kernel_size=1)
        self.head = nn.Sequential(pixels, nn.PixelShuffle(stride))
        for convolution in (embedding, pixels):
            nn.init.trunc_normal_(convolution.weight, std=0.02)
            if convolution.bias is not None:  # the embedding of a ViT that norms its tokens next (CLIP's) has none
                nn.init.zeros_(convolution.bias)

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """Reconstructs every pixel.

        images: float [B, 3, R, R], normalised. mask: bool [B, g, g], True for masked blocks; g divides the
        encoder's patch grid. Returns [B, 3, R, R] in normalised units.
        """
        if isinstance(self.encoder, VisionTransformer):
            tokens = self._encode_vit(self.encoder, images, mask)
        else:
            tokens = self._encode_swin(self.encoder, images, mask)
        pixels, shuffle = self.head
        assert isinstance(pixels, nn.Conv2d)
        values = linear(tokens, pixels.weight.flatten(1), pixels.bias)
        reconstruction: Tensor = shuffle(values.permute(0, 3, 1, 2))
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
