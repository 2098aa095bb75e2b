"""Metrics of a run: every step appears once in every sink, also after interruptions."""

import json
import os
import signal
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import WORLD, board, config, quiet

from kamim import KamimError
from kamim.cli.progress import metrics_line
from kamim.config.pretrain import Log
from kamim.training import metrics, starts
from kamim.training.metrics import Metrics, TimedBatches
from kamim.training.pretrain import pretrain


class Listener:
    """A sink that records its calls."""

    def __init__(self) -> None:
        self.said: list[tuple[int, dict[str, float]]] = []
        self.panels: list[int] = []

    def numbers(self, step: int, values: Any) -> None:
        self.said.append((step, dict(values)))

    def panel(self, step: int, rgb: np.ndarray) -> None:
        self.panels.append(step)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def values(loss: float) -> dict[str, torch.Tensor | float]:
    return {"samples": 8, "loss": torch.tensor(loss), "grad_norm": torch.tensor(1.0), "data_wait": 0.25}


def test_a_step_is_read_when_the_next_one_is_queued() -> None:
    heard = Listener()
    with Metrics([heard]) as made:
        made.add(0, 1e-3, values(0.5))
        assert heard.said == []
        made.log({"knn_top1": 12.5})
        made.add(1, 1e-3, values(0.25))
        ((step, first),) = heard.said
        assert (step, first["loss"], first["knn_top1"], first["lr"]) == (0, 0.5, 12.5, 1e-3)
        made.flush()
    assert [(step, said["loss"]) for step, said in heard.said] == [(0, 0.5), (1, 0.25)]
    assert "knn_top1" not in heard.said[1][1]


def test_rates_are_of_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time between the last step and restart() (a checkpoint, a panel) counts for no step."""
    now = iter([0.0, 2.0, 2.0, 10.0, 11.0, 11.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    heard = Listener()
    made = Metrics([heard])  # at 0
    made.add(0, 1e-3, values(0.5))  # at 2
    made.restart()  # at 10
    made.add(1, 1e-3, values(0.5))  # at 11
    made.flush()
    assert [said["images_per_second"] for _, said in heard.said] == [4, 8]
    assert [said["data_wait_share"] for _, said in heard.said] == [0.125, 0.25]


def test_waits_add_up_what_the_user_waited_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def batches() -> Iterator[Any]:
        for i in range(3):
            clock[0] += 2  # the loader is slow
            yield i

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    waits, taken = TimedBatches(batches()), []
    for batch in waits:
        clock[0] += 100  # the user is slower
        if batch:
            taken.append(waits.pop_seconds())
    assert taken == [4, 2]


@pytest.fixture(scope="module")
def resumed(stores: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed after 5 of 8 steps, one step after its checkpoint, and resumed."""
    run = tmp_path_factory.mktemp("runs") / "resumed"

    class Killed(Exception):
        pass

    def kill(done: int, total: int, said: dict[str, float]) -> None:
        if done == 6:
            raise Killed

    given = config(run, stores["zarr"], "checkpoint_epochs=2", "panel_epochs=1")
    with pytest.raises(Killed):
        pretrain(given, kill)
    assert [line["step"] for line in metrics.read(run)] == [0, 1, 2, 3, 4]
    assert pretrain(given, quiet).finished
    return run


def test_a_resumed_run_has_every_step_once(resumed: Path) -> None:
    assert [line["step"] for line in metrics.read(resumed)] == list(range(8))
    found = board(resumed)
    for tag in ("loss", "lr", "grad_norm", "weight_mean", "weight_max", "images_per_second", "data_wait_share"):
        said = found.Scalars(tag)
        assert [event.step for event in said] == list(range(8)), tag
        assert [event.value for event in said] == pytest.approx([line[tag] for line in metrics.read(resumed)], rel=1e-6)


def test_every_start_is_noted(resumed: Path) -> None:
    made = [json.loads(line) for line in (resumed / "starts.jsonl").read_text().splitlines()]
    assert [start["step"] for start in made] == [0, 4]
    assert made[0]["torch"] == torch.__version__.partition("+")[0] or made[0]["torch"] == torch.__version__
    assert {"processor", "cores", "gpus", "device", "processes", "time"} <= set(made[0])


def test_a_start_cut_off_spoils_no_other(tmp_path: Path) -> None:
    for step in (0, 4):
        starts.log(tmp_path, step, 8, WORLD)
        with (tmp_path / "starts.jsonl").open("a") as file:
            file.write('{"time": "2026-')  # as a machine that goes down may leave it
    assert [start["step"] for start in starts.read(tmp_path)] == [0, 4]


def test_a_run_stopped_by_a_signal_has_every_step_once(stores: dict[str, Path], tmp_path: Path) -> None:
    def stop(done: int, total: int, said: dict[str, float]) -> None:
        if done == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    given = config(tmp_path / "run", stores["zarr"])
    assert not pretrain(given, stop).finished
    assert [event.step for event in board(given.out).Scalars("loss")] == [0, 1, 2]
    pretrain(given, quiet)
    assert [event.step for event in board(given.out).Scalars("loss")] == list(range(8))


def test_a_finished_run_trains_and_says_nothing_more(resumed: Path, stores: dict[str, Path]) -> None:
    def stamps() -> dict[Path, int]:
        kept = ("checkpoints", "panels", "tensorboard", "metrics.jsonl", "starts.jsonl")
        files = (file for name in kept for file in (resumed / name, *(resumed / name).rglob("*")))
        return {file: file.stat().st_mtime_ns for file in files}

    before = stamps()
    pretrain(config(resumed, stores["zarr"], "checkpoint_epochs=2", "panel_epochs=1"), quiet)
    assert stamps() == before


class FakeWandb(types.ModuleType):
    """A fake of the package that records its calls."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = types.SimpleNamespace(name="wandb")  # type: ignore[assignment]
        self.begun: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.Image = lambda rgb: rgb.shape
        self.Error = ConnectionError
        self.reachable = True

    def login(self, verify: bool, timeout: int) -> bool:
        if not self.reachable:
            raise self.Error("No API key configured. Use `wandb login` to log in.")
        return True

    def init(self, **given: Any) -> "FakeWandb":
        self.begun.append(given)
        self.newest = 0
        return self

    def log(self, said: dict[str, Any], step: int) -> None:
        """Takes no step before the newest one, which the package drops."""
        assert step >= self.newest
        self.newest = step
        self.logged.append((step, said))

    def finish(self) -> None:
        self.logged.append((-1, {}))


def test_wandb_is_told_where_asked(stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)

    def stop(done: int, total: int, said: dict[str, float]) -> None:
        if done == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    given = config(tmp_path / "run", stores["zarr"], "log.wandb=points", "panel_epochs=1")
    pretrain(given, stop)
    pretrain(given, quiet)
    assert [begun["project"] for begun in fake.begun] == ["points", "points"]
    assert fake.begun[0]["id"] == fake.begun[1]["id"]
    assert fake.begun[0]["config"]["model"]["name"] == "vit_demo"
    assert [step for step, said in fake.logged if "loss" in said] == list(range(8))
    assert [step for step, said in fake.logged if "panel" in said] == [1, 3, 5, 7]
    assert [step for step, said in fake.logged if not said] == [-1, -1]


def test_wandb_without_a_login_ends_a_run_before_it_begins(
    stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandb()
    fake.reachable = False
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(KamimError, match=r"log.wandb = points: No API key configured. .*; WANDB_MODE=offline logs to"):
        pretrain(config(tmp_path / "run", stores["zarr"], "log.wandb=points"), quiet)
    assert not (tmp_path / "run").exists()


def test_a_missing_wandb_is_said_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    metrics.check_installed(Log())
    with pytest.raises(ValueError, match=r"log.wandb = True: needs the wandb package; pip install 'kamim\[wandb\]'"):
        metrics.check_installed(Log(wandb=True))


def test_a_line_that_was_cut_short_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "lo')
    assert metrics.read(tmp_path) == [{"step": 0, "loss": 1.0}]
    sink = metrics.Files(tmp_path, 1)
    sink.numbers(1, {"loss": 0.5})
    sink.close()
    assert [line["step"] for line in metrics.read(tmp_path)] == [0, 1]


def test_a_bar_says_loss_and_wait() -> None:
    assert metrics_line({}) == ""
    assert metrics_line({"loss": 0.5, "data_wait_share": 0.0123}) == "loss 0.5000, data-wait 1.2%"
