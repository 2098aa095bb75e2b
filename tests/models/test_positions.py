"""Positions of a ViT's patches: the formula, what is trained, and what cannot have which."""

import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from kamim import KamimError
from kamim.cli import app
from kamim.config.pretrain import Pretrain
from kamim.config.schema import load
from kamim.models import hugging_face, interop
from kamim.models.architectures import architecture
from kamim.models.masked_image_model import MaskedImageModel, build_encoder
from kamim.models.positions import sincos_table
from kamim.models.readout import tokens_after
from kamim.training import checkpoint
from kamim.training.model import build_optimizer


def slow_sincos(width: int, grid: int) -> list[list[float]]:
    """Section 3.5 of "Attention is all you need" for both axes, as MAE's code lays them out: x first, sines first."""
    rows = []
    for y in range(grid):
        for x in range(grid):
            row = []
            for position in (x, y):
                angles = [position / 10_000 ** (i / (width / 4)) for i in range(width // 4)]
                row += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            rows.append(row)
    return rows


def test_sincos_positions_follow_the_formula() -> None:
    table = sincos_table(16, 5, 1)
    assert table.shape == (1, 26, 16) and table.dtype == torch.float32
    assert not table[0, 0].any()
    torch.testing.assert_close(table[0, 1:], torch.tensor(slow_sincos(16, 5)))


def test_sincos_positions_are_neither_trained_nor_drawn() -> None:
    given = load(Pretrain, None, ["data.store=s", "out=o", "model.name=vit_demo", "model.positions=sincos"])
    model = MaskedImageModel("vit_demo", 192, positions="sincos")
    trained = {id(p) for group in build_optimizer(given.optim, model).param_groups for p in group["params"]}
    assert {name for name, p in model.named_parameters() if id(p) not in trained} == {"encoder.pos_embed"}
    assert torch.equal(model.encoder.pos_embed, sincos_table(128, 12, 1))


@pytest.mark.parametrize(  # a class token, registers too, neither
    ("name", "side"), [("vit_demo", 64), ("vit_small_patch14_reg4_dinov2", 56), ("vit_base_patch16_siglip_224", 64)]
)
def test_every_plain_vit_takes_sincos_positions_for_its_patches(name: str, side: int) -> None:
    encoder = build_encoder(name, side, positions="sincos")
    table, grid = encoder.pos_embed[0], side // architecture(name).patch_size
    torch.testing.assert_close(table[-(grid**2) :], sincos_table(encoder.embed_dim, grid, 0)[0])
    assert not table[: -(grid**2)].any()


def test_learned_is_the_default_of_the_papers_vits() -> None:
    torch.manual_seed(0)
    default = build_encoder("vit_tiny", 64).state_dict()
    torch.manual_seed(0)
    learned = build_encoder("vit_tiny", 64, positions="learned").state_dict()
    assert all(torch.equal(value, learned[name]) for name, value in default.items())
    assert 0.015 < default["pos_embed"].std() < 0.025


def test_relative_positions_of_any_vit_are_those_of_vit_base_relpos() -> None:
    with torch.device("meta"):
        relative = build_encoder("vit_base", 64, positions="relative").state_dict()
        preset = build_encoder("vit_base_relpos", 64).state_dict()
    assert relative.keys() == {name for name in preset if ".ls" not in name}
    assert "pos_embed" not in relative


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("model.name=swin_tiny model.positions=sincos", "is a Swin, whose windows have positions of their own; leave"),
        ("model.name=vit_demo model.positions=rope", r"model.positions = 'rope'.*'learned', 'sincos' or 'relative'"),
        ("model.name=vit_small_patch14_reg4_dinov2 model.positions=relative", "has 5 tokens before its patches, must"),
        ("method=mae model.name=swin_tiny", "is a Swin, which cannot leave out masked patches; choose a ViT"),
        ("method=mae model.positions=relative", "cannot have relative positions; set model.positions = sincos or"),
        ("method=mae mask.ratio=0.99", r"mask.ratio = 0.99: masks all 6 x 6 blocks, .* must be at most 0.9722"),
        ("method=mae decoder.width=64 decoder.heads=3", "width = 64: must be a multiple of heads = 3"),
        ("decoder.width=64", "decoder: SimMIM has none; leave it out, or set method = mae"),
    ],
)
def test_what_does_not_fit_is_one_line(keys: str, message: str) -> None:
    with pytest.raises(KamimError, match=message) as raised:
        load(Pretrain, None, ["data.store=s", "out=o", *keys.split()])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("positions", ["sincos", "relative"])
def test_checkpoints_keep_positions(positions: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MaskedImageModel("vit_demo", 64, positions=positions)  # type: ignore[arg-type]
    state = {name: torch.randn_like(v) * 0.1 for name, v in model.state_dict().items() if v.is_floating_point()}
    model.load_state_dict(state, strict=False)
    foreign = interop.convert(model.state_dict())
    assert (foreign.architecture, foreign.resolution) == ("vit_demo", 64)
    out = checkpoint.save_imported(
        tmp_path / "ours", interop.Foreign("vit_demo", 64, foreign.state, True, foreign.positions)
    )
    read = checkpoint.read(out).build_model().eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(tokens_after(read.encoder, images, 6), tokens_after(model.eval().encoder, images, 6))


def test_sincos_positions_leave_as_the_table_they_are() -> None:
    """Hugging Face's own class computes the same from the exported weights, so the positions went along."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    model = MaskedImageModel("vit_demo", 64, positions="sincos").eval()
    config, weights = hugging_face.to_hugging_face(model.state_dict(), "vit_demo", 64, has_head=True)
    theirs = ViTModel(ViTConfig(**config), add_pooling_layer=False).eval()
    renamed = {name.removeprefix("vit."): value for name, value in weights.items() if name.startswith("vit.")}
    with torch.no_grad():
        theirs.embeddings.position_embeddings.copy_(renamed["embeddings.position_embeddings"])
        images = torch.randn(2, 3, 64, 64)
        ours = model.encoder.norm_pre(model.encoder._pos_embed(model.encoder.patch_embed(images)))
        theirs.embeddings.cls_token.copy_(renamed["embeddings.cls_token"])
        projection = theirs.embeddings.patch_embeddings.projection
        projection.weight.copy_(renamed["embeddings.patch_embeddings.projection.weight"])
        projection.bias.copy_(renamed["embeddings.patch_embeddings.projection.bias"])
        torch.testing.assert_close(theirs.embeddings(images), ours)
    assert torch.equal(interop.to_timm(model.state_dict())["pos_embed"], sincos_table(128, 4, 1))


def test_relative_positions_are_refused_by_other_layouts(tmp_path: Path) -> None:
    model = MaskedImageModel("vit_demo", 64, positions="relative")
    checkpoint.save_imported(tmp_path / "ours", interop.Foreign("vit_demo", 64, model.state_dict(), True, "relative"))
    result = CliRunner().invoke(app, ["export", str(tmp_path / "ours"), "--out", str(tmp_path / "e.safetensors")])
    assert "of relative positions, which timm's ViT does not have; cannot be exported" in result.output
    result = CliRunner().invoke(
        app, ["export", str(tmp_path / "ours"), "--layout", "huggingface", "--out", str(tmp_path / "hf")]
    )
    assert result.exit_code == 1
    assert "has parts that Hugging Face's ViT does not have" in result.output
