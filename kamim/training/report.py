"""Reports a pretraining run as one self-contained HTML page: curves, panels, machines and configuration."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kamim import KamimError
from kamim.config.pretrain import Pretrain
from kamim.config.schema import load
from kamim.models.attention import uniform_distance
from kamim.reporting import page
from kamim.reporting.plots import COLOURS, label_log_axis, panels, styled
from kamim.storage.escape import literal
from kamim.storage.flatten import flat_text
from kamim.training import metrics, starts
from kamim.training.run_folder import CONFIG, METRICS, PANELS, REPORT, check_links

PNG = b"\x89PNG\r\n\x1a\n"  # the signature of a PNG file
POINTS = 100  # per curve; for more steps, each point is the mean of a group and a band its range
COLUMNS = 3
NEARLY_ALL = 0.99  # share of clipped steps that is explained
Lines = Sequence[Mapping[str, float]]  # the lines of a metrics.jsonl
STYLES = ("-", "--", ":")  # line styles, for more settings in one figure than there are colours
PLATEAU = 0.02  # share of the uniform distance within which attention is on the plateau; the paper's KAMIM: 0.003
MOST_PANELS = 12  # largest number of panels, spread evenly over the run
# title: ({key in metrics.jsonl: label}, scale of the y axis)
CURVES: Mapping[str, tuple[Mapping[str, str], str]] = {
    "loss": ({"loss": ""}, "linear"),
    "loss without weights W": ({"loss_unweighted": "model", "loss_mean_colour": "each crop's mean colour"}, "linear"),
    "gradient's norm, before clipping": ({"grad_norm": ""}, "log"),
    "learning rate": ({"lr": ""}, "linear"),
    "weights W": ({"weight_mean": "mean", "weight_max": "largest"}, "log"),
    "images per second": ({"images_per_second": ""}, "linear"),
    "data-wait, share of a step's time": ({"data_wait_share": ""}, "linear"),
    "kNN, top-1 (%)": ({"knn_top1": "kNN", "knn_majority": "majority class"}, "linear"),
    "distance of attention from uniform (px)": ({"attention_selectivity": ""}, "log"),
    "effective rank (RankMe)": ({"rankme": ""}, "linear"),
    "uniformity": ({"uniformity": ""}, "linear"),
    "alpha-ReQ": ({"alpha_req": ""}, "linear"),
}


def is_current(run: Path) -> bool:
    """Returns whether the report is newer than the metrics."""
    report, logged = run / REPORT, run / METRICS
    return report.is_file() and logged.is_file() and report.stat().st_mtime_ns >= logged.stat().st_mtime_ns


def save_report(run: Path) -> Path:
    """Writes RUN/report.html of a running, stopped or finished run. Raises KamimError if there is no run."""
    check_links(run)
    if not (run / CONFIG).is_file() or not (lines := metrics.read(run)):
        raise KamimError(f"{run}: holds no run with a step done (config.yaml, metrics.jsonl); give a run's folder")
    config, started = load(Pretrain, run / CONFIG), starts.read(run)
    shown = [file for file in sorted((run / PANELS).glob("step-*.png")) if _is_panel(file)]
    parts = [
        page.paragraph(_summary(config, lines, started)),
        *map(page.paragraph, _remarks(config, lines)),
        page.picture(page.png(curves(lines)), "curves", "By optimiser step. Bands: smallest and largest."),
        *_panels(shown),
        page.heading("Machines and configuration"),
        _starts(started),
        page.folded("Configuration", page.table(("key", "value"), flat_text(config.model_dump(mode="json")))),
    ]
    page.save_page(f"Run {run.resolve().name}", parts, run / REPORT)
    return run / REPORT


@styled
def curves(lines: Sequence[Mapping[str, float]], columns: int = COLUMNS) -> Figure:
    """Draws one panel for each kind of logged number. lines: the lines of metrics.jsonl."""
    drawn = {
        title: (known, scale)
        for title, (names, scale) in CURVES.items()
        if (known := {name: label for name, label in names.items() if any(name in line for line in lines)})
    }
    rows = -(-len(drawn) // columns)
    figure, grid = panels(columns, rows, side=3.4, height=2.4)
    for axes, (title, (names, scale)) in zip(grid.flat, drawn.items(), strict=False):
        for colour, (name, label) in zip(COLOURS, names.items(), strict=False):
            xy = np.array([(line["step"], line[name]) for line in lines if name in line])
            _curve(axes, xy, colour, label)
        axes.set_title(title)
        if scale == "log":
            label_log_axis(axes)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(names) > 1:
            axes.legend()
    for axes in list(grid.flat)[len(drawn) :]:
        axes.set_axis_off()
    return figure


@styled
def comparison(settings: Mapping[str, Sequence[Lines]]) -> Figure:
    """Draws Eq. 1 and, if any run logged it, the kNN probe by optimiser step, with one line per setting.

    The runs of a setting differ by seed. Lines are means over the runs, bands their range.
    """
    drawn = {"loss_unweighted": "loss without weights (Eq. 1)", "knn_top1": "kNN probe, top-1 (%)"}
    drawn = {
        name: title
        for name, title in drawn.items()
        if any(name in line for runs in settings.values() for lines in runs for line in lines)
    }
    figure, grid = panels(max(len(drawn), 1), side=5.2, height=3.6)
    for axes, (name, title) in zip(grid.flat, drawn.items(), strict=False):
        for i, (setting, runs) in enumerate(settings.items()):
            if any(name in line for lines in runs for line in lines):
                _band(axes, name, runs, COLOURS[i % len(COLOURS)], STYLES[i // len(COLOURS) % len(STYLES)], setting)
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
    return figure


def _band(axes: Axes, name: str, runs: Sequence[Lines], colour: str, style: str, label: str) -> None:
    """Draws one line for several runs, up to the last step that all of them have reached."""
    logged = [np.array([(line["step"], line[name]) for line in lines if name in line]) for lines in runs]
    logged = [xy for xy in logged if len(xy)]
    shared = min(map(len, logged))
    curves = np.stack([[part.mean(axis=0) for part in _parts(xy[:shared])] for xy in logged])
    middle = curves.mean(axis=0)
    if len(curves) > 1:
        axes.fill_between(
            middle[:, 0], curves[..., 1].min(axis=0), curves[..., 1].max(axis=0), color=colour, alpha=0.2, linewidth=0
        )
    marker = "o" if len(middle) < 30 else ""
    axes.plot(*middle.T, color=colour, linestyle=style, marker=marker, label=literal(label))


def last_unweighted(lines: Lines) -> float | None:
    """Returns the mean of Eq. 1 over the last tenth of the steps with a finite loss; None if it was not logged."""
    losses = [line["loss_unweighted"] for line in lines if np.isfinite(line.get("loss_unweighted", np.nan))]
    return float(np.mean(losses[-max(len(losses) // 10, 1) :])) if losses else None


def mean_of(name: str, lines: Lines) -> float | None:
    """Returns the mean of a number over the steps that logged a finite one; None if no step did."""
    values = [line[name] for line in lines if np.isfinite(line.get(name, np.nan))]
    return float(np.mean(values)) if values else None


def _parts(xy: np.ndarray) -> list[np.ndarray]:
    """Splits steps [N, 2] into at most POINTS groups."""
    return np.array_split(xy, min(len(xy), POINTS))


def _curve(axes: Axes, xy: np.ndarray, colour: str, label: str) -> None:
    """Draws a curve of xy [N, 2]."""
    parts = _parts(xy)
    middle = np.array([part.mean(axis=0) for part in parts])
    if len(parts) < len(xy):
        low, high = (np.array([reduce(part[:, 1]) for part in parts]) for reduce in (np.min, np.max))
        axes.fill_between(middle[:, 0], low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(*middle.T, color=colour, label=label, marker="o" if len(xy) < 30 else "")


def _summary(config: Pretrain, lines: Sequence[Mapping[str, float]], started: Sequence[Mapping[str, Any]]) -> str:
    weighting, last = config.weighting, lines[-1]
    method = config.title
    if weighting is not None:
        method += (
            f" ({weighting.detector}, {weighting.footprint}, w_ps {weighting.patch_size}, T {weighting.temperature:g})"
        )
    done, total = int(last["step"]) + 1, started[-1]["steps"] if started else None
    state = "done" if done == total else f"at {done} of {total or 'unknown'} steps"
    clipped = mean_of("clipped", lines)
    rate = np.median([line.get("images_per_second", np.nan) for line in lines])
    length = config.optim.duration or f"{config.optim.epochs} epochs"
    return (
        f"{method}, {config.model.name} at {config.data.resolution} px, {length} of "
        f"{config.data.store}, {config.optim.batch_size} images a step: {state}. "
        f"Last loss {last.get('loss', np.nan):.4f}; "
        + ("" if clipped is None else f"{clipped:.0%} of the steps were clipped at {config.optim.clip_grad:g}; ")
        + f"{rate:,.0f} images per second, the median step's."
        + _plateau(config, lines)
    )


def _plateau(config: Pretrain, lines: Sequence[Mapping[str, float]]) -> str:
    """Returns a sentence on whether and when attention left the plateau; empty if it was not measured."""
    measured = [(int(line["step"]), line["attention_selectivity"]) for line in lines if "attention_selectivity" in line]
    if not measured:
        return ""
    patch = config.model.patch_size
    uniform = uniform_distance(config.data.resolution // patch, patch)
    last = f"at {measured[-1][1]:.2g} px from the {uniform:.3g} px of uniform attention"
    left = next((step for step, selective in measured if selective > PLATEAU * uniform), None)
    if left is None:
        return f" Attention has not left the plateau (docs/results.md): it is {last}, within {PLATEAU:.0%}."
    return f" Attention left the plateau by step {left:,}; it is {last} now."


def _remarks(config: Pretrain, lines: Lines) -> list[str]:
    """Returns what the share of clipped steps and the newest online probe mean."""
    remarks = []
    if (mean_of("clipped", lines) or 0) >= NEARLY_ALL:
        remarks.append(
            f"Nearly every step was clipped, so every gradient has the norm {config.optim.clip_grad:g} whatever the "
            "size of the loss. That is usual for KAMIM, whose loss is W times as large as SimMIM's, and no fault; a "
            "run that is compared with this one should be clipped as often."
        )
    probed = [line for line in lines if np.isfinite(line.get("knn_top1", np.nan)) and "knn_majority" in line]
    if probed:
        last = probed[-1]
        better = last["knn_low"] > last["knn_majority"]
        remarks.append(
            f"Online probe after {int(last['step']) + 1} steps: kNN top-1 {last['knn_top1']:.2f} "
            f"[{last['knn_low']:.1f}, {last['knn_high']:.1f}] %, Wilson's 95 % interval; always answering the most "
            f"frequent class gives {last['knn_majority']:.2f} %. "
            + ("" if better else "So the features do not tell the classes apart better than that, as far as it shows.")
        )
    return remarks


def _is_panel(file: Path) -> bool:
    """Returns whether a file is a PNG panel of a run; a page shows no other file, such as a link to something else."""
    plain = file.is_file() and not file.is_symlink()
    return plain and re.fullmatch("step-[0-9]+", file.stem) is not None and file.read_bytes()[:8] == PNG


def _panels(files: Sequence[Path]) -> list[page.Part]:
    """Returns the newest panel open and some of the others folded."""
    if not files:
        return []
    files = [files[i] for i in np.unique(np.linspace(0, len(files) - 1, MOST_PANELS).round().astype(int))]
    pictures = [page.picture(file.read_bytes(), file.stem, _steps(file)) for file in files]
    older = [page.folded(_steps(file), picture) for file, picture in zip(files[:-1], pictures[:-1], strict=True)]
    return [page.heading("Reconstructions"), pictures[-1], *older]


def _steps(file: Path) -> str:
    return f"After {int(file.stem.removeprefix('step-'))} steps."


def _starts(started: Sequence[Mapping[str, Any]]) -> page.Part:
    """Returns a table with a column for every start of the run."""
    names = dict.fromkeys(name for start in started for name in start)
    rows = [(name, *(_text(start.get(name)) for start in started)) for name in names]
    return page.table(("", *(f"start {i}" for i in range(1, len(started) + 1))), [row for row in rows if any(row[1:])])


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)
