"""The training loop: learning, replay, resuming, and rejected configurations."""

import itertools
import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_store
from runs import WORLD, config, losses, quiet, weights
from skimage import data

from kamim.config.pretrain import Optim, Pretrain
from kamim.models.masked_autoencoder import MaskedAutoencoder
from kamim.models.masked_image_model import MaskedImageModel
from kamim.storage.store import Store
from kamim.training import checkpoint, run_folder, schedule
from kamim.training.data import training_loader
from kamim.training.pretrain import build_trainer, pretrain
from kamim.training.trainer import Batches, Outcome
from pipelines.batch import Batch


@pytest.fixture(scope="module")
def store(stores: dict[str, Path]) -> Path:
    return stores["zarr"]


@pytest.fixture(scope="module")
def finished(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of 8 steps."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert pretrain(config(out, store), quiet).finished
    return out


def train_on(given: Pretrain, batches: Batches, steps_per_epoch: int) -> None:
    """Pretrains on batches of the test's own."""
    loader = training_loader(given, Store(given.data.store), WORLD)
    trainer = build_trainer(given, loader, WORLD)
    trainer.batches, trainer.run = batches, replace(trainer.run, steps_per_epoch=steps_per_epoch, every=1 << 30)
    given.out.mkdir()
    trainer.__post_init__()
    trainer.fit(quiet)


def test_a_run_replays_exactly(finished: Path, store: Path, tmp_path: Path) -> None:
    pretrain(config(tmp_path / "again", store), quiet)
    assert losses(tmp_path / "again") == losses(finished)
    for name, value in weights(finished).items():
        assert torch.equal(value, weights(tmp_path / "again")[name])


@pytest.mark.parametrize("at", [1, 2, 5, 7])
def test_a_stopped_run_resumes_exactly(finished: Path, store: Path, tmp_path: Path, at: int) -> None:
    """After SIGTERM at step `at`, the state of that step is saved, and the resumed run equals an uninterrupted one."""

    def stop(done: int, total: int, metrics: dict[str, float]) -> None:
        if done == at:
            os.kill(os.getpid(), signal.SIGTERM)

    outcome = pretrain(config(tmp_path / "run", store), stop)
    assert (outcome.step, outcome.finished) == (at, False)
    assert pretrain(config(tmp_path / "run", store), quiet).finished
    assert losses(tmp_path / "run") == losses(finished)
    for name, value in weights(finished).items():
        assert torch.equal(value, weights(tmp_path / "run")[name])


def test_a_killed_run_goes_on_from_its_newest_checkpoint(finished: Path, store: Path, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(done: int, total: int, metrics: dict[str, float]) -> None:
        if done == 5:
            raise Killed

    with pytest.raises(Killed):
        pretrain(config(tmp_path / "run", store), kill)
    (tmp_path / "run/checkpoints/step-00000006.partial").mkdir()  # died while writing
    assert pretrain(config(tmp_path / "run", store), quiet).finished
    assert losses(tmp_path / "run") == losses(finished)


def test_a_finished_run_does_nothing_more(finished: Path, store: Path) -> None:
    def left() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (finished, *finished.rglob("*"))}

    before = left()
    assert pretrain(config(finished, store, "data.workers=2"), quiet) == Outcome(8, 8, finished=True)
    assert left() == before
    (finished / "report.html").write_text("of a step before")
    os.utime(finished / "report.html", (0, 0))  # as where a kill came before the last one
    pretrain(config(finished, store), quiet)
    assert ": done. Last loss" in (finished / "report.html").read_text()


def test_a_run_has_its_folder_for_itself(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    (tmp_path / "link").symlink_to(out)

    def meanwhile(done: int, total: int, metrics: dict[str, float]) -> None:
        for name in ("run", "link"):
            with pytest.raises(ValueError, match=f"out = {tmp_path / name}: another process works there now"):
                pretrain(config(tmp_path / name, store, "optim.epochs=2"), quiet)

    assert pretrain(config(out, store, "optim.epochs=2"), meanwhile).finished
    assert not (tmp_path / ".run.kamim-lock").exists()


def test_a_second_request_to_stop_is_the_same_one_but_for_ctrl_c(store: Path, tmp_path: Path) -> None:
    def stop(numbers: tuple[signal.Signals, ...], done: int, total: int, metrics: dict[str, float]) -> None:
        for number in numbers:
            os.kill(os.getpid(), number)

    said_twice = partial(stop, (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT))
    assert pretrain(config(tmp_path / "run", store), said_twice) == Outcome(0, 1, finished=False)
    with pytest.raises(KeyboardInterrupt):
        pretrain(config(tmp_path / "run", store), partial(stop, (signal.SIGINT, signal.SIGINT)))
    assert pretrain(config(tmp_path / "run", store), quiet) == Outcome(1, 8, finished=True)


def test_only_the_newest_checkpoints_stay(finished: Path) -> None:
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == [
        "step-00000004",
        "step-00000006",
        "step-00000008",
    ]


def test_micro_batches_add_up_to_the_whole_batch(finished: Path, store: Path, tmp_path: Path) -> None:
    pretrain(config(tmp_path / "run", store, "optim.micro_batch=5"), quiet)
    assert losses(tmp_path / "run") == pytest.approx(losses(finished), rel=1e-3)


def test_simmim_is_kamim_with_weights_of_one(finished: Path, store: Path, tmp_path: Path) -> None:
    pretrain(config(tmp_path / "simmim", store, "weighting=null"), quiet)
    pretrain(config(tmp_path / "hot", store, "weighting.temperature=1e9"), quiet)
    assert losses(tmp_path / "simmim") == pytest.approx(losses(tmp_path / "hot"), rel=1e-4)
    assert losses(tmp_path / "simmim")[0] < losses(finished)[0]


def logged(run: Path, name: str) -> list[float]:
    return [json.loads(line)[name] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_runs_of_any_weights_have_eq_1_in_common(finished: Path, store: Path, tmp_path: Path) -> None:
    """With equal random weights, crops and masks, the first step's loss_unweighted is SimMIM's loss."""
    pretrain(config(tmp_path / "simmim", store, "weighting=null", "optim.epochs=2"), quiet)
    assert logged(tmp_path / "simmim", "loss_unweighted") == losses(tmp_path / "simmim")
    assert logged(finished, "loss_unweighted")[0] == losses(tmp_path / "simmim")[0]
    both = zip(logged(finished, "loss_unweighted"), losses(finished), strict=True)
    assert all(plain < weighted for plain, weighted in both)


def test_steps_that_were_clipped_are_marked(finished: Path, store: Path, tmp_path: Path) -> None:
    bound = sum(sorted(logged(finished, "grad_norm"))[3:5]) / 2
    pretrain(config(tmp_path / "some", store, f"optim.clip_grad={bound}", "optim.epochs=2"), quiet)
    norms = logged(tmp_path / "some", "grad_norm")
    assert logged(tmp_path / "some", "clipped") == [float(norm > bound) for norm in norms]
    pretrain(config(tmp_path / "none", store, "optim.clip_grad=null", "optim.epochs=2"), quiet)
    assert "clipped" not in (tmp_path / "none/metrics.jsonl").read_text()


def test_it_learns(tmp_path: Path, store: Path) -> None:
    """The model overfits one batch with a fixed mask."""
    photos = torch.from_numpy(data.astronaut()[:128, 150:278].copy()).unfold(0, 64, 64).unfold(1, 64, 64)
    images = photos.permute(0, 1, 3, 4, 2).reshape(4, 64, 64, 3)

    def batches(first: int, stop: int) -> Iterator[Batch]:
        for step in range(first, stop):
            yield Batch(images, None, torch.zeros(4, dtype=torch.int64), np.arange(4), 0, step, True, 1.0)

    given = config(tmp_path / "run", store, "weighting=null", "optim.lr=2e-3", "checkpoint_epochs=4")
    train_on(given, batches, 25)
    made = losses(tmp_path / "run")
    assert sum(made[-3:]) < 0.4 * sum(made[:3])


def test_online_keypoints_train_too(store: Path, tmp_path: Path) -> None:
    pretrain(config(tmp_path / "run", store, "weighting.keypoints=online", "optim.epochs=2"), quiet)
    assert len(losses(tmp_path / "run")) == 4


MAE = (
    "method=mae",
    "model.positions=sincos",
    "decoder.width=32",
    "decoder.depth=1",
    "decoder.heads=2",
    "mask.patch_size=16",
    "mask.ratio=0.75",
    "norm_pix_loss=true",
    "model.drop_path=0.2",
)


def test_mae_resumes_exactly_with_weights_and_in_micro_batches(store: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int, metrics: dict[str, float]) -> None:
        if done == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    assert pretrain(config(tmp_path / "whole", store, *MAE), quiet).finished
    assert pretrain(config(tmp_path / "run", store, *MAE), stop) == Outcome(0, 3, finished=False)
    assert pretrain(config(tmp_path / "run", store, *MAE), quiet) == Outcome(3, 8, finished=True)
    ended, whole = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert all(torch.equal(ended[name], value) for name, value in whole.items())
    pretrain(config(tmp_path / "micro", store, *MAE, "optim.micro_batch=5"), quiet)
    assert losses(tmp_path / "micro") == pytest.approx(losses(tmp_path / "whole"), rel=1e-3)
    weighted = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["weight_mean"] > 1 and line["loss"] > line["loss_unweighted"] for line in weighted)
    plain = checkpoint.read(tmp_path / "whole").build_model().eval()
    assert isinstance(plain, MaskedAutoencoder)


def test_another_configuration_in_the_same_place_is_refused(finished: Path, store: Path) -> None:
    with pytest.raises(ValueError, match=r"holds a run of another configuration \(lr: 0.0008 there, lr: 0.001 r"):
        pretrain(config(finished, store, "optim.lr=1e-3"), quiet)


def test_a_run_is_not_resumed_on_a_store_that_was_rebuilt(class_folder: Path, tmp_path: Path) -> None:
    """A store with other detectors has the same images."""
    store = make_store(class_folder, tmp_path / "store")
    given = config(tmp_path / "run", store, "optim.epochs=2")
    assert pretrain(given, quiet).finished
    run_folder.check_same_images(given.out, Store(make_store(class_folder, tmp_path / "orb", detectors=("orb",))))
    shutil.rmtree(store)
    make_store(class_folder, store, quality=50)
    said = r"store: was rebuilt since .*run began \(images_sha256: \w{16} then, \w{16} now\)"
    with pytest.raises(ValueError, match=said):
        pretrain(given, quiet)
    (given.out / run_folder.TRAINED_ON).write_text("[1]")
    with pytest.raises(ValueError, match=r"store.json: not the record of a run's store; remove it"):
        pretrain(given, quiet)


def test_what_does_not_shape_a_run_may_change_when_it_resumes(finished: Path, store: Path) -> None:
    before = losses(finished)
    given = config(finished, store, "data.workers=2", "optim.micro_batch=4", "keep_checkpoints=2", "compute.threads=1")
    assert pretrain(given, quiet).finished
    assert losses(finished) == before


def test_a_store_of_smaller_images_is_refused(store: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"stored for crops of 64 px of 0.67 .*, too small for 96 px of 0.67"):
        pretrain(config(tmp_path / "run", store, "data.resolution=96", "weighting=null"), quiet)


def test_keypoints_of_another_resolution_are_refused(store: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="its keypoints are for resolution 64"):
        pretrain(config(tmp_path / "run", store, "data.resolution=96"), quiet)
    assert not (tmp_path / "run").exists()


def test_a_detector_the_store_lacks_is_refused(store: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no 'orb' keypoints, only fast, sift; .*--detectors orb, adds them"):
        pretrain(config(tmp_path / "run", store, "weighting.detector=orb"), quiet)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, store: Path) -> None:
    def broken(first: int, stop: int) -> Iterator[Batch]:
        for step in range(first, stop):
            counts = torch.zeros(2, 8, 8)
            counts[step >= 3] = float("nan")
            yield Batch(
                torch.zeros(2, 64, 64, 3, dtype=torch.uint8),
                counts,
                torch.zeros(2, dtype=torch.int64),
                np.arange(2),
                0,
                step,
                True,
                1.0,
            )

    with pytest.raises(FloatingPointError, match="step 3: the loss is nan"):
        train_on(config(tmp_path / "run", store), broken, 10)


def test_a_damaged_checkpoint_is_noticed(finished: Path, tmp_path: Path) -> None:
    found = checkpoint.latest(finished)
    assert found is not None
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in found.path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"model.safetensors: is missing or damaged"):
        checkpoint.read(copy)


def test_a_checkpoint_of_another_architecture_is_refused(finished: Path) -> None:
    found = checkpoint.latest(finished)
    assert found is not None
    with pytest.raises(ValueError, match="holds another architecture than the requested model"):
        checkpoint.load_weights(found, MaskedImageModel("vit_tiny", 64))


def test_the_schedule_is_the_papers() -> None:
    optim = Optim()
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=optim.lr)
    scheduler = schedule.cosine(optimizer, optim, steps_per_epoch=10)
    rates = []
    for step in range(1000):
        scheduler.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(1e-6)
    assert rates[50] == pytest.approx((1e-6 + 8e-4) / 2)
    assert max(rates) <= 8e-4
    assert rates[500] == pytest.approx((8e-4 + 1e-5) / 2, rel=0.01)
    assert rates[-1] == pytest.approx(1e-5, rel=0.01)
    assert all(a >= b for a, b in itertools.pairwise(rates[100:]))
    scheduler.step_update(5000)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-5)
