"""The page, Markdown and CSV of a leaderboard."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import kamim
from kamim.evaluation.intervals import Estimate, estimate
from kamim.evaluation.leaderboard import Leaderboard, Row, first_samples, joined, seeds
from kamim.evaluation.modes import MODES
from kamim.evaluation.report import CHOICE, chosen_on_val
from kamim.evaluation.results import headline, score_text
from kamim.reporting import page
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


def checkpoints_table(board: Leaderboard, rows: Sequence[Row], digits: int | None = SHORT) -> Table:
    """Returns a row for each checkpoint. digits: of checksums; None gives all of them, and scores as plain numbers."""
    score = score_text if digits is None else headline
    settings = [row.settings for row in rows]
    columns: Columns = [
        ("checkpoint", [row.names for row in rows]),
        ("architecture", [s[0].architecture for s in settings]),
        ("resolution", [_text(s[0].resolution) for s in settings]),
        ("step", [str(s[0].step) for s in settings]),
        ("seed", [_text(s[0].run_seed) for s in settings]),
        ("evaluation seed", [str(s[0].seed) for s in settings]),
    ]
    for title in board.titles.values():
        of_mode = [row.results.get(title) for row in rows]
        columns.append((title, ["" if result is None else score(result) for result in of_mode]))
    columns += [("weights", [(s[0].weights or "")[:digits] for s in settings]), *_samples_columns(rows, digits)]
    columns.append(("command", [joined((one.command or "" for one in s), "; ") for s in settings]))
    return of_columns(columns)


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
    return of_columns([*columns, *_samples_columns([group[0] for group in groups], None)])


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
    tables, left_out = dict(_tables(board)), [*skipped, *board.repeated]
    parts = [page.paragraph(f"kamim {kamim.__version__}. {ABOUT}")]
    if chosen_on_val(mode for mode, _ in board.titles):
        parts.append(page.paragraph(CHOICE))
    if left_out:
        tables[f"Left out: {len(left_out)}"] = Table(("file",), tuple((line,) for line in left_out))
    for title, table in tables.items():
        parts += [page.heading(title), page.table(table.header, table.rows)]
    rows = [row for section in board.sections for row in section]
    groups = [group for section in board.sections for group in board.repetitions(section)]
    texts = {
        "table.md": "\n".join(f"## {escape.markdown(title)}\n\n{t.markdown()}" for title, t in tables.items()),
        "table.csv": checkpoints_table(board, rows, digits=None).csv(),
        **({"seeds.csv": seeds_numbers(board, groups).csv()} if groups else {}),
    }
    check_out(out)
    mark_results(out, COMMAND)
    (out / "seeds.csv").unlink(missing_ok=True)  # left from an earlier leaderboard
    page.save_page(TITLE, parts, out / "index.html")
    for name, text in texts.items():
        write_whole(out / name, text.encode())
    return [out / "index.html", *(out / name for name in texts)]


def _tables(board: Leaderboard) -> Iterator[tuple[str, Table]]:
    """Yields headings and tables: of the checkpoints and of their means for each section, then of the recipes."""
    for number, rows in enumerate(board.sections, 1):
        yield f"{number}. {_heading(rows)}", checkpoints_table(board, rows)
        if groups := board.repetitions(rows):
            yield f"{number}. {SEEDS}", seeds_table(board, groups)
    if (recipes := recipes_table(board)).rows:
        yield "Settings in which columns of one mode differ", recipes


def _heading(rows: Sequence[Row]) -> str:
    """Names the samples of a section."""
    settings = [one for row in rows for one in row.settings]
    samples = {verb: first_samples(settings, which) for verb, which in (("Trained", "train"), ("Evaluated", "val"))}
    return "; ".join(
        f"{verb} on {of.store} ({of.dataset}, {of.images} images, {of.fingerprint[:SHORT]})"
        for verb, of in samples.items() if of is not None
    )  # fmt: skip


def _settings_columns(groups: Groups) -> Columns:
    """Returns the columns that name the settings of a table over seeds."""
    return [
        ("checkpoints", [joined((row.names for row in group), ", ") for group in groups]),
        ("seeds", [", ".join(map(str, seeds(group))) for group in groups]),
    ]


def _samples_columns(rows: Sequence[Row], digits: int | None) -> Columns:
    """Returns the columns of training and validation samples: the store's fingerprint and the number of images."""
    columns: Columns = []
    for which in ("train", "val"):
        samples = [first_samples(row.settings, which) for row in rows]
        columns += [
            (which, ["" if of is None else of.fingerprint[:digits] for of in samples]),
            (f"{which} images", ["" if of is None else str(of.images) for of in samples]),
        ]
    return columns


def _estimate(group: Sequence[Row], title: str) -> Estimate | None:
    scores = [row.scores[title] for row in group if title in row.scores]
    return estimate(scores) if scores else None


def _text(value: float | None, form: str = "") -> str:
    return "" if value is None else f"{value:{form}}"
