"""A grid of pretraining runs that differ in a few keys: its configuration, its runs and their evaluation."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import pydantic
from pydantic import Field

from kamim import KamimError
from kamim.config.pretrain import Pretrain
from kamim.config.schema import NotEmpty, Section, load
from kamim.evaluation.options import Evaluation, ModeName
from kamim.storage.flatten import flatten

Value = bool | int | float | str | None
Baseline = Literal["pixels", "random"]
BASELINES: Mapping[Baseline, str] = MappingProxyType({"pixels": "raw pixels", "random": "random weights"})
EVALUATION = "evaluation"  # the folder of a sweep that holds the results of `kamim eval`
MAX_RUNS = 10_000
SEED = "seed"  # the key of Pretrain whose values are repetitions


class Axis(Section):
    """What varies: the values of one key of Pretrain, or variants that set several keys each."""

    key: str | None = None
    """A key of Pretrain that varies, such as weighting.patch_size; not with variants."""
    name: Annotated[str, Field(pattern="^[A-Za-z]+$")]
    """Name of the axis in the names of runs: ps and the value 8 make ps8. With variants, also the column's header."""
    values: tuple[Value, ...] = ()
    """The values of the key, each a run; not with variants."""
    variants: dict[Annotated[str, Field(pattern="^[A-Za-z][A-Za-z0-9-]*$")], dict[str, Value]] = Field(
        default_factory=dict
    )
    """Keys of Pretrain and their values, by the variant's name, which is part of the run's name."""

    @pydantic.model_validator(mode="after")
    def _one_kind(self) -> "Axis":
        if bool(self.variants) == bool(self.key and self.values) or (self.variants and (self.key or self.values)):
            raise KamimError(f"axes: the axis {self.name} must have either a key and values, or variants")
        return self

    @property
    def title(self) -> str:
        """The header of the axis's column."""
        return self.key or self.name

    def choices(self) -> list[tuple[str, str, Mapping[str, Value]]]:
        """Returns the axis's choices: (part of the run's name, text in the table, values by key of Pretrain)."""
        if self.key is None:
            return [(name, name, values) for name, values in self.variants.items()]
        return [(f"{self.name}{_text(value)}", _text(value), {self.key: value}) for value in self.values]


class Grid(Section):
    """`kamim sweep`: every combination of the axes' values, each a run of its own below `out`, then evaluated."""

    PRESETS: ClassVar[str] = "sweeps"

    pretrain: dict[str, Any]
    """The runs' configuration: keys of Pretrain, and `preset`, a preset or a file, whose values they override."""
    axes: Annotated[tuple[Axis, ...], NotEmpty]
    """What varies: every combination of the axes' values is a run."""
    evaluation: dict[str, Any]
    """The evaluation's configuration: keys of Evaluation, and `preset`, whose values they override."""
    modes: Annotated[tuple[ModeName, ...], NotEmpty] = ("linprobe",)
    """Modes of `kamim eval` that evaluate every run."""
    baselines: tuple[Baseline, ...] = ()
    """What is evaluated beside the runs: raw pixels, and the architecture with the random weights of every seed."""
    out: Path
    """Folder of the sweep, for runs, evaluations and tables."""

    @pydantic.model_validator(mode="after")
    def _distinct(self) -> "Grid":
        if self.runs > MAX_RUNS:
            raise KamimError(f"axes: {self.runs:,} runs; must be at most {MAX_RUNS:,}; shorten or remove an axis")
        names = Counter(point.name for point in (*points(self), *baselines(self)))
        for name, count in names.items():
            if count > 1:
                raise KamimError(f"axes = {name}: is the name of two runs; give every axis a name and every value once")
        return self

    @property
    def runs(self) -> int:
        """The number of runs: of all combinations of the axes' values."""
        return math.prod(len(axis.values or axis.variants) for axis in self.axes)


@dataclass(frozen=True)
class GridPoint:
    """One row of the table: a combination of the axes, or a baseline.

    name: of its run. labels: its texts by axis title. values: its values by key of Pretrain. checkpoint: the value for
    `kamim eval`.
    """

    name: str
    labels: Mapping[str, str]
    values: Mapping[str, Value]
    checkpoint: str

    @property
    def seed(self) -> str:
        """Its value of the axis `seed`, if there is one."""
        return self.labels.get(SEED, "")

    @property
    def setting(self) -> str:
        """The setting, which points that differ by seed only share."""
        return ", ".join(text for title, text in self.labels.items() if text and title != SEED)


def points(grid: Grid) -> list[GridPoint]:
    """Returns all combinations, each a run; the last axis varies fastest."""
    combinations = []
    for choices in product(*(axis.choices() for axis in grid.axes)):
        name = "_".join(part for part, _, _ in choices)
        labels = {axis.title: text for axis, (_, text, _) in zip(grid.axes, choices, strict=True)}
        values = {key: value for _, _, values in choices for key, value in values.items()}
        combinations.append(GridPoint(name, labels, values, str(grid.out / name)))
    return combinations


def baselines(grid: Grid) -> list[GridPoint]:
    """Returns raw pixels, and random weights for every seed, each of the first run with that seed."""
    first_of_seed: dict[str, GridPoint] = {}
    for point in points(grid):
        first_of_seed.setdefault(point.seed, point)
    rows = []
    for kind in grid.baselines:
        for seed, point in list(first_of_seed.items())[: 1 if kind == "pixels" else None]:
            repeated = bool(seed) and kind == "random"
            title = next((axis.title for axis in grid.axes if axis.title != SEED), SEED)
            labels = {**{axis.title: "" for axis in grid.axes}, title: BASELINES[kind]}
            labels |= {SEED: seed} if repeated else {}
            name = f"{kind}_seed{seed}" if repeated else kind
            rows.append(GridPoint(name, labels, {}, f"{kind}:{grid.out / point.name}"))
    return rows


def pretraining(grid: Grid, point: GridPoint) -> Pretrain:
    """Returns the configuration of a point's run. Raises KamimError for a combination that cannot be trained."""
    return _resolved(Pretrain, grid.pretrain, point.values, {"out": grid.out / point.name})


def evaluation(grid: Grid, rows: Sequence[GridPoint]) -> Evaluation:
    """Returns the configuration of the evaluation of some rows."""
    checkpoints = tuple(f"{row.name}={row.checkpoint}" for row in rows)
    return _resolved(Evaluation, grid.evaluation, {}, {"checkpoint": checkpoints, "out": grid.out / EVALUATION})


S = TypeVar("S", Pretrain, Evaluation)


def _resolved(kind: type[S], section: Mapping[str, Any], values: Mapping[str, Value], given: Mapping[str, Any]) -> S:
    preset = section.get("preset")
    if preset is not None and not isinstance(preset, str):
        raise KamimError(f"preset = {preset!r}: must be the name of a preset, or a file")
    keys = dict(flatten({key: value for key, value in section.items() if key != "preset"})) | dict(values)
    overrides = [f"{key}={json.dumps(value)}" for key, value in keys.items()]
    return load(kind, None if preset is None else Path(preset), overrides, given)


def _text(value: Value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
