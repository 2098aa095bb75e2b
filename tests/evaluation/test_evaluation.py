"""`kamim eval`: classifiers on features whose answer is known, every mode end to end, resuming, wrong input."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build_store
from PIL import Image
from safetensors.torch import load_file
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from typer.testing import CliRunner

from kamim import KamimError
from kamim.cli import app
from kamim.config.pretrain import Compute, Pretrain
from kamim.config.schema import load
from kamim.evaluation import classifier_training as classify
from kamim.evaluation import probe
from kamim.evaluation.classifier_training import make_optimizer
from kamim.evaluation.context import EvalContext
from kamim.evaluation.evaluate import _context, evaluate
from kamim.evaluation.evaluated_model import load_evaluated_model, planned_model
from kamim.evaluation.finetune import Classifier, ModelEma, parameter_groups
from kamim.evaluation.modes import MODES
from kamim.evaluation.options import ClassifierOptim, Evaluation
from kamim.evaluation.results import Accuracy
from kamim.models.masked_image_model import build_encoder
from kamim.models.readout import Pixels, Readout, blocks, fixed, resolve, tokens_after
from kamim.runtime.distributed import World
from kamim.storage.store import Store
from kamim.training import checkpoint
from kamim.training.pretrain import pretrain
from kamim.training.trainer import Run, Trainer
from pipelines.batch import Batch, normalise
from pipelines.samples import Samples, all_samples

CLASSES = 4
CPU = torch.device("cpu")
WORLD = World(0, 1, CPU)
runner = CliRunner()


def silent(title: str) -> Any:
    return lambda done, total, values: None


def coloured(labels: np.ndarray, seed: int) -> Tensor:
    """Noisy images whose colour is their class."""
    random = np.random.default_rng(seed)
    colours = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200], [200, 200, 40]])
    noise = random.integers(-30, 31, (len(labels), 32, 32, 3))
    return torch.from_numpy((colours[labels][:, None, None] + noise).clip(0, 255).astype(np.uint8))


def probed(labels: np.ndarray, shown: np.ndarray, readout: Readout, folder: Path) -> Accuracy:
    """Probes a random encoder; training images show `shown`, and are labelled `labels`."""
    torch.manual_seed(0)
    frozen = probe.Frozen(build_encoder("vit_demo", 32), readout, Compute(), CPU)
    head = probe.build_head(frozen, readout, 32, CLASSES, CPU)
    optim = ClassifierOptim(batch_size=32, epochs=20, warmup_epochs=1)

    def batches(first: int, stop: int) -> Iterator[Batch]:
        images = coloured(shown, 1)
        for step in range(first, stop):
            yield Batch(images, None, torch.from_numpy(labels), np.arange(len(labels)), step, step, True, 1.0)

    def plain(batch: Batch) -> tuple[Tensor, Tensor]:
        return normalise(batch.images), nn.functional.one_hot(batch.labels, CLASSES).float()

    folder.mkdir()
    objective = classify.CrossEntropy(head, frozen, plain, Compute(), 0)
    optimizer = torch.optim.AdamW(head.parameters(), lr=optim.lr, weight_decay=optim.weight_decay)
    run = Run(folder, "linprobe", {}, optim, steps_per_epoch=4, every=100, keep=checkpoint.Keep(1))
    assert Trainer(run, head, head, optimizer, objective, batches, WORLD).fit(lambda *_: None).finished
    truth = np.arange(80) % CLASSES
    val = [Batch(coloured(truth, 2), None, torch.from_numpy(truth), np.arange(80), 0, 0, True, 1.0)]
    return classify.accuracy(head, lambda batch: frozen(normalise(batch.images)), val, WORLD)


@pytest.mark.parametrize("norm", ["none", "token", "joint", "batch"])
def test_separable_classes_are_told_apart(norm: Any, tmp_path: Path) -> None:
    labels = np.arange(32) % CLASSES
    assert probed(labels, labels, Readout(6, "mean", norm), tmp_path / "run").top1 == 100


def test_labels_that_say_nothing_teach_nothing(tmp_path: Path) -> None:
    labels = np.arange(32) % CLASSES
    shuffled = np.repeat(np.arange(CLASSES), 8)  # every label sees every colour equally often
    accuracy = probed(shuffled, labels, Readout(6, "mean", "none"), tmp_path / "run")
    assert accuracy.top1 <= 45
    assert accuracy.top5 == 100


def test_the_joint_norm_is_over_tokens_and_width() -> None:
    features = torch.randn(2, 9, 16)
    head = probe.Head(Readout(1, "mean", "joint"), features.shape[1:], 3)
    flat = features.flatten(1)
    normed = (flat - flat.mean(1, keepdim=True)) / (flat.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(head(features), head.linear(normed.view(2, 9, 16).mean(1)))
    assert head.joint is not None and head.joint.weight.shape == (9, 16)


@pytest.mark.parametrize("name", ["vit_demo", "swin_tiny"])
def test_tokens_after_a_block_are_the_blocks_output(name: str) -> None:
    resolution = 32 if name == "vit_demo" else 192
    encoder, images = build_encoder(name, resolution).eval(), torch.randn(1, 3, resolution, resolution)
    stages = list(encoder.blocks if name == "vit_demo" else encoder.layers)
    seen: dict[int, Tensor] = {}
    for number, stage in enumerate(stages, 1):
        stage.register_forward_hook(lambda module, given, out, number=number: seen.update({number: out}))
    with torch.no_grad():
        encoder.forward_features(images)
        expected, seen = seen, {}
        for number in (1, resolve(encoder, "paper")):
            found = tokens_after(encoder, images, number)
            torch.testing.assert_close(found, expected[number].reshape(found.shape))
            assert max(seen) == number  # what lies behind is not computed
            seen.clear()


@pytest.mark.parametrize("name", ["registers", "swin_tiny"])
def test_blocks_are_timms_intermediates(name: str) -> None:
    """Bit for bit."""
    torch.manual_seed(0)
    if name == "registers":
        encoder = VisionTransformer(64, 16, depth=3, embed_dim=32, num_heads=2, reg_tokens=2, pre_norm=True).eval()
        images = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            found = list(blocks(encoder, images, 2))
            pairs = encoder.forward_intermediates(
                images, indices=[0, 1], return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
            )
        expected = [torch.cat([first, patches], dim=1) for patches, first in pairs]
    else:
        swin, images = build_encoder(name, 192).eval(), torch.randn(1, 3, 192, 192)
        with torch.no_grad():
            found = list(blocks(swin, images, 2))
            maps = swin.forward_intermediates(images, indices=[0, 1], intermediates_only=True)
        expected = [of_stage.flatten(2).transpose(1, 2) for of_stage in maps]
    assert [number for number, _ in found] == [1, 2]
    assert all(torch.equal(tokens, twin) for (_, tokens), twin in zip(found, expected, strict=True))


def test_pixels_are_the_image_made_small() -> None:
    images = torch.arange(3 * 64 * 64, dtype=torch.float32).view(1, 3, 64, 64)
    features = fixed(Pixels(), tokens_after(Pixels(), images, 1), Readout(1, "mean", "none"))
    assert torch.equal(features.view(3, 32, 32), images[0, :, ::2, ::2] + (0.5 + 32))


def test_layer_decay_gives_early_blocks_smaller_rates() -> None:
    model = Classifier(build_encoder("vit_demo", 32), 3)
    groups = parameter_groups(model, 0.05, 0.5)
    scales = {id(p): g.get("lr_scale", 1.0) for g in groups for p in g["params"]}  # type: ignore[attr-defined]
    assert len(scales) == sum(1 for _ in model.parameters())
    blocks = [scales[id(block.attn.qkv.weight)] for block in model.encoder.blocks]
    assert blocks == pytest.approx([0.5 ** (6 - i) for i in range(6)])
    assert scales[id(model.head.weight)] == scales[id(model.head.bias)] == 1
    assert scales[id(model.encoder.patch_embed.proj.weight)] == pytest.approx(0.5**7)
    decayed = {id(p): g["weight_decay"] > 0 for g in groups for p in g["params"]}  # type: ignore[attr-defined,operator]
    for name, parameter in model.named_parameters():
        assert decayed[id(parameter)] == (parameter.ndim > 1 and not name.endswith(("pos_embed", "cls_token")))


def test_layer_decay_with_shared_position_biases_is_microsoft_simmims() -> None:
    """By get_vit_layer and no_weight_decay of microsoft/SimMIM and timm's BEiT, whose table is of that form."""
    model = Classifier(build_encoder("vit_base_relpos", 32), 3)
    groups = parameter_groups(model, 0.05, 0.5)
    of = {id(p): g for g in groups for p in g["params"]}  # type: ignore[attr-defined]
    scales = [of[id(block.attn.qkv.weight)]["lr_scale"] for block in model.encoder.blocks]
    assert scales == pytest.approx([0.5 ** (12 - i) for i in range(12)])
    assert of[id(model.encoder.patch_embed.proj.weight)]["lr_scale"] == pytest.approx(0.5**13)
    table = of[id(model.encoder.rel_pos_bias.relative_position_bias_table)]
    assert (table["lr_scale"], table["weight_decay"]) == (1, 0)


def test_lars_adapts_matrices_alone() -> None:
    torch.manual_seed(0)
    layer, data = nn.Linear(5, 3), torch.randn(4, 7, 5)
    weight, bias = (p.detach().clone().requires_grad_() for p in (layer.weight, layer.bias))
    speed = [torch.zeros_like(weight), torch.zeros_like(bias)]
    groups = [{"params": list(layer.parameters()), "weight_decay": 0.0}]
    optimizer = make_optimizer(groups, ClassifierOptim(algorithm="lars", lr=2.0))
    for images in data:
        optimizer.zero_grad()
        layer(images).square().sum().backward()
        optimizer.step()
        of_weight, of_bias = torch.autograd.grad((images @ weight.T + bias).square().sum(), (weight, bias))
        speed[0] = 0.9 * speed[0] + 0.001 * weight.norm() / of_weight.norm() * of_weight
        speed[1] = 0.9 * speed[1] + of_bias
        weight, bias = weight - 2.0 * speed[0], bias - 2.0 * speed[1]
    torch.testing.assert_close((layer.weight, layer.bias), (weight, bias))


def test_the_protocol_of_mae_norms_twice_and_begins_small() -> None:
    options = load(Evaluation, None, ["linprobe.protocol=mae"], {"checkpoint": ("x",), "val": "y"}).linprobe
    encoder, images = build_encoder("vit_demo", 32).eval(), torch.randn(16, 3, 32, 32)
    readout = Readout(resolve(encoder, options.block), options.pooling, options.norm)
    frozen = probe.Frozen(encoder, readout, Compute(), CPU)
    head = probe.build_head(frozen, readout, 32, 100, CPU, options.init_std)
    features = encoder.forward_features(images)[:, 0]  # behind the encoder's own norm
    normed = (features - features.mean(0)) / (features.var(0, unbiased=False) + 1e-6).sqrt()
    torch.testing.assert_close(head(frozen(images)), normed @ head.linear.weight.T, rtol=1e-4, atol=1e-4)
    assert float(head.linear.weight.detach().std()) == pytest.approx(0.01, rel=0.05)


def test_the_moving_average_is_that_of_the_steps() -> None:
    model = Classifier(build_encoder("vit_demo", 32), 3)
    averaged = ModelEma(model, 0.75)
    expected = None
    for step in range(4):
        with torch.no_grad():
            model.head.bias.fill_(float(step))
        averaged.update()
        expected = float(step) if expected is None else 0.75 * expected + 0.25 * step
    best = averaged.best
    assert best is not model
    torch.testing.assert_close(best.module.head.bias, torch.full((3,), expected))  # type: ignore[union-attr,operator]


@pytest.fixture(scope="module")
def pretrained(stores: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    given = [
        f"data.store={stores['zarr']}",
        "data.resolution=64",
        "model.name=vit_demo",
        f"out={out}",
        "optim.batch_size=12",
        "optim.epochs=1",
        "optim.warmup_epochs=0",
        "compute.device=cpu",
    ]
    pretrain(load(Pretrain, None, given), lambda *_: None)
    return out


SHORT = (
    "compute.device=cpu",
    "knn.k=[1,5]",
    "batch_size=10",
    "sweep.optim.batch_size=12",
    "sweep.optim.epochs=2",
    "few_shot.draws=2",
    "corruptions.kinds=[noise]",
    *(
        f"{mode}.optim.{option}"
        for mode in ("linprobe", "finetune")
        for option in ("batch_size=12", "epochs=2", "warmup_epochs=0")
    ),
    "attentive.poolings=[abmilp]",
    "attentive.optim.epochs=2",
    "attentive.optim.warmup_epochs=0",
    "attentive.optim.micro_batch=12",
)


def evaluation(spec: Path | str, store: Path, *more: str, **given: Any) -> Evaluation:
    given = {"checkpoint": (str(spec),), "train": store, "val": store, **given}
    return load(Evaluation, None, [*SHORT, *more], given)


def run(config: Evaluation, *modes: str) -> list[dict[str, Any]]:
    return [result.as_json() for result in evaluate(config, modes, silent)]


def test_the_same_twice_and_all_that_led_to_it(stores: dict[str, Path], pretrained: Path) -> None:
    config = evaluation(pretrained, stores["zarr"])
    for mode in (name for name, mode in MODES.items() if mode.configured(config)):
        (first,), (second,) = (run(config, mode) for _ in range(2))
        assert first == second
        assert (first["mode"], first["name"], first["step"]) == (mode, "run", 2)
        assert first["val"]["images"] == 24
        found = checkpoint.latest(pretrained)
        assert found is not None and first["weights"] == found.weights
        assert first["pretraining"]["method"] == "kamim"
        if "top1" in first:
            assert 0 <= first["top1"] <= first["top5"] <= 100


def test_the_nearest_neighbour_of_an_image_is_itself(stores: dict[str, Path], pretrained: Path) -> None:
    (result,) = run(evaluation(pretrained, stores["zarr"]), "knn")
    assert result["k"]["1"]["top1"] == 100


def test_neighbours_in_dinos_manner(stores: dict[str, Path], pretrained: Path) -> None:
    """Class tokens behind the last norm, unit length, votes by exp(cosine / 0.07): eval_knn.py in a few lines."""
    config = evaluation(pretrained, stores["zarr"], "knn.protocol=dino", "knn.k=[3, 5]", "per_class=3")
    (result,) = run(config, "knn")
    assert [result[key] for key in ("protocol", "block", "pooling", "norm")] == ["dino", 6, "cls", "final"]
    context = _context(config, WORLD, [])
    encoder, found = load_evaluated_model(str(pretrained)).encoder.eval(), []
    for samples in (context.train, context.val):
        assert samples is not None
        loader = context.in_order(samples, 64)
        whole = loader.micro_batches(0, loader.plan.steps_per_epoch)
        with torch.no_grad():
            tokens = [encoder.forward_features(normalise(batch.images))[:, 0] for batch in whole]  # type: ignore[operator]
        found.append(nn.functional.normalize(torch.cat(tokens).bfloat16().float()))
    train, val = found
    assert context.train is not None
    for k in (3, 5):
        similarity, nearest = (val @ train.T).topk(k)
        votes = torch.zeros(len(val), 3).scatter_add_(1, context.train.labels[nearest], (similarity / 0.07).exp())
        top1 = 100 * float((votes.argmax(1) == context.val.labels).double().mean())
        assert result["k"][str(k)]["top1"] == pytest.approx(top1)
    (other,) = run(evaluation(pretrained, stores["zarr"], "per_class=3"), "knn")
    assert [other[key] for key in ("protocol", "block", "pooling", "norm")] == ["linprobe", 6, "mean", "none"]


def test_the_sweep_has_a_row_for_every_readout_and_rate(stores: dict[str, Path], pretrained: Path) -> None:
    (result,) = run(evaluation(pretrained, stores["zarr"]), "probe-sweep")
    assert len(result["rows"]) == 6 * 3 * 2 * 10
    assert result["best"] in result["rows"]
    assert result["best"]["top1"] == max(row["top1"] for row in result["rows"])


def test_reconstruction_in_both_conventions(stores: dict[str, Path], pretrained: Path, tmp_path: Path) -> None:
    (result,) = run(evaluation(pretrained, stores["zarr"], train=None, out=tmp_path / "out"), "reconstruct")
    assert result["mask_ratio"] == 0.6
    for convention in ("paper", "honest"):
        assert 0 < result[convention]["psnr"] < 40
        assert -1 < result[convention]["ssim"] < 1
    assert "data:image/png" in (tmp_path / "out/index.html").read_text()
    (more,) = run(evaluation(pretrained, stores["zarr"], "reconstruct.mask_ratio=0.1"), "reconstruct")
    assert more["paper"] != result["paper"]
    with pytest.raises(ValueError, match="has no head trained to reconstruct pixels"):
        run(evaluation(f"pixels:{pretrained}", stores["zarr"]), "reconstruct")


@pytest.mark.parametrize("mode", ["linprobe", "finetune", "reconstruct"])
def test_training_is_bf16_and_validation_fp32(
    mode: str, stores: dict[str, Path], pretrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the released code: of the encoder, frozen or not."""
    found: list[bool] = []
    forward = Attention.forward

    def spied(self: Attention, *given: Any, **named: Any) -> Tensor:
        found.append(torch.is_autocast_enabled("cpu"))
        return forward(self, *given, **named)

    monkeypatch.setattr(Attention, "forward", spied)
    run(evaluation(pretrained, stores["zarr"], "compute.precision=bf16"), mode)
    validation = found[-6 * 3 :]  # 6 blocks, 24 images in batches of 10
    assert not any(validation)
    assert any(found) == (mode != "reconstruct")


@pytest.mark.parametrize(("decay", "warns"), [(0.9999, True), (0.96, True), (0.95, False), (None, False)])
def test_an_average_longer_than_the_training_is_a_warning(
    decay: float | None, warns: bool, stores: dict[str, Path], pretrained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """24 images in batches of 10 are 2 steps an epoch, 20 in all; an average of decay d spans 1 / (1 - d) steps."""
    more = f"finetune.ema={'null' if decay is None else decay}"
    config = evaluation(
        pretrained,
        stores["zarr"],
        more,
        "finetune.optim.epochs=10",
        "finetune.optim.warmup_epochs=1",
        "finetune.optim.batch_size=10",
    )
    MODES["finetune"].plan(_context(config, WORLD, []), load_evaluated_model(str(pretrained)))
    assert ["training has 20, so untrained weights are part" in line for line in caplog.messages] == [True] * warns


def test_baselines(stores: dict[str, Path], pretrained: Path) -> None:
    config = evaluation("", stores["zarr"], checkpoint=(f"random:{pretrained}", f"pixels:{pretrained}"))
    random, pixels = run(config, "linprobe")
    assert (random["architecture"], random["step"], random["weights"], random["block"]) == ("vit_demo", 0, None, 6)
    assert (pixels["architecture"], pixels["name"], pixels["block"]) == ("pixels", "pixels run", 1)


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("linprobe", ()),
        ("linprobe", ("linprobe.protocol=mae",)),
        ("linprobe", ("linprobe.protocol=dinov2",)),
        ("finetune", ("finetune.ema=0.9", "finetune.layer_decay=0.7")),
    ],
)
def test_a_stopped_evaluation_goes_on_to_the_same_result(
    mode: str,
    options: tuple[str, ...],
    stores: dict[str, Path],
    pretrained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    more = (f"{mode}.checkpoint_epochs=1", *options)
    (undisturbed,) = run(evaluation(pretrained, stores["zarr"], *more, out=tmp_path / "a"), mode)
    train_step = Trainer.train_step

    def killed(trainer: Trainer, step: int, micro_batches: Any) -> Any:
        if step == 3:
            raise SystemError("killed")
        return train_step(trainer, step, micro_batches)

    config = evaluation(pretrained, stores["zarr"], *more, out=tmp_path / "b")
    with monkeypatch.context() as patched, pytest.raises(SystemError):
        patched.setattr(Trainer, "train_step", killed)
        run(config, mode)
    assert run(config, mode) == [undisturbed]
    for a, b in ((tmp_path / run / f"run/{mode}" for run in "ab"),):
        last = [checkpoint.latest(folder) for folder in (a, b)]
        assert last[0] is not None and last[1] is not None
        assert last[0].weights == last[1].weights


def test_features_go_on_where_they_were(
    stores: dict[str, Path], pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kamim.evaluation.features.SAVE_EVERY", 1)
    config = evaluation(pretrained, stores["zarr"], out=tmp_path / "out")

    def stop(title: str) -> Any:
        def update(done: int, total: int, values: Any) -> None:
            if (done, total) == (2, 3):
                raise KeyboardInterrupt

        return update

    with pytest.raises(KeyboardInterrupt):
        evaluate(config, ["knn"], stop)
    mark = tmp_path / "out/run/knn/train/done.json"
    assert json.loads(mark.read_text()) == {"steps": 1}
    assert run(config, "knn") == run(evaluation(pretrained, stores["zarr"]), "knn")


def test_a_result_is_not_made_twice_nor_taken_for_another(
    stores: dict[str, Path], pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = evaluation(pretrained, stores["zarr"], out=tmp_path / "out")
    first = run(config, "knn")
    monkeypatch.setattr("kamim.evaluation.tasks.knn", None)
    assert run(config, "knn") == first
    with pytest.raises(ValueError, match=r"\(seed 0 there, 1 requested\); remove it, or choose another folder"):
        run(evaluation(pretrained, stores["zarr"], "seed=1", out=tmp_path / "out"), "knn")
    monkeypatch.setattr("kamim.evaluation.evaluate._run", None)  # the second is looked at before the first begins
    two = {"checkpoint": (f"new={pretrained}", str(pretrained)), "out": tmp_path / "out"}
    with pytest.raises(ValueError, match=r"holds another evaluation \(batch_size 10 there, 9 requested\)"):
        run(evaluation("", stores["zarr"], "batch_size=9", **two), "knn")
    with pytest.raises(ValueError, match=r"\(options.temperature 0.07 there, 0.1 requested\)"):
        run(evaluation("", stores["zarr"], "knn.temperature=0.1", **two), "knn")


def test_results_of_earlier_versions_are_found(stores: dict[str, Path], pretrained: Path, tmp_path: Path) -> None:
    """They say less of how their checkpoint was pretrained; its checksum says that it is the same."""
    config = evaluation(pretrained, stores["zarr"], out=tmp_path / "out")
    (new,) = run(config, "knn")
    old = {**new, "pretraining": {"method": "kamim", "dataset": "imagefolder", "epochs": 1, "complete": True}}
    (tmp_path / "out/run/knn/result.json").write_text(json.dumps(old))
    settings = {key: value for key, value in old.items() if key not in ("k", "majority_top1")}
    (tmp_path / "out/run/knn/settings.json").write_text(json.dumps(settings))
    assert run(config, "knn") == [old]
    assert "kamim on imagefolder, 1 epochs" in (tmp_path / "out/index.html").read_text()


@pytest.mark.parametrize(("name", "clip_grad"), [("vit_tiny", None), ("swin_tiny", 1.0)])
def test_gradients_are_clipped_as_the_released_code_does(
    name: str, clip_grad: float | None, stores: dict[str, Path]
) -> None:
    model = planned_model("x", load(Pretrain, None, ["data.store=s", "out=o", f"model.name={name}"]))
    store = Store(stores["zarr"])
    samples = all_samples(store)
    for mode in ("linprobe", "finetune"):
        for given, expected in (((), clip_grad), ((f"{mode}.optim.clip_grad=null",), None)):
            config = evaluation("x", stores["zarr"], *given)
            task = MODES[mode].plan(EvalContext(config, WORLD, samples, samples), model)
            assert task.settings.options["optim"]["clip_grad"] == expected
    config = evaluation("x", stores["zarr"], "linprobe.protocol=dinov2", "linprobe.pooling=mean")
    task = MODES["linprobe"].plan(EvalContext(config, WORLD, samples, samples), model)
    assert task.settings.options["optim"]["clip_grad"] is None


def test_a_few_samples_of_each_class(stores: dict[str, Path], pretrained: Path) -> None:
    (result,) = run(evaluation(pretrained, stores["zarr"], "per_class=3", "knn.k=[9]"), "knn")
    assert result["train"]["images"] == 9
    assert result["val"]["images"] == 24


def test_what_cannot_be_evaluated_is_refused_before_any_work(
    stores: dict[str, Path], pretrained: Path, class_folder: Path, marked_store: Path, tmp_path: Path
) -> None:
    train = stores["zarr"]
    flat = build_store(class_folder / "coffee", tmp_path / "flat", detectors=())
    (tmp_path / "broken.pth").write_bytes(b"junk")
    torch.save({}, tmp_path / "some.pth")
    for mode, given, message in (
        ("linprobe", evaluation(pretrained, train, val=flat), "has no labels"),
        ("knn", evaluation(pretrained, flat, "per_class=2"), "has no labels"),
        ("linprobe", evaluation(tmp_path / "broken.pth", train), "not a checkpoint of tensors alone"),
        ("linprobe", evaluation(f"random:{tmp_path}/some.pth", train), "neither a checkpoint"),
        ("knn", evaluation(pretrained, train, val=marked_store), "its 1 classes are not the 3 of"),
        ("linprobe", evaluation(pretrained, train, train=None), "train: is missing"),
        ("linprobe", evaluation(pretrained, train, "linprobe.block=7"), "block = 7: the encoder has blocks 1 to 6"),
        ("linprobe", evaluation(tmp_path / "nothing", train), "neither a checkpoint"),
        ("linprobe", evaluation(pretrained, tmp_path / "nothing"), "not a kamim store"),
        (
            "linprobe",
            evaluation(pretrained, train, "linprobe.optim.batch_size=100"),
            r"linprobe\.optim.batch_size = 100: more than the 24",
        ),
        (
            "finetune",
            evaluation(pretrained, train, "finetune.optim.batch_size=100"),
            r"finetune\.optim.batch_size = 100",
        ),
        ("linprobe", evaluation(pretrained, train, "linprobe.norm=final", "linprobe.block=2"), "block = 2 has none"),
        ("linprobe", evaluation(f"pixels:{pretrained}", train, "linprobe.norm=batch"), "block = 1 has none"),
        ("linprobe", evaluation(pretrained, train, "linprobe.norm=joint", "linprobe.pooling=cls"), "over patch tokens"),
        ("knn", evaluation(pretrained, train, "knn.k=[25]"), r"knn.k = 25: more than the 24 training samples"),
        ("knn", evaluation(f"pixels:{pretrained}", train, "knn.pooling=cls"), "has no class token"),
        ("knn", evaluation(pretrained, train, "per_class=9"), "class 'astronaut' has 8 samples"),
        ("finetune", evaluation(f"pixels:{pretrained}", train), "nothing to fine-tune"),
        ("knn", evaluation("", train, checkpoint=("a=x", "a=y")), "neither a checkpoint"),
        ("knn", evaluation("", train, checkpoint=(f"a={pretrained}", f"a={pretrained}")), "a is the name of two"),
        ("knn", evaluation("", train, checkpoint=(f"../a={pretrained}",)), "must not hold /"),
    ):
        with pytest.raises(ValueError, match=message):
            run(given, mode)


def test_all_that_cannot_be_evaluated_is_named_at_once(stores: dict[str, Path], pretrained: Path) -> None:
    train = stores["zarr"]
    checkpoints = (f"a={pretrained}", f"b={pretrained}")  # each fault once, though both have it
    given = evaluation("", train, "knn.k=[25]", "finetune.optim.batch_size=100", checkpoint=checkpoints)
    with pytest.raises(KamimError) as caught:
        run(given, "finetune", "knn")
    finetune, knn = str(caught.value).split("; ")
    assert (
        finetune
        == "finetune.optim.batch_size = 100: more than the 24 training samples (set finetune.optim.batch_size=16)"
    )
    assert knn == "knn.k = 25: more than the 24 training samples (set knn.k=[24])"


@pytest.mark.parametrize("key", ["knn.k", "sweep.lrs", "sweep.poolings", "reconstruct.conventions", "checkpoint"])
def test_nothing_is_not_a_choice(key: str) -> None:
    with pytest.raises(ValueError, match=rf"{key} = \(?\[?\]?\)?: must hold one at least"):
        load(Evaluation, None, ["val=x", "checkpoint=[x]", f"{key}=[]"])


def test_names_of_checkpoints(pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = tmp_path / "lr=0.1:b"
    odd.symlink_to(pretrained)
    assert load_evaluated_model(f"KAMIM={odd}").name == "KAMIM"
    assert load_evaluated_model(f"random:{pretrained}").name == "random run"
    monkeypatch.chdir(pretrained)
    assert load_evaluated_model(".").name == "run"


def test_the_command(
    stores: dict[str, Path],
    pretrained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    command = ["eval", "--mode", "linprobe", "--checkpoint", f"KAMIM={pretrained}", "--train", str(stores["zarr"])]
    command += ["--val", str(stores["zarr"]), "--norm", "token", *SHORT]
    command += ["--json", str(tmp_path / "r.json"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["/venv/bin/kamim", *command])
    shown = runner.invoke(app, command)
    assert shown.exit_code == 0, shown.output
    assert re.search(r"linprobe KAMIM \(step \d+\): top-1 [\d.]+ \[[\d.]+, [\d.]+\] %, top-5", shown.output)
    labels = Store(stores["zarr"]).images.labels
    assert f"majority class: top-1 {100 * np.bincount(labels).max() / len(labels):.2f} [" in shown.output
    assert "24 of 24 validation images are training images too, byte for byte" in caplog.text
    (result,) = json.loads((tmp_path / "r.json").read_text())
    assert result["norm"] == "token"
    assert (result["command"], result["run_seed"]) == (shlex.join(["kamim", *command]), 0)
    assert result == json.loads((tmp_path / "out/KAMIM/linprobe/result.json").read_text())
    monkeypatch.setattr("sys.argv", ["/venv/bin/kamim", *command, "--debug"])  # another command, the same result
    assert runner.invoke(app, command).exit_code == 0
    assert json.loads((tmp_path / "r.json").read_text()) == [result]
    refused = runner.invoke(app, [*command, "--mode", "guess"])
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "--mode guess: must be one of linprobe, finetune, knn" in refused.stderr


def test_the_examples_of_help_are_keys_and_presets_that_there_are() -> None:
    shown = runner.invoke(app, ["eval", "--help"]).output
    override, file = re.findall(r"such as\W+([\w./=-]+)", shown)
    made = load(Evaluation, Path(file), [override, "checkpoint=[x]", "val=y"])
    assert made.linprobe.optim.lr == 1e-3


def test_the_page_has_checkpoints_in_the_order_typed(stores: dict[str, Path], pretrained: Path, tmp_path: Path) -> None:
    """Then those of earlier commands, by name."""
    for names in ("ab", "zm"):
        specs = tuple(f"{name}=pixels:{pretrained}" for name in names)
        evaluate(evaluation("", stores["zarr"], checkpoint=specs, out=tmp_path / "out"), ["knn"], silent)
    table = (tmp_path / "out/index.html").read_text().partition("</table>")[0]
    assert re.findall(r"<tr><td>(.)</td>", table) == ["z", "m", "a", "b"]


def test_val_may_lack_the_last_of_classes_that_are_numbers(
    class_folder: Path, pretrained: Path, tmp_path: Path
) -> None:
    """The validation images are training images, which are their own nearest neighbours."""
    for number, name in enumerate(("astronaut", "chelsea", "coffee")):
        for split in ("train", "val")[: 2 if number < 2 else 1]:
            shutil.copytree(class_folder / name, tmp_path / split / str(number))
    train, val = (
        build_store(tmp_path / split, tmp_path / f"store-{split}", detectors=()) for split in ("train", "val")
    )
    knn, attentive = run(evaluation(pretrained, train, "knn.k=[1]", val=val), "knn", "attentive")
    assert (knn["classes"], knn["val"]["images"], knn["k"]["1"]["top1"]) == (3, 16, 100)
    assert attentive["classes"] == 3


def test_the_majority_is_of_the_training_classes(stores: dict[str, Path]) -> None:
    """Of 3 blue and 2 red training images the majority is blue, and 1 of 4 validation images is."""
    store = Store(stores["zarr"])
    labels = store.images.labels
    at = {label: np.flatnonzero(labels == label) for label in (1, 2)}
    train = Samples(store, np.sort(np.concatenate([at[1][:2], at[2][:3]])))
    val = Samples(store, np.sort(np.concatenate([at[1][:3], at[2][3:4]])))
    assert EvalContext(evaluation("", store.path), WORLD, train, val).majority_top1 == 25.0


def test_two_processes_and_every_mode(stores: dict[str, Path], pretrained: Path, tmp_path: Path) -> None:
    last = "batch_size=23"  # the last step has one sample: a process has none
    given = [*SHORT, last, f"checkpoint=[KAMIM={pretrained},'pixels:{pretrained}']", f"train={stores['zarr']}"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "kamim", "eval", "--mode", "all", "--out", str(tmp_path / "two"), f"val={stores['zarr']}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *given], capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("linprobe KAMIM") == 1  # one process talks
    kamim, pixels = f"KAMIM={pretrained}", f"pixels:{pretrained}"
    one = evaluate(evaluation("", stores["zarr"], last, checkpoint=(kamim, pixels), out=tmp_path / "one"), None, silent)
    made = {(result.settings.name, result.settings.mode): result.as_json() for result in one}
    any_encoder = ("linprobe", "knn", "attentive", "probe-sweep", "few-shot", "corruptions")
    assert made.keys() == {
        *(("KAMIM", mode) for mode in (*any_encoder, "finetune", "reconstruct")),
        *(("pixels run", mode) for mode in any_encoder),
    }
    for (name, mode), result in made.items():
        other = json.loads((tmp_path / "two" / name / mode / "result.json").read_text())
        assert other.pop("command").startswith("kamim eval --mode all --out ")
        assert other.keys() == result.keys()
        if mode in ("knn", "few-shot", "corruptions"):
            assert other == result
        if mode == "reconstruct":
            assert other["honest"] == pytest.approx(result["honest"], rel=1e-5)
    heads = [checkpoint.latest(tmp_path / out / "KAMIM/attentive/abmilp") for out in ("one", "two")]
    trained, other = (load_file(head.path / "model.safetensors") for head in heads if head is not None)
    for name in ("pooling.score.0.weight", "linear.weight", "linear.bias"):  # micro-batches are those of the ranks
        torch.testing.assert_close(trained[name], other[name])
    page = (tmp_path / "one/index.html").read_text()
    titles = ("Linear probe", "Fine-tuning", "Attentive probes", "Features or pooling", "Reconstruction")
    assert all(f"<h2>{title}</h2>" in page for title in titles)


def test_small_images_are_enlarged_to_the_checkpoints_resolution(pretrained: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for label in "ab":
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(6):
            pixels = random.integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{number}.png")
    small = build_store(tmp_path / "images", tmp_path / "small", detectors=())
    assert Store(small).images.sizes.max() == 32
    (result,) = run(evaluation(pretrained, small), "knn")
    assert (result["val"]["images"], result["k"]["1"]["top1"]) == (12, 100)


def test_a_bug_in_reading_a_store_is_not_taken_for_a_missing_store(
    pretrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("kamim.evaluation.evaluated_model.read_manifest", broken)
    with pytest.raises(ValueError, match=r"^a bug$"):
        load_evaluated_model(str(pretrained))
