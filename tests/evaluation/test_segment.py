"""The linear segmentation probe: equal to slow twins, end to end, resumed, and wrong input before any work."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import config as pretraining
from runs import quiet
from torch.nn.functional import interpolate
from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassJaccardIndex
from typer.testing import CliRunner

from kamim import KamimError
from kamim.cli import app
from kamim.config.pretrain import Compute, Pretrain
from kamim.config.schema import load
from kamim.evaluation import segment
from kamim.evaluation.evaluate import evaluate, tasks_of
from kamim.evaluation.evaluated_model import load_evaluated_model, planned_model
from kamim.evaluation.options import Evaluation
from kamim.evaluation.segment import PixelCrossEntropy, SegmentationHead, predictions, segmentation
from kamim.models.masked_image_model import build_encoder
from kamim.models.readout import Pixels, token_map
from kamim.runtime.distributed import World
from kamim.training import checkpoint
from kamim.training.pretrain import pretrain
from kamim.training.trainer import Trainer
from pipelines.batch import Batch

WORLD = World(0, 1, torch.device("cpu"))
COLOURS = np.array([[230, 20, 20], [20, 230, 20], [20, 20, 230]], np.uint8)
SHORT = ("segment.optim.batch_size=8", "segment.optim.epochs=15", "segment.optim.lr=0.05", "workers=1")
runner = CliRunner()


def write_scenes(folder: Path, count: int, seed: int, names: str = "red\ngreen\nblue\n") -> Path:
    """Noisy images of coloured squares of 16 px, whose colour is their class; some have no class."""
    random = np.random.default_rng(seed)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    (folder / "classes.txt").write_text(names)
    for n in range(count):
        height, width = random.integers(3, 6, 2).tolist()
        squares = random.integers(0, 3, (height, width))
        mask = squares.repeat(16, 0).repeat(16, 1)
        pixels = COLOURS[mask] + random.integers(-15, 16, (*mask.shape, 3))
        mask[:16, :16] = 255
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"images/{n}.png")
        Image.fromarray(mask.astype(np.uint8)).save(folder / f"masks/{n}.png")
    return folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("scenes")
    return write_scenes(root / "train", 24, 0), write_scenes(root / "val", 7, 1)


@pytest.fixture(scope="module")
def pretrained(stores: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pretrained") / "run"
    pretrain(pretraining(out, stores["zarr"], "optim.epochs=1", "optim.warmup_epochs=0"), lambda *_: None)
    return out


def evaluation(spec: str, scenes: tuple[Path, Path], *more: str, **given: Any) -> Evaluation:
    chosen = {"checkpoint": (spec,), **given}
    train, val = scenes
    return load(Evaluation, None, [*SHORT, f"segment.train={train}", f"segment.val={val}", *more], chosen)


def run(config: Evaluation) -> list[dict[str, Any]]:
    return [result.as_json() for result in evaluate(config, ["segment"], lambda title: quiet)]


@pytest.mark.parametrize("size", [(3, 3), (24, 24), (37, 100), (5, 64), (200, 7)])
@pytest.mark.parametrize("strip", [1, 700, 1 << 24])
def test_predictions_are_those_of_upsampled_logits(
    size: tuple[int, int], strip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segment, "STRIP_VALUES", strip)
    logits = torch.randn(5, 6, 6, generator=torch.Generator().manual_seed(0))
    whole = interpolate(logits[None], size, mode="bilinear", align_corners=False)[0]
    parts = list(predictions(logits, size))
    assert [(rows.start, rows.stop) for rows, _ in parts][-1][1] == size[0]
    found = torch.cat([part for _, part in parts])
    assert found.shape == size and (len(parts) == 1) == (strip == 1 << 24 or (size == (3, 3) and strip == 700))
    best = whole.topk(2, dim=0).values
    assert ((found == whole.argmax(0)) | (best[0] - best[1] < 1e-5)).all()


def test_the_head_norms_every_channel_and_reads_every_token_alike() -> None:
    torch.manual_seed(0)
    head, tokens = SegmentationHead(8, 3), torch.randn(4, 8, 5, 5) * 3 + 1
    assert float(SegmentationHead(768, 150).conv.weight.detach().std()) == pytest.approx(0.01, rel=0.05)
    logits, rows = head(tokens), tokens.permute(0, 2, 3, 1).reshape(-1, 8).double()
    normed = (rows - rows.mean(0)) / (rows.var(0, unbiased=False) + 1e-5).sqrt()
    weight, bias = head.conv.weight.detach().double()[:, :, 0, 0], head.conv.bias.detach().double()  # type: ignore[union-attr]
    expected = (normed @ weight.T + bias).view(4, 5, 5, 3).permute(0, 3, 1, 2)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", [2, 6])
def test_tokens_lie_where_their_patches_do(block: int) -> None:
    encoder, images = build_encoder("vit_demo", 64).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        found = token_map(encoder, images, block)
        (tokens,) = encoder.forward_intermediates(
            images, [block - 1], norm=block == 6, output_fmt="NCHW", intermediates_only=True
        )
    torch.testing.assert_close(found, tokens, rtol=1e-4, atol=1e-5)
    swin = build_encoder("swin_tiny", 192).eval()
    with torch.no_grad():
        stage = token_map(swin, torch.randn(1, 3, 192, 192), 2)
    assert stage.shape == (1, 192, 24, 24)


def test_a_token_of_pixels_is_a_patch() -> None:
    images = torch.randn(2, 3, 64, 64)
    tokens = token_map(Pixels(16), images, 1)
    assert tokens.shape == (2, 768, 4, 4)
    patch = images[1, :, 16:32, 48:64]
    torch.testing.assert_close(tokens[1, :, 1, 3].sort().values, patch.flatten().sort().values)


def labelled(count: int, seed: int, ignored: float) -> Batch:
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count, 32, 32), generator=random)
    labels[torch.rand(labels.shape, generator=random) < ignored] = -1
    images = torch.randint(0, 256, (count, 32, 32, 3), generator=random).to(torch.uint8)
    return Batch(images, None, labels, np.arange(count), 0, 0, True, 1.0)


def objective() -> PixelCrossEntropy:
    torch.manual_seed(0)
    head = SegmentationHead(768, 3).eval()
    with torch.no_grad():
        head.conv.weight.normal_()
    return PixelCrossEntropy(head, segment.FrozenTokens(Pixels(16), 1, Compute(), WORLD.device), Compute())


def test_the_loss_is_the_mean_over_all_pixels_and_ignored_ones_count_nothing() -> None:
    found, batch = objective(), labelled(3, 0, ignored=0.4)
    logits = interpolate(found.network(found.read(segment.normalise(batch.images))), (32, 32), mode="bilinear")
    picked = logits.log_softmax(1).gather(1, batch.labels.clamp(min=0)[:, None])[:, 0]
    expected = -(picked * (batch.labels >= 0)).sum() / (3 * 32 * 32)
    torch.testing.assert_close(found(batch).loss, expected)
    nothing = found(labelled(2, 1, ignored=1.1)).loss
    assert float(nothing.detach()) == 0  # and not nan, which a mean over no pixels would be
    nothing.backward()


def test_iou_is_that_of_torchmetrics_and_of_counting_pixels() -> None:
    random = np.random.default_rng(0)
    truth, predicted = random.integers(-1, 4, 5000), random.integers(0, 4, 5000)
    truth[truth == 2] = 3  # class 2 is predicted only; class 4 occurs nowhere
    confusion = MulticlassConfusionMatrix(5, ignore_index=-1)
    confusion.update(torch.from_numpy(predicted), torch.from_numpy(truth))
    found = segmentation(confusion.compute(), tuple("abcde"), 255)
    known = truth >= 0
    for index, name in enumerate("abcd"):
        mine, theirs = (predicted == index) & known, truth == index
        assert found.iou[name] == pytest.approx(100 * (mine & theirs).sum() / (mine | theirs).sum())
    assert found.iou["e"] is None and found.iou["c"] == 0
    jaccard = MulticlassJaccardIndex(5, ignore_index=-1)(torch.from_numpy(predicted), torch.from_numpy(truth))
    assert found.miou == pytest.approx(100 * float(jaccard))
    assert found.pixel_accuracy == pytest.approx(100 * (predicted == truth)[known].mean())
    without = segmentation(confusion.compute(), tuple("abcde"), 2)
    assert without.iou["c"] is None and without.miou > found.miou


def test_colours_are_learned_and_everything_is_reported(
    scenes: tuple[Path, Path], pretrained: Path, tmp_path: Path
) -> None:
    """Raw pixels tell the classes of squares apart, as far as crops and squares align."""
    config = evaluation("", scenes, checkpoint=(f"pixels:{pretrained}", f"KAMIM={pretrained}"), out=tmp_path / "out")
    pixels, kamim = run(config)
    assert pixels["miou"] > 60 and pixels["pixel_accuracy"] > 75 and set(pixels["iou"]) == {"red", "green", "blue"}
    assert (kamim["mode"], kamim["block"], kamim["epochs"], kamim["classes"]) == ("segment", 6, 15, 3)
    assert (kamim["train"]["images"], kamim["val"]["images"]) == (24, 7) and kamim["weights"]
    assert kamim["train"]["fingerprint"] != kamim["val"]["fingerprint"]
    page = (tmp_path / "out/index.html").read_text()
    assert page.count("data:image/png") == 1 and "IoU by class" in page and "green" in page
    assert run(config) == [pixels, kamim]


def test_a_stopped_training_goes_on_to_the_same_result(
    scenes: tuple[Path, Path], pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = ("segment.optim.epochs=2", "segment.checkpoint_epochs=1")
    (undisturbed,) = run(evaluation(str(pretrained), scenes, *short, out=tmp_path / "a"))
    train_step = Trainer.train_step

    def killed(trainer: Trainer, step: int, micro_batches: Any) -> Any:
        if step == 4:
            raise SystemError("killed")
        return train_step(trainer, step, micro_batches)

    config = evaluation(str(pretrained), scenes, *short, out=tmp_path / "b")
    with monkeypatch.context() as patched, pytest.raises(SystemError):
        patched.setattr(Trainer, "train_step", killed)
        run(config)
    assert run(config) == [undisturbed]
    a, b = (checkpoint.latest(tmp_path / name / "run/segment") for name in "ab")
    assert a is not None and b is not None and a.weights == b.weights
    (other,) = run(evaluation(str(pretrained), scenes, *short, "seed=1"))
    assert other["miou"] != undisturbed["miou"]


def test_what_cannot_be_segmented_is_refused_before_any_work(
    scenes: tuple[Path, Path], pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kamim.evaluation.evaluate._run", None)
    other = write_scenes(tmp_path / "other", 1, 2, names="red\ngreen\ncyan\n")
    spec = str(pretrained)
    for config, message in (
        (load(Evaluation, None, [], {"checkpoint": (spec,)}), "segment.train: is missing; give a folder"),
        (load(Evaluation, None, ["segment.train=x"], {"checkpoint": (spec,)}), "segment.val: is missing"),
        (evaluation(spec, (scenes[0], tmp_path / "none")), "none: no such folder"),
        (evaluation(spec, (scenes[0], other)), "names other classes than"),
        (evaluation(spec, scenes, "segment.optim.batch_size=25"), "batch_size = 25: more than the 24 images"),
        (evaluation(spec, scenes, "segment.block=7"), "block = 7: the encoder has blocks 1 to 6"),
        (evaluation(spec, scenes, "segment.ignore_index=7"), "holds the index 255, but classes.txt names 0 to 2"),
    ):
        with pytest.raises(KamimError, match=message):
            run(config)
    with pytest.raises(ValueError, match=r"crop_scale = \[0.5, 0.2\]"):
        evaluation(spec, scenes, "segment.crop_scale=[0.5, 0.2]")
    given = ["data.store=s", "out=o", "model.name=vit_demo", "data.resolution=16", "mask.patch_size=16"]
    model = planned_model("x", load(Pretrain, None, given))
    with pytest.raises(KamimError, match="has one token for an image of 16 px"):
        tasks_of(evaluation("x", scenes), ["segment"], [model], WORLD)


def test_all_includes_it_if_its_folders_are_given_and_modes_of_stores_name_what_they_lack(
    scenes: tuple[Path, Path], pretrained: Path, stores: dict[str, Path]
) -> None:
    store = stores["zarr"]
    model = load_evaluated_model(str(pretrained))

    def modes(*more: str, **given: Any) -> list[str]:
        short = ("linprobe.optim.batch_size=8", "finetune.optim.batch_size=8", "sweep.optim.batch_size=8", "knn.k=[3]")
        named = {"checkpoint": ("x",), "train": store, "val": store, **given}
        config = load(Evaluation, None, [*short, *SHORT, *more], named)
        return [task.settings.mode for task in tasks_of(config, None, [model], WORLD)]

    assert "segment" not in modes()
    assert "segment" in modes(f"segment.train={scenes[0]}", f"segment.val={scenes[1]}")
    with pytest.raises(KamimError, match="val: is missing"):
        modes(val=None)


def test_a_class_that_no_mask_holds_is_logged_for_each_folder(
    pretrained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = "red\ngreen\nblue\ncar\n"
    folders = write_scenes(tmp_path / "train", 8, 0, names), write_scenes(tmp_path / "val", 2, 1, names)
    tasks_of(evaluation("x", folders), ["segment"], [load_evaluated_model(str(pretrained))], WORLD)
    logged = [line for line in caplog.messages if "no mask holds" in line]
    assert logged == [f"{folder}: no mask holds 1 of its 4 classes: car" for folder in folders]
    assert not [line for line in caplog.messages if "training images too" in line]


def test_images_in_both_folders_are_reported(
    scenes: tuple[Path, Path], pretrained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    val = write_scenes(tmp_path / "val", 3, 5)
    for name in ("images", "masks"):
        shutil.copy(scenes[0] / name / "4.png", val / name / "copy.png")
    tasks_of(evaluation("x", (scenes[0], val)), ["segment"], [load_evaluated_model(str(pretrained))], WORLD)
    assert f"1 of 4 validation images are training images too, byte for byte ({val} and {scenes[0]})" in caplog.text


def test_the_command(scenes: tuple[Path, Path], pretrained: Path, tmp_path: Path) -> None:
    command = ["eval", "--mode", "segment", "--checkpoint", f"pixels:{pretrained}", *SHORT, "segment.optim.epochs=2"]
    command += [f"segment.train={scenes[0]}", f"segment.val={scenes[1]}", "--json", str(tmp_path / "r.json")]
    shown = runner.invoke(app, command)
    assert shown.exit_code == 0, shown.output
    assert "segment pixels run: mIoU " in shown.output and "on 7 images of 3 classes" in shown.output
    assert " % over 3 of 3 classes, pixel accuracy " in shown.output
    (result,) = json.loads((tmp_path / "r.json").read_text())
    assert result["mode"] == "segment" and result["val"]["store"] == str(scenes[1])
    (scenes[1] / "masks/0.png").rename(scenes[1] / "masks/x.png")
    refused = runner.invoke(app, command)
    (scenes[1] / "masks/x.png").rename(scenes[1] / "masks/0.png")
    replaced, line = refused.stderr.splitlines()
    assert refused.exit_code == 1 and "exists and will be replaced" in replaced and "masks does not" in line
