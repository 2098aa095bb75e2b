"""The linear probe on features whose answer is known, and end to end."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_store
from torch import Tensor, nn

from kamim.batch import Batch, normalise
from kamim.compose.evaluation import run_linprobe
from kamim.compose.training import run_pretrain
from kamim.config import Pretrain, Probe, load
from kamim.evaluate import linprobe
from kamim.models import build_encoder

CLASSES = 4


def probe(*more: str) -> Probe:
    given = ("checkpoint=c", "train=t", "val=v", "optim.batch_size=32", "optim.epochs=20", "optim.warmup_epochs=1")
    return load(Probe, None, [*given, "compute.device=cpu", *more])


def coloured(labels: np.ndarray, seed: int) -> Tensor:
    """Noisy images whose colour is their class."""
    random = np.random.default_rng(seed)
    colours = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200], [200, 200, 40]])
    noise = random.integers(-30, 31, (len(labels), 32, 32, 3))
    return torch.from_numpy((colours[labels][:, None, None] + noise).clip(0, 255).astype(np.uint8))


def run(labels: np.ndarray, shown: np.ndarray) -> dict[str, float]:
    """Probes a random encoder; training images show `shown`, and are labelled `labels`."""
    torch.manual_seed(0)
    encoder = build_encoder("vit_demo", 32)

    def batches(first: int, stop: int) -> Iterator[Batch]:
        images = coloured(shown, 1)
        for step in range(first, stop):
            yield Batch(images, None, torch.from_numpy(labels), np.arange(len(labels)), step, step, True, 1.0)

    truth = np.arange(80) % CLASSES
    val = [Batch(coloured(truth, 2), None, torch.from_numpy(truth), np.arange(80), 0, 0, True, 1.0)]

    def plain(batch: Batch) -> tuple[Tensor, Tensor]:
        return normalise(batch.images), nn.functional.one_hot(batch.labels, CLASSES).float()

    return linprobe(encoder, probe(), batches, val, plain, CLASSES, 4, torch.device("cpu"), lambda *_: None)


def test_separable_classes_are_told_apart() -> None:
    labels = np.arange(32) % CLASSES
    assert run(labels, labels)["top1"] == 100


def test_labels_that_say_nothing_teach_nothing() -> None:
    labels = np.arange(32) % CLASSES
    shuffled = np.repeat(np.arange(CLASSES), 8)  # every label sees every colour equally often
    accuracy = run(shuffled, labels)
    assert accuracy["top1"] <= 45
    assert accuracy["top5"] == 100


def test_the_encoder_is_left_as_it_was(stores: dict[str, Path], checkpointed: Path) -> None:
    first = run_linprobe(end_to_end(checkpointed, stores["zarr"]), lambda *_: None)
    second = run_linprobe(end_to_end(checkpointed, stores["zarr"]), lambda *_: None)
    assert first == second
    assert first["block"] == 6
    assert first["step"] == 2
    assert first["val"]["images"] == 24
    assert 0 <= first["top1"] <= first["top5"] <= 100


@pytest.fixture(scope="module")
def checkpointed(stores: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    given = [
        f"data.store={stores['zarr']}", "data.resolution=64", "model.name=vit_demo", f"out={out}",
        "optim.batch_size=12", "optim.epochs=1", "optim.warmup_epochs=0", "compute.device=cpu",
    ]  # fmt: skip
    run_pretrain(load(Pretrain, None, given), lambda *_: None)
    return out


def end_to_end(checkpoint: Path | str, store: Path, val: Path | None = None, *more: str) -> Probe:
    given = [f"checkpoint={checkpoint}", f"train={store}", f"val={val or store}", "optim.batch_size=12"]
    return load(Probe, None, [*given, "optim.epochs=2", "optim.warmup_epochs=0", "compute.device=cpu", *more])


def test_random_weights_are_the_same_architecture_untrained(stores: dict[str, Path], checkpointed: Path) -> None:
    result = run_linprobe(end_to_end(f"random:{checkpointed}", stores["zarr"]), lambda *_: None)
    assert (result["architecture"], result["step"]) == ("vit_demo", 0)


def test_what_cannot_be_probed_is_refused_before_any_work(
    stores: dict[str, Path], checkpointed: Path, class_folder: Path, marked_store: Path, tmp_path: Path
) -> None:
    train = stores["zarr"]
    unlabelled = build_store(class_folder / "coffee", tmp_path / "flat", detectors=())
    for given, message in (
        (end_to_end(checkpointed, train, unlabelled), "has no labels"),
        (end_to_end(checkpointed, train, marked_store), "its 1 classes are not the 3 of"),
        (end_to_end(checkpointed, train, None, "block=7"), "block = 7: the encoder has blocks 1 to 6"),
        (end_to_end(tmp_path / "nothing", train), "neither a checkpoint"),
        (end_to_end(checkpointed, tmp_path / "nothing"), "not a kamim store"),
        (end_to_end(checkpointed, train, None, "optim.batch_size=100"), "is more than the store's 24 samples"),
    ):
        with pytest.raises(ValueError, match=message):
            run_linprobe(given, lambda *_: None)
