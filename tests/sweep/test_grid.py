"""A sweep: settings from axes, runs that resume, and a table with the paper's numbers where they belong."""

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from runs import losses
from typer.testing import CliRunner

from kamim.cli import app
from kamim.config.schema import load
from kamim.evaluation.report import leaderboard, leaderboard_page
from kamim.evaluation.report.paper import PRETRAINING, TABLE_2
from kamim.evaluation.results import Accuracy, EvalSettings, Result, SampleSet
from kamim.evaluation.task_progress import Position
from kamim.runtime import distributed, rendezvous
from kamim.sweep import grid
from kamim.sweep import sweep as compose
from kamim.sweep.grid import Grid
from kamim.sweep.table import SweepResults, differences_table, runs_table, settings_table

TABLE2 = Path(__file__).parents[2] / "configs/sweeps/table2.yaml"


def small(out: Path, store: Path) -> dict[str, Any]:
    """2 x 2 settings, 4 steps each."""
    optim = {"batch_size": 12, "micro_batch": 12, "epochs": 2, "warmup_epochs": 0}
    return {
        "pretrain": {
            "data": {"store": str(store), "resolution": 64, "workers": 1},
            "model": {"name": "vit_demo"},
            "compute": {"device": "cpu"},
            "optim": optim,
            "panel_epochs": None,
            "checkpoint_epochs": 1,
        },
        "axes": [
            {"key": "weighting.patch_size", "name": "ps", "values": [8, 16]},
            {"key": "weighting.temperature", "name": "t", "values": [0.25, 1.0]},
        ],
        "evaluation": {
            "train": str(store),
            "val": str(store),
            "compute": {"device": "cpu"},
            "linprobe": {"optim": optim},
        },
        "out": str(out),
    }


@pytest.fixture(scope="module")
def store(stores: dict[str, Path]) -> Path:
    return stores["zarr"]


def file_of(content: dict[str, Any], folder: Path) -> Path:
    file = folder / "sweep.yaml"
    file.write_text(json.dumps(content))  # JSON is YAML
    return file


def test_table_2_is_the_papers() -> None:
    given = load(Grid, TABLE2)
    made = {setting.name: grid.pretraining(given, setting) for setting in grid.points(given)}
    assert {(c.weighting.patch_size, c.weighting.temperature) for c in made.values() if c.weighting} == set(TABLE_2)
    assert len({c.data.store for c in made.values()}) == 1
    assert made["ps8_t0.25"].out == Path("runs/table2/ps8_t0.25")
    assert made["ps32_t1"].model.name == "vit_base"
    assert grid.evaluation(given, grid.points(given)).checkpoint[0] == "ps8_t0.1=runs/table2/ps8_t0.1"
    assert grid.evaluation(given, grid.points(given)).linprobe.optim.epochs == 100


def results_of(given: Grid) -> list[Result[Accuracy]]:
    """As `kamim eval` would give them of whole runs on the whole of ImageNet."""
    evaluation = grid.evaluation(given, grid.points(given))
    results = []
    for point in grid.points(given):
        config = grid.pretraining(given, point).model_dump(mode="json")
        settings = EvalSettings(
            mode="linprobe",
            name=point.name,
            checkpoint=f"runs/{point.name}",
            architecture="vit_base",
            step=62500,
            weights=None,
            pretraining={
                **{key: config[key] for key in PRETRAINING if key in config},
                "weighting": config["weighting"],
                "dataset": "imagenet",
                "samples": 1_281_167,
                "images": "jpeg",
                "complete": True,
            },
            seed=0,
            train=SampleSet("train", "imagenet", 1_281_167, ""),
            val=SampleSet("val", "imagenet", 50_000, ""),
            classes=1000,
            protocol="paper",
            block=8,
            pooling="mean",
            norm="none",
            options=evaluation.linprobe.model_dump(mode="json"),
        )
        results.append(Result(settings, Accuracy(1.5, 5.0)))
    return results


def test_the_papers_numbers_stand_beside_the_same_settings_alone() -> None:
    given = load(Grid, TABLE2)
    made = runs_table(SweepResults(given, results_of(given)))
    assert made.header[:3] == ("weighting.patch_size", "weighting.temperature", "linear probe")
    assert dict(zip(made.header, made.rows[1], strict=True)) == {
        "weighting.patch_size": "8",
        "weighting.temperature": "0.25",
        "linear probe": "1.50 [1.4, 1.6]",
        "linear probe, paper's": "33.97 (Table 1)",
    }
    assert [row[3].split()[0] for row in made.rows] == [f"{linprobe:.2f}" for linprobe, _ in TABLE_2.values()]
    assert made.markdown().splitlines()[3] == "| 8 | 0.25 | 1.50 [1.4, 1.6] | 33.97 (Table 1) |"
    short = load(Grid, TABLE2, ["pretrain.optim.epochs=50"])
    assert len(runs_table(SweepResults(short, results_of(short))).header) == 3  # no such run in the paper


def test_a_stopped_sweep_resumes(store: Path, tmp_path: Path) -> None:
    """Stopped in the middle of its second run and typed again: as one that was not; then it only shows its table."""
    given = {name: load(Grid, None, given=small(tmp_path / name, store)) for name in ("whole", "again")}
    compose.run_grid(given["whole"], lambda title: lambda *_: None)

    seen: list[Position] = []

    def stop(position: Position) -> Any:
        seen.append(position)

        def progress(done: int, total: int, said: dict[str, float]) -> None:
            if position.name.startswith("pretrain") and position.number > 1 and done == 3:
                os.kill(os.getpid(), signal.SIGTERM)

        return progress

    with pytest.raises(KeyboardInterrupt):
        compose.run_grid(given["again"], stop)
    tasks = len(grid.points(given["again"])) * (1 + len(given["again"].modes))
    assert [(at.number, at.count) for at in seen] == [(n, tasks) for n in range(1, len(given["again"].modes) + 3)]
    assert (tmp_path / "again/evaluation/ps8_t0.25/linprobe/result.json").exists()
    assert not (tmp_path / "again/ps16_t0.25").exists()
    first = {file: file.stat().st_mtime_ns for file in (tmp_path / "again/ps8_t0.25").rglob("*.safetensors")}
    file = file_of(small(tmp_path / "again", store), tmp_path)
    result = CliRunner().invoke(app, ["sweep", str(file)])
    assert result.exit_code == 0, result.output
    assert {file: file.stat().st_mtime_ns for file in first} == first
    for setting in grid.points(given["whole"]):
        assert losses(tmp_path / "again" / setting.name) == losses(tmp_path / "whole" / setting.name)
    assert (tmp_path / "again/table.md").read_text() == (tmp_path / "whole/table.md").read_text()
    assert (
        "| Eq. 1, last tenth of the steps | mean W | gradient norm, mean | steps clipped |"
        in (tmp_path / "again/table.md").read_text()
    )
    assert (tmp_path / "again/index.html").read_text().count("data:image/png;base64,") == 1
    assert "ps" in (tmp_path / "again/index.html").read_text()
    assert len(json.loads((tmp_path / "again/table.json").read_text())["results"]) == 4

    def untouched(*_: object) -> None:
        raise AssertionError("a finished sweep trains nothing")

    compose.run_grid(given["again"], lambda title: untouched)
    other = CliRunner().invoke(app, ["sweep", str(file), "pretrain.optim.lr=0.5"])
    assert other.exit_code == 1
    assert "holds a run of another configuration" in other.stderr


def study(out: Path, store: Path) -> dict[str, Any]:
    """Two methods and two seeds, two steps each, with both baselines."""
    content = small(out, store)
    content["axes"] = [
        {"key": "seed", "name": "seed", "values": [0, 1]},
        {"name": "method", "variants": {"simmim": {"weighting": None}, "point": {"weighting.footprint": "point"}}},
    ]
    content["evaluation"]["knn"] = {"k": [3]}
    content["pretrain"]["optim"] = {"batch_size": 24, "micro_batch": 24, "epochs": 2, "warmup_epochs": 0}
    return {**content, "baselines": ["pixels", "random"], "modes": ["knn", "reconstruct"]}


@pytest.fixture(scope="module")
def studied(store: Path, tmp_path_factory: pytest.TempPathFactory) -> SweepResults:
    """The study, by two shards one after the other."""
    given = load(Grid, None, given=study(tmp_path_factory.mktemp("study"), store))
    first = compose.run_grid(given, lambda title: lambda *_: None, (1, 2))
    assert [point.name for point in first.points] == [
        "seed0_simmim",
        "seed1_simmim",
        "pixels",
        "random_seed0",
        "random_seed1",
    ]
    return compose.run_grid(given, lambda title: lambda *_: None, (2, 2))


def test_variants_set_several_keys(studied: SweepResults) -> None:
    names = ["seed0_simmim", "seed0_point", "seed1_simmim", "seed1_point"]
    configs = {point.name: grid.pretraining(studied.grid, point) for point in grid.points(studied.grid)}
    assert list(configs) == names
    assert [config.seed for config in configs.values()] == [0, 0, 1, 1]
    assert [config.weighting and config.weighting.footprint for config in configs.values()] == [None, "point"] * 2


def test_shards_make_what_one_process_makes(studied: SweepResults, store: Path, tmp_path: Path) -> None:
    whole = compose.run_grid(load(Grid, None, given=study(tmp_path, store)), lambda title: lambda *_: None)
    assert runs_table(whole) == runs_table(studied)
    for point in grid.points(whole.grid):
        assert losses(tmp_path / point.name) == losses(studied.grid.out / point.name)


def test_baselines_have_the_modes_that_apply_to_them(studied: SweepResults) -> None:
    """Raw pixels reconstruct nothing; random weights are those of the seed's run before training."""
    modes = {name: [mode for row, mode in studied.by_point if row == name] for name, _ in studied.by_point}
    assert modes["pixels"] == ["knn"]
    assert modes["random_seed0"] == modes["seed0_simmim"] == ["knn", "reconstruct"]
    assert studied.by_point["random_seed1", "knn"].settings.checkpoint == f"random:{studied.grid.out}/seed1_simmim"


def test_seeds_are_averaged_and_differences_are_paired(studied: SweepResults) -> None:
    rows = {row[0]: row for row in settings_table(studied).rows}
    assert {name: row[1] for name, row in rows.items()} == {
        "simmim": "2",
        "point": "2",
        "raw pixels": "1",
        "random weights": "2",
    }
    scores = {
        method: np.array([studied.by_point[f"seed{seed}_{method}", "knn"].measured.score for seed in (0, 1)])
        for method in ("simmim", "point")
    }
    assert rows["simmim"][2] == f"{scores['simmim'].mean():.2f} ± {scores['simmim'].std(ddof=1):.2f}"
    ((setting, difference, _),) = differences_table(studied).rows
    assert setting == "point"
    assert difference.split()[0] == f"{(scores['point'] - scores['simmim']).mean():+.2f}"
    page = (studied.grid.out / "index.html").read_text()
    assert "Differences, with 95 % intervals over seeds" in page


def test_a_mean_over_some_of_the_seeds_says_so(studied: SweepResults) -> None:
    """seed1_simmim has been reconstructed, but not classified."""
    some = SweepResults(studied.grid, [r for at, r in studied.by_point.items() if at != ("seed1_simmim", "knn")])
    rows = {row[0]: row for row in settings_table(some).rows}
    score = studied.by_point["seed0_simmim", "knn"].measured.score
    assert rows["simmim"][1:3] == ("2", f"{score:.2f} (1 of 2 runs)")
    assert "runs" not in rows["point"][2]
    ((_, difference, other),) = differences_table(some).rows
    assert difference.endswith(" (1 of 2 runs)") and "runs" not in other


def test_a_leaderboard_finds_the_seeds_of_a_sweep(studied: SweepResults) -> None:
    """The means of the sweep's own table, of the settings with two seeds; what a setting is, results record."""
    results, skipped = leaderboard.find([studied.grid.out])
    board = leaderboard.Leaderboard(results)
    groups = [group for section in board.sections for group in board.repetitions(section)]
    ours = {row[2:] for row in leaderboard_page.seeds_table(board, groups).rows}
    assert ours == {row[2:] for row in settings_table(studied).rows if row[1] == "2"}
    assert (len(results), skipped, len(groups)) == (len(studied.by_point), [], 3)


@pytest.mark.parametrize(
    "axis",
    [
        {"name": "a"},
        {"name": "a", "key": "seed"},
        {"name": "a", "values": [1]},
        {"name": "a", "key": "seed", "values": [1], "variants": {"x": {"seed": 1}}},
        {"name": "a", "key": "seed", "variants": {"x": {"seed": 1}}},
    ],
)
def test_an_axis_has_values_or_variants(axis: dict[str, Any], store: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a key and values, or variants"):
        load(Grid, None, given={**small(tmp_path, store), "axes": [axis]})


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("axes=[{key: weighting.patch_size, name: ps, values: [8, 7]}]", "must be a multiple of weighting.patch_size"),
        ("axes=[{key: weighting.patch, name: ps, values: [8]}]", "weighting.patch: unknown key"),
        ("axes=[{key: weighting.patch_size, name: ps, values: [8, 8]}]", "ps8: is the name of two runs"),
        ("modes=[guess]", "modes"),
        ("evaluation.knn.k=[]", "knn.k"),
        ("axes=[{key: weighting.detector, name: d, values: [fast, orb]}]", "has no 'orb' keypoints"),
        ("evaluation.val=/nowhere", "/nowhere: not a kamim store"),
        ("evaluation.linprobe.optim.batch_size=25", "linprobe.optim.batch_size = 25"),
        ("pretrain.optim.batch_size=25", "batch_size = 25: is more than the store's 24 samples"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_before_any_work(
    override: str, said: str, store: Path, tmp_path: Path
) -> None:
    file = file_of(small(tmp_path / "out", store), tmp_path)
    result = CliRunner().invoke(app, ["sweep", str(file), override])
    assert result.exit_code == 1
    assert said in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


NINE_AXES = [{"key": f"optim.{name}", "name": name, "values": [*range(1, 11)]} for name in "abcdefghi"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"axes": NINE_AXES}, "axes: 1,000,000,000 runs; must be at most 10,000"),
        ({"axes": [{"key": "seed", "name": "s", "values": [*range(101)]}] * 2}, "axes: 10,201 runs"),
        ({"pretrain": {"preset": 5}}, "preset = 5: must be the name of a preset, or a file"),
        ({"pretrain": {"preset": ["x"]}}, "preset = ['x']: must be the name of a preset, or a file"),
        ({"evaluation": {"preset": {}}}, "preset = {}: must be the name of a preset, or a file"),
    ],
)
def test_a_sweep_has_limits(content: dict[str, Any], said: str, store: Path, tmp_path: Path) -> None:
    """Nine axes would take minutes to list, and are refused before."""
    file = file_of({**small(tmp_path / "out", store), **content}, tmp_path)
    shown = ["--print-config"] if "axes" in content else []
    result = CliRunner().invoke(app, ["sweep", str(file), *shown])
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1), result.output
    assert said in result.stderr


def test_a_sweep_that_refers_to_itself_is_refused(tmp_path: Path) -> None:
    for text in ("pretrain: &a {preset: imagenette, x: *a}", "pretrain: {}\naxes: &a [*a]"):
        (tmp_path / "sweep.yaml").write_text(text)
        result = CliRunner().invoke(app, ["sweep", str(tmp_path / "sweep.yaml")])
        assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1), result.output
        assert "an alias inside what it names" in result.stderr


def test_the_size_of_a_sweep_is_printed_and_the_configuration_reads_back(store: Path, tmp_path: Path) -> None:
    file = file_of(small(tmp_path / "out", store), tmp_path)
    shown = CliRunner().invoke(app, ["sweep", str(file), "--print-config"]).stdout
    (tmp_path / "again.yaml").write_text(shown)
    again = load(Grid, tmp_path / "again.yaml")
    assert again == load(Grid, file)
    assert shown.splitlines()[0] == f"# {len(grid.points(again))} runs"


def test_the_example_of_help_is_a_key_that_there_is() -> None:
    shown = CliRunner().invoke(app, ["sweep", "--help"]).output
    override = re.findall(r"overrides,\W+such\W+as\W+([\w.=-]+)", shown)
    assert grid.pretraining(load(Grid, TABLE2, override), grid.points(load(Grid, TABLE2))[0]).optim.lr == 1e-3


def test_processes_join_once_for_a_whole_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch cannot join the same group twice: what runs inside goes on with the one that is there."""
    said: list[str] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: len(said) % 2 == 1)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: said.append("joined"))
    monkeypatch.setattr(rendezvous, "meet", lambda kind: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: said.append("left"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    distributed.start("cpu")
    for _ in range(2):
        distributed.start("cpu")
        distributed.stop()
    assert said == ["joined"]
    distributed.stop()
    assert said == ["joined", "left"]
