"""Weights from elsewhere give the same numbers here; ours go back."""

import functools
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import SwinConfig, SwinForMaskedImageModeling, ViTConfig, ViTForMaskedImageModeling
from typer.testing import CliRunner

from kamim.cli import app
from kamim.models import interop
from kamim.models.architectures import ARCHITECTURES
from kamim.models.masked_image_model import MaskedImageModel, build_encoder
from kamim.training import checkpoint

State = dict[str, Tensor]


def hugging_face(name: str) -> torch.nn.Module:
    """transformers' own SimMIM model of this architecture, random weights."""
    torch.manual_seed(0)
    if name.startswith("vit"):
        width, heads, depth = {
            "vit_demo": (128, 4, 6), "vit_tiny": (192, 3, 12), "vit_small": (384, 6, 12), "vit_base": (768, 12, 12)
        }[name]  # fmt: skip
        given = ViTConfig(
            hidden_size=width, num_attention_heads=heads, num_hidden_layers=depth, intermediate_size=4 * width,
            image_size=192, encoder_stride=16,
        )  # fmt: skip
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


def loaded(made: interop.Foreign) -> MaskedImageModel:
    model = MaskedImageModel(made.architecture, made.resolution).eval()
    model.load_state_dict(made.state, strict=made.has_head)
    return model


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
    assert (made.architecture, made.resolution, made.has_head) == ("vit_tiny", 224, False)
    assert torch.equal(made.state["encoder.blocks.3.attn.qkv.weight"], vit.state_dict()["blocks.3.attn.qkv.weight"])
    smaller = interop.convert(state, 192)
    assert smaller.state["encoder.pos_embed"].shape == (1, 145, 192)


def test_microsoft_simmims_swin_layout_and_another_window() -> None:
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
    for window in (7, 12):  # their ImageNet models' at 224 px, and at 384 px
        wider = {k: biases(window, v.shape[1]) if k.endswith("bias_table") else v for k, v in state.items()}
        made = interop.convert(wider)
        assert (made.architecture, made.resolution, made.has_head) == ("swin_tiny", 192, True)
        for key, value in made.state.items():
            torch.testing.assert_close(value, state[unstaged(key)].reshape(value.shape), atol=0.03, rtol=0)
        loaded(made)


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
    checkpoint.save_imported(tmp_path / "ours", name, 192, state, has_head)
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
    back = interop.convert(interop.read_file(tmp_path / "theirs/model.safetensors"))
    assert (back.architecture, back.has_head) == (name, has_head)
    assert back.state.keys() == state.keys()
    assert all(torch.equal(back.state[key], value) for key, value in state.items())
    assert CliRunner().invoke(app, arguments).exit_code == 1  # it is there already


def test_weights_are_files_as_others_are(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        checkpoint.save_imported(tmp_path / "ours", "vit_demo", 96, MaskedImageModel("vit_demo", 96).state_dict(), True)
        out = tmp_path / "e.safetensors"
        assert CliRunner().invoke(app, ["export", str(tmp_path / "ours"), "--out", str(out)]).exit_code == 0
    finally:
        assert os.umask(before) == 0o027
    assert [file.stat().st_mode & 0o777 for file in (out, tmp_path / "ours/model.safetensors")] == [0o640, 0o640]


@pytest.mark.parametrize("name", ["vit_tiny", "swin_tiny"])
def test_what_is_exported_loads_into_timm_and_comes_back(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MaskedImageModel(name, 192)
    checkpoint.save_imported(tmp_path / "ours", name, 192, model.state_dict(), has_head=True)
    result = CliRunner().invoke(app, ["export", str(tmp_path / "ours"), "--out", str(tmp_path / "e.safetensors")])
    assert result.exit_code == 0, result.output
    line = result.output.partition(": ")[2]
    theirs = eval(line, {"timm": timm, "functools": functools, "torch": torch})  # what users paste
    images = torch.randn(1, 3, 192, 192)
    with torch.no_grad():
        torch.testing.assert_close(
            theirs.eval().forward_features(images), model.encoder.eval().forward_features(images), atol=0, rtol=0
        )
    back = interop.convert(interop.read_file(tmp_path / "e.safetensors"))
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
    save_file({"fc.weight": torch.zeros(2)}, tmp_path / "resnet.safetensors")
    save_file({"patch_embed.proj.weight": torch.zeros(77, 3, 16, 16)}, tmp_path / "odd.safetensors")
    lacking = build_encoder("vit_demo", 96).state_dict()
    del lacking["norm.bias"]
    save_file(lacking, tmp_path / "lacking.safetensors")
    for name, message in {
        "none.pth": "no such file",
        "evil.pth": "not a checkpoint of tensors alone",
        "text.pth": "not a checkpoint of tensors alone",
        "resnet.safetensors": "no patch embedding among its 1 tensors",
        "odd.safetensors": "a ViT of width 77 with 0 blocks; known are vit_tiny",
        "lacking.safetensors": "encoder.norm.bias is missing",
    }.items():
        result = run(app, ["import", str(tmp_path / name), "--out", str(tmp_path / "x")])
        assert result.exit_code == 1
        assert message in result.output
        assert "weights_only" not in result.output  # which torch advises to leave out
        assert not (tmp_path / "x").exists()
