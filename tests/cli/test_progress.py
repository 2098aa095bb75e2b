"""What a progress bar prints."""

import pytest
from rich.progress import Progress

from kamim.cli.progress import Update, _Left, _Position, _Rate, add_bar
from kamim.cli.time_left import TimeLeft
from kamim.evaluation.task_progress import Position


def test_each_task_of_a_bar_has_a_time_left_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tasks of 1, 3 and 2 seconds a step, the last one left and begun again; where there is no terminal."""
    now, lines = 0.0, list[str]()
    monkeypatch.setattr("kamim.cli.progress.say", lines.append)
    progress = Progress(disable=True, get_time=lambda: now)
    update = Update(progress, add_bar(progress, "demo", 4))
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
    monkeypatch.setattr("kamim.cli.progress.say", lines.append)
    progress = Progress(disable=True, get_time=lambda: now)
    update = Update(progress, add_bar(progress, "eval", 0))
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
    add_bar(progress, "demo", 0)
    (task,) = progress.tasks
    assert [column.render(task).plain for column in (_Position(), _Rate(), _Left())] == [""] * 3


def test_a_task_of_one_step_is_told_even_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = list[str]()
    monkeypatch.setattr("kamim.cli.progress.say", lines.append)
    progress = Progress(disable=True)
    update = Update(progress, add_bar(progress, "demo", 0))
    for name in ("train", "val"):
        update(1, 1, name)
    assert [line.rpartition(", ")[2] for line in lines] == ["train", "val"]
