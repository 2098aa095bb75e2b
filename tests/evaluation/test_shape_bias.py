"""Shape bias: decisions and fractions by hand, end to end on images that show their texture alone, wrong input."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build_store
from PIL import Image
from runs import config as pretraining
from runs import quiet

from kamim import KamimError
from kamim.config.schema import load
from kamim.evaluation.evaluate import evaluate
from kamim.evaluation.options import Evaluation
from kamim.evaluation.shape_bias import decisions, shape_bias
from kamim.training.pretrain import pretrain

COLOURS = {"cat": (220, 30, 30), "dog": (30, 220, 30), "car": (30, 30, 220)}
CATEGORIES = "shape_bias.categories={cat: [cat], dog: [dog], car: [car]}"


def scene(category: str, random: np.random.Generator) -> Image.Image:
    noise = random.integers(-20, 21, (64, 64, 3))
    return Image.fromarray((np.array(COLOURS[category]) + noise).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, random = tmp_path_factory.mktemp("coloured"), np.random.default_rng(0)
    for category in COLOURS:
        (root / category).mkdir()
        for n in range(6):
            scene(category, random).save(root / category / f"{n}.png")
    return build_store(root, tmp_path_factory.mktemp("store") / "coloured", detectors=("fast",))


@pytest.fixture(scope="module")
def conflicts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images that show their texture's colour alone."""
    root, random = tmp_path_factory.mktemp("conflicts"), np.random.default_rng(1)
    for shape in (*COLOURS, "boat"):
        (root / shape).mkdir()
        for texture in COLOURS:
            for n in range(2):
                scene(texture, random).save(root / shape / f"{shape}{n + 1}-{texture}{n + 3}.png")
    (root / "cat/notes.png").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def pretrained(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pretrained") / "run"
    pretrain(pretraining(out, store, "optim.epochs=1", "optim.warmup_epochs=0"), lambda *_: None)
    return out


def evaluation(spec: Path | str, store: Path, images: Path, *more: str, **given: Any) -> Evaluation:
    options = [f"shape_bias.images={images}", CATEGORIES, "workers=1", "compute.device=cpu", *more]
    return load(Evaluation, None, options, {"checkpoint": (str(spec),), "train": store, **given})


def test_a_decision_is_for_the_category_of_the_highest_mean_probability() -> None:
    probabilities = torch.tensor([[0.4, 0.1, 0.3, 0.2], [0.1, 0.6, 0.1, 0.2], [0.0, 0.3, 0.3, 0.4]])
    members = {"cat": [0, 1], "dog": [2], "car": [3]}
    assert decisions(probabilities, members) == ["dog", "cat", "car"]  # means .25 .3 .2, .35 .1 .2, .15 .3 .4


def test_the_bias_is_the_share_of_shape_decisions_among_right_ones() -> None:
    shapes, textures = ["cat", "cat", "cat", "dog", "dog"], ["dog", "dog", "car", "cat", "car"]
    found = shape_bias(shapes, textures, ["cat", "dog", "cat", "car", "cat"])
    assert (found.shape, found.texture, found.other) == (2, 1, 2)
    assert found.shape_bias == pytest.approx(200 / 3)
    assert found.by_category == {"cat": pytest.approx(200 / 3), "dog": None}
    assert shape_bias(["cat"], ["dog"], ["car"]).shape_bias is None


def test_a_probe_that_sees_colours_decides_for_the_texture(
    store: Path, conflicts: Path, pretrained: Path, tmp_path: Path
) -> None:
    config = evaluation(f"pixels:{pretrained}", store, conflicts, out=tmp_path / "out")
    (result,) = (found.as_json() for found in evaluate(config, ["shape-bias"], lambda title: quiet))
    assert (result["shape_bias"], result["shape"], result["texture"], result["other"]) == (0, 0, 12, 0)
    assert (result["val"]["images"], result["classes"]) == (12, 3)  # neither boats nor cats that look like cats
    assert "Shape or texture" in (tmp_path / "out/index.html").read_text()
    two = ("shape_bias.categories={cat: [cat], dog: [dog, car]}",)
    (other,) = evaluate(evaluation(pretrained, store, conflicts, *two), ["shape-bias"], lambda title: quiet)
    assert other.settings.val.images == 4 and other.settings.val.fingerprint != result["val"]["fingerprint"]


def test_what_cannot_be_decided_is_refused_before_any_work(
    store: Path, conflicts: Path, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kamim.evaluation.evaluate._run", None)
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat/cat1-dog1.jpg").write_bytes(b"")
    for config, message in (
        (evaluation(pretrained, store, conflicts, train=None), "train: is missing"),
        (evaluation(pretrained, store, conflicts, "shape_bias.categories={}"), "two categories or more"),
        (evaluation(pretrained, store, conflicts, "shape_bias.categories={cat: [lion], dog: [dog]}"), "class 'lion'"),
        (evaluation(pretrained, store, conflicts, "shape_bias.images=null"), "shape_bias.images: is missing"),
        (evaluation(pretrained, store, tmp_path / "none"), "none: no such folder"),
        (evaluation(pretrained, store, tmp_path), "0 images are named"),
    ):
        with pytest.raises(KamimError, match=message):
            evaluate(config, ["shape-bias"], lambda title: quiet)
