"""Plots of results. Colours distinguish checkpoints."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kamim.evaluation.corrupted_images import STRENGTHS
from kamim.evaluation.results import FewShotAccuracy, KnnAccuracy, Robustness, SweepRow, best_by_readout
from kamim.reporting.plots import GREY, depth_axis, look, panels, styled
from kamim.storage.escape import literal

DASHES: Sequence[Any] = ("-", "--", ":", "-.")
CLASSIFIERS: Mapping[str, Any] = {"linear": "-", "knn": "--"}


@styled
def depth(sweeps: Mapping[str, Sequence[SweepRow]]) -> Figure:
    """Plots top1 at the best learning rate by block: {checkpoint: rows}. A panel per norm; dashes mark poolings."""
    chosen = {name: best_by_readout(rows) for name, rows in sweeps.items()}
    norms, poolings = (
        sorted({getattr(row, key) for rows in chosen.values() for row in rows}) for key in ("norm", "pooling")
    )
    dashes = dict(zip(poolings, cycle(DASHES), strict=False))
    figure, (line,) = panels(len(norms), side=4.4, height=3.6)
    for axes, norm in zip(line, norms, strict=True):
        for i, rows in enumerate(chosen.values()):
            for pooling in poolings:
                mine = [row for row in rows if (row.norm, row.pooling) == (norm, pooling)]
                xy = [row.block for row in mine], [row.top1 for row in mine]
                axes.plot(*xy, linestyle=dashes[pooling], **look(i))
        axes.set_title(f"norm: {norm}")
        axes.sharey(line[0])
        depth_axis(axes, "linear probe, best rate, top-1 (%)" if axes is line[0] else "")
    handles = [Line2D([], [], label=literal(name), **look(i)) for i, name in enumerate(chosen)]
    handles += [Line2D([], [], color=GREY, linestyle=dash, label=pooling) for pooling, dash in dashes.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, handlelength=3.2)
    return figure


@styled
def poolings(accuracies: Mapping[str, Mapping[str, float]]) -> Figure:
    """Plots top1 by readout: {checkpoint: {readout: top1}}, with a line for each checkpoint."""
    ways = list(dict.fromkeys(way for of_checkpoint in accuracies.values() for way in of_checkpoint))
    figure, ((axes,),) = panels(1, side=6.4, height=3.3)
    for i, (name, top1) in enumerate(accuracies.items()):
        axes.plot([ways.index(way) for way in top1], list(top1.values()), label=literal(name), **look(i))
    axes.set_xticks(range(len(ways)), labels=ways)
    axes.set_ylabel("top-1 (%)")
    figure.legend(loc="outside lower center", ncols=4)
    return figure


@styled
def neighbours(results: Mapping[str, KnnAccuracy]) -> Figure:
    """Plots top1 by the number of neighbours k: {checkpoint: accuracy}."""
    figure, ((axes,),) = panels(1, side=5.2, height=3.3)
    for i, (name, measured) in enumerate(results.items()):
        top1 = [accuracy.top1 for accuracy in measured.k.values()]
        axes.plot(list(measured.k), top1, label=literal(name), **look(i))
    axes.set_xscale("log")
    ticks = sorted({k for measured in results.values() for k in measured.k})
    axes.set_xticks(ticks, labels=[str(k) for k in ticks])
    axes.minorticks_off()
    axes.set_xlabel("k, neighbours that vote")
    axes.set_ylabel("kNN, top-1 (%)")
    figure.legend(loc="outside lower center", ncols=4)
    return figure


@styled
def few_labels(results: Mapping[str, tuple[int, FewShotAccuracy]]) -> Figure:
    """Plots top1 by labelled images per class: {checkpoint: (number of classes, accuracy)}. kNN is dashed."""
    figure, ((axes,),) = panels(1, side=5.2, height=3.3)
    ticks: dict[float, str] = {}
    for i, (classes, measured) in enumerate(results.values()):
        x = [shot.images / classes for shot in measured.shots]
        ticks |= {at: str(shot.per_class or "all") for at, shot in zip(x, measured.shots, strict=True)}
        for name, dash in CLASSIFIERS.items():
            top1, spread = ([getattr(shot, key) for shot in measured.shots] for key in (name, f"{name}_spread"))
            axes.errorbar(x, top1, spread, linestyle=dash, capsize=2, **look(i))
    axes.set_xscale("log")
    axes.set_xticks(list(ticks), labels=list(ticks.values()))
    axes.minorticks_off()
    axes.set_xlabel("labelled images of each class")
    axes.set_ylabel("top-1 (%)")
    _legend(figure, list(results))
    return figure


@styled
def corrupted(results: Mapping[str, Robustness]) -> Figure:
    """Plots top1 by strength, 0 for clean images: {checkpoint: accuracy}. A panel per corruption; kNN is dashed."""
    kinds = list(dict.fromkeys(row.corruption for measured in results.values() for row in measured.corrupted))
    figure, (line,) = panels(len(kinds), side=2.6, height=3.0)
    for axes, kind in zip(line, kinds, strict=True):
        for i, measured in enumerate(results.values()):
            rows = [row for row in measured.corrupted if row.corruption == kind]
            for name, dash in CLASSIFIERS.items():
                top1 = [getattr(measured, name), *(getattr(row, name) for row in rows)]
                axes.plot([0, *(row.strength for row in rows)], top1, linestyle=dash, **look(i))
        axes.set_title(kind)
        axes.sharey(line[0])
        axes.set_xticks([0, *STRENGTHS])
        axes.set_xlabel("strength")
    line[0].set_ylabel("top-1 (%)")
    _legend(figure, list(results))
    return figure


def _legend(figure: Figure, names: Sequence[str]) -> None:
    """Names the checkpoints by colour and the classifiers by dash."""
    handles = [Line2D([], [], label=literal(name), **look(i)) for i, name in enumerate(names)]
    handles += [Line2D([], [], color=GREY, linestyle=dash, label=name) for name, dash in CLASSIFIERS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, handlelength=3.2)
