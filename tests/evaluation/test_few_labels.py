"""Logistic regression, few labels and corrupted images: slow twins, end to end, wrong input."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import config as pretraining
from runs import quiet
from sklearn.linear_model import LogisticRegression

from kamim import KamimError
from kamim.config.schema import load
from kamim.evaluation import few_shot, logistic
from kamim.evaluation.corrupted_images import KINDS, Corruption
from kamim.evaluation.evaluate import _context, evaluate
from kamim.evaluation.options import Evaluation, FewShot
from kamim.models.readout import Pixels
from kamim.runtime.distributed import World
from kamim.training.pretrain import pretrain
from pipelines.batch import normalise
from pipelines.samples import n_per_class

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pretrained(stores: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pretrained") / "run"
    pretrain(pretraining(out, stores["zarr"], "optim.epochs=1", "optim.warmup_epochs=0"), lambda *_: None)
    return out


def evaluation(spec: Path | str, store: Path, *more: str, **given: Any) -> Evaluation:
    return load(
        Evaluation,
        None,
        [*more, "workers=1", "compute.device=cpu"],
        {"checkpoint": (str(spec),), "train": store, "val": store, **given},
    )


def run(config: Evaluation, mode: str) -> dict[str, Any]:
    (result,) = evaluate(config, [mode], lambda title: quiet)
    return result.as_json()


def blobs(samples: int, classes: int, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = np.random.default_rng(seed)
    labels = np.arange(samples) % classes
    features = np.random.default_rng(0).normal(size=(classes, width))[labels] + random.normal(size=(samples, width))
    return torch.from_numpy(features.astype(np.float32)), torch.from_numpy(labels)


@pytest.mark.parametrize("tile", [7, 8192])
def test_logistic_regression_is_that_of_scikit_learn(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logistic, "TILE", tile)
    monkeypatch.setattr(logistic, "PENALTY", 0.5)  # large enough for both to reach the one solution
    features, labels = blobs(60, 4, 8, 1)
    found = logistic.fit(features, labels, 4, CPU)
    centred = (features - features.mean(0)).numpy().astype(np.float64)
    units = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    expected = LogisticRegression(C=1 / 0.5, fit_intercept=False, tol=1e-10, max_iter=10_000).fit(units, labels.numpy())
    np.testing.assert_allclose(found.weight, expected.coef_, atol=2e-3)
    others, truth = blobs(90, 4, 8, 2)
    centred = (others - features.mean(0)).numpy()
    top1 = 100 * (expected.predict(centred / np.linalg.norm(centred, axis=1, keepdims=True)) == truth.numpy()).mean()
    assert found.accuracy(others, truth) == pytest.approx(top1, abs=1.2)


def test_logistic_regression_reaches_its_minimum(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """That of scikit-learn's Newton method, on features whose variances differ as those of a ViT."""
    features, labels = blobs(1500, 10, 96, 1)
    features *= 1 / torch.arange(1, 97)
    units = torch.nn.functional.normalize(features - features.mean(0))

    def loss(weight: torch.Tensor) -> float:
        squares = logistic.PENALTY / (2 * len(labels)) * weight.square().sum()
        return float(torch.nn.functional.cross_entropy(units @ weight.T, labels) + squares)

    newton = LogisticRegression(
        C=1 / logistic.PENALTY, fit_intercept=False, solver="newton-cg", tol=1e-6, max_iter=1000
    ).fit(units.double().numpy(), labels.numpy())
    least = loss(torch.from_numpy(newton.coef_).float())
    assert loss(logistic.fit(features, labels, 10, CPU).weight) == pytest.approx(least, rel=0.01)
    assert not caplog.messages
    monkeypatch.setattr(logistic, "ITERATIONS", 30)
    assert loss(logistic.fit(features, labels, 10, CPU).weight) > 1.1 * least
    assert caplog.messages == ["the logistic regression on 1500 samples ended after 30 iterations, before its minimum"]


def test_one_label_of_each_class_is_enough_to_fit_and_bf16_does() -> None:
    features, labels = blobs(4, 4, 64, 3)
    found = logistic.fit(features.bfloat16(), labels, 4, CPU)
    assert found.accuracy(features, labels) == 100 and found.weight.isfinite().all()


def test_accuracy_by_labels(stores: dict[str, Path], pretrained: Path, tmp_path: Path) -> None:
    given = ("few_shot.per_class=[1, 3, 9, null]", "few_shot.draws=3", "seed=2")
    config = evaluation(pretrained, stores["zarr"], *given, out=tmp_path / "out")
    result = run(config, "few-shot")
    # 9 is left out: a class has 8
    assert [(shot["per_class"], shot["images"]) for shot in result["shots"]] == [(1, 3), (3, 9), (None, 24)]
    one, three, everything = result["shots"]
    assert everything["linear"] == 100 and everything["linear_spread"] == everything["knn_spread"] == 0
    assert one["linear_spread"] > 0 and one["linear"] < 100
    context = _context(config, World(0, 1, CPU), [])
    assert context.train is not None
    train = np.fromfile(tmp_path / "out/run/few-shot/train/6-mean-none", np.int16).reshape(24, -1)
    features = torch.from_numpy(train).view(torch.bfloat16)
    labels, expected = context.train.labels, []
    for draw in range(3):
        rows = torch.from_numpy(n_per_class(labels.numpy(), 3, 2 + draw))
        expected.append(logistic.fit(features[rows], labels[rows], 3, CPU).accuracy(features, labels))
    assert three["linear"] == pytest.approx(np.mean(expected))
    assert three["linear_spread"] == pytest.approx(np.std(expected, ddof=1))
    page = (tmp_path / "out/index.html").read_text()
    assert "labels of a class" in page and page.count("data:image/png") == 1
    assert run(config, "few-shot") == result


def test_accuracy_on_corrupted_images(stores: dict[str, Path], pretrained: Path, tmp_path: Path) -> None:
    config = evaluation(f"pixels:{pretrained}", stores["zarr"], "corruptions.k=3", out=tmp_path / "out")
    result = run(config, "corruptions")
    assert [(row["corruption"], row["strength"]) for row in result["corrupted"]] == [
        (kind, strength) for kind in KINDS for strength in range(1, 6)
    ]
    assert result["linear"] == 100  # the training images themselves
    worst = min(result["corrupted"], key=lambda row: row["linear"])
    assert worst["linear"] < 100
    page = (tmp_path / "out/index.html").read_text()
    assert "Corrupted images" in page and page.count("data:image/png") == 1
    context = _context(config, World(0, 1, CPU), [])
    (batch,) = context.in_order(context.val, 64).micro_batches(0, 1)
    images = batch.images.numpy().copy()
    Corruption("noise", 4)(images, 0, 0, batch.indices)
    seen = np.fromfile(tmp_path / "out/pixels run/corruptions/noise-4/1-mean-none", np.int16).reshape(24, -1)
    expected = Pixels()(normalise(torch.from_numpy(images)))[:, 0].bfloat16()
    torch.testing.assert_close(torch.from_numpy(seen).view(torch.bfloat16), expected)
    assert run(config, "corruptions") == result


def test_classes_without_images_do_not_count() -> None:
    labels = torch.tensor([1, 3, 1, 3, 3])
    ((per_class, (rows,)),) = few_shot._drawn(labels, FewShot(per_class=(2, 3), draws=1), 0)
    assert per_class == 2 and labels[rows].bincount().tolist() == [0, 2, 0, 2]


def test_what_cannot_be_measured_is_refused_before_any_work(
    stores: dict[str, Path], pretrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kamim.evaluation.evaluate._run", None)
    store = stores["zarr"]
    for mode, config, message in (
        ("few-shot", evaluation(pretrained, store, "few_shot.per_class=[9]"), "the smallest class has 8 images"),
        ("few-shot", evaluation(pretrained, store, train=None), "train: is missing"),
        ("few-shot", evaluation(f"pixels:{pretrained}", store, "few_shot.pooling=cls"), "no class token"),
        ("corruptions", evaluation(pretrained, store, val=None), "val: is missing"),
    ):
        with pytest.raises(KamimError, match=message):
            run(config, mode)
    with pytest.raises(KamimError, match="fog"):
        evaluation(pretrained, store, "corruptions.kinds=[fog]")
