"""Pictures: keypoints and weights over images, reconstructions. One style, readable in print."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from kamim.reporting.page import save_picture
from kamim.storage.escape import literal

matplotlib.use("Agg")

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#666666"
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "figure.constrained_layout.w_pad": 0.08,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "pdf.fonttype": 42,
    "axes.prop_cycle": cycler(color=COLOURS),
}
styled = matplotlib.rc_context(STYLE)
RING_COLOUR = np.array([230, 159, 0], np.uint8)  # Okabe and Ito's orange
MASK_GREY = 128
BRIGHTEST = 3.0  # of attention, in uniform weights
GOLDEN = 0.618034  # turns of hue between two classes, so that neighbours differ


def look(i: int) -> dict[str, Any]:
    """Colour and marker of the i-th checkpoint; markers distinguish checkpoints without colour."""
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}


def panels(count: int, rows: int = 1, side: float = 3.0, height: float = 3.0) -> tuple[Figure, np.ndarray]:
    """A figure of rows x count axes, each side x height inches."""
    figure = Figure(figsize=(side * count, height * rows), layout="constrained")
    return figure, figure.subplots(rows, count, squeeze=False)


def depth_axis(axes: Axes, label: str) -> None:
    """Labels the axes of a plot over depth, with ticks at whole blocks."""
    axes.set_xlabel("depth (block)")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _image(axes: Axes, image: np.ndarray, title: str = "") -> None:
    axes.imshow(image)
    axes.set_axis_off()
    axes.set_title(literal(title), fontsize=9)


def _with_map(rgb: np.ndarray, bitmap: np.ndarray) -> np.ndarray:
    """The image, dimmed, with the map F painted over it."""
    painted = (rgb * 0.6).astype(np.uint8)
    painted[bitmap] = RING_COLOUR
    return painted


def _weights(
    axes: Axes, rgb: np.ndarray, weights: np.ndarray, patch_size: int, scale: LogNorm, title: str
) -> AxesImage:
    """Draws W as a heat map over the grey image, and returns the heat map."""
    axes.imshow(rgb.mean(axis=2), cmap="gray")
    extent = (-0.5, weights.shape[1] * patch_size - 0.5, weights.shape[0] * patch_size - 0.5, -0.5)
    heat = axes.imshow(weights, cmap="viridis", alpha=0.75, extent=extent, norm=scale, interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(title, fontsize=9)
    return heat


def weight_ticks(largest: float, smallest: float = 1.0) -> list[float]:
    """Returns values of W to label on a logarithmic axis: 1, 2, 5, 10, ... as long as they do not collide."""
    decades = [10.0**power for power in range(int(np.floor(np.log10(smallest))), int(np.log10(largest)) + 1)]
    if len(decades) > 2:
        inside = [decade for decade in decades if decade >= smallest]
        return inside[:: -(-len(inside) // 8)]
    return [step * decade for decade in decades for step in (1, 2, 5) if smallest <= step * decade <= largest]


def label_log_axis(axes: Axes) -> None:
    """Makes the y axis of drawn axes logarithmic, with plain numbers as labels: 20 and 50 rather than 2 × 10¹."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < 100 * low:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def weights_sheet(
    rows: Sequence[tuple[str, np.ndarray, np.ndarray, np.ndarray]], patch_size: int, caption: str, file: Path
) -> None:
    """Draws a row per (title, RGB uint8 [H, W, 3], map F bool [H, W], weights W [g, g]): image, keypoints, weights.

    All rows share the colours of W, from 1 (or less, if W is normalised) to the largest of them, which the axis at the
    right explains.
    """
    heights = [2.9 * rgb.shape[0] / rgb.shape[1] + 0.25 for _, rgb, _, _ in rows]
    figure = Figure(figsize=(9.6, 0.4 + sum(heights)), layout="constrained")
    figure.suptitle(literal(caption), fontsize=10)
    lines = figure.subplots(len(rows), 3, squeeze=False, height_ratios=heights)
    largest = max(2.0, *(float(weights.max()) for _, _, _, weights in rows))
    smallest = min(1.0, *(float(weights.min()) for _, _, _, weights in rows))
    scale = LogNorm(smallest, largest)
    for line, (title, rgb, bitmap, weights) in zip(lines, rows, strict=True):
        _image(line[0], rgb, title)
        _image(line[1], _with_map(rgb, bitmap), f"map F, density {bitmap.mean():.3f}")
        heat = _weights(
            line[2], rgb, weights, patch_size, scale, f"W: mean {weights.mean():.4g}, max {weights.max():.4g}"
        )
    bar = figure.colorbar(heat, ax=lines[:, 2], fraction=0.046, pad=0.02, aspect=30)
    ticks = weight_ticks(largest, smallest)
    bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks], minor=False, fontsize=7)
    bar.minorticks_off()
    save_picture(figure, file)


def reconstruction_sheet(
    originals: np.ndarray, masks: np.ndarray, reconstructions: Sequence[tuple[str, np.ndarray]], caption: str
) -> Figure:
    """Columns are images; rows are originals, masked images and each named model's reconstructions (figure 2).

    originals and reconstructions: uint8 [N, R, R, 3]; masks: bool [N, R, R], True for masked pixels. Visible patches
    are the original's.
    """
    return _sheet(_reconstructions(originals, masks, reconstructions), caption)


def attention_sheet(originals: np.ndarray, maps: Sequence[tuple[str, np.ndarray]], caption: str) -> Figure:
    """Columns are images: the original, then named maps of attention over it.

    originals: uint8 [N, R, R, 3]; a map: float [N, g, g], not negative, of sum 1, g dividing R. No weight is black, and
    BRIGHTEST times the uniform weight, 1 / g², or more is brightest.
    """
    rows = [("original", originals)]
    for name, attention in maps:
        scale = originals.shape[1] // attention.shape[1]
        relative = (attention * attention[0].size / BRIGHTEST).clip(0, 1)
        heat = colormaps["inferno"](relative.repeat(scale, axis=1).repeat(scale, axis=2))[..., :3]
        rows.append((name, (0.35 * originals + 0.65 * 255 * heat).astype(np.uint8)))
    return _sheet(rows, caption)


def segmentation_sheet(
    images: np.ndarray, truth: np.ndarray, classes: Sequence[str], predictions: Sequence[tuple[str, np.ndarray]]
) -> Figure:
    """Columns are images; below them the true classes, and those that each named model predicts, as colours.

    images: uint8 [N, R, R, 3]; truth and predictions: int [N, R, R], -1 (white) for pixels without a class. The legend
    names the classes that occur.
    """
    index = np.arange(len(classes))
    hsv = np.stack([index * GOLDEN % 1, np.full(len(classes), 0.75), 1 - index % 3 * 0.25], axis=-1)
    colours = np.concatenate([hsv_to_rgb(hsv), np.ones((1, 3))])  # the last one is also that of -1
    maps = [("truth", truth), *predictions]
    figure = _sheet([("image", images), *((name, colours[values]) for name, values in maps)], "")
    occurring = np.unique(np.concatenate([values.ravel() for _, values in maps]))
    handles = [Patch(color=colours[i], label=literal(classes[i])) for i in occurring.tolist() if i >= 0]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    return figure


def panel_sheet(
    originals: np.ndarray,
    masks: np.ndarray,
    reconstructions: np.ndarray,
    bitmaps: np.ndarray | None,
    weights: np.ndarray | None,
    caption: str,
) -> Figure:
    """As reconstruction_sheet, of one model, with the maps F (bool [N, R, R]) and W ([N, g, g]), if given."""
    rows = _reconstructions(originals, masks, [("reconstructed", reconstructions)])
    if bitmaps is not None and weights is not None:
        painted = [_with_map(image, bitmap) for image, bitmap in zip(originals, bitmaps, strict=True)]
        low, high = min(float(weights.min()), 1.0), max(float(weights.max()), 2.0)
        shades = colormaps["viridis"](np.log(weights / low) / np.log(high / low))[..., :3]
        title = f"W, {low:.2g} to {weights.max():.1f}"
        rows += [("keypoints", np.stack(painted)), (title, (shades * 255).astype(np.uint8))]
    return _sheet(rows, caption)


def pixels(figure: Figure) -> np.ndarray:
    """A figure as RGB, uint8 [H, W, 3]."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _reconstructions(
    originals: np.ndarray, masks: np.ndarray, named: Sequence[tuple[str, np.ndarray]]
) -> list[tuple[str, np.ndarray]]:
    hidden = masks[..., None]
    rows = [("original", originals), ("masked", np.where(hidden, np.uint8(MASK_GREY), originals))]
    return rows + [(name, np.where(hidden, images, originals)) for name, images in named]


def _sheet(rows: Sequence[tuple[str, np.ndarray]], caption: str) -> Figure:
    """Named rows of images [N, H, W, 3], one below the other."""
    count = len(rows[0][1])
    figure = Figure(figsize=(1.25 * count + 0.5, 1.3 * len(rows) + 0.4), layout="constrained")
    figure.suptitle(literal(caption), fontsize=10)
    for line, (name, images) in zip(figure.subplots(len(rows), count, squeeze=False), rows, strict=True):
        for axes, image in zip(line, images, strict=True):
            _image(axes, image)
        line[0].set_axis_on()
        line[0].set_xticks([])
        line[0].set_yticks([])
        line[0].spines[:].set_visible(False)
        line[0].set_ylabel(literal(name), fontsize=9)
    return figure
