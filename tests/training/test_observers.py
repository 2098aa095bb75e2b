"""Panels and the probe show the state of a run and do not change it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import WORLD, board, config, quiet, weights

from kamim.config.pretrain import Pretrain
from kamim.config.schema import load
from kamim.evaluation.evaluate import evaluate
from kamim.evaluation.options import Evaluation
from kamim.models.label_free import effective_rank, uniformity
from kamim.models.readout import tokens_after
from kamim.reporting import plots
from kamim.storage.store import Store
from kamim.training import checkpoint, metrics, report
from kamim.training.data import whole_images
from kamim.training.pretrain import pretrain
from pipelines.batch import normalise
from pipelines.chunk import Crops
from pipelines.loader import Loader
from pipelines.samples import Samples


@pytest.fixture(scope="module")
def store(stores: dict[str, Path]) -> Path:
    return stores["zarr"]


@pytest.fixture(scope="module")
def watched(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 epochs of 2 steps, with panels and probe after every second epoch."""
    out = tmp_path_factory.mktemp("runs") / "watched"
    probe = f"probe={{train: {store}, val: {store}, every_epochs: 2, per_class: 6}}"
    label_free = "label_free={images: 9, every_epochs: 3}"
    plateau = "plateau={images: 9, every_epochs: 2}"
    assert pretrain(config(out, store, "panel_epochs=2", probe, label_free, plateau), quiet).finished
    return out


@pytest.fixture(scope="module")
def unwatched(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "unwatched"
    pretrain(config(out, store, "panel_epochs=null"), quiet)
    return out


def test_a_run_that_is_looked_at_is_the_run_that_is_not(watched: Path, unwatched: Path) -> None:
    assert [line["loss"] for line in metrics.read(watched)] == [line["loss"] for line in metrics.read(unwatched)]
    for name, value in weights(unwatched).items():
        assert torch.equal(value, weights(watched)[name])
    assert not (unwatched / "panels").exists()


def test_panels_come_every_so_many_epochs(watched: Path) -> None:
    files = sorted((watched / "panels").iterdir())
    assert [file.name for file in files] == ["step-00000004.png", "step-00000008.png"]
    assert [event.step for event in board(watched).Images("panel")] == [4, 8]
    first, last = (np.asarray(Image.open(file)).astype(int) for file in files)
    assert first.shape == last.shape
    changed = np.abs(first - last).max(axis=2) > 0  # the reconstructions, and the caption
    assert 0 < changed.mean() < 0.4


def test_panels_show_the_weights_of_the_loss(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[np.ndarray] = []
    sheet = plots.panel_sheet

    def kept(originals: Any, masks: Any, made: Any, bitmaps: Any, weights: np.ndarray, caption: str) -> Any:
        shown.append(weights)
        return sheet(originals, masks, made, bitmaps, weights, caption)

    monkeypatch.setattr(plots, "panel_sheet", kept)
    short = ("optim.epochs=2", "panel_epochs=2")
    for normalize in ("false", "true"):
        pretrain(config(tmp_path / normalize, store, f"weighting.normalize={normalize}", *short), quiet)
    plain, normalised = shown
    np.testing.assert_allclose(normalised, plain / plain.mean(axis=(1, 2), keepdims=True), rtol=1e-5)
    assert (plain >= 1).all() and (normalised < 1).any()


def test_a_resumed_run_shows_the_same_panel(watched: Path, store: Path, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(done: int, total: int, said: dict[str, float]) -> None:
        if done == 7:
            raise Killed

    given = config(tmp_path / "run", store, "panel_epochs=2")
    with pytest.raises(Killed):
        pretrain(given, kill)
    pretrain(given, quiet)
    for file in sorted((watched / "panels").iterdir()):
        assert (tmp_path / "run/panels" / file.name).read_bytes() == file.read_bytes()


def test_the_probe_is_that_of_the_evaluation(watched: Path, store: Path) -> None:
    made = {line["step"]: line["knn_top1"] for line in metrics.read(watched) if "knn_top1" in line}
    assert list(made) == [3, 7]
    given = [f"checkpoint=[{watched}]", f"train={store}", f"val={store}", "per_class=6", "knn.k=[18]", "seed=3"]
    (result,) = evaluate(load(Evaluation, None, given), ["knn"], lambda title: quiet)
    assert made[7] == pytest.approx(result.measured.k[18].top1, abs=100 / 24 + 1e-6)  # features are rounded there
    assert {event.step: event.value for event in board(watched).Scalars("knn_top1")} == pytest.approx(made)


def test_measures_without_labels_are_those_of_the_probes_features(watched: Path, store: Path) -> None:
    made = {line["step"]: line for line in metrics.read(watched) if "rankme" in line}
    assert list(made) == [5, 7]  # after three epochs of two steps, and after the last step
    encoder = checkpoint.read(watched).build_model().encoder.eval()
    chosen = Samples(Store(store), np.linspace(0, 23, 9).astype(np.int64))
    batch = next(iter(whole_images(chosen, 64, 9, 1, WORLD).micro_batches(0, 1)))
    with torch.no_grad():
        tokens = tokens_after(encoder, normalise(batch.images), 6)[:, 1:]  # less the class token
    features = tokens.mean(dim=1)
    expected = {"rankme": effective_rank(features), "uniformity": uniformity(features)}
    assert {name: made[7][name] for name in expected} == pytest.approx(expected, rel=1e-4)
    titles = [axes.get_title() for axes in report.curves(metrics.read(watched)).axes]
    assert {"kNN, top-1 (%)", "effective rank (RankMe)", "uniformity", "alpha-ReQ"} <= set(titles)


def test_a_store_without_labels_is_refused_before_any_work(store: Path, tmp_path: Path) -> None:
    given = config(tmp_path / "run", store, f"probe={{train: {store}, val: {tmp_path / 'none'}}}")
    with pytest.raises(ValueError, match="none"):
        pretrain(given, quiet)
    assert not (tmp_path / "run").exists()


def test_a_panel_of_simmim_has_no_weights() -> None:
    images = np.zeros((2, 8, 8, 3), np.uint8)
    masks, weights = np.zeros((2, 8, 8), bool), np.ones((2, 2, 2), np.float32)
    plain = plots.panel_sheet(images, masks, images, None, None, "")
    full = plots.panel_sheet(images, masks, images, masks, weights, "")
    assert [len(figure.axes) for figure in (plain, full)] == [6, 10]
    assert plots.pixels(full).shape[2] == 3


def test_panels_and_probes_leave_out_what_the_run_does(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode_and_crop = Loader._decode_and_crop

    def without_first(self: Loader, crops: Crops, scratch: Any, stopped: np.ndarray) -> np.ndarray:
        return decode_and_crop(self, crops, scratch, stopped) | (crops.indices == 0)

    def damaged(self: Loader, crops: Crops, scratch: Any) -> None:
        raise ValueError("not a JPEG")

    monkeypatch.setattr(Loader, "_decode_and_crop", without_first)
    monkeypatch.setattr(Loader, "_crop_alone", damaged)
    probe = f"probe={{train: {store}, val: {store}, every_epochs: 2}}"
    pretrain(config(tmp_path / "run", store, "data.on_error=skip", "optim.epochs=2", probe), quiet)
    assert metrics.read(tmp_path / "run")[-1]["knn_top1"] > 0
    assert [line["samples"] for line in metrics.read(tmp_path / "run")].count(11) == 2
    assert (tmp_path / "run/panels/step-00000004.png").is_file()


def test_selectivity_is_the_distance_from_uniform_attention(watched: Path, store: Path) -> None:
    """Against the softmax of q k^T written out for every block, of the last checkpoint's model."""
    logged = [
        (line["step"], line["attention_selectivity"])
        for line in metrics.read(watched)
        if "rankme" not in line and "attention_selectivity" in line
    ]
    assert [step for step, _ in logged] == [3]  # and the last step, beside the probe
    vit = checkpoint.read(watched).build_model().eval().encoder
    opened = Store(store)
    chosen = Samples(opened, np.linspace(0, len(opened) - 1, 9).astype(np.int64))
    (batch,) = whole_images(chosen, 64, 9, 1, WORLD).micro_batches(0, 1)
    places = torch.cartesian_prod(torch.arange(4), torch.arange(4)).double() * 16
    between = torch.cdist(places, places)
    gaps = []
    with torch.no_grad():
        tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(normalise(batch.images))))
        for block in vit.blocks:
            q, k, _ = block.attn.qkv(block.norm1(tokens)).reshape(9, 17, 3, 4, 32).permute(2, 0, 3, 1, 4)
            weights = ((q @ k.transpose(-2, -1)) / 32**0.5).softmax(-1)[..., 1:, 1:].double()
            weights = weights / weights.sum(-1, keepdim=True)
            gaps.append(abs(float((weights * between).sum(-1).mean() - between.mean())))
            tokens = block(tokens)
    last = metrics.read(watched)[-1]["attention_selectivity"]
    assert last == pytest.approx(np.mean(gaps), rel=1e-4)


def test_the_report_says_whether_attention_left_the_plateau(watched: Path) -> None:
    text = report.save_report(watched).read_text()
    assert "Attention has not left the plateau" in text
    lines = metrics.read(watched)
    assert all(0.5 < line["loss_mean_colour"] < 1.5 for line in lines if "loss_mean_colour" in line)
    moved = [{**line, "attention_selectivity": 0.1 + 5 * (line["step"] > 4)} for line in lines]
    given = load(Pretrain, watched / "config.yaml")
    assert "Attention left the plateau by step 5; it is at 5.1 px from the 32.1 px" in report._summary(given, moved, [])
