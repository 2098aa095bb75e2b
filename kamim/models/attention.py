"""Attention weights of timm encoders, computed beside the unchanged model.

The model runs unchanged, with fused attention (SDPA), which does not return its softmax weights. Hooks on the attention
modules recompute them from q and k and pass them on layer by layer, so that only one layer's weights of one batch are
held in memory. timm's AttentionExtract needs attention that is not fused, which changes the last digits of the model's
output, and returns the weights of all layers at once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers import Attention
from timm.models.swin_transformer import SwinTransformer, WindowAttention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from kamim.models.positions import BiasedAttention

OnTokens = Callable[[int, Tensor], None]
OnAttention = Callable[[int, Tensor, Tensor, Tensor], None]


def attention_weights(module: Attention | WindowAttention, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Computes softmax(q k^T / sqrt(d) + bias + mask) of a timm attention module.

    x: [B, N, D], the module's input. mask: [W, N, N], the mask of a shifted window attention, with B a multiple of W.
    Returns [B, heads, N, N]; rows are queries and sum to 1.
    """
    batch, tokens, _ = x.shape
    q, k, _ = module.qkv(x).reshape(batch, tokens, 3, module.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    if isinstance(module, Attention):
        q, k = module.q_norm(q), module.k_norm(k)
    scores = (q * module.scale) @ k.transpose(-2, -1)
    if isinstance(module, WindowAttention):
        scores = scores + module._get_rel_pos_bias()
    if isinstance(module, BiasedAttention):
        scores = scores + module.bias()
    if mask is not None:
        scores = (scores.unflatten(0, (-1, len(mask))) + mask.unsqueeze(1)).flatten(0, 1)
    weights: Tensor = scores.softmax(dim=-1)
    return weights


def patch_attention(weights: Tensor, prefix: int) -> Tensor:
    """Returns attention among patch tokens, rows renormalised: [.., N, N] -> float64 [.., N - prefix, N - prefix].

    A query whose whole weight is on prefix tokens counts as uniform attention, as with the released code's 1e-32.
    """
    kept = weights[..., prefix:, prefix:].double()
    total = kept.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, kept / total, 1 / kept.shape[-1])


def token_distances(side: int, patch: float) -> Tensor:
    """Returns Euclidean distances (px) between tokens of a side x side grid of `patch` px: float64 [side², side²]."""
    at = torch.arange(side, dtype=torch.float64) * patch
    xy = torch.cartesian_prod(at, at)
    return torch.linalg.vector_norm(xy[:, None] - xy[None], dim=-1)


def uniform_distance(side: int, patch: float) -> float:
    """Returns the mean distance in px under uniform attention; 99.75 for 12 x 12 tokens of 16 px."""
    return float(token_distances(side, patch).mean())


def attention_distance(attention: Tensor, distances: Tensor) -> Tensor:
    """Returns the mean distance from query to key, weighted by attention: [.., N, N] -> [..], px."""
    return (attention * distances).sum(dim=-1).mean(dim=-1)


def blocks(encoder: VisionTransformer | SwinTransformer) -> list[Any]:
    """Returns the transformer blocks, in order; each has its attention as `.attn`."""
    if isinstance(encoder, SwinTransformer):
        return [block for layer in encoder.layers for block in layer.blocks]
    return list(encoder.blocks)


@contextmanager
def watched(
    encoder: VisionTransformer | SwinTransformer, on_tokens: OnTokens, on_attention: OnAttention | None = None
) -> Iterator[None]:
    """Inside this context, every forward pass reports its hidden states and attention, in order of depth.

    on_tokens(depth, tokens [B, h, w, D]): depth 0 is the input of the first block, depth d the output of block d,
    without class and register tokens. on_attention(depth, weights [B, heads, N, N], given [B, N, D],
    output [B, N, D]): depth from 1, all N tokens. given is the input of the attention, after the block's first norm;
    output is the attention's own, before it is added to the residual stream.
    """
    prefix = 0 if isinstance(encoder, SwinTransformer) else encoder.num_prefix_tokens
    layers = blocks(encoder)

    def grid(tokens: Tensor) -> Tensor:
        if tokens.ndim == 4:
            return tokens
        side = int((tokens.shape[1] - prefix) ** 0.5)
        return tokens[:, prefix:].unflatten(1, (side, side))

    def entering(module: nn.Module, given: tuple[Any, ...]) -> None:
        on_tokens(0, grid(given[0]))

    hooks = [layers[0].register_forward_pre_hook(entering)]
    for depth, layer in enumerate(layers, start=1):
        hooks.append(layer.register_forward_hook(lambda _, __, output, d=depth: on_tokens(d, grid(output))))
        if on_attention is not None:
            hooks.append(layer.attn.register_forward_hook(_reporter(depth, on_attention), with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _reporter(depth: int, on_attention: OnAttention) -> Callable[..., None]:
    def report(module: Any, given: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        assert named.get("attn_mask") is None and not named.get("is_causal"), "a ViT of images masks nothing"
        on_attention(depth, attention_weights(module, given[0], named.get("mask")), given[0], output)

    return report


def selectivity(encoder: VisionTransformer, images: Tensor, patch: float) -> float:
    """Returns how far attention is from uniform: the mean over blocks of |attention distance - uniform distance|, px.

    images: float [B, 3, R, R], normalised; the distance of a block is the mean over them, heads and queries. patch:
    side of a patch in px. It is 0 if every token attends to all alike, as on the plateau of docs/results.md.
    """
    grid, _ = encoder.patch_embed.grid_size
    distances, by_block = token_distances(grid, patch).to(images.device), []

    def on_attention(depth: int, weights: Tensor, *_: Tensor) -> None:
        by_block.append(attention_distance(patch_attention(weights, encoder.num_prefix_tokens), distances).mean())

    with watched(encoder, lambda depth, tokens: None, on_attention), torch.no_grad():
        encoder.forward_features(images)
    return float((torch.stack(by_block) - uniform_distance(grid, patch)).abs().mean())
