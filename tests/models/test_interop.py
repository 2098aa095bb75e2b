"""Weights from elsewhere give the same numbers here; ours go back."""

import argparse
import dataclasses
import functools
import os
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import SwinConfig, SwinForMaskedImageModeling, ViTConfig, ViTForMaskedImageModeling
from typer.testing import CliRunner

from kamim.cli import app
from kamim.evaluation.evaluated_model import load_model
from kamim.models import architectures, interop
from kamim.models.masked_autoencoder import MaskedAutoencoder
from kamim.models.masked_image_model import MaskedImageModel, build_encoder
from kamim.models.presets import ARCHITECTURES
from kamim.training import checkpoint
from kamim.training.checkpoint import save_tensors
from pipelines.batch import normalise

State = dict[str, Tensor]


def hugging_face(name: str) -> torch.nn.Module:
    """transformers' own SimMIM model of this architecture, random weights."""
    torch.manual_seed(0)
    if name.startswith("vit"):
        width, heads, depth = {
            "vit_demo": (128, 4, 6),
            "vit_tiny": (192, 3, 12),
            "vit_small": (384, 6, 12),
            "vit_base": (768, 12, 12),
        }[name]
        given = ViTConfig(
            hidden_size=width,
            num_attention_heads=heads,
            num_hidden_layers=depth,
            intermediate_size=4 * width,
            image_size=192,
            encoder_stride=16,
        )
        model = ViTForMaskedImageModeling(given)
    else:
        width, depths, heads = {
            "swin_tiny": (96, [2, 2, 6, 2], [3, 6, 12, 24]),
            "swin_base": (128, [2, 2, 18, 2], [4, 8, 16, 32]),
        }[name]
        given = SwinConfig(image_size=192, window_size=6, embed_dim=width, depths=depths, num_heads=heads)
        given.encoder_stride = 32
        model = SwinForMaskedImageModeling(given)
    for parameter in model.parameters():  # nothing at its zero or one, so that no weight can go astray unseen
        torch.nn.init.normal_(parameter, std=0.02, mean=1.0 if parameter.ndim == 1 and parameter.mean() > 0.9 else 0.0)
    return model.eval()


def loaded(made: interop.Foreign) -> MaskedImageModel | MaskedAutoencoder:
    return made.build_model().eval()


@pytest.mark.parametrize("name", ["vit_demo", "vit_tiny", "vit_small", "vit_base", "swin_tiny", "swin_base"])
def test_reconstructions_and_hidden_states_equal_hugging_faces(name: str) -> None:
    theirs = hugging_face(name)
    made = interop.convert(theirs.state_dict())
    ours = loaded(made)
    assert (made.architecture, made.resolution, made.has_head) == (name, 192, True)
    images = torch.randn(1, 3, 192, 192)
    mask = torch.rand(1, 6, 6) < 0.6
    patch = ARCHITECTURES[name].patch_size
    bools = mask.repeat_interleave(32 // patch, 1).repeat_interleave(32 // patch, 2).flatten(1)
    hidden: list[Tensor] = []
    encoder = ours.encoder
    if name.startswith("vit"):
        first, layers = encoder.blocks[0], [*encoder.blocks]
    else:  # timm merges patches at a stage's beginning, Hugging Face at the end of the one before
        first, layers = encoder.layers[0], [*(layer.downsample for layer in encoder.layers[1:]), encoder.layers[-1]]
    first.register_forward_pre_hook(lambda module, given: hidden.append(given[0]))
    for layer in layers:
        layer.register_forward_hook(lambda module, given, out: hidden.append(out))
    with torch.no_grad():
        reference = theirs(images, bool_masked_pos=bools, output_hidden_states=True)
        reconstruction = ours(images, mask)
    torch.testing.assert_close(reconstruction, reference.reconstruction, atol=1e-4, rtol=1e-4)
    for k, (block, expected) in enumerate(zip(hidden, reference.hidden_states, strict=True)):
        torch.testing.assert_close(block.reshape(expected.shape), expected, atol=1e-4, rtol=1e-4, msg=f"state {k}")


def transformers_4(name: str, state: State) -> State:
    """The same weights under the names of the authors' files."""
    inner = ".attention.attention." if name.startswith("vit") else ".attention.self."
    rules = [
        (r"\.attention\.q_proj\.", f"{inner}query."),
        (r"\.attention\.k_proj\.", f"{inner}key."),
        (r"\.attention\.v_proj\.", f"{inner}value."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
        (r"\.attention\.relative_position_bias\.", ".attention.self."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
        (r"^vit\.layers\.", "vit.encoder.layer."),
    ]
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    if name.startswith("swin"):
        renamed["swin.encoder.layers.0.blocks.0.attention.self.relative_position_index"] = torch.zeros(36, 36)
    return renamed


@pytest.mark.parametrize("name", ["vit_tiny", "swin_tiny"])
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model_state_dict": s}], ids=["bare", "wrapped"])
def test_the_authors_layouts(name: str, wrap: Callable[[State], object], tmp_path: Path) -> None:
    theirs = hugging_face(name).state_dict()
    torch.save(wrap(transformers_4(name, theirs)), tmp_path / "theirs.pth")
    made, direct = interop.convert(interop.read_file(tmp_path / "theirs.pth")), interop.convert(theirs)
    assert made.state.keys() == direct.state.keys()
    assert all(torch.equal(made.state[key], direct.state[key]) for key in made.state)


def test_moco_v3s_layout(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vit = build_encoder("vit_tiny", 224)
    state = {f"module.base_encoder.{key}": value for key, value in vit.state_dict().items()}
    state |= {f"module.momentum_encoder.{key}": value + 1 for key, value in vit.state_dict().items()}
    state |= {"module.base_encoder.head.0.weight": torch.zeros(3, 3), "module.predictor.0.weight": torch.zeros(3, 3)}
    torch.save({"epoch": 300, "arch": "vit_tiny", "state_dict": state}, tmp_path / "moco.pth.tar")
    made = interop.convert(interop.read_file(tmp_path / "moco.pth.tar"))
    assert (made.architecture, made.resolution, made.has_head) == ("vit_tiny_patch16_224", 224, False)
    assert torch.equal(made.state["encoder.blocks.3.attn.qkv.weight"], vit.state_dict()["blocks.3.attn.qkv.weight"])
    smaller = interop.convert(state, 192)
    assert smaller.state["encoder.pos_embed"].shape == (1, 145, 192)


def test_microsoft_simmims_swin_layout_and_another_window(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    swin = MaskedImageModel("swin_tiny", 192)
    torch.nn.init.normal_(swin.mask_token)
    for key, value in swin.state_dict().items():
        if key.endswith("bias_table"):
            value.copy_(biases(6, value.shape[1]))
    state: State = {}
    for key, value in swin.state_dict().items():
        state[unstaged(key)] = value[None, None] if key == "mask_token" else value
    state["encoder.layers.0.blocks.1.attn_mask"] = torch.zeros(1)
    made = interop.convert(state)
    assert all(torch.equal(made.state[key], value) for key, value in swin.state_dict().items())
    table = "encoder.layers.0.blocks.0.attn.relative_position_bias_table"
    assert state[table].shape[0] == 11**2
    for window, side in ((7, 192), (12, None)):  # their ImageNet models' at 224 px, and at 384 px
        wider = {k: biases(window, v.shape[1]) if k.endswith("bias_table") else v for k, v in state.items()}
        caplog.clear()
        made = interop.convert(wider, side)
        assert (made.architecture, made.resolution, made.has_head) == ("swin_tiny", 192, True)
        (said,) = caplog.messages
        assert said == (
            f"tables of position biases are interpolated from windows of {window} tokens to 6, those of a swin_tiny at "
            "192 px"
        )
        for key, value in made.state.items():
            torch.testing.assert_close(value, state[unstaged(key)].reshape(value.shape), atol=0.03, rtol=0)
        loaded(made)


def test_a_swin_for_224_px_stays_what_it_is(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    torch.manual_seed(0)
    theirs = timm.create_model("swin_tiny_patch4_window7_224", num_classes=5)
    save_file(theirs.state_dict(), tmp_path / "swin.safetensors")
    run = CliRunner().invoke
    recwarn.clear()
    result = run(app, ["import", str(tmp_path / "swin.safetensors"), "--out", str(tmp_path / "ours")])
    assert result.output == f"{tmp_path / 'ours'}: swin_tiny_patch4_window7_224 at 224 px, encoder alone\n"
    ours, images = checkpoint.read(tmp_path / "ours").build_model().eval(), torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = theirs.eval().forward_features(images)
        torch.testing.assert_close(ours.encoder.forward_features(images), expected, atol=0, rtol=0)
    smaller = ["--out", str(tmp_path / "smaller"), "--resolution", "192"]
    result = run(app, ["import", str(tmp_path / "swin.safetensors"), *smaller])
    assert result.output.endswith(f"{tmp_path / 'smaller'}: swin_tiny at 192 px, encoder alone\n")
    assert not recwarn.list


def biases(window: int, heads: int) -> Tensor:
    """A table in which every offset of (y, x) tokens has the same bias, whatever the window: [(2 w - 1)^2, heads]."""
    offsets = torch.arange(1.0 - window, window)
    y, x = torch.meshgrid(offsets, offsets, indexing="ij")
    return (torch.sin(y / 3) + 0.2 * torch.cos(x / 2)).reshape(-1, 1) * torch.linspace(0.5, 1, heads)


def unstaged(key: str) -> str:
    """The name in microsoft/SimMIM's files of one of ours."""
    key = re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", key)
    return key.replace("head.0.", "decoder.0.").replace("mask_token", "encoder.mask_token")


@pytest.mark.parametrize("name", ["vit_demo", "vit_tiny", "swin_tiny"])
@pytest.mark.parametrize("has_head", [True, False], ids=["whole", "encoder"])
def test_what_is_exported_to_hugging_face_loads_there_and_comes_back(name: str, has_head: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MaskedImageModel(name, 192).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    state = {key: value for key, value in model.state_dict().items() if has_head or key.startswith("encoder.")}
    checkpoint.save_imported(tmp_path / "ours", interop.Foreign(name, 192, state, has_head))
    arguments = ["export", str(tmp_path / "ours"), "--layout", "huggingface", "--out", str(tmp_path / "theirs")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    kind = next(word for word in re.findall(r"transformers\.(\w+)\.from_pretrained", result.output))
    theirs, info = getattr(transformers, kind).from_pretrained(tmp_path / "theirs", output_loading_info=True)
    unset = {key for key in info["missing_keys"] if not key.startswith("pooler.")}
    assert (unset, set(info["unexpected_keys"]), set(info["mismatched_keys"])) == (set(), set(), set())
    images, mask = torch.randn(1, 3, 192, 192), torch.rand(1, 6, 6) < 0.6
    repeat = 32 // ARCHITECTURES[name].patch_size
    with torch.no_grad():
        if has_head:
            bools = mask.repeat_interleave(repeat, 1).repeat_interleave(repeat, 2).flatten(1)
            made = theirs.eval()(images, bool_masked_pos=bools).reconstruction
            torch.testing.assert_close(made, model(images, mask), atol=1e-4, rtol=1e-4)
        else:
            made = theirs.eval()(images).last_hidden_state
            tokens = model.encoder.forward_features(images)
            torch.testing.assert_close(made, tokens.reshape(made.shape), atol=1e-4, rtol=1e-4)
    back = interop.load(tmp_path / "theirs")
    assert (back.architecture, back.has_head) == (name, has_head)
    assert back.state.keys() == state.keys()
    assert all(torch.equal(back.state[key], value) for key, value in state.items())
    assert CliRunner().invoke(app, arguments).exit_code == 1  # it is there already


def test_weights_are_files_as_others_are(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        checkpoint.save_imported(
            tmp_path / "ours", interop.Foreign("vit_demo", 96, MaskedImageModel("vit_demo", 96).state_dict(), True)
        )
        out = tmp_path / "e.safetensors"
        assert CliRunner().invoke(app, ["export", str(tmp_path / "ours"), "--out", str(out)]).exit_code == 0
    finally:
        assert os.umask(before) == 0o027
    assert [file.stat().st_mode & 0o777 for file in (out, tmp_path / "ours/model.safetensors")] == [0o640, 0o640]


def test_exports_of_the_same_weights_are_the_same_bytes(tmp_path: Path) -> None:
    """The safetensors package orders metadata anew in each call; what it reads is what was given."""
    state, about = {"b": torch.arange(5.0), "a": torch.ones(3, dtype=torch.int64)}, {"kamim.é": 'vit "\\', "z": "1"}
    for number in range(20):
        save_tensors(state, tmp_path / str(number), about)
    (content,) = {file.read_bytes() for file in tmp_path.iterdir()}
    assert b'{"format":"pt","kamim.' in content
    with safe_open(tmp_path / "0", "pt") as opened:
        assert opened.metadata() == {"format": "pt", **about}
        assert all(torch.equal(opened.get_tensor(name), value) for name, value in state.items())


@pytest.mark.parametrize("name", ["vit_tiny", "swin_tiny"])
def test_what_is_exported_loads_into_timm_and_comes_back(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MaskedImageModel(name, 192)
    checkpoint.save_imported(tmp_path / "ours", interop.Foreign(name, 192, model.state_dict(), True))
    result = CliRunner().invoke(app, ["export", str(tmp_path / "ours"), "--out", str(tmp_path / "e.safetensors")])
    assert result.exit_code == 0, result.output
    line = result.output.partition(": ")[2]
    theirs = eval(line, {"timm": timm, "functools": functools, "torch": torch})  # what users paste
    images = torch.randn(1, 3, 192, 192)
    with torch.no_grad():
        torch.testing.assert_close(
            theirs.eval().forward_features(images), model.encoder.eval().forward_features(images), atol=0, rtol=0
        )
    back = interop.load(tmp_path / "e.safetensors")
    assert back.architecture == name
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in back.state.items())
    assert not back.has_head


def test_import_makes_a_checkpoint_and_says_what_is_wrong(tmp_path: Path) -> None:
    run = CliRunner().invoke
    save_file(build_encoder("vit_demo", 96).state_dict(), tmp_path / "vit.safetensors")
    result = run(app, ["import", str(tmp_path / "vit.safetensors"), "--out", str(tmp_path / "made")])
    assert result.exit_code == 0, result.output
    found = checkpoint.read(tmp_path / "made")
    assert (found.config.model.name, found.config.data.resolution, found.has_head) == ("vit_demo", 96, False)
    found.build_model()
    torch.save({"a": print}, tmp_path / "evil.pth")
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "lfs.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    save_file({"fc.weight": torch.zeros(2)}, tmp_path / "resnet.safetensors")
    save_file({"patch_embed.proj.weight": torch.zeros(77, 3, 16, 16)}, tmp_path / "odd.safetensors")
    lacking = build_encoder("vit_demo", 96).state_dict()
    del lacking["norm.bias"]
    save_file(lacking, tmp_path / "lacking.safetensors")
    for name, message in {
        "none.pth": "no such file",
        "evil.pth": "not a checkpoint of tensors alone",
        "text.pth": "not a checkpoint of tensors alone",
        "lfs.safetensors": "is a pointer of Git LFS, whose file was not fetched (git lfs pull); weights are",
        "resnet.safetensors": "no patch embedding among its 1 tensors",
        "odd.safetensors": "a ViT of width 77 with 0 blocks; known are vit_tiny",
        "lacking.safetensors": "encoder.norm.bias is missing",
    }.items():
        result = run(app, ["import", str(tmp_path / name), "--out", str(tmp_path / "x")])
        assert result.exit_code == 1
        assert message in result.output
        assert "weights_only" not in result.output  # which torch advises to leave out
        assert not (tmp_path / "x").exists()


def drawn(model: torch.nn.Module) -> State:
    """The state of a model with every weight drawn."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05, mean=1.0 if parameter.ndim == 1 and parameter.mean() > 0.9 else 0.0)
    return model.state_dict()


class CfgNode(dict[str, object]):
    """What yacs.config.CfgNode pickles as: a dict with attributes."""


CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"


def shared_bias_beit(**size: int) -> torch.nn.Module:
    """timm's BEiT with the options of microsoft/SimMIM's ViT, by default a ViT-B."""
    return timm.models.beit.Beit(
        img_size=224,
        num_classes=0,
        global_pool="token",
        use_abs_pos_emb=False,
        use_shared_rel_pos_bias=True,
        init_values=0.1,
        norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
        **size,
    )


def test_vit_base_relpos_has_the_size_of_microsoft_simmims_vit() -> None:
    """Except the biases of the keys, which theirs does not have."""
    with torch.device("meta"):
        beit, ours = shared_bias_beit(), build_encoder("vit_base_relpos", 224)
    theirs, own = (sum(p.numel() for p in model.parameters()) for model in (beit, ours))
    assert own - theirs == 12 * 768
    assert (ours.embed_dim, len(ours.blocks), ours.blocks[0].attn.num_heads) == (768, 12, 12)


def test_microsoft_simmims_vit_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its twin is timm's BEiT with a shared bias, whose names are those of their files, and a head in plain words."""
    small = {"embed_dim": 192, "depth": 2, "num_heads": 3}
    known = ARCHITECTURES["vit_base_relpos"]
    small_known = dataclasses.replace(known, options={**known.options, **small})
    monkeypatch.setattr(architectures, "ARCHITECTURES", {**ARCHITECTURES, "vit_base_relpos": small_known})
    torch.manual_seed(0)
    beit = shared_bias_beit(**small).eval()
    state = {f"encoder.{key}": value for key, value in drawn(beit).items()}
    state["encoder.rel_pos_bias.relative_position_index"] = torch.zeros(197, 197)
    state["encoder.mask_token"] = torch.randn(1, 1, 192)
    state["decoder.0.weight"], state["decoder.0.bias"] = torch.randn(768, 192, 1, 1) * 0.05, torch.randn(768)
    options = CfgNode(MODEL=CfgNode(TYPE="vit"))
    options.__dict__["__immutable__"] = True
    yacs = types.ModuleType("yacs.config")
    yacs.CfgNode = CfgNode  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", yacs)
        torch.save({"model": state, "epoch": 799, "config": options}, tmp_path / "ckpt.pth")
    out = tmp_path / "ours"
    result = CliRunner().invoke(app, ["import", str(tmp_path / "ckpt.pth"), "--out", str(out)])
    assert result.output == f"{out}: vit_base_relpos at 224 px, with its pixel head\n"
    ours = checkpoint.read(out).build_model().eval()
    assert set(ours.state_dict()) == set(MaskedImageModel("vit_base_relpos", 224).state_dict())
    images, mask = torch.randn(1, 3, 224, 224), torch.rand(1, 7, 7) < 0.6
    with torch.no_grad():
        torch.testing.assert_close(
            ours.encoder.forward_features(images), beit.forward_features(images), atol=1e-4, rtol=1e-4
        )
        patches = beit.patch_embed(images)
        masked = mask.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)
        patches[masked] = state["encoder.mask_token"][0, 0]
        hidden = torch.cat([beit.cls_token, patches], dim=1)
        for block in beit.blocks:
            hidden = block(hidden, shared_rel_pos_bias=beit.rel_pos_bias())
        tokens = beit.norm(hidden)[:, 1:].transpose(1, 2).reshape(1, 192, 14, 14)
        expected = torch.nn.functional.conv2d(tokens, state["decoder.0.weight"], state["decoder.0.bias"])
        torch.testing.assert_close(
            ours(images, mask), torch.nn.functional.pixel_shuffle(expected, 16), atol=1e-4, rtol=1e-4
        )
    result = CliRunner().invoke(app, ["export", str(out), "--out", str(tmp_path / "e.safetensors")])
    assert "a vit_base_relpos of relative positions, which timm's ViT does not have" in result.output
    smaller = interop.convert(state, 192).state
    assert smaller[interop.SHARED_BIAS].shape == (23**2 + 3, 3)
    assert torch.equal(
        smaller[interop.SHARED_BIAS][-3:], state["encoder.rel_pos_bias.relative_position_bias_table"][-3:]
    )


@pytest.mark.parametrize("with_decoder", [True, False], ids=["whole", "encoder"])
def test_maes_layout(with_decoder: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    state = dict(drawn(vit))
    if with_decoder:
        mae = MaskedAutoencoder("vit_tiny_patch16_224", 224, width=64, depth=1, heads=2)
        state |= {name: value for name, value in mae.state_dict().items() if not name.startswith("encoder.")}
    torch.save({"model": state, "args": argparse.Namespace(mask_ratio=0.75)}, tmp_path / "mae.pth")
    same_features(vit, interop.load(tmp_path / "mae.pth"), "vit_tiny_patch16_224", with_decoder)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch8_224"])
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "backbone"])
def test_dinos_layout(name: str, whole: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vit = timm.create_model(name, num_classes=0).eval()
    state = drawn(vit)
    content: dict[str, object] = dict(state)
    if whole:
        head = {"head.mlp.0.weight": torch.zeros(2, 2), "head.last_layer.weight_g": torch.zeros(2, 1)}
        teacher = {f"backbone.{key}": value for key, value in state.items()} | head
        student = {f"module.backbone.{key}": value + 1 for key, value in state.items()}
        content = {"student": student, "teacher": teacher, "epoch": 100, "args": argparse.Namespace(arch="vit_small")}
    torch.save(content, tmp_path / "dino.pth")
    same_features(vit, interop.load(tmp_path / "dino.pth"), name)


def same_features(theirs: torch.nn.Module, made: interop.Foreign, name: str, has_head: bool = False) -> None:
    """Bit for bit those of timm's model, whose epsilon and names theirs are."""
    assert (made.architecture, made.resolution, made.has_head) == (name, 224, has_head)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = theirs.forward_features(images)
        assert torch.equal(loaded(made).encoder.forward_features(images), expected)


def test_moco_v3s_vit_small_has_twelve_heads() -> None:
    vit = build_encoder("vit_small_moco", 32)
    made = interop.convert({f"module.base_encoder.{key}": value for key, value in vit.state_dict().items()})
    assert (made.architecture, vit.blocks[0].attn.num_heads) == ("vit_small_moco", 12)


def test_a_hugging_face_folder_prepares_images_as_kamim(tmp_path: Path) -> None:
    """AutoImageProcessor and ViTModel on the folder give the features that kamim's encoder gives of a whole image."""
    torch.manual_seed(0)
    model = MaskedImageModel("vit_demo", 96).eval()
    state = {key: value for key, value in drawn(model).items() if key.startswith("encoder.")}
    checkpoint.save_imported(tmp_path / "ours", interop.Foreign("vit_demo", 96, state, False))
    folder = tmp_path / "theirs"
    arguments = ["export", str(tmp_path / "ours"), "--layout", "huggingface", "--out", str(folder)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    image = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    theirs = processor(images=image, return_tensors="pt")["pixel_values"]
    ours = normalise(torch.from_numpy(image)[None])
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    larger = processor(images=np.zeros((50, 70, 3), np.uint8), return_tensors="pt")["pixel_values"]
    assert larger.shape == (1, 3, 96, 96)
    for mode in ("L", "LA", "P", "RGBA", "CMYK"):
        other = Image.fromarray(image).convert(mode)
        found, expected = (
            processor(images=one, return_tensors="pt")["pixel_values"] for one in (other, other.convert("RGB"))
        )
        torch.testing.assert_close(found, expected)
    encoder = transformers.ViTModel.from_pretrained(folder, add_pooling_layer=False).eval()
    with torch.no_grad():
        features = encoder(theirs).last_hidden_state
        torch.testing.assert_close(features, model.encoder.forward_features(ours), atol=1e-4, rtol=1e-4)
    out = tmp_path / "back"
    result = CliRunner().invoke(app, ["import", str(folder), "--out", str(out)])
    assert result.output == f"{out}: vit_demo at 96 px, encoder alone\n"
    assert all(torch.equal(state[key], value) for key, value in checkpoint.read(out).model_state().items())
    assert load_model(str(folder)).origin.architecture == "vit_demo"  # evaluation takes the folder itself
    (folder / "model.safetensors").unlink()
    result = CliRunner().invoke(app, ["import", str(folder), "--out", str(tmp_path / "x")])
    assert "no such file, and no folder with a config.json and model.safetensors" in result.output


def test_folders_tell_epsilon_and_heads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768, layer_norm_eps=1e-6
        ),
        add_pooling_layer=False,
    )
    made.save_pretrained(tmp_path)
    assert interop.load(tmp_path).architecture == "vit_tiny_patch16_224"
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("1e-06", "1e-05"))
    assert interop.load(tmp_path).architecture == "vit_tiny"
    (said,) = caplog.messages
    assert (
        said == "LayerNorm's epsilon is 1e-12 in a vit_tiny, 1e-05 is expected of this file; features differ a little"
    )
    config.write_text(config.read_text().replace('"num_attention_heads": 3', '"num_attention_heads": 6'))
    with pytest.raises(ValueError, match="a ViT of width 192 with 12 blocks and 6 heads, a vit_tiny has 3"):
        interop.load(tmp_path)
    config.write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        interop.load(tmp_path)


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "swin_s3_tiny_224"])
def test_a_timm_name_goes_to_timm_and_comes_back(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    side = 56 if name.startswith("vit") else 224
    theirs = timm.create_model(name, img_size=side, num_classes=0)
    save_file(drawn(theirs), tmp_path / "theirs.safetensors")
    run, ours, file = CliRunner().invoke, tmp_path / "ours", tmp_path / "exported.safetensors"
    arguments = ["import", str(tmp_path / "theirs.safetensors"), "--model", name, "--out", str(ours)]
    result = run(app, arguments)
    assert result.output == f"{ours}: {name} at {side} px, encoder alone\n"
    result = run(app, ["export", str(ours), "--out", str(file)])
    assert result.exit_code == 0, result.output
    pasted = eval(result.output.partition(": ")[2], {"timm": timm, "functools": functools, "torch": torch})
    assert pasted.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, pasted.state_dict()[key]) for key, value in theirs.state_dict().items())
    back = interop.load(file)
    assert (back.architecture, back.resolution) == (name, side)
    assert all(
        torch.equal(value, theirs.state_dict()[key.removeprefix("encoder.")]) for key, value in back.state.items()
    )
    result = run(app, ["export", str(ours), "--layout", "huggingface", "--out", str(tmp_path / "folder")])
    assert "has parts that Hugging Face's" in result.output and not (tmp_path / "folder").exists()
    result = run(app, [*arguments, "--out", str(tmp_path / "x"), "--resolution", "100"])
    assert result.exit_code == 1 and f"--resolution 100: {name} needs a multiple of" in result.output
    result = run(app, [*arguments, "--out", str(tmp_path / "x"), "--model", "vit_bse"])
    assert "--model vit_bse: must be one of" in result.output and "the nearest names are vit_base, " in result.output
    if name.startswith("vit"):
        result = run(app, ["import", str(tmp_path / "theirs.safetensors"), "--out", str(tmp_path / "x")])
        assert "a ViT of width 384 with 12 blocks; known are vit_tiny, " in result.output
