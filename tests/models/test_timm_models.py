"""Any ViT or Swin of timm by name: the same features as timm's, a masked forward as an obvious twin's, and errors."""

import pytest
import timm
import torch
from torch import Tensor, nn

from kamim.config.pretrain import Pretrain
from kamim.config.schema import load
from kamim.models.architectures import architecture
from kamim.models.masked_image_model import MaskedImageModel, build_encoder
from kamim.models.readout import Readout, check, prefix, tokens_after

VITS = {  # name: resolution, prefix tokens, patch
    "vit_small_patch14_reg4_dinov2": (56, 5, 14),  # class token and registers, layer scale
    "test_vit2": (64, 1, 16),  # a register and no class token, averaged by timm
    "vit_tiny_patch16_384": (64, 1, 16),
}
SWINS = {"swin_s3_tiny_224": 224, "swin_tiny_patch4_window7_224": 224}


def randomised(model: nn.Module) -> nn.Module:
    """The model in evaluation mode with every weight drawn, so that none can be left out unseen."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05, mean=1.0 if parameter.ndim == 1 and parameter.mean() > 0.9 else 0.0)
    return model.eval()


@pytest.mark.parametrize("name", [*VITS, "swin_s3_tiny_224"])
def test_features_equal_a_direct_timm_call(name: str) -> None:
    side = VITS[name][0] if name in VITS else SWINS[name]
    options = dict(architecture(name).options)
    theirs = randomised(timm.create_model(name, img_size=side, num_classes=0, **options))
    ours = build_encoder(name, side).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        expected = theirs.forward_features(images)
        torch.testing.assert_close(ours.forward_features(images), expected, atol=0, rtol=0)
        last = tokens_after(ours, images, len(ours.layers) if name in SWINS else len(ours.blocks))
        torch.testing.assert_close(ours.norm(last).reshape(expected.shape), expected, atol=1e-5, rtol=0)
    norms = [m.eps for m in ours.modules() if isinstance(m, nn.LayerNorm)]
    assert norms == [m.eps for m in theirs.modules() if isinstance(m, nn.LayerNorm)]


@pytest.mark.parametrize("name", VITS)
def test_a_masked_vit_equals_a_loop_over_its_patches(name: str) -> None:
    side, tokens_before, patch = VITS[name]
    model = randomised(MaskedImageModel(name, side))
    vit = model.encoder
    assert (prefix(vit), architecture(name).patch_size) == (tokens_before, patch)
    images = torch.randn(1, 3, side, side)
    mask = torch.tensor([[[True, False], [False, True]]])
    grid = side // patch
    with torch.no_grad():
        rows: list[Tensor] = []
        for y in range(grid):
            for x in range(grid):
                pixels = images[0, :, y * patch : (y + 1) * patch, x * patch : (x + 1) * patch]
                embedded = (vit.patch_embed.proj.weight * pixels).sum(dim=(1, 2, 3)) + vit.patch_embed.proj.bias
                rows.append(model.mask_token if mask[0, y * 2 // grid, x * 2 // grid] else embedded)
        patches = torch.stack(rows)
        before = [token[0] for token in (vit.cls_token, vit.reg_token) if token is not None]
        if vit.no_embed_class:
            tokens = torch.cat([*before, patches + vit.pos_embed[0]])
        else:
            tokens = torch.cat([*before, patches]) + vit.pos_embed[0]
        hidden = tokens[None]
        for block in vit.blocks:
            hidden = block(hidden)
        hidden = vit.norm(hidden)[0, tokens_before:]
        expected = torch.zeros(3, side, side)
        for number, token in enumerate(hidden):
            y, x = divmod(number, grid)
            values = model.head[0].weight[:, :, 0, 0] @ token + model.head[0].bias
            expected[:, y * patch : (y + 1) * patch, x * patch : (x + 1) * patch] = values.view(3, patch, patch)
        torch.testing.assert_close(model(images, mask)[0], expected, atol=1e-4, rtol=1e-4)


def test_a_masked_swin_of_another_window_equals_its_parts() -> None:
    """Where nothing is masked, the reconstruction is the head of timm's features; what is masked cannot be seen."""
    model = randomised(MaskedImageModel("swin_s3_tiny_224", 224))
    images, mask = torch.randn(1, 3, 224, 224), torch.zeros(1, 7, 7, dtype=torch.bool)
    with torch.no_grad():
        features = model.encoder.forward_features(images)[0]
        expected = torch.zeros(3, 224, 224)
        for y in range(7):
            for x in range(7):
                values = model.head[0].weight[:, :, 0, 0] @ features[y, x] + model.head[0].bias
                expected[:, 32 * y : 32 * y + 32, 32 * x : 32 * x + 32] = values.view(3, 32, 32)
        torch.testing.assert_close(model(images, mask)[0], expected, atol=1e-4, rtol=1e-4)
        mask[0, 3, 4] = True
        hidden = images.clone()
        hidden[:, :, 96:128, 128:160] = 0
        assert torch.equal(model(images, mask), model(hidden, mask))


def test_a_register_is_not_taken_for_a_class_token() -> None:
    with pytest.raises(ValueError, match="pooling = cls: the encoder has no class token"):
        check(build_encoder("test_vit2", 64), Readout(1, "cls", "none"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("model.name=vit_bse", r"model.name = 'vit_bse': must be one of .* nearest names are vit_base, "),
        ("model.name=vit_large_patch16_225", r"the nearest names are vit_large_patch16_224, "),
        ("model.name=hf-hub:some/model", "or a ViT or Swin of timm, such as vit_small_patch16_224 or swin_tiny"),
        ("model.name=vit_small_r26_s32_224", "is not one of the ViTs and Swins that can be pretrained; choose"),
        ("model.name=vit_base_patch16_xp_224", "is made of ParallelScalingBlock, not of the plain attention blocks"),
        ("model.name=vit_large_patch14_224", r"data.resolution = 192: must be .* model patch = 14, such as 196"),
        ("model.name=vit_large_patch14_224 data.resolution=224", r"mask.patch_size = 32: .* fit are 14, 28, 56, 112$"),
        ("model.name=swin_small_patch4_window7_224", r"resolution = 192: .* needs a multiple of 224 px, such as 224"),
        ("model.name=swin_base_patch4_window12_384", r"data.resolution = 192: .* needs a multiple of 384 px"),
        (
            "model.name=vit_large_patch14_224 data.resolution=196 mask.patch_size=28 weighting.patch_size=8",
            r"multiple of weighting.patch_size = 8; sizes that fit are 1, 2, 4, 7, 14, 28, 49, 98$",
        ),
    ],
)
def test_what_cannot_be_is_one_line_before_any_work(given: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load(Pretrain, None, ["data.store=x", "out=x", *given.split()])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        "model.name=vit_large_patch16_224 data.resolution=224",
        "model.name=vit_base_patch8_224",
        "model.name=vit_huge_patch14_224 data.resolution=224 mask.patch_size=28",
        "model.name=swin_small_patch4_window7_224 data.resolution=224",
    ],
)
def test_names_of_timm_are_configurations(given: str) -> None:
    config = load(Pretrain, None, ["data.store=x", "out=x", *given.split()])
    assert config.model.name in given
