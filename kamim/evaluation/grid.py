"""A grid of pretraining runs that differ in a few keys, and the table of what their evaluation gives."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import pydantic
from pydantic import Field

from kamim import KamimError
from kamim.evaluation.config import Evaluation
from kamim.evaluation.paper import quoted
from kamim.evaluation.report import CHOICE, CHOSEN, HEADLINES, PAPER_HEADER
from kamim.reporting import page
from kamim.storage.escape import printable
from kamim.storage.flatten import flatten
from kamim.storage.store import write_whole
from kamim.training import metrics, report
from kamim.training.config import Pretrain
from kamim.training.settings import SOME, Section, load

Mode = Literal["linprobe", "finetune", "knn", "reconstruct", "probe-sweep"]
Value = bool | int | float | str | None


class Axis(Section):
    """One key of Pretrain, and its values."""

    key: str
    """Such as weighting.patch_size."""
    name: Annotated[str, Field(pattern="^[A-Za-z]+$")]
    """What a run's name calls it: ps and 8 make ps8."""
    values: Annotated[tuple[Value, ...], SOME]
    """Each is a run."""


class Grid(Section):
    """`kamim sweep`: every combination of the axes' values, each a run of its own below `out`, then evaluated."""

    PRESETS: ClassVar[str] = "sweeps"

    pretrain: dict[str, Any]
    """Keys of Pretrain, and `preset`, a preset's name or a file, whose values they override."""
    axes: Annotated[tuple[Axis, ...], SOME]
    """What varies."""
    evaluation: dict[str, Any]
    """Keys of Evaluation, and `preset`, likewise."""
    modes: Annotated[tuple[Mode, ...], SOME] = ("linprobe",)
    """Of `kamim eval`."""
    out: Path
    """The sweep's folder."""

    @pydantic.model_validator(mode="after")
    def _distinct(self) -> "Grid":
        names = [setting.name for setting in settings(self)]
        for name in names:
            if names.count(name) > 1:
                raise KamimError(f"axes = {name}: is the name of two runs; give every axis a name and every value once")
        return self


@dataclass(frozen=True)
class GridPoint:
    """One combination. name: of its run. values: by key of Pretrain."""

    name: str
    values: Mapping[str, Value]


def settings(grid: Grid) -> list[GridPoint]:
    """All of them; the last axis varies fastest."""
    return [
        GridPoint("_".join(f"{axis.name}{_text(v)}" for axis, v in zip(grid.axes, values, strict=True)),
                {axis.key: value for axis, value in zip(grid.axes, values, strict=True)})
        for values in product(*(axis.values for axis in grid.axes))
    ]  # fmt: skip


def pretraining(grid: Grid, setting: GridPoint) -> Pretrain:
    """The run of a setting. Raises ValueError where that cannot be."""
    return _resolved(Pretrain, grid.pretrain, setting.values, {"out": grid.out / setting.name})


def evaluation(grid: Grid) -> Evaluation:
    """Of all runs, by their names."""
    runs = tuple(f"{setting.name}={grid.out / setting.name}" for setting in settings(grid))
    return _resolved(Evaluation, grid.evaluation, {}, {"checkpoint": runs, "out": grid.out / "evaluation"})


S = TypeVar("S", Pretrain, Evaluation)


def _resolved(kind: type[S], section: Mapping[str, Any], values: Mapping[str, Value], given: Mapping[str, Any]) -> S:
    preset = section.get("preset")
    keys = dict(flatten({key: value for key, value in section.items() if key != "preset"})) | dict(values)
    overrides = [f"{key}={json.dumps(value)}" for key, value in keys.items()]
    return load(kind, None if preset is None else Path(preset), overrides, given)


@dataclass(frozen=True)
class Table:
    """What a sweep found: rows of text, a run each, and the paper's numbers where its setting is the same."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """With a header."""
        lines = [self.header, tuple("---" for _ in self.header), *self.rows]
        return "".join(f"| {' | '.join(map(_markdown, cells))} |\n" for cells in lines)


def _markdown(cell: str) -> str:
    return printable(cell).replace("|", "\\|")


def table(grid: Grid, results: Sequence[Mapping[str, Any]]) -> Table:
    """Of the headlines of `kamim eval`'s results and of the runs' metrics. Columns without any number are left out."""
    found = {(result["name"], result["mode"]): result for result in results}
    columns: list[tuple[str, list[str]]] = [
        (axis.key, [_text(setting.values[axis.key]) for setting in settings(grid)]) for axis in grid.axes
    ]
    for mode in grid.modes:
        mine = [found[setting.name, mode] for setting in settings(grid)]
        title, headline = HEADLINES[mode]
        columns.append((title, [headline(result) for result in mine]))
        columns.append((f"{title}, {PAPER_HEADER}", [_quote(result) for result in mine]))
    runs = [metrics.read(grid.out / setting.name) for setting in settings(grid)]
    columns.append(("Eq. 1, last tenth of the steps", [_number(report.last_unweighted(run), ".4f") for run in runs]))
    columns.append(("steps clipped", [_number(report.clipped_share(run), ".0%") for run in runs]))
    kept = [(title, cells) for title, cells in columns if any(cells)]
    return Table(tuple(title for title, _ in kept), tuple(zip(*(cells for _, cells in kept), strict=True)))


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _quote(result: Mapping[str, Any]) -> str:
    value, where = quoted(result).get("top1", (None, ""))
    return "" if value is None else f"{value:.2f} ({where})"


def save(grid: Grid, made: Table, results: Sequence[Mapping[str, Any]]) -> None:
    """table.json (every result whole), table.md and index.html in grid.out."""
    about = [{"name": setting.name, "values": dict(setting.values)} for setting in settings(grid)]
    page.save_numbers({"settings": about, "results": list(results)}, grid.out / "table.json")
    write_whole(grid.out / "table.md", made.markdown().encode())
    parts = [page.table(made.header, made.rows), page.paragraph("Top-1 in per cent on the validation store.")]
    if set(grid.modes) & set(CHOSEN):
        parts.append(page.paragraph(CHOICE))
    runs = {setting.name: metrics.read(grid.out / setting.name) for setting in settings(grid)}
    caption = "The loss without weights (Eq. 1) by optimiser step, whatever the weights that a run trained with."
    parts.append(page.picture(page.png(report.comparison(runs)), "loss", caption))
    page.save_page(f"Sweep {grid.out.name}", parts, grid.out / "index.html")


def _text(value: Value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
