"""A grid of pretraining runs that differ in a few keys, and the table of their evaluation."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import pydantic
from pydantic import Field

from kamim import KamimError
from kamim.evaluation.config import Evaluation, ModeName
from kamim.evaluation.modes import MODES
from kamim.evaluation.report import CHOICE, chosen_on_val
from kamim.evaluation.results import Result
from kamim.evaluation.sections import PAPER_HEADER, quote
from kamim.reporting import page
from kamim.storage.escape import printable
from kamim.storage.flatten import flatten
from kamim.storage.store import write_whole
from kamim.training import metrics, report
from kamim.training.config import Pretrain
from kamim.training.settings import SOME, Section, load

Value = bool | int | float | str | None


class Axis(Section):
    """One key of Pretrain, and its values."""

    key: str
    """Such as weighting.patch_size."""
    name: Annotated[str, Field(pattern="^[A-Za-z]+$")]
    """Its abbreviation in the names of runs: ps and 8 give ps8."""
    values: Annotated[tuple[Value, ...], SOME]
    """One run for each."""


class Grid(Section):
    """`kamim sweep`: one run below `out` for every combination of the axes' values, then their evaluation."""

    PRESETS: ClassVar[str] = "sweeps"

    pretrain: dict[str, Any]
    """Keys of Pretrain, and `preset`, a preset's name or a file, whose values they override."""
    axes: Annotated[tuple[Axis, ...], SOME]
    """The keys that vary."""
    evaluation: dict[str, Any]
    """Keys of Evaluation, and `preset`, likewise."""
    modes: Annotated[tuple[ModeName, ...], SOME] = ("linprobe",)
    """Modes of `kamim eval`."""
    out: Path
    """The sweep's folder."""

    @pydantic.model_validator(mode="after")
    def _distinct(self) -> "Grid":
        names = [point.name for point in points(self)]
        for name in names:
            if names.count(name) > 1:
                raise KamimError(f"axes = {name}: is the name of two runs; give every axis a name and every value once")
        return self


@dataclass(frozen=True)
class GridPoint:
    """One combination of values. name: of its run. values: by key of Pretrain."""

    name: str
    values: Mapping[str, Value]


def points(grid: Grid) -> list[GridPoint]:
    """All combinations; the last axis varies fastest."""
    return [
        GridPoint("_".join(f"{axis.name}{_text(v)}" for axis, v in zip(grid.axes, values, strict=True)),
                {axis.key: value for axis, value in zip(grid.axes, values, strict=True)})
        for values in product(*(axis.values for axis in grid.axes))
    ]  # fmt: skip


def pretraining(grid: Grid, point: GridPoint) -> Pretrain:
    """The configuration of a run. Raises KamimError if it is invalid."""
    return _resolved(Pretrain, grid.pretrain, point.values, {"out": grid.out / point.name})


def evaluation(grid: Grid) -> Evaluation:
    """The configuration of the evaluation of all runs, by their names."""
    runs = tuple(f"{point.name}={grid.out / point.name}" for point in points(grid))
    return _resolved(Evaluation, grid.evaluation, {}, {"checkpoint": runs, "out": grid.out / "evaluation"})


S = TypeVar("S", Pretrain, Evaluation)


def _resolved(kind: type[S], section: Mapping[str, Any], values: Mapping[str, Value], given: Mapping[str, Any]) -> S:
    preset = section.get("preset")
    keys = dict(flatten({key: value for key, value in section.items() if key != "preset"})) | dict(values)
    overrides = [f"{key}={json.dumps(value)}" for key, value in keys.items()]
    return load(kind, None if preset is None else Path(preset), overrides, given)


@dataclass(frozen=True)
class Table:
    """The table of a sweep: one row of text for each run, with the paper's numbers for the same settings."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """The table as Markdown, with a header."""
        lines = [self.header, tuple("---" for _ in self.header), *self.rows]
        return "".join(f"| {' | '.join(map(_markdown, cells))} |\n" for cells in lines)


def _markdown(cell: str) -> str:
    return printable(cell).replace("|", "\\|")


def table(grid: Grid, results: Sequence[Result[Any]]) -> Table:
    """The headlines of `kamim eval`'s results and of the runs' metrics, without columns that hold no number."""
    by_run = {(result.settings.name, result.settings.mode): result for result in results}
    columns: list[tuple[str, list[str]]] = [
        (axis.key, [_text(point.values[axis.key]) for point in points(grid)]) for axis in grid.axes
    ]
    for mode in grid.modes:
        of_mode, title = [by_run[point.name, mode] for point in points(grid)], MODES[mode].column
        columns.append((title, [result.measured.headline for result in of_mode]))
        columns.append((f"{title}, {PAPER_HEADER}", [quote(result.settings, "top1") for result in of_mode]))
    runs = [metrics.read(grid.out / point.name) for point in points(grid)]
    columns.append(("Eq. 1, last tenth of the steps", [_number(report.last_unweighted(run), ".4f") for run in runs]))
    columns.append(("steps clipped", [_number(report.clipped_share(run), ".0%") for run in runs]))
    kept = [(title, cells) for title, cells in columns if any(cells)]
    return Table(tuple(title for title, _ in kept), tuple(zip(*(cells for _, cells in kept), strict=True)))


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def save(grid: Grid, shown: Table, results: Sequence[Result[Any]]) -> None:
    """Writes table.json, with every result in full, table.md and index.html to grid.out."""
    about = [{"name": point.name, "values": dict(point.values)} for point in points(grid)]
    page.save_numbers({"settings": about, "results": [result.as_json() for result in results]}, grid.out / "table.json")
    write_whole(grid.out / "table.md", shown.markdown().encode())
    parts = [page.table(shown.header, shown.rows), page.paragraph("Top-1 in per cent on the validation store.")]
    if chosen_on_val(grid.modes):
        parts.append(page.paragraph(CHOICE))
    runs = {point.name: metrics.read(grid.out / point.name) for point in points(grid)}
    caption = "The loss without weights (Eq. 1) by optimiser step, also of runs that trained with weights."
    parts.append(page.picture(page.png(report.comparison(runs)), "loss", caption))
    page.save_page(f"Sweep {grid.out.name}", parts, grid.out / "index.html")


def _text(value: Value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
