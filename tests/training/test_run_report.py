"""The report page of a run in any state."""

import json
import re
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from runs import config, quiet
from typer.testing import CliRunner

from kamim.cli import app
from kamim.reporting.plots import label_log_axis
from kamim.training import metrics, report
from kamim.training.pretrain import pretrain

AFTER_EPOCHS = (  # curves of the callbacks
    "kNN, top-1 (%)",
    "distance of attention from uniform (px)",
    "effective rank (RankMe)",
    "uniformity",
    "alpha-ReQ",
)


@pytest.fixture(scope="module")
def finished(stores: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "<b>run"
    store = stores["zarr"]
    probe = f"probe={{train: {store}, val: {store}, every_epochs: 2}}"
    pretrain(
        config(
            out, store, "panel_epochs=2", probe, "label_free={images: 12, every_epochs: 2}", "plateau={every_epochs: 2}"
        ),
        quiet,
    )
    return out


def titles(run: Path) -> list[str]:
    return [axes.get_title() for axes in report.curves(metrics.read(run)).axes if axes.get_title()]


def test_a_finished_run_leaves_its_report(finished: Path) -> None:
    text = (finished / "report.html").read_text()
    assert "KAMIM (fast, ring, w_ps 8, T 0.25)" in text
    assert ": done. Last loss" in text
    assert "100% of the steps were clipped at 1;" in text
    assert "<b>run" not in text.replace("&lt;b&gt;run", "")  # escaped
    assert text.count("data:image/png;base64,") == 3  # curves and two panels
    assert not re.search(r'(src|href)="(?!data:)', text)  # self-contained
    assert "optim.warmup_epochs" in text and "processor" in text and "torch" in text
    assert titles(finished) == list(report.CURVES)


def test_a_stopped_run_has_one_on_demand(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "stopped"
    run.mkdir()
    (run / "config.yaml").write_text((finished / "config.yaml").read_text())
    (run / "starts.jsonl").write_text((finished / "starts.jsonl").read_text())
    lines = (finished / "metrics.jsonl").read_text().splitlines(keepends=True)[:3]
    (run / "metrics.jsonl").write_text("".join(lines) + lines[0][:9])  # killed while writing
    result = CliRunner().invoke(app, ["report", str(run)])
    assert result.exit_code == 0, result.output
    assert result.output.strip() == str(run / "report.html")
    text = (run / "report.html").read_text()
    assert "at 3 of 8 steps" in text
    assert text.count("data:image/png;base64,") == 1
    assert titles(run) == [title for title in report.CURVES if title not in AFTER_EPOCHS]


def test_a_page_shows_some_of_many_panels(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "long"
    (run / "panels").mkdir(parents=True)
    for name in ("config.yaml", "metrics.jsonl"):
        (run / name).write_bytes((finished / name).read_bytes())
    for step in range(1, 101):
        (run / f"panels/step-{step:08d}.png").write_bytes(report.PNG)
    text = report.save_report(run).read_text()
    assert re.findall(r"<summary>After (\d+) steps", text) == [str(step) for step in range(1, 100, 9)]
    assert 'alt="step-00000100"' in text


def test_curves_of_many_steps_keep_their_extremes() -> None:
    lines = [{"step": i, "loss": 1.0 if i != 777 else 50.0, "grad_norm": 1.0} for i in range(5000)]
    axes = report.curves(lines).axes[0]
    assert len(axes.lines[0].get_xdata()) == report.POINTS
    assert axes.collections[0].get_datalim(axes.transData).ymax == 50


@pytest.mark.parametrize("content", [None, "config"])
def test_a_folder_without_a_run_is_refused(content: str | None, finished: Path, tmp_path: Path) -> None:
    if content:
        (tmp_path / "config.yaml").write_text((finished / "config.yaml").read_text())
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 1
    assert "holds no run with a step done" in " ".join(result.stderr.split())


def test_a_simmim_run_has_no_weights(finished: Path) -> None:
    lines = [{k: v for k, v in line.items() if not k.startswith("weight")} for line in metrics.read(finished)]
    drawn = [axes.get_title() for axes in report.curves(json.loads(json.dumps(lines))).axes if axes.get_title()]
    assert "weights W" not in drawn


def test_runs_are_compared_by_what_they_have_in_common() -> None:
    """Runs are distinguishable even if there are more than colours; runs or steps without the number are skipped."""
    lines = [{"step": i, "loss": 9.0, "loss_unweighted": 1.0 if i < 90 else 0.5, "clipped": i % 2} for i in range(100)]
    figure = report.comparison({**{f"run {i}": [lines] for i in range(9)}, "old": [[{"step": 0, "loss": 1.0}]]})
    drawn = figure.axes[0].lines
    assert [line.get_label() for line in drawn] == [f"run {i}" for i in range(9)]
    assert len({(line.get_color(), line.get_linestyle()) for line in drawn}) == 9
    assert report.last_unweighted(lines) == 0.5
    assert report.last_unweighted([*lines, {"step": 100, "loss_unweighted": float("nan")}]) == 0.5
    assert report.mean_of("clipped", lines) == 0.5
    assert report.last_unweighted([{"step": 0, "loss": 1.0}]) is report.mean_of("clipped", [{"step": 0}]) is None


@pytest.mark.parametrize(
    ("values", "labels"),
    [([17, 54.6], ["20", "50"]), ([0.7, 30], ["1", "2", "5", "10", "20"]), ([0.02, 400], ["0.1", "1", "10", "100"])],
)
def test_a_logarithmic_axis_has_plain_numbers(values: list[float], labels: list[str]) -> None:
    figure = Figure()
    axes = figure.subplots()
    axes.plot(values)
    label_log_axis(axes)
    figure.canvas.draw()
    low, high = axes.get_ylim()
    major = [text for text in axes.get_yticklabels() if low <= text.get_position()[1] <= high]
    assert [text.get_text() for text in major] == labels
    assert not any(text.get_text() for text in axes.get_yticklabels(minor=True))


def test_ticks_are_at_whole_steps() -> None:
    """Of a run of three steps, too, alone and compared."""
    lines = [{"step": i, "loss": 1.0, "loss_unweighted": 1.0} for i in range(3)]
    for figure in (report.curves(lines), report.comparison({"a": [lines]})):
        assert all(float(tick).is_integer() for tick in figure.axes[0].get_xticks())


def test_clipping_and_a_probe_below_the_majority_class_are_explained(tmp_path: Path) -> None:
    probe = {"knn_top1": 30.0, "knn_low": 25.0, "knn_high": 36.0, "knn_majority": 33.0}
    lines = [{"step": 0, "clipped": 1.0}, {"step": 1, "clipped": 1.0, **probe}]
    clipped, probed = report._remarks(config(tmp_path / "run", tmp_path), lines)
    assert clipped.startswith("Nearly every step was clipped, so every gradient has the norm 1 whatever")
    assert "kNN top-1 30.00 [25.0, 36.0] %" in probed and "most frequent class gives 33.00 %" in probed
    assert "do not tell the classes apart better" in probed
    (better,) = report._remarks(config(tmp_path / "run", tmp_path), [{"step": 1, **probe, "knn_majority": 10.0}])
    assert "do not tell" not in better
