"""Computes the numbers of the figures and analysis.json from the collected measures."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from kamim import KamimError
from kamim.analysis import embed, measures
from kamim.analysis.analysed_model import AnalysedModel
from kamim.analysis.collect import FEATURE_IMAGES, Curves, Samples, per_image
from kamim.models.attention import uniform_distance
from kamim.models.label_free import centred, effective_rank, uniformity

Table = dict[str, Any]


def fourier(curves: Curves) -> Table:
    """Computes figure 4. Per depth from 0: frequency in pi per token, and log amplitude relative to the lowest."""
    depths = sorted(curves.spectrum)
    means = [(curves.spectrum[depth] / curves.images).cpu().numpy() for depth in depths]
    return {
        "curves": [mean - mean[0] for mean in means],
        "frequency": [2 * np.arange(len(m)) / curves.sides[d] for d, m in zip(depths, means, strict=True)],
    }


def attention(model: AnalysedModel, curves: Curves, seed: int) -> tuple[Table, Table, Table]:
    """Computes figures 6 and 7, per depth from 1 with intervals over images, and their closeness to uniform."""
    distance, nmi = per_image(curves.distance), per_image(curves.nmi)  # [N, L, heads]
    uniform = uniform_distance(model.grid, model.patch)
    resampled = measures.bootstrap_means(np.stack([distance.mean(axis=2), nmi.mean(axis=2)], axis=2), seed)
    tables = [
        _over_heads(values, resampled[..., i]) | {"uniform": level, "grid": f"{model.grid}x{model.grid}"}
        for i, (values, level) in enumerate(((distance, uniform), (nmi, 0.0)))
    ]
    gap = np.abs(tables[0]["mean"] - uniform).mean()
    closeness = {
        "distance": _estimate(tables[0]["mean"].mean(), resampled[..., 0].mean(axis=1)),
        "distance_from_uniform": _estimate(gap, np.abs(resampled[..., 0] - uniform).mean(axis=1)),
        "nmi": _estimate(tables[1]["mean"].mean(), resampled[..., 1].mean(axis=1)),
        "uniform_distance": uniform,
    }
    return tables[0], tables[1], closeness


def _over_heads(values: np.ndarray, resampled: np.ndarray) -> Table:
    heads = values.mean(axis=0)  # [L, heads]
    low, high = measures.interval(resampled)
    return {"mean": heads.mean(axis=1), "spread": heads.std(axis=1), "heads": heads, "low": low, "high": high}


def _estimate(value: float, resampled: np.ndarray) -> Table:
    low, high = measures.interval(resampled)
    return {"value": value, "low": low, "high": high}


def weight_correlation(curves: Curves, seed: int) -> Table:
    """Returns Pearson's r of W and attention received per depth from 1: mean over images, 95 % interval.

    images: the number of images with an r; an image has none if W or attention does not vary over its tokens.
    """
    values = per_image(curves.correlation)
    defined = values[np.isfinite(values).all(axis=1)]
    if not len(defined):
        raise KamimError("figures = weights: W is constant on every image; there is nothing to correlate")
    low, high = measures.interval(measures.bootstrap_means(defined, seed))
    return {"mean": defined.mean(axis=0), "low": low, "high": high, "images": len(defined)}


def pooled(curves: Curves) -> list[torch.Tensor]:
    """Returns the mean tokens of the first images, per depth from 0: [n, D] each, n <= FEATURE_IMAGES."""
    return [torch.cat(curves.pooled[depth])[:FEATURE_IMAGES] for depth in sorted(curves.pooled)]


def features(curves: Curves) -> Table:
    """Returns the effective rank and uniformity of mean tokens, per depth from 0."""
    tokens = pooled(curves)
    return {
        "rank": np.array([effective_rank(centred(f)) for f in tokens]),
        "uniformity": np.array([uniformity(f) for f in tokens]),
        "images": len(tokens[0]),
    }


def similarity(curves: dict[str, Curves]) -> dict[str, dict[str, np.ndarray]]:
    """Returns linear CKA of mean tokens: [row][column], every layer of one with every layer of the other."""
    tokens = {name: pooled(kept) for name, kept in curves.items()}
    return {one: {other: measures.linear_cka(tokens[one], tokens[other]) for other in tokens} for one in tokens}


def classes(samples: Samples, label: np.ndarray, titles: tuple[str, ...], seed: int) -> Table:
    """Computes figure 3. label: the class of each image, as a place in titles."""
    _, tokens, width = samples.tokens.shape
    xy = embed.tsne(samples.tokens.reshape(-1, width), seed)
    return {"xy": xy, "label": np.repeat(label, tokens), "classes": titles, "block": samples.token_block}


def transformation(samples: Samples) -> Table:
    """Computes figure 8, of the first image."""
    both, variance = _plane(samples.before[:1], samples.after[:1])
    return {"before": both[0][0], "after": both[1][0], "variance": variance, "block": samples.block}


def two_images(samples: Samples, label: np.ndarray, titles: tuple[str, ...]) -> Table:
    """Computes figure 9, of the first image of each of the first two classes."""
    chosen = [int(np.argmax(label == i)) for i in (0, 1)]
    (before, after), variance = _plane(samples.before[chosen], samples.after[chosen])
    return {"before": before, "after": after, "variance": variance, "block": samples.block, "classes": titles[:2]}


def many_images(samples: Samples, label: np.ndarray, titles: tuple[str, ...]) -> Table:
    """Computes figure 10: before and after attention, with a PCA of each."""
    table: Table = {"block": samples.block, "classes": titles, "label": label}
    for kind, tokens in (("before", samples.before), ("after", samples.after)):
        (table[kind],), table[f"{kind}_variance"] = _plane(tokens)
    return table


def _plane(*sets: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Projects all tokens by one PCA: [n, T, D] each -> ([n, T, 2] each, shares of variance [2])."""
    stacked = np.concatenate(sets)
    xy, variance = embed.pca(stacked.reshape(-1, stacked.shape[-1]))
    return np.split(xy.reshape(*stacked.shape[:2], 2), np.cumsum([len(s) for s in sets])[:-1]), variance


def probe(probes: Sequence[tuple[int, float]]) -> Table:
    """Computes figure "probe" from (block, top-1 in per cent) of every probe."""
    return {"block": [block for block, _ in probes], "top1": [top1 for _, top1 in probes]}
