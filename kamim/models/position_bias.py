"""Relative position biases that all blocks of a ViT share, as in BEiT (Bao et al. 2022) and microsoft/SimMIM's ViT."""

from timm.layers import Attention
from timm.models.beit import RelativePositionBias
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor


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
