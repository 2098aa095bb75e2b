"""A pretraining run as one HTML page that needs nothing else: how it was made, its curves, its panels."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kamim import KamimError
from kamim.reporting import page
from kamim.reporting.plots import COLOURS, panels, styled
from kamim.storage.escape import literal
from kamim.storage.flatten import flat_text
from kamim.training import machine, metrics
from kamim.training.config import Pretrain
from kamim.training.settings import load

FILE = "report.html"
PNG = b"\x89PNG\r\n\x1a\n"  # what such a file begins with
POINTS = 100  # of a curve; of more steps than these each point is the mean of some, and a band their range
COLUMNS = 3
Lines = Sequence[Mapping[str, float]]  # of a metrics.jsonl
STYLES = ("-", "--", ":")  # of settings in one picture, of which there may be more than colours
PANELS = 12  # at most, from all over the run
# title: the numbers drawn together, as metrics.jsonl names them, and what the y axis says
CURVES: Mapping[str, tuple[Mapping[str, str], str]] = {
    "loss": ({"loss": ""}, "linear"),
    "loss without weights (Eq. 1)": ({"loss_unweighted": ""}, "linear"),
    "gradient's norm, before clipping": ({"grad_norm": ""}, "log"),
    "learning rate": ({"lr": ""}, "linear"),
    "weights W": ({"weight_mean": "mean", "weight_max": "largest"}, "log"),
    "images per second": ({"images_per_second": ""}, "linear"),
    "data-wait, share of a step's time": ({"data_wait_share": ""}, "linear"),
    "kNN, top-1 (%)": ({"knn_top1": ""}, "linear"),
}


def is_current(run: Path) -> bool:
    """Whether the report says all that the run has said."""
    report, said = run / FILE, run / metrics.FILE
    return report.is_file() and said.is_file() and report.stat().st_mtime_ns >= said.stat().st_mtime_ns


def save_report(run: Path) -> Path:
    """RUN/report.html, of a run that goes on, was stopped or is done. Raises ValueError where there is none."""
    if not (run / "config.yaml").is_file() or not (lines := metrics.read(run)):
        raise KamimError(f"{run}: holds no run with a step done (config.yaml, metrics.jsonl); give a run's folder")
    config, starts = load(Pretrain, run / "config.yaml"), machine.starts(run)
    shown = [file for file in sorted((run / "panels").glob("step-*.png")) if _is_panel(file)]
    parts = [
        page.paragraph(_summary(config, lines, starts)),
        page.picture(page.png(curves(lines)), "curves", "By optimiser step. Bands: smallest and largest."),
        *_panels(shown),
        page.heading("How it was made"),
        _starts(starts),
        page.folded("Configuration", page.table(("key", "value"), flat_text(config.model_dump(mode="json")))),
    ]
    page.save_page(f"Run {run.resolve().name}", parts, run / FILE)
    return run / FILE


@styled
def curves(lines: Sequence[Mapping[str, float]], columns: int = COLUMNS) -> Figure:
    """A panel for each kind of number there is. lines: as metrics.jsonl has them."""
    drawn = {
        title: (known, scale) for title, (names, scale) in CURVES.items()
        if (known := {name: label for name, label in names.items() if any(name in line for line in lines)})
    }  # fmt: skip
    rows = -(-len(drawn) // columns)
    figure, grid = panels(columns, rows, side=3.4, height=2.4)
    for axes, (title, (names, scale)) in zip(grid.flat, drawn.items(), strict=False):
        for colour, (name, label) in zip(COLOURS, names.items(), strict=False):
            xy = np.array([(line["step"], line[name]) for line in lines if name in line])
            _curve(axes, xy, colour, label)
        axes.set_title(title)
        axes.set_yscale(scale)
        axes.set_xlabel("step")
        if any(names.values()):
            axes.legend()
    for axes in list(grid.flat)[len(drawn) :]:
        axes.set_axis_off()
    return figure


@styled
def comparison(settings: Mapping[str, Sequence[Lines]]) -> Figure:
    """Eq. 1 and, if any run logged it, the kNN probe by optimiser step: one line for each setting, whose runs differ by
    seed. Lines are means over the runs, bands the range of the runs."""
    drawn = {"loss_unweighted": "loss without weights (Eq. 1)", "knn_top1": "kNN probe, top-1 (%)"}
    drawn = {
        name: title for name, title in drawn.items()
        if any(name in line for runs in settings.values() for lines in runs for line in lines)
    }  # fmt: skip
    figure, grid = panels(max(len(drawn), 1), side=5.2, height=3.6)
    for axes, (name, title) in zip(grid.flat, drawn.items(), strict=False):
        for i, (setting, runs) in enumerate(settings.items()):
            if any(name in line for lines in runs for line in lines):
                _band(axes, name, runs, COLOURS[i % len(COLOURS)], STYLES[i // len(COLOURS) % len(STYLES)], setting)
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.legend()
    return figure


def _band(axes: Axes, name: str, runs: Sequence[Lines], colour: str, style: str, label: str) -> None:
    """One line for some runs, as far as all of them have come."""
    logged = [np.array([(line["step"], line[name]) for line in lines if name in line]) for lines in runs]
    logged = [xy for xy in logged if len(xy)]
    shared = min(map(len, logged))
    curves = np.stack([[part.mean(axis=0) for part in _parts(xy[:shared])] for xy in logged])
    middle = curves.mean(axis=0)
    if len(curves) > 1:
        axes.fill_between(middle[:, 0], curves[..., 1].min(axis=0), curves[..., 1].max(axis=0), color=colour, alpha=0.2,
                          linewidth=0)  # fmt: skip
    axes.plot(*middle.T, color=colour, linestyle=style, label=literal(label))


def last_unweighted(lines: Lines) -> float | None:
    """Eq. 1, mean over the last tenth of the steps, except those without a finite loss; None if it was not logged."""
    found = [line["loss_unweighted"] for line in lines if np.isfinite(line.get("loss_unweighted", np.nan))]
    return float(np.mean(found[-max(len(found) // 10, 1) :])) if found else None


def mean_of(name: str, lines: Lines) -> float | None:
    """The mean of a number over the steps that logged a finite one; None if no step did."""
    values = [line[name] for line in lines if np.isfinite(line.get(name, np.nan))]
    return float(np.mean(values)) if values else None


def _parts(xy: np.ndarray) -> list[np.ndarray]:
    """Steps [N, 2] in at most POINTS groups."""
    return np.array_split(xy, min(len(xy), POINTS))


def _curve(axes: Axes, xy: np.ndarray, colour: str, label: str) -> None:
    """xy: [N, 2]."""
    parts = _parts(xy)
    middle = np.array([part.mean(axis=0) for part in parts])
    if len(parts) < len(xy):
        low, high = (np.array([reduce(part[:, 1]) for part in parts]) for reduce in (np.min, np.max))
        axes.fill_between(middle[:, 0], low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(*middle.T, color=colour, label=label, marker="o" if len(xy) < 30 else "")


def _summary(config: Pretrain, lines: Sequence[Mapping[str, float]], starts: Sequence[Mapping[str, Any]]) -> str:
    weighting, last = config.weighting, lines[-1]
    method = "SimMIM (Eq. 1)"
    if weighting is not None:
        method = (
            f"KAMIM (Eq. 3; {weighting.detector}, {weighting.footprint}, w_ps {weighting.patch_size}, "
            f"T {weighting.temperature:g})"
        )
    done, total = int(last["step"]) + 1, starts[-1]["steps"] if starts else None
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
    )


def _is_panel(file: Path) -> bool:
    """Whether it is a picture of a run: a page shows no other file, whatever it is called or a link to."""
    return file.is_file() and re.fullmatch("step-[0-9]+", file.stem) is not None and file.read_bytes()[:8] == PNG


def _panels(files: Sequence[Path]) -> list[page.Part]:
    """The newest one open, some of the others folded."""
    if not files:
        return []
    files = [files[i] for i in np.unique(np.linspace(0, len(files) - 1, PANELS).round().astype(int))]
    pictures = [page.picture(file.read_bytes(), file.stem, _steps(file)) for file in files]
    older = [page.folded(_steps(file), made) for file, made in zip(files[:-1], pictures[:-1], strict=True)]
    return [page.heading("What it makes of a few samples"), pictures[-1], *older]


def _steps(file: Path) -> str:
    return f"After {int(file.stem.removeprefix('step-'))} steps."


def _starts(starts: Sequence[Mapping[str, Any]]) -> page.Part:
    """A column for every time the run was started."""
    names = dict.fromkeys(name for start in starts for name in start)
    rows = [(name, *(_text(start.get(name)) for start in starts)) for name in names]
    return page.table(("", *(f"start {i}" for i in range(1, len(starts) + 1))), [row for row in rows if any(row[1:])])


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)
