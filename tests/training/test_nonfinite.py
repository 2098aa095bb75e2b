"""A loss that is not finite never changes the weights, and its step can be replayed."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import config, quiet
from safetensors.torch import load_file
from typer.testing import CliRunner

from kamim.cli import app
from kamim.config.pretrain import Weighting
from kamim.training import checkpoint, objective
from kamim.training import replay as replaying
from kamim.training.nonfinite import NonFinite
from kamim.training.objective import MaskedReconstruction, loss_weights
from kamim.training.pretrain import pretrain
from kamim.training.replay import replay
from kamim.training.trainer import Losses
from pipelines.batch import Batch
from pipelines.plan import Plan

BAD = 5  # the step, of 8, whose loss is not finite


@pytest.fixture(scope="module")
def store(stores: dict[str, Path]) -> Path:
    return stores["zarr"]


def lines(run: Path) -> list[dict[str, Any]]:
    made = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in made:
        for name in ("images_per_second", "data_wait", "data_wait_share"):
            line.pop(name, None)
    return made


def spoil(monkeypatch: pytest.MonkeyPatch, sample: int, value: float, *, gradient: bool = False) -> None:
    """Sets the loss (or only its gradient) of every batch of step BAD with the sample to `value`."""
    losses = MaskedReconstruction.__call__

    def spoilt(computed: MaskedReconstruction, batch: Batch) -> Losses:
        made = losses(computed, batch)
        if batch.step == BAD and sample in batch.indices:
            if gradient:
                made.loss.register_hook(lambda grad: grad * value)
            else:
                made = replace(made, loss=made.loss * value)
        return made

    monkeypatch.setattr(MaskedReconstruction, "__call__", spoilt)


@pytest.fixture(scope="module")
def finished(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert pretrain(config(out, store, "model.drop_path=0.2", "optim.micro_batch=8"), quiet).finished
    return out


def state(run: Path, step: int) -> dict[str, torch.Tensor]:
    folder = checkpoint.at(run, step).path
    return load_file(folder / "model.safetensors") | load_file(folder / "optimizer.safetensors")


def indices_of(run: Path) -> list[list[int]]:
    """Returns the indices of step BAD's micro-batches."""
    (record,) = (run / "nonfinite").glob("*.json")
    return [part["indices"] for rank in json.loads(record.read_text())["ranks"] for part in rank]


@pytest.mark.parametrize("gradient", [False, True], ids=["loss", "gradient"])
def test_the_run_stops_in_the_state_of_before_the_step(
    gradient: bool, finished: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although the host reads the loss only when the next step has been computed."""
    given = config(
        tmp_path / "run",
        store,
        "model.drop_path=0.2",
        "optim.micro_batch=8",
        "checkpoint_epochs=2",
        "keep_checkpoints=9",
    )
    with monkeypatch.context() as patch:
        spoil(patch, a_sample(store, given), float("inf"), gradient=gradient)
        what = "the norm of the gradient" if gradient else "the loss"
        with pytest.raises(
            NonFinite, match=rf"step 5: {what} is (inf|nan); stopped before it, see .*step-00000005.json"
        ):
            pretrain(given, quiet)
    assert checkpoint.saved(given.out) == [4, 5]
    assert lines(given.out) == lines(finished)[:5]
    # ... bit by bit what a run that was stopped there by hand has saved.
    stopped = config(tmp_path / "by_hand", store, "model.drop_path=0.2", "optim.micro_batch=8", "checkpoint_epochs=9")

    def stop(done: int, total: int, metrics: dict[str, float]) -> None:
        if done == BAD:
            os.kill(os.getpid(), signal.SIGTERM)

    assert pretrain(stopped, stop).step == BAD
    mine, by_hand = state(given.out, BAD), state(stopped.out, BAD)
    assert mine.keys() == by_hand.keys()
    assert all(torch.equal(mine[name], value) for name, value in by_hand.items())
    # Resumed without the trouble, it ends as if there had been none.
    assert pretrain(given, quiet).finished
    assert lines(given.out) == lines(finished)


def a_sample(store: Path, given: Any) -> int:
    """A sample of the first micro-batch of step BAD."""
    return int(Plan(24, given.optim.batch_size, given.optim.micro_batch, given.seed).step_indices(BAD)[3])


def test_the_record_says_what_was_computed_on(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = config(tmp_path / "run", store, "optim.micro_batch=8")
    spoil(monkeypatch, a_sample(store, given), float("nan"))
    with pytest.raises(NonFinite):
        pretrain(given, quiet)
    record = json.loads((given.out / "nonfinite/step-00000005.json").read_text())
    assert (record["step"], record["seed"], record["loss"]) == (5, 3, "nan")
    ((first, second),) = record["ranks"]
    assert (first["epoch"], len(first["indices"]), first["loss"]) == (2, 8, "nan")
    assert len(second["indices"]) == 4
    assert 0 < second["loss"] < 100


def test_skipping_leaves_the_step_out_and_counts_it(
    finished: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given = config(tmp_path / "run", store, "model.drop_path=0.2", "optim.micro_batch=8", "on_nonfinite=skip")
    with monkeypatch.context() as patch:
        spoil(patch, a_sample(store, given), float("nan"))
        assert pretrain(given, quiet).finished
    made = lines(given.out)
    assert [line.pop("skipped") for line in made] == [0, 0, 0, 0, 0, 1, 0, 0]
    assert made[:BAD] == lines(finished)[:BAD]
    assert (made[BAD]["loss"], made[BAD]["grad_norm"]) == (None, None)
    assert all(0 < line["loss"] < 100 for line in made[BAD + 1 :])
    assert "step 5: the loss is nan; skipped, see" in caplog.text
    weights = state(given.out, 6)
    assert {float(value) for name, value in weights.items() if name.endswith(".step")} == {5.0}


def test_skipping_ends_where_nothing_else_would_come(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = config(tmp_path / "run", store, "on_nonfinite=skip", "optim.epochs=12")
    monkeypatch.setattr(objective, "masked_l1", lambda *of: torch.tensor(float("nan"), requires_grad=True))
    with pytest.raises(FloatingPointError, match="step 19: the loss is nan, as were 19 before it; stopped"):
        pretrain(given, quiet)


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_replay_computes_the_step_again(
    policy: str, store: Path, class_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It starts from the state saved before the step if the run stopped, otherwise from the newest checkpoint."""
    given = config(tmp_path / "run", store, "model.drop_path=0.2", "optim.micro_batch=8", f"on_nonfinite={policy}")
    sample = a_sample(store, given)

    poison(sample, monkeypatch)
    if policy == "stop":
        with pytest.raises(NonFinite):
            pretrain(given, quiet)
    else:
        pretrain(given, quiet)
    found = replay(given.out, None, "cpu")
    assert (found.step, found.began) == (BAD, 5 if policy == "stop" else 4)
    assert [s.index for s in found.samples] == [i for part in indices_of(given.out) for i in part]
    assert not np.isfinite(found.loss)
    assert [s.index for s in found.samples if not np.isfinite(s.loss)] == [sample]
    assert found.worst[0].index == sample
    record = json.loads((given.out / "nonfinite/step-00000005.json").read_text())
    (_, second) = record["ranks"][0]
    assert sum(s.loss for s in found.samples[8:]) / 4 == pytest.approx(second["loss"], rel=1e-6)
    result = CliRunner().invoke(
        app,
        [
            "replay",
            str(given.out),
            "--out",
            str(tmp_path / "r.json"),
            "--plot",
            str(tmp_path / "r.png"),
            *(("--source", str(class_folder)) if policy == "stop" else ()),
        ],
    )
    assert result.exit_code == 0, result.output
    name = ("astronaut", "chelsea", "coffee")[sample // 8]  # the class folder has 8 images of each
    file = f"{name}/{sample % 8}.jpg" if policy == "stop" else None
    assert f"sample {sample} ({name}{f', {file}' if file else ''}): loss nan" in result.output
    samples = json.loads((tmp_path / "r.json").read_text())["samples"]
    assert len(samples) == 12
    assert [(s["class"], s["file"]) for s in samples if s["index"] == sample] == [(name, file)]
    assert (tmp_path / "r.png").stat().st_size > 10_000


def poison(sample: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets W of a sample in epoch 2 to NaN wherever it is computed, like a fault of the data."""

    def spoilt(batch: Batch, weighting: Weighting | None) -> torch.Tensor | None:
        weights = loss_weights(batch, weighting)
        assert weights is not None
        weights[np.flatnonzero((batch.indices == sample) & (batch.epoch == BAD // 2))] = float("nan")
        return weights

    for module in (objective, replaying):
        monkeypatch.setattr(module, "loss_weights", spoilt)


def test_any_step_replays(finished: Path) -> None:
    """Step 7 replays from the checkpoint one step before; step 1 from the beginning, as its checkpoints are gone."""
    for step, began in ((7, 6), (1, 0)):
        found = replay(finished, step, "cpu")
        assert found.began == began
        assert round(found.loss, 6) == lines(finished)[step]["loss"]


def test_the_replay_of_a_mae_computes_its_own_loss(store: Path, tmp_path: Path) -> None:
    mae = (
        "method=mae",
        "decoder.width=32",
        "decoder.depth=1",
        "decoder.heads=2",
        "mask.patch_size=16",
        "optim.epochs=2",
    )
    given = config(tmp_path / "run", store, *mae)
    assert pretrain(given, quiet).finished
    found = replay(given.out, 3, "cpu")
    assert round(found.loss, 6) == lines(given.out)[3]["loss"]


def test_what_cannot_be_replayed(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not a run of `kamim pretrain` \(no config.yaml\)"):
        replay(tmp_path, None, "cpu")
    with pytest.raises(ValueError, match="all recorded losses are finite; give the step=N to replay, 0 to 7"):
        replay(finished, None, "cpu")
    with pytest.raises(ValueError, match="step = 8: the run has steps 0 to 7"):
        replay(finished, 8, "cpu")
