"""Positions of a ViT's patches: fixed sine-cosine ones, and relative biases that all blocks share.

Sine-cosine positions are MAE's (He et al. 2022), relative biases those of BEiT (Bao et al. 2022) and microsoft/SimMIM's
ViT. Learned positions are timm's.
"""

import torch
from timm.layers import Attention
from timm.models.beit import RelativePositionBias
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor


def sincos_table(width: int, grid: int, prefix: int) -> Tensor:
    """Returns sine-cosine positions as MAE's: float32 [1, prefix + grid * grid, width], patches in reading order.

    The first half of a patch's row encodes its column x, the second half its row y, both counted from 0: each half
    holds sin(w_i p), then cos(w_i p), with w_i = 10000^(-4 i / width). The first `prefix` rows, of class and register
    tokens, are 0. width must be a multiple of 4.
    """
    assert width % 4 == 0, width
    frequencies = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    phases = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([phases.sin(), phases.cos()], dim=1)  # [grid, width / 2]
    patches = torch.cat([axis.repeat(grid, 1), axis.repeat_interleave(grid, dim=0)], dim=1)
    return torch.cat([torch.zeros(prefix, width), patches.float()])[None]


def fix_sincos(encoder: VisionTransformer) -> None:
    """Sets the position table of a ViT to sine-cosine positions, which are not trained."""
    grid, _ = encoder.patch_embed.grid_size
    prefix = encoder.pos_embed.shape[1] - grid**2
    with torch.no_grad():
        encoder.pos_embed.copy_(sincos_table(encoder.embed_dim, grid, prefix))
    encoder.pos_embed.requires_grad_(False)


class BiasedAttention(Attention):  # type: ignore[misc]
    """timm's attention with a bias added to its scores, which belongs to the encoder and not to a block.

    share_position_bias sets shared; it is a tuple, so that the table is a parameter of the encoder alone.
    """

    shared: tuple[RelativePositionBias, ...] = ()

    def bias(self) -> Tensor:
        """Returns the bias of q k^T / sqrt(d): float [heads, N, N], of a class token and the patch tokens, N in all."""
        (table,) = self.shared
        bias: Tensor = table()
        return bias

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x: [B, N, D]. Returns [B, N, D]."""
        assert attn_mask is None and not is_causal, "a ViT of images masks nothing"
        output: Tensor = super().forward(x, attn_mask=self.bias()[None].to(x.dtype))
        return output


def share_position_bias(encoder: VisionTransformer) -> None:
    """Gives an encoder of BiasedAttention its table, `rel_pos_bias`: a bias per offset of patches and head, all 0.

    Three more rows are those of attention to, from and between class tokens.
    """
    encoder.rel_pos_bias = RelativePositionBias(encoder.patch_embed.grid_size, encoder.blocks[0].attn.num_heads)
    for block in encoder.blocks:
        block.attn.shared = (encoder.rel_pos_bias,)
