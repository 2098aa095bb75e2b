"""The command, stopped as by a batch system, and with impossible settings."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kamim.cli import RESUMABLE, app
from kamim.config.pretrain import Pretrain
from kamim.runtime.distributed import World
from kamim.training import checkpoint
from pipelines.loader import Loader

GIVEN = (
    "data.resolution=64",
    "data.workers=1",
    "model.name=vit_demo",
    "optim.batch_size=12",
    "optim.warmup_epochs=1",
    "compute.device=cpu",
    "checkpoint_epochs=500",
    "optim.epochs=500",
)


@pytest.fixture(scope="module")
def store(stores: dict[str, Path]) -> Path:
    return stores["zarr"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_the_state_and_exits_with_75(number: signal.Signals, store: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "kamim", "pretrain", f"data.store={store}", f"out={out}", *GIVEN]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
    try:
        metrics = out / "metrics.jsonl"
        for _ in range(1200):
            if metrics.is_file() and metrics.read_text().count("\n") >= 2:
                break
            assert run.poll() is None, run.stderr and run.stderr.read()
            time.sleep(0.1)
        run.send_signal(number)
        _, said = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == RESUMABLE == 75
    (step,) = checkpoint.saved(out)
    assert f"stopped after step {step}, saved; rerun the command to resume" in said
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(step))
    begun, stopped, ended = (line[20:] for line in (out / "log.txt").read_text().splitlines())
    assert begun.startswith("training from step 0 of ")
    assert stopped == f"step {step} is done, and a signal stopped the run"
    assert ended == f"{begun.partition(': begun by')[0]}: ended"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_the_first_step_exits_with_75_too(
    number: signal.Signals, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(config: Pretrain, loader: Loader, world: World) -> None:
        os.kill(os.getpid(), number)

    monkeypatch.setattr("kamim.training.pretrain.build_trainer", prepare)
    code, said = invoke(f"data.store={store}", f"out={tmp_path / 'run'}", *GIVEN)
    assert (code, said) == (75, "stopped at once; rerun the command to resume from the newest checkpoint\n")


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["pretrain", *arguments])
    return result.exit_code, result.output


def test_resume_auto_goes_on_and_never_refuses(store: Path, tmp_path: Path) -> None:
    given = (f"data.store={store}", f"out={tmp_path / 'run'}", *GIVEN, "optim.epochs=2")
    assert invoke("--resume", "never", *given)[0] == 0
    code, said = invoke("--resume", "never", *given)
    assert code == 1
    assert "holds a run already; choose another out=..., or --resume auto to continue it" in said
    assert invoke("--resume", "auto", *given)[0] == 0
    code, said = invoke(*given)
    assert (code, said) == (0, f"{tmp_path / 'run'}: 4 steps, all done before; {tmp_path / 'run/report.html'}\n")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("data.store=/nowhere",), "error: /nowhere: not a kamim store (no manifest.json); make one with `kamim pre"),
        (
            ("weighting.detector=orb",),
            "has no 'orb' keypoints, only fast, sift; the command that made it, with --detec",
        ),
        (("data.resolution=96",), "its keypoints are for resolution 64 and crop scale [0.67, 1.0], not 96"),
        (
            ("data.resolution=96", "weighting=null"),
            "of 64 px of 0.67 of the area and more, too small for 96 px of 0.67; preprocess with --resolution 96",
        ),
        (
            ("data.crop_scale=[0.3, 1.0]", "weighting=null"),
            "too small for 64 px of 0.3; preprocess with --resolution 64 --crop-scale 0.3,1.0",
        ),
        (
            ("compute.device=cuda",),
            "compute.device = 'cuda': this machine has no CUDA device; use compute.device=cpu or a",
        ),
        (("compute.precision=fp16",), "compute.precision = 'fp16': input should be 'auto', 'bf16' or 'fp32'"),
        (
            ("optim.batch_size=64",),
            "batch_size = 64: is more than the store's 24 samples, so that an epoch has no comple",
        ),
        (
            ("optim.duration=3 steps",),
            "optim: a warm-up of 100 steps, a cosine to step 3 and 3 steps in all do not fit",
        ),
        (("init_from=/nowhere",), "init_from = /nowhere: "),
        (("data.crop_scale=[0.5,1.0]",), "not 64 and [0.5, 1.0]; preprocess with --resolution and --crop"),
    ],
)
def test_what_cannot_be_is_one_line_before_any_work(
    given: tuple[str, ...], message: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    more = ("optim.warmup_epochs=50",) if "duration" in given[0] else ()
    code, said = invoke(f"data.store={store}", f"out={tmp_path / 'run'}", *GIVEN, *more, *given)
    assert code == 1
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_move_into_a_store(store: Path) -> None:
    before = sorted(store.iterdir())
    code, said = invoke(f"data.store={store}", f"out={store}", *GIVEN)
    assert (code, said) == (1, f"error: out = {store}: is a store; choose another out=...\n")
    assert sorted(store.iterdir()) == before


def test_a_folder_that_cannot_be_made(store: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, said = invoke(f"data.store={store}", f"out={tmp_path / 'file/run'}", *GIVEN)
    assert (code, said.count("\n")) == (1, 1)
    lock = tmp_path / "file/.run.kamim-lock"
    assert f"out = {tmp_path / 'file/run'}: {lock} cannot be created or locked: File exists" in said
