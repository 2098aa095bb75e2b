"""A run that is killed anywhere, or loses a checkpoint, ends with the losses and weights of an uninterrupted run."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from camera import Camera, watched
from conftest import full_disk
from safetensors.torch import load_file

from kamim.config.pretrain import Pretrain
from kamim.config.schema import load
from kamim.models import architectures, presets
from kamim.storage.store import Store
from kamim.training import checkpoint, metrics, run_folder
from kamim.training.pretrain import pretrain

SMALL: Mapping[str, presets.Architecture] = {
    **presets.ARCHITECTURES,
    "vit_demo": presets._vit("vit_tiny_patch16_224", embed_dim=32, depth=2, num_heads=2),
}


class Unheard(metrics.Files):
    """A sink that writes nothing."""

    def __init__(self, run: Path, first: int):
        """Does nothing."""

    def numbers(self, step: int, values: metrics.Values) -> None:
        """Does nothing."""

    def flush(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    """A model that is saved quickly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(architectures, "ARCHITECTURES", SMALL)
        patch.setattr(metrics, "TensorBoard", Unheard)  # it writes from a thread of its own
        yield


def asked(out: Path, store: Path, *more: str) -> Pretrain:
    """Six steps, two an epoch."""
    given = (
        f"data.store={store}",
        "data.resolution=64",
        "data.workers=1",
        "model.name=vit_demo",
        f"out={out}",
        "seed=3",
        "optim.batch_size=12",
        "optim.micro_batch=8",
        "optim.epochs=3",
        "optim.warmup_epochs=1",
        "compute.device=cpu",
        "checkpoint_epochs=1",
        "keep_checkpoints=2",
        "model.drop_path=0.2",
        "panel_epochs=null",
    )
    return load(Pretrain, None, [*given, *more])


def quiet(done: int, total: int, metrics: dict[str, float]) -> None:
    """No progress bar."""


def ended(run: Path) -> dict[str, Any]:
    """Returns all files of a finished run, except timing fields."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for name in ("images_per_second", "data_wait", "data_wait_share"):
            line.pop(name, None)
    files = sorted((run / "checkpoints").rglob("*.safetensors"))
    return {"metrics": lines} | {str(file.relative_to(run)): load_file(file) for file in files}


def assert_same(run: Path, whole: dict[str, Any]) -> None:
    made = ended(run)
    assert made.keys() == whole.keys()
    assert made["metrics"] == whole["metrics"]
    for name in whole.keys() - {"metrics"}:
        assert made[name].keys() == whole[name].keys()
        assert all(torch.equal(made[name][key], value) for key, value in whole[name].items()), name


@pytest.fixture(scope="module")
def store(stores: dict[str, Path]) -> Path:
    return stores["zarr"]


@pytest.fixture(scope="module")
def finished(store: Path, small: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert pretrain(asked(out, store), quiet).finished
    return out


@pytest.fixture(scope="module")
def whole(finished: Path) -> dict[str, Any]:
    return ended(finished)


def test_a_run_killed_at_any_write_ends_the_same(
    whole: dict[str, Any], store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, copies = tmp_path / "world", tmp_path / "copies"
    world.mkdir()
    copies.mkdir()
    camera = Camera(world, copies, monkeypatch)
    save_file = checkpoint.save_file

    def save_seen(*arguments: Any, **options: Any) -> None:
        camera()  # safetensors opens its files where Python does not hear of it
        save_file(*arguments, **options)

    monkeypatch.setattr(checkpoint, "save_file", save_seen)
    with watched(camera):
        pretrain(asked(world / "run", store), lambda done, total, metrics: camera())  # and after every step
    assert_same(world / "run", whole)
    monkeypatch.undo()
    monkeypatch.setattr(metrics, "TensorBoard", Unheard)
    monkeypatch.setattr(architectures, "ARCHITECTURES", SMALL)
    assert len(camera.killed) > 40
    for copy in camera.killed:
        assert pretrain(asked(copy / "run", store), quiet).finished
        assert_same(copy / "run", whole)
        shutil.rmtree(copy)


KILLED = """  # runs sys.argv[2]/N in children, each killed at N: w17 the 17th change, s3 in the middle of step 3
import os, signal, sys, threading
from pathlib import Path
import torch
import test_train_crash as own
from kamim.training import objective
from kamim.training.pretrain import pretrain

torch.set_num_threads(1)
own.architectures.ARCHITECTURES = own.SMALL
store, base, *numbers = sys.argv[1:]
for name in numbers:
    child = os.fork()
    if child == 0:
        left = int(name[1:])
        def count():
            global left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        def watch(event, arguments):
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if writes and base in str(arguments[0]) or event in ("os.rename", "os.remove", "os.mkdir"):
                count()
        if name[0] == "w":
            sys.addaudithook(watch)
        else:
            error = objective.masked_error
            objective.masked_error = lambda method: lambda *given: (count(), error(method)(*given))[1]
        pretrain(own.asked(Path(base, name), Path(store)), own.quiet)
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def test_what_real_kills_leave_is_continued(whole: dict[str, Any], store: Path, tmp_path: Path) -> None:
    """Kills during the writing of a checkpoint, the removal of one, a step's second micro-batch, and an epoch."""
    numbers = ("w9", "w20", "s4", "s9")
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(store), str(tmp_path), *numbers],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
    )
    assert [int(status) for status in killed.stdout.split()] == [signal.SIGKILL] * len(numbers)
    for number in numbers:
        assert pretrain(asked(tmp_path / number, store), quiet).finished
        assert_same(tmp_path / number, whole)


def copied(run: Path, to: Path) -> Path:
    shutil.copytree(run, to)
    return to


def harm(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda newest: harm(newest / "model.safetensors"),
        lambda newest: harm(newest / "optimizer.safetensors"),
        lambda newest: (newest / "model.safetensors").unlink(),
        lambda newest: (newest / "state.json").write_bytes((newest / "state.json").read_bytes()[:100]),
        lambda newest: [file.unlink() for file in newest.iterdir()],
    ],
    ids=["weights", "optimizer", "missing", "state", "empty"],
)
def test_a_damaged_newest_checkpoint_is_passed_over(
    damage: Any, finished: Path, whole: dict[str, Any], store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = copied(finished, tmp_path / "run")
    damage(run / "checkpoints/step-00000006")
    assert checkpoint.read(run).step == 4
    assert "step-00000006" in caplog.text
    assert "using the checkpoint before it" in caplog.text
    assert pretrain(asked(run, store, "keep_checkpoints=1"), quiet).finished
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000006"]
    assert pretrain(asked(run, store), quiet).finished
    weights = load_file(run / "checkpoints/step-00000006/model.safetensors")
    assert all(
        torch.equal(weights[name], value)
        for name, value in whole["checkpoints/step-00000006/model.safetensors"].items()
    )


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(
    finished: Path, store: Path, tmp_path: Path
) -> None:
    run = copied(finished, tmp_path / "run")
    for file in run.glob("checkpoints/*/model.safetensors"):
        harm(file)
    with pytest.raises(ValueError, match=r"has only damaged checkpoints; remove .*checkpoints to start anew"):
        pretrain(asked(run, store), quiet)
    assert len(list((run / "checkpoints").iterdir())) == 2


def test_a_stop_behind_a_damaged_checkpoint_keeps_the_newer_state(
    finished: Path, whole: dict[str, Any], store: Path, tmp_path: Path
) -> None:
    run = copied(finished, tmp_path / "run")
    harm(run / "checkpoints/step-00000006/model.safetensors")

    def stop(done: int, total: int, metrics: dict[str, float]) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)

    assert pretrain(asked(run, store, "keep_checkpoints=1"), stop).step == 5
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000005"]
    assert pretrain(asked(run, store), quiet).finished
    assert ended(run)["metrics"] == whole["metrics"]


def test_the_newest_and_every_so_many_stay(store: Path, tmp_path: Path) -> None:
    more = ("keep_checkpoints=1", "keep_every_epochs=2", "checkpoint_epochs=3", "optim.epochs=5")
    given = asked(tmp_path / "run", store, *more)
    run_folder.claim(given, Store(store))
    (tmp_path / "run/checkpoints/step-00000004.partial").mkdir(parents=True)
    pretrain(given, quiet)
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == [
        "step-00000004",
        "step-00000008",
        "step-00000010",
    ]


@pytest.mark.parametrize("room", [20_000, 400_000], ids=["weights", "optimizer"])
def test_a_full_disk_does_not_end_a_run(
    room: int, whole: dict[str, Any], store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The disk is full while the second of three checkpoints is written."""
    room_ends = full_disk(room)
    sizes = {"model": 0, "optimizer": 0}

    def progress(done: int, total: int, metrics: dict[str, float]) -> None:
        if done == 3:
            (file,) = (tmp_path / "run/checkpoints").glob("*/model.safetensors")
            sizes["model"] = file.stat().st_size
            room_ends.__enter__()
        if done == 5:
            room_ends.__exit__(None, None, None)
            assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000002"]

    assert pretrain(asked(tmp_path / "run", store), progress).finished
    assert (sizes["model"] > room) == (room == 20_000)
    assert caplog.text.count("step 4: no checkpoint, the run continues: ") == 1
    assert "step 4: no checkpoint" in (tmp_path / "run/log.txt").read_text()
    made = ended(tmp_path / "run")
    assert made["metrics"] == whole["metrics"]
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["step-00000002", "step-00000006"]


def test_a_last_checkpoint_that_finds_no_room_is_an_error(store: Path, tmp_path: Path) -> None:
    room_ends = full_disk(20_000)

    def progress(done: int, total: int, metrics: dict[str, float]) -> None:
        if done == 5:
            room_ends.__enter__()

    try:
        with pytest.raises(OSError, match=r"step-00000006: cannot be written: .*File too large"):
            pretrain(asked(tmp_path / "run", store), progress)
    finally:
        room_ends.__exit__(None, None, None)
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["step-00000002", "step-00000004"]


def test_metrics_that_find_no_room_are_written_later(
    whole: dict[str, Any], store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """While metrics.jsonl cannot grow, no checkpoint is published without its lines; then both catch up."""
    room_ends = full_disk(0)

    def progress(done: int, total: int, metrics: dict[str, float]) -> None:
        if done == 2:
            room_ends.__enter__()
        if done == 5:
            room_ends.__exit__(None, None, None)

    assert pretrain(asked(tmp_path / "run", store), progress).finished
    assert caplog.text.count("metrics.jsonl is behind, the run continues") == 1
    assert ended(tmp_path / "run")["metrics"] == whole["metrics"]
