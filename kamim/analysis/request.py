"""The request, its images, and the models that can be shown, all checked before any work."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from kamim import KamimError
from kamim.analysis import embed
from kamim.analysis.analysed_model import AnalysedModel
from kamim.analysis.collect import WEIGHT_CELL
from kamim.evaluation.results import Accuracy, Result
from kamim.method import rng
from kamim.storage.escape import one_line
from pipelines.batch import Batch

FIGURES = ("2", "3", "4", "5", "6", "7", "8", "9", "10", "features", "cka", "weights", "probe")
NEED_VIT = {"5", "6", "7", "8", "9", "10"}
NEED_CLASSES = {"3", "9", "10"}
NEED_SKLEARN = {"3", "8", "9", "10"}
NEED_LAYER = {"3", "5", "8", "9", "10"}
CLASSES = 3
IMAGES_PER_CLASS = 8
MOST_IMAGES = 1000  # the default of --images


@dataclass(frozen=True)
class Request:
    """An analysis request. figures: of FIGURES, or None for all that these models and this store allow.

    images: number for curves; None for all, MOST_IMAGES at most. classes: three names, or () for the store's first
    three. layer: the block, from 1, of figures 3, 5 and 8 to 10; None for the paper's choice (see
    collect.token_block and attention_block). head: of figure 5, from 1; None for the mean. queries: (x, y) of its query
    tokens, as shares of the image's sides in [0, 1). probes: linear probes of `kamim eval`, for figure "probe".
    """

    figures: tuple[str, ...] | None = None
    images: int | None = None
    classes: tuple[str, ...] = ()
    layer: int | None = None
    head: int | None = None
    queries: tuple[tuple[float, float], ...] = ((0.5, 0.5), (0.2, 0.3))
    seed: int = 0
    probes: tuple[Result[Accuracy], ...] = ()


def read_probes(file: Path) -> list[Result[Accuracy]]:
    """Reads the linear probes that `kamim eval --json FILE` wrote. Raises KamimError if there are none."""
    try:
        results = [result for result in json.loads(file.read_text()) if result["mode"] == "linprobe"]
        probes = [Result.from_json(result, Accuracy) for result in results]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise KamimError(f"probe = {file}: not a result of kamim eval --json ({one_line(error)})") from error
    if not probes:
        raise KamimError(f"probe = {file}: holds no linear probe")
    return probes


def probed(model: AnalysedModel, request: Request) -> list[tuple[int, float]]:
    """Returns (block, top-1 in per cent) of the request's probes of this very checkpoint, by block."""
    own = [probe for probe in request.probes if probe.settings.checkpoint == model.about["checkpoint"]]
    return sorted((probe.settings.block or 0, probe.measured.top1) for probe in own)


def parse_figures(text: str) -> tuple[str, ...] | None:
    """Parses "all" as None, else a comma-separated list of FIGURES. Raises KamimError for anything else."""
    if text == "all":
        return None
    wanted = tuple(part.strip() for part in text.split(","))
    for part in wanted:
        if part not in FIGURES:
            raise KamimError(f"figures = {text}: {part!r} is none; must be all, or some of {','.join(FIGURES)}")
    return tuple(figure for figure in FIGURES if figure in wanted)


def parse_query(text: str) -> tuple[float, float]:
    """Parses "X,Y" as (x, y). Raises KamimError unless both are in [0, 1)."""
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError:
        raise KamimError(f"query = {text}: must be two numbers, such as 0.5,0.5") from None
    if not (0 <= x < 1 and 0 <= y < 1):
        raise KamimError(f"query = {text}: must be two shares of the image's sides, from 0 to below 1")
    return x, y


class Source(Protocol):
    """A source of images. labels: int64 [n], -1 without. classes: the labels' names."""

    name: str
    labels: np.ndarray
    classes: tuple[str, ...]

    def batches(self, indices: np.ndarray, resolution: int, size: int, cell: int | None) -> Iterable[Batch]:
        """Loads whole images `indices`, resized, in batches of at most `size`; cell: cell size of FAST ring counts."""
        ...


@dataclass(frozen=True)
class Chosen:
    """The images of an analysis. curves: for plots over depth. samples: for plots of tokens; label: their classes,
    as indices into titles (all 0 if the store has too few).
    """

    curves: np.ndarray
    samples: np.ndarray
    label: np.ndarray
    titles: tuple[str, ...]


def choose(request: Request, source: Source) -> Chosen:
    """Chooses images by seed. Raises KamimError for fewer than two or too many images, and for unknown classes."""
    total = len(source.labels)
    if total < 2:
        raise KamimError(f"store = {source.name}: has {total} image; an analysis is over images and needs 2 or more")
    count = min(total, MOST_IMAGES) if request.images is None else request.images
    if not 2 <= count <= total:
        raise KamimError(f"images = {count}: {source.name} has {total}; choose 2 to {total}")
    order = rng.permutation(request.seed, 0, total)
    titles = _titles(request.classes, source)
    if not titles:
        few = order[:CLASSES]
        return Chosen(order[:count], few, np.zeros(len(few), np.int64), ())
    parts = [order[source.labels[order] == source.classes.index(title)][:IMAGES_PER_CLASS] for title in titles]
    for title, part in zip(titles, parts, strict=True):
        if not len(part):
            raise KamimError(f"classes: {source.name} has no image of class {title!r}; choose others")
    label = np.repeat(np.arange(CLASSES), [len(part) for part in parts])
    return Chosen(order[:count], np.concatenate(parts), label, titles)


def _titles(wanted: tuple[str, ...], source: Source) -> tuple[str, ...]:
    """Returns the three classes requested, or the first three with images; () if fewer than three have images."""
    if not wanted:
        titles = [source.classes[label] for label in np.unique(source.labels) if label >= 0]
        return tuple(titles[:CLASSES]) if len(titles) >= CLASSES else ()
    if not source.classes:
        raise KamimError(f"classes = {','.join(wanted)}: {source.name} has no labels; leave the classes out")
    for title in wanted:
        if title not in source.classes:
            some = ", ".join(source.classes[:5]) + (", ..." if len(source.classes) > 5 else "")
            raise KamimError(f"classes: {title!r} is not one of the {len(source.classes)} of {source.name} ({some})")
    if len(set(wanted)) != CLASSES or len(wanted) != CLASSES:
        raise KamimError(f"classes = {','.join(wanted)}: must be {CLASSES} different ones")
    return wanted


def _shown(
    figure: str, models: Sequence[AnalysedModel], chosen: Chosen, request: Request
) -> tuple[list[AnalysedModel], str]:
    """Returns the models that `figure` can show, and the reason why it cannot show others."""
    if figure == "probe":
        return [m for m in models if probed(m, request)], "needs a probe, kamim eval's result for the checkpoint"
    if figure in NEED_CLASSES and not chosen.titles:
        return [], f"needs labels of {CLASSES} classes, which the store does not have"
    if figure == "2":
        return [m for m in models if m.model is not None], "needs a checkpoint of kamim, which has a pixel head"
    if figure == "weights":
        reason = f"needs a ViT, for images of a multiple of {WEIGHT_CELL} px"
        return [m for m in models if m.is_vit and m.resolution % WEIGHT_CELL == 0], reason
    if figure in NEED_VIT:
        return [m for m in models if m.is_vit], "needs a ViT, whose tokens all attend to each other"
    return list(models), ""


def plan(
    request: Request, models: Sequence[AnalysedModel], chosen: Chosen
) -> tuple[dict[str, list[AnalysedModel]], list[str]]:
    """Returns {figure: models it shows}, and notes on omissions. Raises KamimError if a requested one shows none."""
    planned, notes = {}, []
    for figure in request.figures or FIGURES:
        if figure == "probe" and not request.probes and request.figures is None:
            continue  # not requested
        able, reason = _shown(figure, models, chosen, request)
        if able:
            planned[figure] = able
        elif request.figures:
            raise KamimError(f"figures = {figure}: {reason}")
        if len(able) < len(models):
            left = ", ".join(m.name for m in models if m not in able)
            notes.append(f"figure {figure} without {left}: {reason}")
    for model in {m.name: m for figure in NEED_LAYER & planned.keys() for m in planned[figure]}.values():
        _check("layer", request.layer, model, model.depth)
    for model in planned.get("5", []):
        _check("head", request.head, model, model.encoder.blocks[0].attn.num_heads)
    if NEED_SKLEARN & planned.keys():
        embed.check()
    return planned, notes


def _check(option: str, value: int | None, model: AnalysedModel, most: int) -> None:
    """Raises KamimError for a layer or head that the model does not have."""
    if value is not None and not 1 <= value <= most:
        raise KamimError(f"{option} = {value}: {model.name} has {option}s 1 to {most}")
