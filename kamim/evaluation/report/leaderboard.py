"""A leaderboard: results of many evaluations, a row for each checkpoint and a column for each mode and its options."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kamim import KamimError
from kamim.evaluation.modes import MODES, read_file
from kamim.evaluation.results import FILE, EvalSettings, Result, SampleSet
from kamim.storage.escape import one_line

Data = tuple[Any, ...]  # identifies the samples that a result was trained and measured on


def find(folders: Sequence[Path]) -> tuple[dict[Path, Result[Any]], list[str]]:
    """Returns every result below the folders by its file, and a line for each file that holds none, with the reason.

    Raises KamimError for a folder without a result.json, and if none can be read.
    """
    files: dict[Path, Path] = {}  # a file below two of the folders counts once
    for folder in folders:
        below = [file for file in sorted(folder.rglob(FILE)) if file.is_file()]
        if not below:
            raise KamimError(f"{folder}: holds no {FILE}; give folders that kamim eval --out or kamim sweep wrote")
        for file in below:
            files.setdefault(file.resolve(), file)
    results, skipped = {}, []
    for file in files.values():
        try:
            results[file] = _checked(file)
        except KamimError as error:
            skipped.append(one_line(error))
    if not results:
        raise KamimError(f"none of {len(skipped)} results can be read; the first is {skipped[0]}")
    return results, skipped


def _checked(file: Path) -> Result[Any]:
    """Reads a result and checks that its score, if it has one, is a finite number."""
    result = read_file(file)
    try:
        finite = math.isfinite(result.measured.score or 0)
    except (ValueError, ArithmeticError):  # nothing was measured, such as the accuracy for no k at all
        finite = False
    if not finite:
        raise KamimError(f"{file}: has no finite score; remove it and rerun the command to measure again")
    return result


@dataclass
class Row:
    """A checkpoint that was evaluated with one seed on one pair of sample sets.

    data: identifies the samples. results, files: by the column's title.
    """

    data: Data
    results: dict[str, Result[Any]] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)

    @property
    def settings(self) -> list[EvalSettings]:
        """The settings of all results, those that record the run's seed first."""
        settings_of_runs = [result.settings for result in self.results.values()]
        return sorted(settings_of_runs, key=lambda settings: settings.run_seed is None)

    @property
    def names(self) -> str:
        """The checkpoint's name, or its names if it was evaluated under several."""
        return joined((settings.name for settings in self.settings), ", ")

    @property
    def scores(self) -> dict[str, float]:
        """The scores by the column's title."""
        scores = {title: result.measured.score for title, result in self.results.items()}
        return {title: score for title, score in scores.items() if score is not None}

    @property
    def setting(self) -> str | None:
        """The setting, which rows that differ by the run's seed only share.

        None if that is unknown: for raw pixels, foreign weights, and results of versions that did not record the seed.
        """
        first = self.settings[0]
        if first.run_seed is None:
            return None
        trained = first.weights is not None
        run = (first.architecture, first.resolution, first.step, trained, first.pretraining, first.seed, self.data)
        return json.dumps(run, sort_keys=True)


class Leaderboard:
    """Results as rows and columns.

    Results are in one column if they have the same mode, protocol and options, and in one row if they are of the same
    checkpoint, evaluation seed, training samples and validation samples. sections: the rows by their samples, the best
    of the first column first. titles: of the columns, by recipe. repeated: a line for each file that is left out
    because another has its row and column.
    """

    def __init__(self, results: Mapping[Path, Result[Any]]):
        self.titles = _titles([result.settings for result in results.values()])
        self.repeated: list[str] = []
        rows: dict[tuple[Any, ...], Row] = {}
        for file, result in sorted(results.items(), key=lambda item: item[1].settings.train is None):
            settings, title = result.settings, self.titles[_recipe(result.settings)]
            about, train, val = (_checkpoint(settings), settings.seed), _samples(settings.train), _samples(settings.val)
            if train is None:  # a mode that trains nothing joins a row with the same validation samples
                train = next((of for *other, of, on in rows if (*other, on) == (*about, val)), None)
            row = rows.setdefault((*about, train, val), Row((train, val)))
            if settings.weights is None and title in row.results and row.results[title].measured != result.measured:
                about = (settings.checkpoint, settings.seed)  # such as pixels in patches of another size
                row = rows.setdefault((*about, train, val), Row((train, val)))
            if title in row.results:
                first = one_line(row.files[title])
                self.repeated.append(f"{one_line(file)}: is of the same checkpoint and settings as {first}")
            else:
                row.results[title], row.files[title] = result, file
        self.sections = _grouped(rows.values(), lambda row: row.data)
        for section in self.sections:
            section.sort(key=lambda row: [-row.scores.get(title, -math.inf) for title in self.titles.values()])

    def repetitions(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Returns the rows of each setting that has several runs, which differ by seed only."""
        settings = _grouped([row for row in rows if row.setting is not None], lambda row: row.setting)
        return [group for group in settings if len(seeds(group)) > 1]


def _checkpoint(settings: EvalSettings) -> Any:
    """Returns a checkpoint's identity: its weights' checksum, or what determines pixels and untrained weights.

    They are the same for several runs. Early versions did not record the seed of untrained weights.
    """
    known = settings.architecture == "pixels" or settings.run_seed is not None
    origin = (settings.architecture, settings.resolution, settings.run_seed, None if known else settings.checkpoint)
    return settings.weights or origin


def _samples(samples: SampleSet | None) -> Any:
    """Returns the identity of samples, except the evaluation's seed, with which subsets are drawn."""
    return None if samples is None else (samples.fingerprint or samples.store, samples.images)


def _recipe(settings: EvalSettings) -> tuple[str, str]:
    """Returns the key of a column: the mode, and its protocol and options as JSON."""
    return settings.mode, json.dumps({"protocol": settings.protocol, **settings.options}, sort_keys=True)


def _titles(settings: Sequence[EvalSettings]) -> dict[tuple[str, str], str]:
    """Returns the title of each recipe's column, in the order of the modes; numbered if a mode has several recipes."""
    titles = {}
    recipes = dict.fromkeys(map(_recipe, settings))
    for name, mode in MODES.items():
        of_mode = [recipe for recipe in recipes if recipe[0] == name]
        for number, recipe in enumerate(of_mode, 1):
            titles[recipe] = mode.column if len(of_mode) == 1 else f"{mode.column} [{number}]"
    return titles


def seeds(group: Sequence[Row]) -> list[int]:
    """Returns the runs' seeds, ascending; empty if two rows have the same, so that they differ otherwise."""
    of_runs = {seed for row in group if (seed := row.settings[0].run_seed) is not None}
    return sorted(of_runs) if len(of_runs) == len(group) else []


def first_samples(settings: Sequence[EvalSettings], which: str) -> SampleSet | None:
    """Returns the samples of the first settings that have any. which: "train" or "val"."""
    samples: SampleSet | None = next(filter(None, (getattr(one, which) for one in settings)), None)
    return samples


def _grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> list[list[Row]]:
    """Groups the rows by key, in the order of their first."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.values())


def joined(texts: Iterable[str], separator: str) -> str:
    """Joins the distinct texts that are not empty, in their order."""
    return separator.join(text for text in dict.fromkeys(texts) if text)
