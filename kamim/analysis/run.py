"""Runs an analysis: passes images through every model, computes numbers, draws figures, writes the page."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

import kamim
from kamim.analysis import figures, tables
from kamim.analysis.analysed_model import AnalysedModel
from kamim.analysis.collect import WEIGHT_CELL, Curves, Samples, collect_curves, collect_samples
from kamim.analysis.plan import plan, probed
from kamim.analysis.request import Chosen, Request, choose
from kamim.method.masking import block_masks, expand_mask
from kamim.reporting import page
from kamim.storage.ownership import mark_results
from kamim.storage.store import Store
from pipelines.batch import Batch, denormalise, normalise
from pipelines.counts import OnlineCounts
from pipelines.loader import Loader
from pipelines.plan import Plan

COMMAND, TITLE = "analyze", "kamim analysis"
PAGE, NUMBERS = "index.html", "analysis.json"
CAPTIONS = {
    "2": "Figure 2. Original, masked, and each checkpoint's reconstruction of the masked patches.",
    "3": "Figure 3. t-SNE of a block's output tokens, images of three classes.",
    "4": "Figure 4. Fourier analysis of hidden states: Δ log amplitude of the highest frequency by depth, and whole "
    "curves. Negative: less high frequency than low.",
    "5": "Figure 5. Attention maps of the marked query tokens.",
    "6": "Figure 6. Attention distance by depth, mean over heads and images; band: standard deviation over heads.",
    "7": "Figure 7. Normalised mutual information of query and key by depth, as figure 6; 0: all queries attend alike.",
    "8": "Figure 8. PCA of one image's tokens: the input and the output of a block's attention.",
    "9": "Figure 9. As figure 8, for two images of two classes, with centroids.",
    "10": "Figure 10. Tokens of many images of three classes, each row with its own PCA; circles: images' centroids.",
    "features": "Effective rank and uniformity of mean tokens by depth.",
    "cka": "Linear CKA of mean tokens, between layers and checkpoints.",
    "weights": "Does the model look where W is large? Pearson's r over an image's tokens of W (FAST, w_ps 8, T 0.25) "
    "and the attention a token receives; band: 95 % interval of the mean over images.",
    "probe": "Top-1 of linear probes by the block they read (kamim eval's results).",
}
OF_CURVES = {"4", "6", "7", "features", "cka", "weights"}
OF_SAMPLES = {"3", "5", "8", "9", "10"}
BATCH = 8
MASK_BLOCK, MASK_RATIO, MASK_IMAGES = 32, 0.6, 8  # SimMIM's mask
UNIFORM_DISTANCE, UNIFORM_NMI = "uniform attention, {grid} tokens: {:.1f} px", "uniform attention: {:.0f}"

Progress = Callable[[int, int], None]
Tables = dict[str, dict[str, Any]]  # of one figure: {checkpoint: numbers}


@dataclass
class Collected:
    """The collected measures of each model, by its name."""

    curves: dict[str, Curves]
    samples: dict[str, Samples]


def batches(store: Store, indices: np.ndarray, resolution: int, size: int, cell: int | None) -> Iterable[Batch]:
    """Loads whole images `indices`, resized, in batches of at most `size`.

    cell: the cell size of FAST ring counts, None without. Keypoints are detected on the pixels that the model sees.
    """
    size = min(size, len(indices))
    in_order = Plan(len(indices), size, size, seed=0, order="stored", drop_last=False, listed=np.asarray(indices))
    counter = None if cell is None else OnlineCounts("fast", "ring", cell)
    return Loader(store, in_order, resolution, counter=counter).micro_batches(0, in_order.steps_per_epoch)


def collect(
    planned: Mapping[str, list[AnalysedModel]], chosen: Chosen, store: Store, request: Request, progress: Progress
) -> Collected:
    """Runs each model over the images its figures need."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    over_depth = _models(planned, OF_CURVES)
    in_full = _models(planned, OF_SAMPLES)
    total = len(over_depth) * len(chosen.curves) + len(in_full) * len(chosen.samples)
    done, collected = 0, Collected({}, {})

    def more(images: int) -> None:
        nonlocal done
        done += images
        progress(done, total)

    for model in {m.name: m for m in (*over_depth, *in_full)}.values():
        model.encoder.to(device).eval()
        take = partial(batches, store, resolution=model.resolution, size=BATCH)
        if model in over_depth:
            weighed = model in planned.get("weights", [])
            loaded = take(chosen.curves, cell=WEIGHT_CELL if weighed else None)
            collected.curves[model.name] = collect_curves(model, loaded, device, more)
        if model in in_full:
            loaded = take(chosen.samples, cell=None)
            samples = collect_samples(model, loaded, request.layer, request.head, request.queries, device, more)
            collected.samples[model.name] = samples
        model.encoder.cpu()
    return collected


def _models(planned: Mapping[str, list[AnalysedModel]], kinds: set[str]) -> list[AnalysedModel]:
    """Returns the models that any of these figures shows, in order of appearance."""
    unique = {m.name: m for figure, shown in planned.items() if figure in kinds for m in shown}
    return list(unique.values())


def first_of_classes(chosen: Chosen) -> np.ndarray:
    """Returns places in chosen.samples of the images that figure 5 shows: one per class, or the first few."""
    if not chosen.titles:
        return np.arange(len(chosen.samples))
    return np.array([int(np.argmax(chosen.label == i)) for i in range(len(chosen.titles))])


def numbers(
    planned: Mapping[str, list[AnalysedModel]], collected: Collected, chosen: Chosen, request: Request
) -> tuple[dict[str, Tables], Tables]:
    """Returns the numbers of all figures except 2, and each ViT's distance from uniform attention ({} without 6, 7)."""
    curves, samples, label, titles = collected.curves, collected.samples, chosen.label, chosen.titles
    few, seed = first_of_classes(chosen), request.seed
    attention = {m.name: tables.attention(m, curves[m.name], seed) for m in _models(planned, {"6", "7"})}
    make: dict[str, Callable[[AnalysedModel], dict[str, Any]]] = {
        "3": lambda m: tables.classes(samples[m.name], label, titles, seed),
        "4": lambda m: tables.fourier(curves[m.name]),
        "5": lambda m: {"maps": samples[m.name].maps[few]},
        "6": lambda m: attention[m.name][0],
        "7": lambda m: attention[m.name][1],
        "8": lambda m: tables.transformation(samples[m.name]),
        "9": lambda m: tables.two_images(samples[m.name], label, titles),
        "10": lambda m: tables.many_images(samples[m.name], label, titles),
        "features": lambda m: tables.features(curves[m.name]),
        "weights": lambda m: tables.weight_correlation(curves[m.name], seed),
        "probe": lambda m: tables.probe(probed(m, request)),
    }
    drawn = {f: {m.name: make[f](m) for m in shown} for f, shown in planned.items() if f in make}
    if "cka" in planned:
        drawn["cka"] = tables.similarity({m.name: curves[m.name] for m in planned["cka"]})
    return drawn, {name: closeness for name, (_, _, closeness) in attention.items()}


def draw(drawn: dict[str, Tables], shown: np.ndarray, queries: tuple[tuple[float, float], ...]) -> dict[str, Figure]:
    """Draws all figures except 2. shown: uint8 [n, R, R, 3], figure 5's images."""
    pictures: dict[str, Callable[[Tables], Figure]] = {
        "3": figures.classes,
        "4": figures.fourier,
        "5": partial(figures.maps, shown=shown, queries=queries),
        "6": partial(figures.by_depth, label="attention distance (px)", uniform=UNIFORM_DISTANCE),
        "7": partial(figures.by_depth, label="normalised mutual information", uniform=UNIFORM_NMI),
        "8": figures.transformation,
        "9": figures.two_images,
        "10": figures.many_images,
        "features": figures.features,
        "cka": figures.similarity,
        "weights": figures.weight_correlation,
        "probe": figures.probe,
    }
    return {figure: pictures[figure](table) for figure, table in drawn.items()}


def images(store: Store, indices: np.ndarray, resolution: int) -> torch.Tensor:
    """Returns whole images, resized: uint8 [n, R, R, 3]."""
    return torch.cat([batch.images.clone() for batch in batches(store, indices, resolution, BATCH, None)])


def reconstruct(models: list[AnalysedModel], chosen: Chosen, store: Store, seed: int) -> dict[str, Figure]:
    """Draws figure 2: {file name: picture}, one for each resolution among the checkpoints."""
    pictures, indices = {}, chosen.curves[:MASK_IMAGES]
    for side in sorted({m.resolution for m in models}):
        shown = images(store, indices, side)
        patches = math.lcm(*(m.patch for m in models if m.resolution == side))
        block = MASK_BLOCK if side % MASK_BLOCK == MASK_BLOCK % patches == 0 else patches
        mask = torch.from_numpy(block_masks(seed, 0, indices, side // block, MASK_RATIO))
        reconstructions = []
        for name, model in ((m.name, m.model) for m in models if m.resolution == side):
            assert model is not None
            with torch.no_grad():
                reconstructions.append((name, denormalise(model.eval()(normalise(shown), mask)).numpy()))
        hidden = expand_mask(mask, side).numpy()
        pictures[f"figure-02-{side}px"] = figures.reconstructions(
            shown.numpy(), hidden, reconstructions, f"{store.path}: {MASK_RATIO:.0%} masked in blocks of {block} px"
        )
    return pictures


def summary(closeness: Tables, notes: list[str]) -> list[str]:
    """Returns the lines to print: the distance from uniform attention, with intervals; then the notes."""
    lines = []
    for name, near in closeness.items():
        gap, distance, nmi = near["distance_from_uniform"], near["distance"], near["nmi"]
        lines.append(
            f"{name}: attention distance {distance['value']:.2f} px, uniform attention "
            f"{near['uniform_distance']:.2f} px; layers lie {gap['value']:.2f} px from it on average "
            f"(95 % {gap['low']:.2f} to {gap['high']:.2f}); NMI {nmi['value']:.4f} "
            f"({nmi['low']:.4f} to {nmi['high']:.4f}), uniform 0"
        )
    return lines + notes


def analyse(models: list[AnalysedModel], store: Store, request: Request, out: Path, progress: Progress) -> list[str]:
    """Writes OUT/figure-*.png and .pdf, analysis.json and index.html; returns the lines to print.

    Raises KamimError for a request that these models or this store cannot fulfil.
    """
    chosen = choose(request, store)
    planned, notes = plan(request, models, chosen)
    collected = collect(planned, chosen, store, request, progress)
    drawn, closeness = numbers(planned, collected, chosen, request)
    shown = images(store, chosen.samples[first_of_classes(chosen)], models[0].resolution).numpy()
    pictures = reconstruct(planned["2"], chosen, store, request.seed) if "2" in planned else {}
    pictures |= {file_stem(figure): picture for figure, picture in draw(drawn, shown, request.queries).items()}
    lines = summary(closeness, notes)
    mark_results(out, COMMAND)
    for stem, picture in pictures.items():
        page.save_figure(picture, out / stem)
    about = {
        "kamim": kamim.__version__,
        "store": str(store.path),
        "seed": request.seed,
        "classes": chosen.titles,
        "images": chosen.curves,
        "token_images": chosen.samples,
        "layer": request.layer,
        "head": request.head,
        "queries": request.queries,
        "mask_ratio": MASK_RATIO,
        "notes": notes,
    }
    checkpoints = {m.name: {**m.about, "resolution": m.resolution} for m in models}
    page.save_numbers(
        {"about": about, "checkpoints": checkpoints, "uniform_attention": closeness, "figures": drawn}, out / NUMBERS
    )
    captioned = [
        page.picture((out / f"{stem}.png").read_bytes(), stem, caption)
        for figure, caption in CAPTIONS.items()
        for stem in pictures
        if stem.startswith(file_stem(figure))
    ]
    parts = [page.paragraph(_about(models, store, chosen)), page.bullets(lines), *captioned]
    page.save_page(TITLE, parts, out / PAGE)
    return lines


def file_stem(figure: str) -> str:
    """Returns figure-02 .. figure-10, or figure-NAME."""
    return f"figure-{int(figure):02d}" if figure.isdigit() else f"figure-{figure}"


def _about(models: list[AnalysedModel], store: Store, chosen: Chosen) -> str:
    named = "; ".join(
        f"{m.name}: {m.about['checkpoint']} ({m.about['architecture']}, {m.resolution} px)" for m in models
    )
    return f"{named}. Curves over {len(chosen.curves)} images of {store.path}; tokens of {len(chosen.samples)}."
