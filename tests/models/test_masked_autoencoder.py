"""MAE: parity with Hugging Face's port of the public code, and what the encoder can see."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from kamim import KamimError
from kamim.cli import app
from kamim.config.pretrain import Pretrain
from kamim.config.schema import load
from kamim.method.loss import masked_l1, masked_l2, normalise_patches
from kamim.models import interop
from kamim.models.file_kind import ARCHITECTURE, DECODER_HEADS
from kamim.models.mae_layout import DecoderSize, to_public
from kamim.models.masked_autoencoder import MaskedAutoencoder
from kamim.models.masked_image_model import MaskedImageModel
from kamim.models.positions import sincos_table
from kamim.training import checkpoint
from kamim.training.initialise import initialise
from kamim.training.model import build_model

State = dict[str, Tensor]


def small() -> MaskedAutoencoder:
    torch.manual_seed(0)
    return MaskedAutoencoder("vit_demo_patch8", 64, positions="sincos", width=64, depth=2, heads=4)


def renamed(state: State) -> State:
    """The names of transformers' ViTMAE -> ours, written apart from kamim.models.interop."""
    ours: State = {}
    for name, value in state.items():
        name = re.sub(r"^vit\.embeddings\.cls_token", "encoder.cls_token", name)
        name = re.sub(r"^vit\.embeddings\.position_embeddings", "encoder.pos_embed", name)
        name = re.sub(r"^vit\.embeddings\.patch_embeddings\.projection", "encoder.patch_embed.proj", name)
        name = re.sub(r"^vit\.layernorm\.", "encoder.norm.", name)
        name = re.sub(r"^vit\.(encoder\.layer|layers)\.", "encoder.blocks.", name)
        name = re.sub(r"^decoder\.", "", name).replace("decoder_layers.", "decoder_blocks.")
        name = name.replace("layernorm_before", "norm1").replace("layernorm_after", "norm2")
        name = re.sub(r"attention\.(?:attention\.)?(?:query|q_proj)\.", "attn.0.", name)
        name = re.sub(r"attention\.(?:attention\.)?(?:key|k_proj)\.", "attn.1.", name)
        name = re.sub(r"attention\.(?:attention\.)?(?:value|v_proj)\.", "attn.2.", name)
        name = re.sub(r"attention\.(output\.dense|o_proj)\.", "attn.proj.", name)
        name = name.replace("intermediate.dense", "mlp.fc1")
        name = re.sub(r"(blocks\.\d+)\.output\.dense", r"\1.mlp.fc2", name)
        ours[name] = value
    for name in [name for name in ours if ".attn.0." in name]:
        parts = [ours.pop(name.replace(".attn.0.", f".attn.{part}.")) for part in range(3)]
        ours[name.replace(".attn.0.", ".attn.qkv.")] = torch.cat(parts)
    return ours


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_reconstruction_loss_and_gradients_are_those_of_hugging_faces_port(norm_pix_loss: bool) -> None:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    model = small()
    theirs = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=128,
            num_hidden_layers=6,
            num_attention_heads=4,
            intermediate_size=512,
            image_size=64,
            patch_size=8,
            decoder_hidden_size=64,
            decoder_num_hidden_layers=2,
            decoder_num_attention_heads=4,
            decoder_intermediate_size=256,
            mask_ratio=0.75,
            norm_pix_loss=norm_pix_loss,
            layer_norm_eps=1e-12,
        )
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
    model.load_state_dict(renamed(theirs.state_dict()))
    for module in model.decoder_blocks.modules():  # theirs has one epsilon for encoder and decoder
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-12
    model.decoder_norm.eps = 1e-12
    images = torch.randn(3, 3, 64, 64)
    output = theirs(images, noise=torch.rand(3, 64))
    mask = output.mask.bool().unflatten(1, (8, 8))
    reconstruction = model(images, mask)
    torch.testing.assert_close(reconstruction, theirs.unpatchify(output.logits), atol=1e-5, rtol=1e-5)
    target = normalise_patches(images, 8) if norm_pix_loss else images
    loss = masked_l2(target, reconstruction, mask)
    torch.testing.assert_close(loss, output.loss)
    loss.backward()
    output.loss.backward()
    gradients = renamed({n: p.grad for n, p in theirs.named_parameters() if p.grad is not None})
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-6, rtol=1e-3, msg=name)


def test_a_masked_pixel_is_not_seen_and_a_visible_one_is() -> None:
    model = small().eval()
    mask = torch.rand(2, 8, 8).flatten(1).argsort(1).unflatten(1, (8, 8)) < 48
    images = torch.randn(2, 3, 64, 64)
    pixels = mask.repeat_interleave(8, 1).repeat_interleave(8, 2).unsqueeze(1)
    with torch.no_grad():
        before = model(images, mask)
        assert torch.equal(model(images + pixels, mask), before)
        assert not torch.allclose(model(images + ~pixels, mask), before)


def test_blocks_of_several_patches_are_masked_whole() -> None:
    model = small().eval()
    coarse = torch.zeros(1, 4, 4, dtype=torch.bool)
    coarse[0, 0, :3] = True
    fine = coarse.repeat_interleave(2, 1).repeat_interleave(2, 2)
    with torch.no_grad():
        assert torch.equal(model(torch.ones(1, 3, 64, 64), coarse), model(torch.ones(1, 3, 64, 64), fine))


def test_weights_multiply_the_squared_error() -> None:
    images, made = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16)
    mask, weights = torch.rand(2, 4, 4) < 0.5, torch.rand(2, 8, 8)
    scale = weights.repeat_interleave(2, 1).repeat_interleave(2, 2)
    masked = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)
    expected = sum(
        float(scale[b, y, x]) * float(made[b, c, y, x] - images[b, c, y, x]) ** 2
        for b in range(2)
        for c in range(3)
        for y in range(16)
        for x in range(16)
        if masked[b, y, x]
    ) / (3 * int(masked.sum()))
    assert float(masked_l2(images, made, mask, weights)) == pytest.approx(expected, rel=1e-5)
    assert float(masked_l2(images, made, mask)) != float(masked_l1(images, made, mask))


@pytest.mark.parametrize("layout", ["public", "huggingface"])
def test_its_layout_goes_in_and_out(layout: str, tmp_path: Path) -> None:
    """The weights of Hugging Face's class, or of the public names, reconstruct as before after import and export."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    torch.manual_seed(0)
    theirs = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=192,
            num_hidden_layers=12,
            num_attention_heads=3,
            intermediate_size=768,
            image_size=64,
            decoder_hidden_size=64,
            decoder_num_hidden_layers=2,
            decoder_num_attention_heads=4,
            decoder_intermediate_size=256,
        )
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        theirs.decoder.decoder_pos_embed.copy_(sincos_table(64, 4, 1))  # which their constructor leaves at 0
    if layout == "huggingface":
        theirs.save_pretrained(tmp_path / "theirs")
        file = tmp_path / "theirs"
    else:
        names = {n.removeprefix("encoder."): v for n, v in renamed(theirs.state_dict()).items()}
        file = tmp_path / "theirs.pth"
        torch.save({"model": names}, file)
    weights = interop.load(file)
    assert (weights.architecture, weights.has_head) == (
        "vit_tiny" if layout == "huggingface" else "vit_tiny_patch16_224",
        True,
    )
    assert weights.decoder == DecoderSize(64, 2, 4 if layout == "huggingface" else 2)
    saved = checkpoint.read(checkpoint.save_imported(tmp_path / "ours", weights))
    model = saved.build_model().eval()
    if layout == "huggingface":
        images, noise = torch.randn(2, 3, 64, 64), torch.rand(2, 16)
        with torch.no_grad():
            output = theirs(images, noise=noise)
            ours = model(images, output.mask.bool().unflatten(1, (4, 4)))
        torch.testing.assert_close(ours, theirs.unpatchify(output.logits), atol=1e-4, rtol=1e-4)
    out = tmp_path / "e.safetensors"
    result = CliRunner().invoke(app, ["export", str(tmp_path / "ours"), "--layout", "mae", "--out", str(out)])
    assert result.exit_code == 0, result.output
    back = interop.convert(load_file(out))
    assert all(torch.equal(back.state[name], value) for name, value in saved.model_state().items())


def test_a_mae_leaves_for_hugging_face_as_its_encoder(tmp_path: Path) -> None:
    model = small()
    saved = interop.Foreign("vit_demo_patch8", 64, model.state_dict(), True, "sincos", DecoderSize(64, 2, 4))
    checkpoint.save_imported(tmp_path / "ours", saved)
    command = ["export", str(tmp_path / "ours"), "--out", str(tmp_path / "hf"), "--layout", "huggingface"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0 and "ViTModel" in result.output
    simmim = interop.Foreign("vit_demo", 64, MaskedImageModel("vit_demo", 64).state_dict(), True)
    checkpoint.save_imported(tmp_path / "simmim", simmim)
    command = ["export", str(tmp_path / "simmim"), "--layout", "mae", "--out", str(tmp_path / "f.safetensors")]
    assert (
        "is no MAE with its decoder; export it with --layout timm or huggingface"
        in CliRunner().invoke(app, command).output
    )


def wide_heads(out: Path) -> MaskedAutoencoder:
    """Saves a MAE whose decoder's heads are 48 wide, not 32 as usual, and returns it."""
    torch.manual_seed(0)
    model = MaskedAutoencoder("vit_demo_patch8", 64, positions="sincos", width=96, depth=1, heads=2).eval()
    given = interop.Foreign("vit_demo_patch8", 64, model.state_dict(), True, "sincos", DecoderSize(96, 1, 2))
    checkpoint.save_imported(out, given)
    return model


def test_an_export_keeps_the_heads_of_its_decoder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, out = wide_heads(tmp_path / "ours"), tmp_path / "e.safetensors"
    command = ["export", str(tmp_path / "ours"), "--layout", "mae", "--out", str(out)]
    for _ in range(2):  # a rerun replaces an export of kamim's own
        assert CliRunner().invoke(app, command).exit_code == 0
    back = interop.load(out)
    assert back.decoder == DecoderSize(96, 1, 2)
    images, mask = torch.randn(1, 3, 64, 64), torch.arange(64).view(1, 8, 8) % 4 > 0
    with torch.no_grad():
        assert torch.equal(back.build_model().eval()(images, mask), model(images, mask))
    assert "are assumed" not in caplog.text
    assert interop.convert(load_file(out)).decoder == DecoderSize(96, 1, 3)
    assert "a decoder's weights do not hold its number of heads; 3 are assumed, 32 wide" in caplog.text


def test_metadata_of_an_export_are_checked(tmp_path: Path) -> None:
    about = {ARCHITECTURE: "vit_demo_patch8", DECODER_HEADS: "2" * 5000}
    save_file(to_public(wide_heads(tmp_path / "ours").state_dict()), tmp_path / "e.safetensors", about)
    with pytest.raises(KamimError, match=r"kamim.decoder_heads = 2+: must be a whole number from 1 to 9999"):
        interop.load(tmp_path / "e.safetensors")


def test_a_named_model_keeps_the_heads_of_config_json(tmp_path: Path) -> None:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    theirs = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=192,
            num_hidden_layers=12,
            num_attention_heads=3,
            intermediate_size=768,
            image_size=64,
            decoder_hidden_size=64,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=4,
            decoder_intermediate_size=256,
        )
    )
    theirs.save_pretrained(tmp_path)
    assert interop.load(tmp_path, name="vit_tiny").decoder == DecoderSize(64, 1, 4)


def test_init_from_takes_the_same_decoder_alone(tmp_path: Path) -> None:
    model = wide_heads(tmp_path / "ours")
    keys = (
        "method=mae",
        "model.name=vit_demo_patch8",
        "model.positions=sincos",
        "data.resolution=64",
        "data.store=s",
        "out=o",
        "weighting=null",
        "mask.patch_size=8",
        "decoder.width=96",
        "decoder.depth=1",
        f"init_from={tmp_path / 'ours'}",
    )
    same = load(Pretrain, None, [*keys, "decoder.heads=2"])
    begun = build_model(same)
    initialise(begun, same)
    assert all(torch.equal(value, begun.state_dict()[name]) for name, value in model.state_dict().items())
    other = load(Pretrain, None, [*keys, "decoder.heads=4"])
    with pytest.raises(KamimError, match=r"is another; set decoder\.width=96 decoder\.depth=1 decoder\.heads=2"):
        initialise(build_model(other), other)
