"""What a progress bar says, and what every command sets before it imports anything."""

import os
import subprocess
import sys

import pytest
from rich.progress import Progress

import kamim.cli
from kamim.cli import console


def test_each_task_of_a_bar_has_a_time_left_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tasks of 1, 3 and 2 seconds a step, the last one left and begun again; where there is no terminal."""
    now, lines = 0.0, list[str]()
    monkeypatch.setattr(console, "say", lines.append)
    progress = Progress(disable=True, get_time=lambda: now)
    update = console.Update(progress, progress.add_task("demo", total=None, note="", images=4))
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


def test_a_task_of_one_step_is_told_even_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = list[str]()
    monkeypatch.setattr(console, "say", lines.append)
    progress = Progress(disable=True)
    update = console.Update(progress, progress.add_task("demo", total=None, note="", images=0))
    for name in ("train", "val"):
        update(1, 1, name)
    assert [line.rpartition(", ")[2] for line in lines] == ["train", "val"]


@pytest.mark.parametrize(("given", "used"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_that_wait_sleep(given: str | None, used: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenMP reads the variable when torch is imported, which importing the command line must not do."""
    monkeypatch.setattr(kamim.cli, "app", lambda: None)
    monkeypatch.setenv("OMP_WAIT_POLICY", given or "")
    if given is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    kamim.cli.main()
    assert os.environ["OMP_WAIT_POLICY"] == used
    assert subprocess.run(
        [sys.executable, "-c", "import sys, kamim.cli; sys.exit('torch' in sys.modules)"],
        check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ).returncode == 0  # fmt: skip
