"""The page, Markdown and CSV of a leaderboard."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kamim
from kamim.evaluation.modes import MODES
from kamim.evaluation.report.leaderboard import Leaderboard, Row, first_samples, joined, seeds
from kamim.evaluation.report.page import CHOICE, chosen_on_val
from kamim.evaluation.results import Result, headline, majority_lines, score_text
from kamim.reporting import page
from kamim.reporting.intervals import Estimate, estimate
from kamim.reporting.table import Table, of_columns
from kamim.storage import escape
from kamim.storage.files import write_whole
from kamim.storage.flatten import flat_text
from kamim.storage.ownership import check_results, mark_results, refuse_links

COMMAND, TITLE = "report eval", "kamim leaderboard"
SHORT = 8  # hexadecimal digits of a checksum, except in CSV files
ABOUT = (
    "Scores are top-1 in per cent on the validation samples, unless named. Weights and samples are identified by the "
    "first digits of checksums, which table.csv has in full. Means are over runs that agree in everything recorded "
    "except their seeds. Rows without a seed are in no mean: they have no run, or early versions did not record it."
)
SEEDS = "Mean ± standard deviation over seeds"
Columns = list[tuple[str, list[str]]]
Groups = Sequence[Sequence[Row]]  # rows that differ by seed only


def scores_table(board: Leaderboard, rows: Sequence[Row]) -> Table:
    """Returns a row of scores for each checkpoint, accuracies with their Wilson intervals."""
    seeds_of_runs = [_text(row.settings[0].run_seed) for row in rows]
    return of_columns(
        [("checkpoint", [row.names for row in rows]), ("seed", seeds_of_runs), *_scores_columns(board, rows, headline)]
    )


def checkpoints_table(rows: Sequence[Row]) -> Table:
    """Returns a row for each checkpoint that tells what it is."""
    weights = [(row.settings[0].weights or "")[:SHORT] for row in rows]
    return of_columns([("checkpoint", [row.names for row in rows]), *_checkpoints_columns(rows), ("weights", weights)])


def commands_table(rows: Sequence[Row]) -> Table:
    """Returns the command lines that measured the results of each checkpoint."""
    return of_columns([("checkpoint", [row.names for row in rows]), ("command", _commands(rows))])


def full_table(board: Leaderboard, rows: Sequence[Row]) -> Table:
    """Returns everything about each checkpoint in one row: whole checksums, scores as plain numbers."""
    return of_columns(
        [
            ("checkpoint", [row.names for row in rows]),
            *_checkpoints_columns(rows),
            *_scores_columns(board, rows, score_text),
            ("weights", [row.settings[0].weights or "" for row in rows]),
            *_samples_columns(rows),
            ("command", _commands(rows)),
        ]
    )


def _checkpoints_columns(rows: Sequence[Row]) -> Columns:
    settings = [row.settings[0] for row in rows]
    return [
        ("architecture", [one.architecture for one in settings]),
        ("resolution", [_text(one.resolution) for one in settings]),
        ("step", [str(one.step) for one in settings]),
        ("seed", [_text(one.run_seed) for one in settings]),
        ("evaluation seed", [str(one.seed) for one in settings]),
    ]


def _scores_columns(board: Leaderboard, rows: Sequence[Row], text: Callable[[Result[Any]], str]) -> Columns:
    columns = []
    for title in board.titles.values():
        of_mode = [row.results.get(title) for row in rows]
        columns.append((title, ["" if result is None else text(result) for result in of_mode]))
    return columns


def _commands(rows: Sequence[Row]) -> list[str]:
    return [joined((one.command or "" for one in row.settings), "; ") for row in rows]


def seeds_table(board: Leaderboard, groups: Groups) -> Table:
    """Returns a row for each setting of several runs: mean and standard deviation of each column."""
    columns = _settings_columns(groups)
    for title in board.titles.values():
        estimates = [(_estimate(group, title), len(group)) for group in groups]
        columns.append((title, ["" if of_runs is None else of_runs.of(runs) for of_runs, runs in estimates]))
    return of_columns(columns)


def seeds_numbers(board: Leaderboard, groups: Groups) -> Table:
    """Returns the means with a column for each number, and with the samples."""
    columns = _settings_columns(groups)
    for title in board.titles.values():
        of_mode = [_estimate(group, title) for group in groups]
        columns += [
            (f"{title}: mean", ["" if e is None else f"{e.mean:.4f}" for e in of_mode]),
            (f"{title}: standard deviation", ["" if e is None else _text(e.deviation, ".4f") for e in of_mode]),
            (f"{title}: runs", ["" if e is None else str(e.runs) for e in of_mode]),
        ]
    return of_columns([*columns, *_samples_columns([group[0] for group in groups])])


def recipes_table(board: Leaderboard) -> Table:
    """Returns the differences between a mode's columns, for modes with several columns."""
    rows = []
    for mode in MODES:
        recipes = {
            title: dict(flat_text(json.loads(text))) for (name, text), title in board.titles.items() if name == mode
        }
        keys = dict.fromkeys(key for recipe in recipes.values() for key in recipe)
        differ = [key for key in keys if len({recipe.get(key) for recipe in recipes.values()}) > 1]
        if len(recipes) > 1:
            for title, recipe in recipes.items():
                rows.append((title, ", ".join(f"{key}={recipe.get(key, 'not recorded')}" for key in differ)))
    return Table(("column", "settings"), tuple(rows))


def check_out(out: Path) -> None:
    """Raises KamimError if `out` holds files but no leaderboard, or links in place of its files."""
    check_results(out, COMMAND, lambda out: page.title_of(out / "index.html") == TITLE)
    refuse_links(out / name for name in ("index.html", "table.md", "table.csv", "seeds.csv"))


def save(board: Leaderboard, skipped: Sequence[str], out: Path) -> list[Path]:
    """Writes index.html, table.md, table.csv and, if there are means, seeds.csv to `out`. Returns the files.

    skipped: a line for each file that could not be read. Raises OSError if a file cannot be written.
    """
    about = [
        f"kamim {kamim.__version__}. {ABOUT}",
        *([CHOICE] if chosen_on_val(mode for mode, _ in board.titles) else []),
    ]
    blocks = [*_blocks(board)]
    if left_out := [*skipped, *board.repeated]:
        table = Table(("file",), tuple((line,) for line in left_out))
        blocks.append(Block(f"Left out: {len(left_out)}", folded={"files": table}))
    rows = [row for section in board.sections for row in section]
    groups = [group for section in board.sections for group in board.repetitions(section)]
    texts = {
        "table.md": "\n".join(block.markdown() for block in blocks),
        "table.csv": full_table(board, rows).csv(),
        **({"seeds.csv": seeds_numbers(board, groups).csv()} if groups else {}),
    }
    check_out(out)
    mark_results(out, COMMAND)
    (out / "seeds.csv").unlink(missing_ok=True)  # left from an earlier leaderboard
    parts = [*map(page.paragraph, about), *(part for block in blocks for part in block.parts())]
    if (commands := commands_table(rows)).header[1:]:
        parts.append(page.folded("Command lines", page.table(commands.header, commands.rows)))
    page.save_page(TITLE, parts, out / "index.html")
    for name, text in texts.items():
        write_whole(out / name, text.encode())
    return [out / "index.html", *(out / name for name in texts)]


@dataclass(frozen=True)
class Block:
    """A heading, paragraphs and a table; then tables by their names, which the page folds."""

    title: str
    table: Table | None = None
    lines: Sequence[str] = ()
    folded: Mapping[str, Table] = field(default_factory=dict)

    def parts(self) -> Iterator[page.Part]:
        """Yields the parts of the page."""
        yield page.heading(self.title)
        yield from map(page.paragraph, self.lines)
        if self.table is not None:
            yield page.table(self.table.header, self.table.rows)
        for name, table in self.folded.items():
            yield page.folded(name, page.table(table.header, table.rows))

    def markdown(self) -> str:
        """Returns the block in Markdown."""
        tables = [*([] if self.table is None else [self.table]), *self.folded.values()]
        texts = [f"## {escape.markdown(self.title)}\n", *(f"{escape.markdown(line)}\n" for line in self.lines)]
        return "\n".join([*texts, *(table.markdown() for table in tables)])


def _blocks(board: Leaderboard) -> Iterator[Block]:
    """Yields the checkpoints and their means of each section, then the recipes."""
    for number, rows in enumerate(board.sections, 1):
        lines = majority_lines(result for row in rows for result in row.results.values())
        about = {"Checkpoints: architecture, step, seed, weights": checkpoints_table(rows)}
        yield Block(f"{number}. {_heading(rows)}", scores_table(board, rows), lines, about)
        if groups := board.repetitions(rows):
            yield Block(f"{number}. {SEEDS}", seeds_table(board, groups))
    if (recipes := recipes_table(board)).rows:
        yield Block("Settings in which columns of one mode differ", recipes)


def _heading(rows: Sequence[Row]) -> str:
    """Names the samples of a section."""
    settings = [one for row in rows for one in row.settings]
    samples = {verb: first_samples(settings, which) for verb, which in (("trained", "train"), ("evaluated", "val"))}
    texts = [
        f"{verb} on {of.store} ({of.dataset}, {of.images} images, {of.fingerprint[:SHORT]})"
        for verb, of in samples.items()
        if of is not None
    ]
    heading = "; ".join(texts)
    return heading[:1].upper() + heading[1:]


def _settings_columns(groups: Groups) -> Columns:
    """Returns the columns that name the settings of a table over seeds."""
    return [
        ("checkpoints", [joined((row.names for row in group), ", ") for group in groups]),
        ("seeds", [", ".join(map(str, seeds(group))) for group in groups]),
    ]


def _samples_columns(rows: Sequence[Row]) -> Columns:
    """Returns the columns of training and validation samples: the store's fingerprint and the number of images."""
    columns: Columns = []
    for which in ("train", "val"):
        samples = [first_samples(row.settings, which) for row in rows]
        columns += [
            (which, ["" if of is None else of.fingerprint for of in samples]),
            (f"{which} images", ["" if of is None else str(of.images) for of in samples]),
        ]
    return columns


def _estimate(group: Sequence[Row], title: str) -> Estimate | None:
    scores = [row.scores[title] for row in group if title in row.scores]
    return estimate(scores) if scores else None


def _text(value: float | None, form: str = "") -> str:
    return "" if value is None else f"{value:{form}}"
