"""Public layouts of weights, each compared with the source's own class; and what weights alone do not say."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import transformers
from runs import config
from safetensors.torch import save_file
from torch import Tensor, nn

from kamim import KamimError
from kamim.models import interop
from kamim.models.masked_image_model import MaskedImageModel
from kamim.training import checkpoint
from kamim.training.initialise import initialise

State = dict[str, Tensor]
VIT_TINY = {
    "num_hidden_layers": 12,
    "hidden_size": 192,
    "num_attention_heads": 3,
    "intermediate_size": 768,
    "image_size": 64,
}


def drawn(model: nn.Module) -> nn.Module:
    """The model with every weight drawn, in eval mode."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05, mean=1.0 if parameter.ndim == 1 and parameter.mean() > 0.9 else 0.0)
    return model.eval()


def features(weights: interop.Foreign, images: Tensor) -> Tensor:
    """The normed tokens of kamim's encoder: [B, N, D], of a Swin too."""
    with torch.no_grad():
        tokens: Tensor = weights.build_model().eval().encoder.forward_features(images)
    return tokens.flatten(1, -2)


LAYOUTS: dict[str, Callable[[State], object]] = {
    "timm": lambda state: state,
    "deit": lambda state: {"model": state},
    "dino": lambda state: {"teacher": {f"backbone.{name}": value for name, value in state.items()}},
    "ddp": lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_224", "vit_small_patch8_224"])
def test_a_state_dict_of_a_public_vit_has_timms_features(
    name: str, layout: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = drawn(timm.create_model(name, num_classes=5, img_size=64))
    torch.save(LAYOUTS[layout](theirs.state_dict()), tmp_path / "weights.pth")
    weights, images = interop.load(tmp_path / "weights.pth"), torch.randn(1, 3, 64, 64)
    assert weights.architecture == name
    with torch.no_grad():
        assert torch.equal(features(weights, images), theirs.forward_features(images))
    assert caplog.messages == [
        f"weights do not hold their number of heads; {theirs.blocks[0].attn.num_heads} are assumed, those of a {name}; "
        "name the model if it has others"
    ]


@pytest.mark.parametrize("name", interop.PUBLIC)
def test_every_public_name_is_found_by_its_weights_alone(name: str) -> None:
    if "large" in name or "huge" in name:
        pytest.skip("takes gigabytes")
    state = timm.create_model(name, num_classes=0).state_dict()
    assert interop.convert(state).architecture == name


def moco_positions(side: int, width: int) -> Tensor:
    """MoCo v3's table, by the definition in its vits.py."""
    rows, columns = torch.meshgrid(torch.arange(float(side)), torch.arange(float(side)), indexing="ij")
    omega = 1.0 / 10000.0 ** (torch.arange(width // 4) / (width // 4))
    down = torch.einsum("m,d->md", rows.flatten(), omega)
    across = torch.einsum("m,d->md", columns.flatten(), omega)
    table = torch.cat([down.sin(), down.cos(), across.sin(), across.cos()], dim=1)
    return torch.cat([torch.zeros(1, width), table])[None]


@pytest.mark.parametrize("prefix", ["module.base_encoder.", "module.", ""], ids=["whole", "linear probe", "deit"])
def test_moco_v3s_vit_small_has_twelve_heads_in_each_of_its_layouts(prefix: str, tmp_path: Path) -> None:
    theirs = timm.create_model("vit_small_patch16_224", num_heads=12, num_classes=0)
    drawn(theirs).pos_embed.data = moco_positions(14, 384)
    torch.save({"state_dict": {f"{prefix}{k}": v for k, v in theirs.state_dict().items()}}, tmp_path / "moco.pth.tar")
    weights, images = interop.load(tmp_path / "moco.pth.tar"), torch.randn(1, 3, 224, 224)
    assert weights.architecture == "vit_small_moco"
    with torch.no_grad():
        assert torch.equal(features(weights, images), theirs.forward_features(images))


def test_maes_positions_are_not_mocos() -> None:
    """MAE orders the column first, so transposing the grid of MoCo's table gives MAE's."""
    theirs = timm.create_model("vit_small_patch16_224", num_classes=0)
    table = moco_positions(14, 384)
    transposed = table[:, 1:].unflatten(1, (14, 14)).transpose(1, 2).flatten(1, 2)
    theirs.pos_embed.data = torch.cat([table[:, :1], transposed], dim=1)
    assert interop.convert(theirs.state_dict()).architecture == "vit_small_patch16_224"


@pytest.mark.parametrize("source", ["moco", "folder", "checkpoint", "exported"])
def test_init_from_compares_heads(source: str, tmp_path: Path) -> None:
    """vit_small has 6 heads of 64 features, and shares all its shapes with a ViT-S of 12."""
    path, state = tmp_path / "weights", MaskedImageModel("vit_small_moco", 64).encoder.state_dict()
    if source == "moco":
        path = tmp_path / "moco.pth.tar"
        torch.save({"state_dict": {f"module.base_encoder.{k}": v for k, v in state.items()}}, path)
    elif source == "folder":
        size = {**VIT_TINY, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
        transformers.ViTModel(transformers.ViTConfig(**size)).save_pretrained(path)
    elif source == "checkpoint":
        ours = {f"encoder.{name}": value for name, value in state.items()}
        checkpoint.save_imported(path, interop.Foreign("vit_small_moco", 64, ours, False))
    else:
        path = tmp_path / "weights.safetensors"
        save_file(state, path, {interop.ARCHITECTURE: "vit_small_moco"})
    requested = config(tmp_path / "run", tmp_path / "store", "model.name=vit_small", f"init_from={path}")
    with pytest.raises(KamimError, match=r"^init_from = .*: a ViT of width 384 .* and 12 heads, a vit_small has 6"):
        initialise(MaskedImageModel("vit_small", 64), requested)


def test_init_from_a_checkpoint_of_another_epsilon_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = "vit_tiny_patch16_224"
    checkpoint.save_imported(
        tmp_path / "ours", interop.Foreign(name, 64, MaskedImageModel(name, 64).state_dict(), True)
    )
    requested = config(tmp_path / "run", tmp_path / "store", "model.name=vit_tiny", f"init_from={tmp_path / 'ours'}")
    initialise(MaskedImageModel("vit_tiny", 64), requested)
    (line,) = caplog.messages
    assert line.startswith("LayerNorm's epsilon is 1e-12 in a vit_tiny, 1e-06 is expected of this file")


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (transformers.ViTModel, {}),
        (transformers.ViTForImageClassification, {}),
        (transformers.ViTMSNForImageClassification, {}),
        (transformers.ViTMAEModel, {"mask_ratio": 0.0}),
        (transformers.ViTMAEForPreTraining, {"mask_ratio": 0.0, "decoder_num_hidden_layers": 1}),
    ],
)
@pytest.mark.parametrize("whole", [True, False], ids=["folder", "file"])
def test_hugging_faces_vits(
    kind: type[transformers.PreTrainedModel], changes: dict[str, float], whole: bool, tmp_path: Path
) -> None:
    theirs = drawn(kind(kind.config_class(**VIT_TINY, **changes)))
    theirs.save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs" if whole else (tmp_path / "theirs/model.safetensors").rename(tmp_path / "w.safetensors")
    weights, images = interop.load(path), torch.randn(1, 3, 64, 64)
    expected_eps = theirs.config.layer_norm_eps if whole else 1e-12
    assert weights.architecture == ("vit_tiny" if expected_eps == 1e-12 else "vit_tiny_patch16_224")
    order = {"noise": torch.arange(16.0)[None]} if "mask_ratio" in changes else {}
    with torch.no_grad():
        expected = theirs.base_model(images, **order).last_hidden_state
    torch.testing.assert_close(features(weights, images), expected, atol=1e-4, rtol=1e-4)


def test_hugging_faces_swin_with_a_classifier(tmp_path: Path) -> None:
    size = {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 6, "image_size": 192}
    theirs = drawn(transformers.SwinForImageClassification(transformers.SwinConfig(**size)))
    theirs.save_pretrained(tmp_path)
    weights, images = interop.load(tmp_path), torch.randn(1, 3, 192, 192)
    assert (weights.architecture, weights.has_head) == ("swin_tiny", False)
    with torch.no_grad():
        expected = theirs.swin(images).last_hidden_state
    torch.testing.assert_close(features(weights, images), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("registers", [True, False])
def test_hugging_faces_dinov2(registers: bool, tmp_path: Path) -> None:
    name = "Dinov2WithRegisters" if registers else "Dinov2"
    size = {"hidden_size": 384, "num_attention_heads": 6, "image_size": 56, "patch_size": 14}
    kind = getattr(transformers, f"{name}ForImageClassification")
    theirs = drawn(kind(getattr(transformers, f"{name}Config")(**size)))
    theirs.save_pretrained(tmp_path)
    asked = f"vit_small_patch14_{'reg4_' * registers}dinov2"
    weights, images = interop.load(tmp_path, name=asked), torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        expected = theirs.base_model(images).last_hidden_state
    torch.testing.assert_close(features(weights, images), expected, atol=1e-4, rtol=1e-4)
    other = f"vit_small_patch14_{'reg4_' * (not registers)}dinov2"
    counts = ("4", "0") if registers else ("0", "4")
    with pytest.raises(
        KamimError,
        match=f"these are weights of a ViT of width 384 with 12 blocks, patches of 14 px, {counts[0]} registers, "
        f"layer scale, the requested model is a {other}, a ViT .* {counts[1]} registers, layer scale$",
    ):
        interop.load(tmp_path, name=other)


def test_dinov2s_own_layout_with_registers() -> None:
    """Its file has positions of class token and patches; timm adds that of the class token to the token."""
    theirs = drawn(timm.create_model("vit_small_patch14_reg4_dinov2", img_size=56, num_classes=0))
    state = theirs.state_dict()
    offset = torch.randn(1, 1, 384)
    state["register_tokens"] = state.pop("reg_token")
    state["pos_embed"] = torch.cat([offset, state["pos_embed"]], dim=1)
    state["cls_token"] = state["cls_token"] - offset
    state["mask_token"] = torch.zeros(1, 384)
    weights = interop.convert(state, hints=interop.Hints("vit_small_patch14_reg4_dinov2"))
    images = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        expected = theirs.forward_features(images)
    torch.testing.assert_close(features(weights, images), expected, atol=1e-4, rtol=1e-4)


def test_a_timm_folder_says_its_architecture(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs = drawn(timm.create_model("vit_small_patch16_224", num_classes=5, img_size=64))
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architecture": "vit_small_patch16_224", "num_classes": 5}')
    weights, images = interop.load(tmp_path), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(features(weights, images), theirs.forward_features(images))
    assert (weights.architecture, caplog.messages) == ("vit_small_patch16_224", [])
    (tmp_path / "config.json").write_text('{"architecture": "resnet50"}')
    with pytest.raises(KamimError, match="timm's resnet50 is not one of the ViTs and Swins"):
        interop.load(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("hidden_act", "relu", 'kamim\'s encoders have "gelu" only'),
        ("hidden_act", "quick_gelu", 'kamim\'s encoders have "gelu" only'),
        ("qkv_bias", False, "kamim's encoders have true only"),
        ("layer_norm_eps", float("nan"), "must be a number above 0"),
        ("layer_norm_eps", float("inf"), "must be a number above 0"),
        ("layer_norm_eps", -1, "must be a number above 0"),
        ("layer_norm_eps", "1e-6", "must be a number above 0"),
        ("layer_norm_eps", True, "must be a number above 0"),
        ("num_attention_heads", 0, "must be a whole number above 0"),
        ("num_attention_heads", "3", "must be a whole number above 0"),
        ("image_size", [32, 128], "must be a square"),
    ],
)
def test_a_folder_of_another_encoder_is_refused(key: str, value: object, allowed: str, tmp_path: Path) -> None:
    transformers.ViTModel(transformers.ViTConfig(**VIT_TINY)).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(KamimError) as caught:
        interop.load(tmp_path)
    assert f"{tmp_path}: config.json: {key} = {json.dumps(value)}: {allowed}" in str(caught.value)


def test_a_convolutional_networks_weights_are_called_that(tmp_path: Path) -> None:
    save_file(timm.create_model("resnet18", num_classes=0).state_dict(), tmp_path / "resnet.safetensors")
    with pytest.raises(KamimError, match=r"bn1\.\w+ is of a BatchNorm, so these are a convolutional network's"):
        interop.load(tmp_path / "resnet.safetensors")
