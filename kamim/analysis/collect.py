"""Streams images through an encoder and keeps the inputs of the figures.

A few numbers are kept for each image and layer (and one mean token, of the first FEATURE_IMAGES images), so memory does
not grow with the size of attention maps, and hardly with the number of images.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from kamim.analysis import measures
from kamim.analysis.analysed_model import AnalysedModel
from kamim.method.weighting import counts_to_weights
from kamim.models.attention import attention_distance, patch_attention, token_distances, watched
from pipelines.batch import Batch, normalise

FEATURE_IMAGES = 1024  # for rank, uniformity and CKA, whose cost is quadratic in images
WEIGHT_CELL, TEMPERATURE = 8, 0.25  # W of the paper's best model: FAST, w_ps 8, T 0.25

Images = Iterable[Batch]
Progress = Callable[[int], None]  # takes the number of further images that are done


@dataclass
class Curves:
    """Measures by depth, over many images. Attention measures are empty for a Swin, and correlation without counts.

    sides: depth 0 .. L, tokens along a side. spectrum: depth 0 .. L, summed over images, [s - s // 2] each.
    pooled: depth 0 .. L, lists of [b, D].
    distance (px), nmi: depth 1 .. L, lists of [b, heads]. correlation: depth 1 .. L, lists of [b].
    """

    images: int = 0
    sides: dict[int, int] = field(default_factory=dict)
    spectrum: dict[int, Tensor] = field(default_factory=dict)
    pooled: dict[int, list[Tensor]] = field(default_factory=dict)
    distance: dict[int, list[Tensor]] = field(default_factory=dict)
    nmi: dict[int, list[Tensor]] = field(default_factory=dict)
    correlation: dict[int, list[Tensor]] = field(default_factory=dict)


def per_image(kept: dict[int, list[Tensor]]) -> np.ndarray:
    """Stacks the values of every image and depth: {1 .. L: lists of [b, ..]} -> float64 [N, L, ..]."""
    return np.stack([torch.cat(kept[depth]).cpu().numpy() for depth in sorted(kept)], axis=1)


def _run(model: AnalysedModel, batch: Batch) -> None:
    with torch.no_grad():
        model.encoder.forward_features(normalise(batch.images))


def collect_curves(model: AnalysedModel, batches: Images, device: torch.device, progress: Progress) -> Curves:
    """Collects everything that is plotted by depth. batches: with counts in cells of WEIGHT_CELL px, or without."""
    kept, weights, distances = Curves(), torch.empty(0), torch.empty(0)
    if model.is_vit:
        distances = token_distances(model.grid, model.patch).to(device)

    def on_tokens(depth: int, tokens: Tensor) -> None:
        kept.sides[depth] = tokens.shape[1]
        amplitude = measures.log_amplitude(tokens).sum(dim=0)
        kept.spectrum[depth] = kept.spectrum[depth] + amplitude if depth in kept.spectrum else amplitude
        if kept.images <= FEATURE_IMAGES:
            kept.pooled.setdefault(depth, []).append(tokens.mean(dim=(1, 2)).cpu())

    def on_attention(depth: int, softmax: Tensor, *_: Tensor) -> None:
        attention = patch_attention(softmax, model.prefix)
        kept.distance.setdefault(depth, []).append(attention_distance(attention, distances))
        kept.nmi.setdefault(depth, []).append(measures.normalised_mutual_information(softmax, model.prefix))
        if len(weights):
            received = attention.mean(dim=(1, 2))
            kept.correlation.setdefault(depth, []).append(measures.correlation(received, weights))

    with watched(model.encoder, on_tokens, on_attention if model.is_vit else None):
        for batch in (batch.to(device) for batch in batches):
            kept.images += len(batch)
            if model.is_vit and batch.counts is not None:
                weights = token_weights(batch.counts, model)
            _run(model, batch)
            progress(len(batch))
    return kept


def token_weights(counts: Tensor, model: AnalysedModel) -> Tensor:
    """Averages W (Eq. 2) over each token: cell counts [B, g, g] -> [B, tokens]."""
    weights = counts_to_weights(counts, WEIGHT_CELL, TEMPERATURE)
    return adaptive_avg_pool2d(weights, model.grid).flatten(1)


@dataclass(frozen=True)
class Samples:
    """Tokens and attention maps of a few images. For a Swin, `tokens` alone.

    tokens: the output of block `token_block`, [n, T, D]. before, after: input and output of the attention of block
    `block`, [n, T, D]. maps: attention of the same block from each query, times T so that 1 is uniform:
    [n, queries, g, g].
    """

    tokens: np.ndarray
    before: np.ndarray
    after: np.ndarray
    maps: np.ndarray
    token_block: int
    block: int


def token_block(depth: int, layer: int | None) -> int:
    """Returns the block whose output figure 3 shows: `layer`, or the last but one.

    Of 12 blocks that is the 11th, as in the released notebook (hidden_states[11]); the paper's text says the last.
    """
    return layer or max(depth - 1, 1)


def attention_block(depth: int, layer: int | None) -> int:
    """Returns the block whose attention figures 5 and 8 to 10 show: `layer`, or the last.

    Index 11 in the released notebooks counts from 0, and appendix B says the last; figure 8's caption says the 11th.
    """
    return layer or depth


def query_cell(query: tuple[float, float], grid: int) -> tuple[int, int]:
    """Returns (row, column) of the token at (x, y), shares of the image's sides in [0, 1)."""
    x, y = query
    return int(y * grid), int(x * grid)


def collect_samples(
    model: AnalysedModel,
    batches: Images,
    layer: int | None,
    head: int | None,
    queries: Sequence[tuple[float, float]],
    device: torch.device,
    progress: Progress,
) -> Samples:
    """Collects tokens and maps. layer: see token_block and attention_block. head: from 1, None for the mean."""
    kept: dict[str, list[Tensor]] = {"tokens": [], "before": [], "after": [], "maps": []}
    shown, block = token_block(model.depth, layer), attention_block(model.depth, layer)

    def keep(kind: str, tokens: Tensor) -> None:
        kept[kind].append(tokens.float().cpu())

    def on_tokens(depth: int, tokens: Tensor) -> None:
        if depth == shown:
            keep("tokens", tokens.flatten(1, 2))

    def on_attention(depth: int, softmax: Tensor, given: Tensor, output: Tensor) -> None:
        if depth == block:
            keep("before", given[:, model.prefix :])
            keep("after", output[:, model.prefix :])
            attention = patch_attention(softmax, model.prefix)
            chosen = attention.mean(dim=1) if head is None else attention[:, head - 1]
            cells = [query_cell(query, model.grid) for query in queries]
            rows = chosen[:, [row * model.grid + column for row, column in cells]]
            keep("maps", (rows * rows.shape[-1]).unflatten(2, (model.grid, model.grid)))

    with watched(model.encoder, on_tokens, on_attention if model.is_vit else None):
        for batch in batches:
            _run(model, batch.to(device))
            progress(len(batch))
    arrays = {kind: torch.cat(parts).numpy() if parts else np.empty(0) for kind, parts in kept.items()}
    return Samples(**arrays, token_block=shown, block=block)
