"""The tables and the page of a sweep: a row for each run, and means over the runs that differ by seed only."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kamim.evaluation.modes import MODES
from kamim.evaluation.report.page import CHOICE, chosen_on_val
from kamim.evaluation.results import Result, headline, majority_lines
from kamim.evaluation.sections import PAPER_HEADER, quote
from kamim.reporting import page
from kamim.reporting.intervals import Estimate, estimate, paired_difference
from kamim.reporting.table import Table, of_columns
from kamim.storage.files import write_whole
from kamim.sweep.grid import Grid, GridPoint, baselines, points
from kamim.training import metrics, report
from kamim.training.report import Lines

PAGE, TITLE = "index.html", "Sweep "  # the title ends with the name of the folder
TABLES = ("table.json", "table.md")
OF_RUNS: Mapping[str, tuple[Callable[[Lines], float | None], str]] = {  # columns from a run's metrics, and their format
    "Eq. 1, last tenth of the steps": (report.last_unweighted, ".4f"),
    "mean W": (lambda lines: report.mean_of("weight_mean", lines), ".1f"),
    "gradient norm, mean": (lambda lines: report.mean_of("grad_norm", lines), ".2f"),
    "steps clipped": (lambda lines: report.mean_of("clipped", lines), ".0%"),
}


class SweepResults:
    """The results of a sweep so far, for the points and baselines that have any."""

    def __init__(self, grid: Grid, results: Sequence[Result[Any]]):
        self.grid = grid
        self.by_point = {(result.settings.name, result.settings.mode): result for result in results}
        evaluated = {name for name, _ in self.by_point}
        self.points = [point for point in (*points(grid), *baselines(grid)) if point.name in evaluated]
        self.metrics = {point.name: metrics.read(grid.out / point.name) for point in self.points}

    def settings(self) -> dict[str, list[GridPoint]]:
        """Returns the points of each setting: those that differ by seed only."""
        groups: dict[str, list[GridPoint]] = {}
        for point in self.points:
            groups.setdefault(point.setting, []).append(point)
        return groups

    def scores(self, group: Sequence[GridPoint], mode: str) -> dict[str, float]:
        """Returns the scores of a setting in a mode, by seed."""
        results = {point.seed: self.by_point.get((point.name, mode)) for point in group}
        return {seed: r.measured.score for seed, r in results.items() if r is not None and r.measured.score is not None}


def runs_table(sweep: SweepResults) -> Table:
    """Returns a row for each run and baseline; the paper's numbers appear next to ours if the setting is the same."""
    columns = [(axis.title, [point.labels[axis.title] for point in sweep.points]) for axis in sweep.grid.axes]
    for mode in sweep.grid.modes:
        of_mode = [sweep.by_point.get((point.name, mode)) for point in sweep.points]
        columns.append((MODES[mode].column, ["" if r is None else headline(r) for r in of_mode]))
        quoted = ["" if r is None else quote(r.settings, "top1") for r in of_mode]
        columns.append((f"{MODES[mode].column}, {PAPER_HEADER}", quoted))
    for title, (number, form) in OF_RUNS.items():
        numbers = [number(sweep.metrics[point.name]) for point in sweep.points]
        columns.append((title, ["" if value is None else f"{value:{form}}" for value in numbers]))
    return of_columns(columns)


def settings_table(sweep: SweepResults) -> Table:
    """Returns a row for each setting: the number of seeds, and each mode's mean ± standard deviation over them."""
    groups = sweep.settings()
    columns = [("setting", list(groups)), ("seeds", [str(len(group)) for group in groups.values()])]
    for mode in sweep.grid.modes:
        of_mode = [(list(sweep.scores(group, mode).values()), len(group)) for group in groups.values()]
        columns.append((MODES[mode].column, [estimate(scores).of(runs) if scores else "" for scores, runs in of_mode]))
    return of_columns(columns)


def differences_table(sweep: SweepResults) -> Table:
    """Returns each trained setting minus the first, by seed: mean, and Student's 95 % interval from two seeds on."""
    trained = {point.setting for point in points(sweep.grid)}
    groups = {setting: group for setting, group in sweep.settings().items() if setting in trained}
    (first, reference), *others = groups.items()
    columns = [(f"less {first}", [setting for setting, _ in others])]
    for mode in sweep.grid.modes:
        base = sweep.scores(reference, mode)
        cells = []
        for _, group in others:
            scores = sweep.scores(group, mode)
            pairs = [(scores[seed], base[seed]) for seed in scores if seed in base]
            cells.append(_difference(paired_difference(*zip(*pairs, strict=True)), len(group)) if pairs else "")
        columns.append((MODES[mode].column, cells))
    return of_columns(columns)


def _difference(difference: Estimate, runs: int) -> str:
    """Formats a difference with its interval, which depends much on the number of pairs, given if it is not `runs`."""
    pairs = "" if difference.runs == runs else f" ({difference.runs} of {runs} runs)"
    if difference.half_width is None:
        return f"{difference.mean:+.2f}{pairs}"
    low, high = difference.mean - difference.half_width, difference.mean + difference.half_width
    return f"{difference.mean:+.2f} [{low:+.2f}, {high:+.2f}]{pairs}"


def save(sweep: SweepResults) -> None:
    """Writes table.json (every result in full), table.md and index.html to the sweep's folder."""
    out, groups = sweep.grid.out, sweep.settings()
    about = [{"name": point.name, "values": dict(point.values)} for point in sweep.points]
    results = [result.as_json() for result in sweep.by_point.values()]
    page.save_numbers({"settings": about, "results": results}, out / TABLES[0])
    tables = {"Runs": runs_table(sweep)}
    if any(len(group) > 1 for group in groups.values()):
        tables = {
            "Mean and standard deviation over seeds": settings_table(sweep),
            "Differences, with 95 % intervals over seeds": differences_table(sweep),
            **tables,
        }
    write_whole(out / TABLES[1], "\n".join(f"{title}\n\n{t.markdown()}" for title, t in tables.items()).encode())
    parts = [page.paragraph("Top-1 in per cent on the validation store; that of a run with Wilson's 95 % interval.")]
    parts += map(page.paragraph, majority_lines(sweep.by_point.values()))
    if chosen_on_val(sweep.grid.modes):
        parts.append(page.paragraph(CHOICE))
    for title, table in tables.items():
        parts += [page.heading(title), page.table(table.header, table.rows)]
    curves = {setting: [sweep.metrics[point.name] for point in group] for setting, group in groups.items()}
    caption = (
        "Pretraining, by optimiser step. The loss without weights is Eq. 1, whatever the weights of a run; "
        "runs that set `probe` also show its kNN accuracy. Lines are means over seeds, bands their range."
    )
    parts.append(page.picture(page.png(report.comparison(curves)), "training", caption))
    page.save_page(f"{TITLE}{out.name}", parts, out / PAGE)
