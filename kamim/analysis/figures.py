"""Figures, one function each, drawn from the numbers in analysis.json.

Every function takes {checkpoint: its numbers} in display order and returns a matplotlib Figure.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from kamim.reporting.plots import COLOURS, GREY, depth_axis, look, panels, reconstruction_sheet, styled
from kamim.storage.escape import literal

Numbers = Mapping[str, Mapping[str, Any]]


def _points(axes: Axes) -> None:
    """Removes the ticks of axes of embeddings, whose coordinates have no unit."""
    axes.grid(visible=False)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(True)
    axes.spines[:].set_color("#bbbbbb")


@styled
def reconstructions(
    originals: np.ndarray, masks: np.ndarray, named: Sequence[tuple[str, np.ndarray]], note: str
) -> Any:
    """Draws figure 2. See plots.reconstruction_sheet."""
    return reconstruction_sheet(originals, masks, named, note)


@styled
def classes(numbers: Numbers) -> Figure:
    """Draws figure 3: t-SNE of the output tokens of `block`. xy [n, 2], label [n], classes."""
    figure, lines = panels(len(numbers))
    for axes, (name, table) in zip(lines[0], numbers.items(), strict=True):
        for i, title in enumerate(table["classes"]):
            xy = table["xy"][table["label"] == i]
            axes.scatter(xy[:, 0], xy[:, 1], s=6, alpha=0.7, linewidths=0, label=literal(title), **look(i))
        axes.set_title(literal(f"{name}, block {table['block']}"))
        _points(axes)
    figure.legend(*lines[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, markerscale=2.5)
    return figure


@styled
def fourier(numbers: Numbers) -> Figure:
    """Draws figure 4: relative log amplitude of the last entry by depth, and whole curves [depths][f], frequency."""
    figure, lines = panels(1 + len(numbers), side=3.1)
    for i, (name, table) in enumerate(numbers.items()):
        lines[0, 0].plot([curve[-1] for curve in table["curves"]], label=literal(name), **look(i))
        _spectra(lines[0, 1 + i], name, table)
    depth_axis(lines[0, 0], "Δ log amplitude, highest frequency")
    lines[0, 0].legend()
    for axes in lines[0, 2:]:
        axes.sharey(lines[0, 1])
    lines[0, 1].set_ylabel("Δ log amplitude")
    return figure


def _spectra(axes: Axes, name: str, table: Mapping[str, Any]) -> None:
    """Draws one line per depth, from dark to bright."""
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(table["curves"])))
    for depth, (frequency, curve) in enumerate(zip(table["frequency"], table["curves"], strict=True)):
        ends = {0: "0 (embedding)", len(shades) - 1: str(len(shades) - 1)}
        axes.plot(frequency, curve, color=shades[depth], label=ends.get(depth))
    axes.set_title(literal(name))
    axes.set_xlabel("frequency (π per token)")
    axes.legend(title="depth", title_fontsize=8)


@styled
def maps(numbers: Numbers, shown: np.ndarray, queries: Sequence[tuple[float, float]]) -> Figure:
    """Draws figure 5: attention of single queries. maps [n, queries, g, g], 1 is uniform. shown: uint8 [n, R, R, 3]."""
    columns = [(image, query) for image in range(len(shown)) for query in range(len(queries))]
    figure = Figure(figsize=(1.35 * len(columns) + 0.5, 1.15 * (1 + len(numbers)) + 0.4), layout="constrained")
    lines = figure.subplots(1 + len(numbers), len(columns), squeeze=False)
    first = next(iter(numbers.values()))["maps"]
    for axes, (image, query) in zip(lines[0], columns, strict=True):
        axes.imshow(shown[image])
        _mark(axes, queries[query], first.shape[-1], shown.shape[1])
    for line, (name, table) in zip(lines[1:], numbers.items(), strict=True):
        for axes, (image, query) in zip(line, columns, strict=True):
            attention = table["maps"][image, query]
            heat = axes.imshow(attention, cmap="viridis", vmin=0, vmax=max(2.0, float(attention.max())))
            _mark(axes, queries[query], len(attention), len(attention))
            bar = figure.colorbar(heat, ax=axes, fraction=0.046, pad=0.02, ticks=[0, heat.norm.vmax])
            bar.ax.set_yticklabels(["0", f"{heat.norm.vmax:.1f}"], fontsize=6)
            bar.outline.set_visible(False)
        line[0].set_ylabel(literal(name))
    for axes in lines.flat:
        _points(axes)
    figure.suptitle("attention of the marked token, in multiples of uniform attention", fontsize=9)
    return figure


def _mark(axes: Axes, query: tuple[float, float], grid: int, side: int) -> None:
    """Draws a box around the query token."""
    cell = side / grid
    x, y = (int(share * grid) * cell - 0.5 for share in query)
    axes.add_patch(Rectangle((x, y), cell, cell, fill=False, edgecolor="#D55E00", linewidth=1.6))


@styled
def by_depth(numbers: Numbers, label: str, uniform: str) -> Figure:
    """Draws figures 6 and 7: mean over heads with one standard deviation, and the line of uniform attention.

    mean, spread: [L]. uniform: a number. `uniform` is the line's label, {} its number and {grid} the tokens.
    """
    figure, lines = panels(1, side=5.2, height=3.3)
    axes = lines[0, 0]
    for i, (name, table) in enumerate(numbers.items()):
        depth = np.arange(1, len(table["mean"]) + 1)
        axes.plot(depth, table["mean"], label=literal(name), **look(i))
        low, high = table["mean"] - table["spread"], table["mean"] + table["spread"]
        axes.fill_between(depth, low, high, color=look(i)["color"], alpha=0.15, linewidth=0)
    for text, value in {uniform.format(n["uniform"], grid=n["grid"]): n["uniform"] for n in numbers.values()}.items():
        axes.axhline(value, color=GREY, linestyle="--", linewidth=1.2, label=text)
    depth_axis(axes, label)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


@styled
def transformation(numbers: Numbers) -> Figure:
    """Draws figure 8: PCA of an image's tokens before and after attention. before, after: [T, 2]; variance [2]."""
    figure, lines = panels(len(numbers))
    for axes, (name, table) in zip(lines[0], numbers.items(), strict=True):
        for i, kind in enumerate(("before", "after")):
            axes.scatter(*table[kind].T, s=14, alpha=0.8, linewidths=0, label=f"{kind} attention", **look(i))
        _principal(axes, f"{name}, block {table['block']}", table["variance"])
    figure.legend(*lines[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, markerscale=1.5)
    return figure


@styled
def two_images(numbers: Numbers) -> Figure:
    """Draws figure 9: as figure 8 for two images of two classes, with centroids. before, after: [2, T, 2]."""
    figure, lines = panels(len(numbers))
    for axes, (name, table) in zip(lines[0], numbers.items(), strict=True):
        looks = iter(range(4))
        for kind in ("before", "after"):
            for title, xy in zip(table["classes"], table[kind], strict=True):
                axes.scatter(
                    *xy.T, s=14, alpha=0.7, linewidths=0, label=literal(f"{title}, {kind}"), **look(next(looks))
                )
        for kind, colour in (("before", "black"), ("after", "#888888")):
            centre = table[kind].mean(axis=1)
            under = {"s": 150, "linewidths": 0, "marker": "X", "zorder": 0.5}
            axes.scatter(*centre.T, color=colour, label=f"centroids {kind}", **under)
        _principal(axes, f"{name}, block {table['block']}", table["variance"])
    figure.legend(*lines[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


@styled
def many_images(numbers: Numbers) -> Figure:
    """Draws figure 10: tokens of many images of three classes, before (top) and after attention, with separate PCAs.

    before, after: [n, T, 2]; label [n]; before_variance, after_variance [2]. Circles are centroids of images.
    """
    figure, lines = panels(len(numbers), rows=2)
    for column, (name, table) in enumerate(numbers.items()):
        for row, kind in enumerate(("before", "after")):
            axes = lines[row, column]
            for i, title in enumerate(table["classes"]):
                mine = table[kind][table["label"] == i]
                axes.scatter(*mine.reshape(-1, 2).T, s=5, alpha=0.4, linewidths=0, label=literal(title), **look(i))
                axes.scatter(*mine.mean(axis=1).T, s=30, facecolors=COLOURS[i], edgecolors="black", linewidths=0.9)
            _principal(axes, f"{name}, {kind} attention of block {table['block']}", table[f"{kind}_variance"])
    figure.legend(*lines[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, markerscale=3)
    return figure


def _principal(axes: Axes, title: str, variance: np.ndarray) -> None:
    axes.set_title(literal(title))
    _points(axes)
    axes.set_xlabel(f"PC 1 ({variance[0]:.0%} of variance)", fontsize=8)
    axes.set_ylabel(f"PC 2 ({variance[1]:.0%})", fontsize=8)


@styled
def features(numbers: Numbers) -> Figure:
    """Draws effective rank and uniformity of mean tokens by depth, from 0. rank, uniformity: [L + 1]."""
    figure, lines = panels(2, side=3.6)
    for i, (name, table) in enumerate(numbers.items()):
        for axes, kind in zip(lines[0], ("rank", "uniformity"), strict=True):
            axes.plot(table[kind], label=literal(name), **look(i))
    depth_axis(lines[0, 0], "effective rank")
    depth_axis(lines[0, 1], "uniformity (0: all features alike)")
    figure.legend(*lines[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


@styled
def similarity(numbers: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """Draws linear CKA of all pairs of layers, of all pairs of checkpoints: [row][column] [a, b]."""
    names = list(numbers)
    figure, lines = panels(len(names), rows=len(names), side=2.5, height=2.4)
    for row, one in enumerate(names):
        for column, other in enumerate(names):
            axes = lines[row, column]
            heat = axes.imshow(numbers[one][other], origin="lower", vmin=0, vmax=1, cmap="viridis")
            axes.grid(visible=False)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(MaxNLocator(integer=True, nbins=7))
            if row == len(names) - 1:
                axes.set_xlabel(literal(f"{other}: depth"))
            if column == 0:
                axes.set_ylabel(literal(f"{one}: depth"))
    figure.colorbar(heat, ax=lines, label="linear CKA", shrink=0.8)
    return figure


@styled
def weight_correlation(numbers: Numbers) -> Figure:
    """Plots Pearson's r of W and attention received by depth, with 95 % intervals over images. mean, low, high: [L]."""
    figure, lines = panels(1, side=5.2, height=3.3)
    axes = lines[0, 0]
    for i, (name, table) in enumerate(numbers.items()):
        depth = np.arange(1, len(table["mean"]) + 1)
        axes.plot(depth, table["mean"], label=literal(name), **look(i))
        axes.fill_between(depth, table["low"], table["high"], color=look(i)["color"], alpha=0.2, linewidth=0)
    axes.axhline(0, color=GREY, linestyle="--", linewidth=1.2, label="no relation")
    depth_axis(axes, "correlation of W with attention received")
    figure.legend(loc="outside lower center", ncols=4)
    return figure


@styled
def probe(numbers: Numbers) -> Figure:
    """Draws the accuracy of linear probes by the block they read. block, top1 (per cent): one entry per probe."""
    figure, lines = panels(1, side=5.2, height=3.3)
    axes = lines[0, 0]
    for i, (name, table) in enumerate(numbers.items()):
        axes.plot(table["block"], table["top1"], label=literal(name), **look(i))
    depth_axis(axes, "linear probe, top-1 (%)")
    figure.legend(loc="outside lower center", ncols=4)
    return figure
