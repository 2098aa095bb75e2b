"""Options beyond the paper: off by default, and the effect of each."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import WORLD, config, losses, quiet, weights
from safetensors.torch import save_file
from torch import Tensor

from kamim.config.pretrain import Compute, Pretrain
from kamim.config.schema import load
from kamim.evaluation.evaluated_model import load_evaluated_model
from kamim.method.loss import denormalise_patches, normalise_patches
from kamim.method.weighting import counts_to_weights
from kamim.models import interop
from kamim.models.masked_image_model import MaskedImageModel, build_encoder
from kamim.runtime.device import autocast, parallel
from kamim.training import checkpoint
from kamim.training.model import build_optimizer
from kamim.training.objective import Reconstruction
from kamim.training.pretrain import pretrain
from pipelines.batch import normalise

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def store(stores: dict[str, Path]) -> Path:
    return stores["zarr"]


def test_all_are_off_by_default() -> None:
    made = load(Pretrain, None, ["data.store=s", "out=o"])
    assert made.weighting is not None
    assert (made.weighting.normalize, made.optim.decay_all, made.norm_pix_loss) == (False, True, False)
    assert (made.init_from, made.on_nonfinite, made.keep_every_epochs) == (None, "stop", None)


def test_normalised_weights_have_mean_one_and_the_same_ratios() -> None:
    counts = torch.randint(0, 65, (3, 8, 8), generator=torch.Generator().manual_seed(0))
    plain, normalised = (counts_to_weights(counts, 8, 0.25, normalize) for normalize in (False, True))
    torch.testing.assert_close(normalised.mean(dim=(1, 2)), torch.ones(3))
    torch.testing.assert_close(normalised / normalised.amin(dim=(1, 2), keepdim=True), plain)


def test_a_run_with_normalised_weights(store: Path, tmp_path: Path) -> None:
    pretrain(config(tmp_path / "run", store, "weighting.normalize=true", "optim.epochs=2"), quiet)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["weight_mean"] for line in lines] == pytest.approx([1.0] * 4, abs=1e-5)
    assert all(line["weight_max"] > 1.5 for line in lines)


def obvious(images: Tensor, p: int) -> Tensor:
    """Normalises as MAE's forward_loss does, patch by patch."""
    made = images.clone()
    for image in range(len(images)):
        for y in range(0, images.shape[2], p):
            for x in range(0, images.shape[3], p):
                patch = images[image, :, y : y + p, x : x + p]
                made[image, :, y : y + p, x : x + p] = (patch - patch.mean()) / (patch.var() + 1e-6) ** 0.5
    return made


@pytest.mark.parametrize("p", [16, 32])
def test_normalised_patches_equal_the_obvious_loop(p: int) -> None:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 3 + 1
    images[0, :, :p, :p] = 0.5  # flat: no deviation to divide by
    torch.testing.assert_close(normalise_patches(images, p), obvious(images, p), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(denormalise_patches(normalise_patches(images, p), images, p), images)


def test_a_run_on_normalised_patches_reconstructs_no_pixels(store: Path, tmp_path: Path) -> None:
    given = ("weighting=null", "optim.epochs=2")
    pretrain(config(tmp_path / "run", store, "norm_pix_loss=true", *given), quiet)
    pretrain(config(tmp_path / "plain", store, *given), quiet)
    assert losses(tmp_path / "run") != losses(tmp_path / "plain")
    assert 0.5 < losses(tmp_path / "run")[0] < 1.5  # of numbers of variance 1, nearly nothing predicted
    assert load_evaluated_model(str(tmp_path / "run")).model is None
    assert load_evaluated_model(str(tmp_path / "plain")).model is not None


@pytest.mark.parametrize("name", ["vit_tiny", "swin_tiny"])
def test_what_has_no_weight_decay(name: str) -> None:
    """MAE's rule, by the names: biases, norms, tokens and positions."""
    given = (f"model.name={name}", "data.store=s", "out=o", "optim.decay_all=false")
    made = load(Pretrain, None, given)
    model = MaskedImageModel(name, 192)
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    decayed, spared = build_optimizer(made.optim, model).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    odd = re.compile(r"bias$|norm\d?\.weight$|_token$|pos_embed$|bias_table$")
    assert {names[id(p)] for p in spared["params"]} == {key for key in names.values() if odd.search(key)}
    assert len(decayed["params"]) + len(spared["params"]) == len(names)
    (everything,) = build_optimizer(load(Pretrain, None, given[:-1]).optim, model).param_groups
    assert everything["weight_decay"] == 0.05
    assert len(everything["params"]) == len(names)


def test_a_run_without_decay_of_vectors_resumes(store: Path, tmp_path: Path) -> None:
    given = ("optim.decay_all=false", "optim.epochs=2", "optim.weight_decay=0.5")
    pretrain(config(tmp_path / "run", store, *given), quiet)
    (tmp_path / "run/checkpoints/step-00000004/state.json").unlink()
    before = weights_at(tmp_path / "run", 2)
    pretrain(config(tmp_path / "run", store, *given), quiet)
    pretrain(config(tmp_path / "whole", store, *given), quiet)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert not torch.equal(before["mask_token"], weights(tmp_path / "run")["mask_token"])


def weights_at(run: Path, step: int) -> dict[str, Tensor]:
    return checkpoint.at(run, step).model_state()


def test_a_duration_in_steps(store: Path, tmp_path: Path) -> None:
    """Five steps of a store with two an epoch: the last checkpoint is the end's."""
    given = ("optim.duration=5 steps", "optim.warmup=1 steps", "checkpoint_epochs=2")
    outcome = pretrain(config(tmp_path / "run", store, *given), quiet)
    assert (outcome.step, outcome.finished) == (5, True)
    assert checkpoint.saved(tmp_path / "run") == [4, 5]
    with pytest.raises(ValueError, match="optim: a warm-up of 9 steps"):
        pretrain(config(tmp_path / "none", store, "optim.duration=5 steps", "optim.warmup=9 steps"), quiet)
    assert not (tmp_path / "none").exists()


FIRST = ("optim.epochs=1", "optim.warmup_epochs=0", "optim.lr=1e-12", "optim.warmup_lr=0", "optim.min_lr=0")


def test_a_run_begins_with_anothers_weights(store: Path, tmp_path: Path) -> None:
    pretrain(config(tmp_path / "first", store, "optim.epochs=2"), quiet)
    for source in (tmp_path / "first", tmp_path / "first/checkpoints/step-00000004"):
        run = tmp_path / f"from {source.name}"
        pretrain(config(run, store, f"init_from={source}", *FIRST), quiet)
        for name, value in weights(tmp_path / "first").items():
            torch.testing.assert_close(weights(run)[name], value, atol=1e-9, rtol=0)
    # Resumed, it goes on from its own state, even where what it began with is gone.
    (tmp_path / "first").rename(tmp_path / "gone")
    pretrain(config(run, store, f"init_from={source}", *FIRST), quiet)


def test_a_run_begins_with_weights_from_elsewhere_at_another_resolution(store: Path, tmp_path: Path) -> None:
    """A ViT of 96 px without a head: its missing weights are those of any run with this seed."""
    torch.manual_seed(7)
    elsewhere = build_encoder("vit_demo", 96).state_dict()
    save_file(elsewhere, tmp_path / "vit.safetensors")
    given = config(tmp_path / "run", store, f"init_from={tmp_path / 'vit.safetensors'}", *FIRST)
    pretrain(given, quiet)
    made = weights(tmp_path / "run")
    assert made["encoder.pos_embed"].shape == (1, 17, 128)
    fitted = interop.convert(elsewhere, 64).state
    torch.manual_seed(given.seed)
    random = MaskedImageModel("vit_demo", 64).state_dict()
    assert not torch.allclose(fitted["encoder.pos_embed"], random["encoder.pos_embed"])
    for name, value in made.items():
        torch.testing.assert_close(value, fitted.get(name, random[name]), atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("none", "no such file or folder"),
        ("tiny.safetensors", "these are a vit_tiny's weights, the requested model is a vit_demo"),
        ("text.pth", "not a checkpoint of tensors alone"),
    ],
)
def test_what_a_run_cannot_begin_with_is_told_before_any_work(
    what: str, message: str, store: Path, tmp_path: Path
) -> None:
    save_file(MaskedImageModel("vit_tiny", 64).state_dict(), tmp_path / "tiny.safetensors")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ValueError, match=f"init_from = {tmp_path / what}: .*{re.escape(message)}"):
        pretrain(config(tmp_path / "run", store, f"init_from={tmp_path / what}"), quiet)
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_a_gpu_without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: False)
    gpu = torch.device("cuda")
    assert not isinstance(autocast(Compute(), gpu), torch.autocast)
    with pytest.raises(
        ValueError, match=r"compute.precision = 'bf16': this GPU does not .* use compute.precision=fp32"
    ):
        autocast(Compute(precision="bf16"), gpu)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: True)
    assert isinstance(autocast(Compute(), gpu), torch.autocast)
    assert not isinstance(autocast(Compute(), CPU), torch.autocast)


@pytest.mark.parametrize(("name", "cells"), [("vit_demo", 4), ("swin_tiny", 16)])
def test_unfused_attention_in_bf16_on_a_cpu_computes_the_same(name: str, cells: int) -> None:
    torch.manual_seed(0)
    model = MaskedImageModel(name, 64)
    images, mask = torch.randn(2, 3, 64, 64), torch.rand(2, cells, cells) < 0.5
    fused = model(images, mask)
    parallel(model, Compute(precision="fp32"), WORLD)
    assert torch.equal(model(images, mask), fused)
    parallel(model, Compute(precision="bf16"), WORLD)
    assert not any(getattr(module, "fused_attn", False) for module in model.modules())
    torch.testing.assert_close(model(images, mask), fused, rtol=0, atol=1e-5)


def test_what_is_shown_of_normalised_targets_are_pixels(tmp_path: Path) -> None:
    given = config(tmp_path / "run", tmp_path, "norm_pix_loss=true")
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8))
    images = normalise(pixels)
    made = Reconstruction(images, torch.ones(2, 2, 2, dtype=torch.bool), normalise_patches(images, 16))
    assert torch.equal(made.pixels(given.normalised_patches), pixels)
