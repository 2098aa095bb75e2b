"""What an evaluation reads from an encoder: the tokens after one of its blocks, normed and pooled."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from kamim import KamimError
from kamim.models.architectures import Block, Norm, Pooling

PIXELS = 32  # side to which Pixels shrinks an image


class Pixels(nn.Module):
    """No encoder at all, the baseline: the image of PIXELS x PIXELS px as one token [B, 1, 3 * PIXELS^2].

    stride: side in px of a token of token_map.
    """

    num_features = 3 * PIXELS * PIXELS

    def __init__(self, stride: int = 16):
        super().__init__()
        self.stride = stride

    def forward(self, images: Tensor) -> Tensor:
        """images: float [B, 3, R, R]."""
        return nn.functional.adaptive_avg_pool2d(images, PIXELS).flatten(1).unsqueeze(1)


Encoder: TypeAlias = VisionTransformer | SwinTransformer | Pixels


@dataclass(frozen=True, order=True)
class Readout:
    """block: whose output, from 1 (of a Swin: its stage). norm: what happens to it before or after pooling.

    none; token: a LayerNorm without affine; final: the encoder's own; joint, batch: see kamim.evaluation.probe.Head.
    pooling tokens: nothing is pooled, and the features are all patch tokens.
    """

    block: int
    pooling: Pooling | Literal["tokens"]
    norm: Norm

    def __str__(self) -> str:
        return f"{self.block}-{self.pooling}-{self.norm}"


def depth(encoder: Encoder) -> int:
    """Returns the number of blocks that can be read: a ViT's blocks, a Swin's stages."""
    if isinstance(encoder, Pixels):
        return 1
    return len(encoder.layers if isinstance(encoder, SwinTransformer) else encoder.blocks)


def resolve(encoder: Encoder, block: Block) -> int:
    """Returns the number of a block: "paper" is a ViT's 8th, or its last if it has fewer, and a Swin's last stage.

    Raises KamimError for a block that the encoder does not have.
    """
    blocks = depth(encoder)
    if block == "last":
        return blocks
    if block == "paper":
        return min(8, blocks) if isinstance(encoder, VisionTransformer) else blocks
    if block > blocks:
        raise KamimError(f"block = {block}: the encoder has blocks 1 to {blocks}")
    return block


def check(encoder: Encoder, readout: Readout) -> None:
    """Raises KamimError if the encoder has no such tokens."""
    if "cls" in readout.pooling and not has_class_token(encoder):
        raise KamimError(f"pooling = {readout.pooling}: the encoder has no class token; take mean or max")
    if readout.norm in ("final", "batch") and (isinstance(encoder, Pixels) or readout.block != depth(encoder)):
        raise KamimError(
            f"norm = {readout.norm}: begins with the encoder's own norm, which is of its last block alone; block = "
            f"{readout.block} has none"
        )
    if readout.norm == "joint" and readout.pooling not in ("mean", "max"):
        raise KamimError(f"norm = joint: is over patch tokens; pooling = {readout.pooling} reads another one")


def width(encoder: Encoder, block: int) -> int:
    """Returns D of the tokens [B, P + N, D] after a block."""
    if isinstance(encoder, SwinTransformer):
        return int(encoder.feature_info[block - 1]["num_chs"])
    return encoder.num_features


def prefix(encoder: Encoder) -> int:
    """Returns the number P of class and register tokens before the patch tokens."""
    return encoder.num_prefix_tokens if isinstance(encoder, VisionTransformer) else 0


def has_class_token(encoder: Encoder) -> bool:
    """Returns whether the first token is a class token; registers may come without one."""
    return isinstance(encoder, VisionTransformer) and encoder.cls_token is not None


def blocks(encoder: Encoder, images: Tensor, last: int) -> Iterator[tuple[int, Tensor]]:
    """Yields (number, its output [B, P + N, D]) of the blocks 1 .. last; later blocks are not computed.

    images: float [B, 3, R, R], normalised. The outputs equal those of timm's forward_intermediates bit for bit, but
    only one is held at a time.
    """
    if isinstance(encoder, Pixels):
        yield 1, encoder(images)
        return
    tokens = encoder.patch_embed(images)
    if isinstance(encoder, SwinTransformer):
        for number, stage in enumerate(encoder.layers[:last], 1):
            tokens = stage(tokens)
            yield number, tokens.flatten(1, 2)
        return
    tokens = encoder.norm_pre(encoder._pos_embed(tokens))
    for number, block in enumerate(encoder.blocks[:last], 1):
        tokens = block(tokens)
        yield number, tokens


def tokens_after(encoder: Encoder, images: Tensor, block: int) -> Tensor:
    """Returns the output of one block: [B, P + N, D]."""
    *_, (_, tokens) = blocks(encoder, images, block)
    return tokens


def token_map(encoder: Encoder, images: Tensor, block: int) -> Tensor:
    """Returns the patch tokens after a block at their places in the image: [B, D, g, g].

    Those of the last block are normed by the encoder's final norm. Of Pixels, a token is the pixels of a patch.
    """
    if isinstance(encoder, Pixels):
        return nn.functional.pixel_unshuffle(images, encoder.stride)
    tokens = tokens_after(encoder, images, block)
    if block == depth(encoder):
        tokens = encoder.norm(tokens)
    tokens = tokens[:, prefix(encoder) :]
    side = math.isqrt(tokens.shape[1])
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def pool(tokens: Tensor, pooling: Pooling | Literal["tokens"], prefix: int) -> Tensor:
    """Pools tokens [B, P + N, D] to [B, D]; cls_mean to [B, 2 D], tokens to [B, N D]. prefix: P."""
    if pooling == "tokens":
        return tokens[:, prefix:].flatten(1)
    if pooling == "cls":
        return tokens[:, 0]
    if pooling == "max":
        return tokens[:, prefix:].amax(dim=1)
    mean = tokens[:, prefix:].mean(dim=1)
    return torch.cat([tokens[:, 0], mean], dim=1) if pooling == "cls_mean" else mean


def fixed(encoder: Encoder, tokens: Tensor, readout: Readout) -> Tensor:
    """Returns the features [B, D] of a readout (see pool for its widths), before a norm that is trained."""
    if readout.norm == "token":
        tokens = nn.functional.layer_norm(tokens, tokens.shape[-1:])
    elif readout.norm in ("final", "batch"):
        assert not isinstance(encoder, Pixels)
        tokens = encoder.norm(tokens)
    return pool(tokens, readout.pooling, prefix(encoder))
