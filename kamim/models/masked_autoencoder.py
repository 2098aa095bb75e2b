"""MAE (He et al. 2022): the encoder sees the visible patches only, a decoder reconstructs the masked ones.

Parameters have the names of the public code, below `encoder.` for the encoder's; attributes, too.
"""

from functools import partial

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from kamim.method.masking import expand_mask
from kamim.models.architectures import architecture, check_maskable
from kamim.models.masked_image_model import build_encoder
from kamim.models.positions import sincos_table
from kamim.models.presets import Positions

EPS = 1e-6  # of the decoder's LayerNorms


class MaskedAutoencoder(nn.Module):
    """A ViT encoder of the visible patches, and a decoder of width `width` with `depth` blocks of `heads` heads.

    It is called as MaskedImageModel is: (images, mask) -> reconstruction.
    """

    def __init__(
        self,
        name: str,
        resolution: int,
        drop_path: float = 0.0,
        positions: Positions | None = None,
        width: int = 512,
        depth: int = 8,
        heads: int = 16,
    ):
        super().__init__()
        check_maskable(name, positions)
        self.name = name
        self.resolution = resolution
        self.encoder = build_encoder(name, resolution, drop_path, positions)
        assert isinstance(self.encoder, VisionTransformer)
        self.patch_size = architecture(name).patch_size
        grid = resolution // self.patch_size
        self.decoder_embed = nn.Linear(self.encoder.embed_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(sincos_table(width, grid, self._class_tokens()), requires_grad=False)
        norm = partial(nn.LayerNorm, eps=EPS)
        self.decoder_blocks = nn.Sequential(
            *(Block(width, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth))
        )
        self.decoder_norm = norm(width)
        self.decoder_pred = nn.Linear(width, self.patch_size**2 * 3)
        self._initialise()

    def _class_tokens(self) -> int:
        return int(self.encoder.cls_token is not None)

    def _initialise(self) -> None:
        """Initialises as the public code: Xavier's uniform for linear layers, N(0, 0.02) for tokens."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.encoder.patch_embed.proj.weight.flatten(1))  # a view
        for token in (self.mask_token, self.encoder.cls_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """Reconstructs every patch.

        images: float [B, 3, R, R], normalised. mask: bool [B, g, g], True for masked blocks, as many in every image; g
        divides the encoder's patch grid. Returns [B, 3, R, R] in normalised units.
        """
        grid = self.resolution // self.patch_size
        removed = expand_mask(mask, grid).flatten(1)  # [B, N], True is removed
        visible = int((~removed[0]).sum())
        kept = removed.int().argsort(dim=1, stable=True)[:, :visible, None]  # [B, V, 1], in reading order
        return self._unpatchify(self._decode(self._encode(images, kept), kept), grid)

    def _encode(self, images: Tensor, kept: Tensor) -> Tensor:
        """Returns the encoder's tokens of the patches `kept` [B, V, 1], after its own P tokens: [B, P + V, D]."""
        vit, prefix = self.encoder, self.encoder.num_prefix_tokens
        tokens = vit._pos_embed(vit.patch_embed(images))
        patches = tokens[:, prefix:].gather(1, kept.expand(-1, -1, tokens.shape[2]))
        latent: Tensor = vit.norm(vit.blocks(vit.norm_pre(torch.cat([tokens[:, :prefix], patches], dim=1))))
        return latent

    def _decode(self, latent: Tensor, kept: Tensor) -> Tensor:
        """Returns the pixels of all N patches, [B, N, p * p * 3], from the tokens of those kept."""
        prefix, classes = self.encoder.num_prefix_tokens, self._class_tokens()
        tokens = self.decoder_embed(latent)
        patches = self.mask_token.to(tokens.dtype).expand(len(tokens), self.decoder_pos_embed.shape[1] - classes, -1)
        patches = patches.scatter(1, kept.expand(-1, -1, tokens.shape[2]), tokens[:, prefix:])
        tokens = torch.cat([tokens[:, :classes], patches], dim=1) + self.decoder_pos_embed
        tokens = self.decoder_norm(self.decoder_blocks(tokens))
        pixels: Tensor = self.decoder_pred(tokens)[:, classes:]
        return pixels

    def _unpatchify(self, pixels: Tensor, grid: int) -> Tensor:
        """Returns images [B, 3, R, R] from patches [B, N, p * p * 3], whose channels come last, as the public code."""
        patches = pixels.unflatten(2, (self.patch_size, self.patch_size, 3)).unflatten(1, (grid, grid))
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
