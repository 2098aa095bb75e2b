"""What a progress bar prints."""

import pytest
from rich.progress import Progress

from kamim.cli.progress import Update, _Left, _Position, _Rate, add_bar
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


def test_a_bar_shows_one_task_of_many_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of three is done already; a kNN has two phases of 2 s a step, a linear probe takes 6 s a step."""
    now, lines = 0.0, list[str]()
    monkeypatch.setattr("kamim.cli.progress.say", lines.append)
    progress = Progress(disable=True, get_time=lambda: now)
    update = Update(progress, add_bar(progress, "eval", 0))
    for number, name, seconds, phases in ((2, "knn b", 2, 2), (3, "linprobe b", 6, 1)):
        move = update.of_task(Position(number, name, 3))
        for done in [*range(1, 5)] * phases:
            now += seconds
            move(done, 4, {"loss": 0.5} if phases == 1 else {})
    knn = [f"eval: task 2 of 3: knn b, {steps}" for steps in ("1/4", "2/4, 0:00:04 left", "3/4, 0:00:02 left")]
    knn.append("eval: task 2 of 3: knn b, 4/4, 0:00:00 left")
    probe = [
        f"eval: task 3 of 3: linprobe b, {done}/4, 0:00:{left:02} left" for done, left in ((2, 12), (3, 6), (4, 0))
    ]
    assert lines == [
        "eval: task 2 of 3: knn b",
        *knn,
        *knn,
        "eval: task 3 of 3: linprobe b",
        "eval: task 3 of 3: linprobe b, 1/4, loss 0.5000",
        *(f"{line}, loss 0.5000" for line in probe),
    ]


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
