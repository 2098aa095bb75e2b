"""The request and its images, checked before torch is imported."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kamim import KamimError
from kamim.evaluation.results import Accuracy, Result
from kamim.method import rng
from kamim.models.file_kind import named
from kamim.storage.escape import one_line
from kamim.storage.store import Store

FIGURES = ("2", "3", "4", "5", "6", "7", "8", "9", "10", "features", "cka", "weights", "probe")
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


@dataclass(frozen=True)
class Chosen:
    """The images of an analysis. curves: for plots over depth. samples: for plots of tokens; label: their classes,
    as indices into titles (all 0 if the store has too few).
    """

    curves: np.ndarray
    samples: np.ndarray
    label: np.ndarray
    titles: tuple[str, ...]


def choose(request: Request, store: Store) -> Chosen:
    """Chooses images by seed. Raises KamimError for fewer than two or too many images, and for unknown classes."""
    labels, classes = store.images.labels, store.manifest.classes
    total = len(labels)
    if total < 2:
        raise KamimError(f"store = {store.path}: has {total} image; an analysis is over images and needs 2 or more")
    count = min(total, MOST_IMAGES) if request.images is None else request.images
    if not 2 <= count <= total:
        raise KamimError(f"images = {count}: {store.path} has {total}; choose 2 to {total}")
    order = rng.permutation(request.seed, 0, total)
    titles = _titles(request.classes, store)
    if not titles:
        few = order[:CLASSES]
        return Chosen(order[:count], few, np.zeros(len(few), np.int64), ())
    parts = [order[labels[order] == classes.index(title)][:IMAGES_PER_CLASS] for title in titles]
    for title, part in zip(titles, parts, strict=True):
        if not len(part):
            raise KamimError(f"classes: {store.path} has no image of class {title!r}; choose others")
    label = np.repeat(np.arange(CLASSES), [len(part) for part in parts])
    return Chosen(order[:count], np.concatenate(parts), label, titles)


def _titles(wanted: tuple[str, ...], store: Store) -> tuple[str, ...]:
    """Returns the three classes requested, or the first three with images; () if fewer than three have images."""
    labels, classes = store.images.labels, store.manifest.classes
    if not wanted:
        titles = [classes[label] for label in np.unique(labels) if label >= 0]
        return tuple(titles[:CLASSES]) if len(titles) >= CLASSES else ()
    if not classes:
        raise KamimError(f"classes = {','.join(wanted)}: {store.path} has no labels; leave the classes out")
    for title in wanted:
        if title not in classes:
            some = ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")
            raise KamimError(
                f"classes = {','.join(wanted)}: {title!r} is not one of the {len(classes)} of {store.path} ({some})"
            )
    if len(set(wanted)) != CLASSES or len(wanted) != CLASSES:
        raise KamimError(f"classes = {','.join(wanted)}: must be {CLASSES} different ones")
    return wanted


def check_names(specs: Sequence[str]) -> None:
    """Raises KamimError unless every checkpoint is given as [NAME=]CHECKPOINT, with a name of its own."""
    names = [named(spec)[0] for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise KamimError(
                f"checkpoint: {name} is the name of two; give each its own, as NAME=CHECKPOINT, such as "
                "KAMIM=runs/demo/kamim"
            )
