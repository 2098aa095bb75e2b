"""What a progress bar says, and what every command sets before it imports anything."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.progress import Progress
from typer.testing import CliRunner

import kamim.cli
from kamim.cli import console
from kamim.cli.evaluate import evaluate
from kamim.cli.preprocess import preprocess
from kamim.cli.time_left import TimeLeft
from kamim.evaluation.task_progress import Position


def test_each_task_of_a_bar_has_a_time_left_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tasks of 1, 3 and 2 seconds a step, the last one left and begun again; where there is no terminal."""
    now, lines = 0.0, list[str]()
    monkeypatch.setattr(console, "say", lines.append)
    progress = Progress(disable=True, get_time=lambda: now)
    update = console.Update(progress, console.add_bar(progress, "demo", 4))
    for name, seconds, steps in (("first", 1, 10), ("second", 3, 10), ("third", 2, 5), ("third again", 2, 10)):
        for done in range(1, steps + 1):
            now += seconds
            update(done, 10, name)
    assert [line for line in lines if "5/10" in line or "10/10" in line] == [
        "demo: 5/10, 4 images/s, 0:00:05 left, first",
        "demo: 10/10, 4 images/s, 0:00:00 left, first",
        "demo: 5/10, 1 images/s, 0:00:15 left, second",
        "demo: 10/10, 1 images/s, 0:00:00 left, second",
        "demo: 5/10, 2 images/s, 0:00:10 left, third",
        "demo: 5/10, 2 images/s, 0:00:10 left, third again",
        "demo: 10/10, 2 images/s, 0:00:00 left, third again",
    ]


def test_one_bar_shows_all_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of five is done already; a kNN takes 11 s, a linear probe 33 s. The last kNN is left."""
    now, lines = 0.0, list[str]()
    monkeypatch.setattr(console, "say", lines.append)
    progress = Progress(disable=True, get_time=lambda: now)
    update = console.Update(progress, console.add_bar(progress, "eval", 0))
    kinds = ("knn", "knn", "linprobe", "knn", "linprobe")
    for number, name in ((2, "knn b"), (3, "linprobe b"), (4, "knn c"), (5, "linprobe c")):
        kind = kinds[number - 1]
        move = update.of_task(Position(number, name, kind, kinds[number:]))
        now += 1  # before the first step
        for done in range(1, 6):
            now += 2 if kind == "knn" else 6.4
            move(done, 5, {"loss": 0.5} if kind == "linprobe" else {})
    assert [line for line in lines if "step" not in line] == [
        "eval: task 2 of 5: knn b",
        "eval: task 3 of 5: linprobe b, at least 0:00:11 left",
        "eval: task 4 of 5: knn c, 0:00:44 left",
        "eval: task 5 of 5: linprobe c, 0:00:33 left",
    ]
    of_second = [line for line in lines if "knn b" in line and "step" in line]
    # 4 s are left of this task, a kNN takes 11 s as far as this one tells, and the probes are unknown.
    assert of_second[0] == "eval: task 2 of 5: knn b, at least 0:00:15 left, step 3 of 5"
    assert lines[-1] == "eval: task 5 of 5: linprobe c, 0:00:00 left, step 5 of 5, loss 0.5000"


def test_a_resumed_task_is_no_measure_of_its_kind() -> None:
    now = 0.0
    left = TimeLeft(lambda: now)
    assert left.begin(Position(1, "pretrain a", "pretrain", ("pretrain",))) == ""
    for done in (91, 92, 93):
        now += 10
        text = left.move(done, 100)
    assert text == "at least 0:02:50 left"  # 70 s, and 100 s for the second, as far as this one tells
    now += 70
    assert left.begin(Position(2, "pretrain b", "pretrain")) == ""
    now += 10
    assert left.move(1, 100) == ""
    now += 10
    assert left.move(2, 100) == "at least 0:16:20 left"


def test_phases_of_a_task_are_estimated_one_by_one() -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 1e-4  # a call takes some time
        return now

    left = TimeLeft(clock)
    assert left.begin(Position(1, "knn a", "knn", ("knn",))) == ""
    for done, total in ((1, 3), (2, 3), (3, 3), (1, 9), (2, 9)):
        now += 2
        text = left.move(done, total)
    assert text == "at least 0:00:38 left"  # 14 s of this phase, and 24 s for the second task


def test_a_bar_begins_without_numbers() -> None:
    progress = Progress(disable=True)
    console.add_bar(progress, "demo", 0)
    (task,) = progress.tasks
    assert [column.render(task).plain for column in (console._Position(), console._Rate(), console._Left())] == [""] * 3


def test_a_task_of_one_step_is_told_even_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = list[str]()
    monkeypatch.setattr(console, "say", lines.append)
    progress = Progress(disable=True)
    update = console.Update(progress, console.add_bar(progress, "demo", 0))
    for name in ("train", "val"):
        update(1, 1, name)
    assert [line.rpartition(", ")[2] for line in lines] == ["train", "val"]


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("resolution = 8: must be 16 to 1024", "--resolution 8: must be 16 to 1024"),
        ("crop_scale = 2.0,1.0: needs 0 < smallest", "--crop-scale 2.0,1.0: needs 0 < smallest"),
        (
            "encoding = raw: images for resolution = 900; take encoding=jpeg",
            "--encoding raw: images for --resolution 900; take --encoding jpeg",
        ),
        ("source: is missing", "--source: is missing"),
        ("dataset: needs source=DIR", "dataset: needs --source DIR"),  # an argument has no option
        ("data.resolution = 8: must be", "data.resolution = 8: must be"),  # a key of a configuration
        ("unknown = 1: resolution: 3", "unknown = 1: resolution: 3"),
        ("/a/out=3/b: damaged", "/a/out=3/b: damaged"),  # a path
    ],
)
def test_parameters_become_options(message: str, line: str) -> None:
    assert console.as_typed(message, console.options_of(preprocess)) == line


def test_options_have_the_names_that_are_typed() -> None:
    assert console.options_of(evaluate)["json_out"] == "--json"
    assert console.options_of(evaluate)["config"] == "--config"
    assert "overrides" not in console.options_of(evaluate)


def test_a_configuration_that_is_printed_is_read_back(tmp_path: Path) -> None:
    for command, given in {
        "eval": ["--checkpoint", "a=run", "--train", "t", "--val", "v", "knn.k=[3, 4]"],
        "sweep": ["table2", "out=elsewhere"],
        "pretrain": ["-c", "demo", "seed=7"],
    }.items():
        first = CliRunner().invoke(kamim.cli.app, [command, *given, "--print-config"])
        assert first.exit_code == 0, first.output
        (tmp_path / "config.yaml").write_text(first.stdout)
        file = [str(tmp_path / "config.yaml")] if command == "sweep" else ["-c", str(tmp_path / "config.yaml")]
        again = CliRunner().invoke(kamim.cli.app, [command, *file, "--print-config"])
        assert again.stdout == first.stdout


@pytest.mark.parametrize(("given", "used"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_that_wait_sleep(given: str | None, used: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenMP reads the variable when torch is imported, which importing the command line must not do."""
    monkeypatch.setattr(kamim.cli, "app", lambda: None)
    monkeypatch.setenv("OMP_WAIT_POLICY", given or "")
    if given is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    kamim.cli.main()
    assert os.environ["OMP_WAIT_POLICY"] == used
    assert (
        subprocess.run(
            [sys.executable, "-c", "import sys, kamim.cli; sys.exit('torch' in sys.modules)"],
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        ).returncode
        == 0
    )
