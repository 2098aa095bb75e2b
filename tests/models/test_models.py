"""The five backbones: sizes, shapes, and that a masked pixel cannot be seen."""

import pytest
import torch

from kamim.method.masking import expand_mask
from kamim.models.masked_image_model import MaskedImageModel, build_encoder
from kamim.models.presets import ARCHITECTURES

PAPER_MILLIONS = {"vit_tiny": 5.5, "vit_small": 21.6, "vit_base": 85.7, "swin_tiny": 27.5, "swin_base": 86.7}


@pytest.mark.parametrize("name", sorted(PAPER_MILLIONS))
def test_encoders_have_the_papers_sizes(name: str) -> None:
    """Table 1's counts, to the rounding of the paper and of the class token and position tables it counts or not."""
    with torch.device("meta"):
        encoder = build_encoder(name, 192)
    millions = sum(p.numel() for p in encoder.parameters()) / 1e6
    assert millions == pytest.approx(PAPER_MILLIONS[name], rel=0.02)


@pytest.mark.parametrize(("name", "resolution"), [("vit_demo", 96), ("vit_tiny", 192), ("swin_tiny", 192)])
def test_what_is_masked_cannot_be_seen_and_what_is_not_can(name: str, resolution: int) -> None:
    torch.manual_seed(0)
    model = MaskedImageModel(name, resolution).eval()
    grid = resolution // 32
    mask = torch.zeros(1, grid, grid, dtype=torch.bool)
    mask[0, 1, 0] = True
    images = torch.randn(1, 3, resolution, resolution)
    hidden, shown = images.clone(), images.clone()
    hidden[:, :, 32:64, :32] += 1
    shown[:, :, :32, :32] += 1
    with torch.no_grad():
        made = model(images, mask)
        assert made.shape == images.shape
        assert torch.equal(model(hidden, mask), made)
        assert not torch.allclose(model(shown, mask), made)


def test_the_mask_token_stands_in_before_positions_are_added() -> None:
    """With everything masked, positions alone tell tokens apart, so the reconstruction is not constant."""
    torch.manual_seed(0)
    model = MaskedImageModel("vit_demo", 96).eval()
    with torch.no_grad():
        made = model(torch.randn(1, 3, 96, 96), torch.ones(1, 3, 3, dtype=torch.bool))
    assert (made[:, :, :16, :16] - made[:, :, 16:32, :16]).abs().max() > 1e-3


def test_expand_mask_repeats_blocks() -> None:
    mask = torch.tensor([[[True, False], [False, True]]])
    expanded = expand_mask(mask, 6)
    assert expanded[0, :3, :3].all()
    assert not expanded[0, :3, 3:].any()
    assert expanded.sum() == 18


def test_a_swin_needs_a_resolution_its_windows_fit() -> None:
    with pytest.raises(ValueError, match=r"data.resolution = 224: .* needs a multiple of 192"):
        ARCHITECTURES["swin_base"].check_resolution(224)


@pytest.mark.parametrize(("name", "resolution"), [("vit_demo", 64), ("swin_tiny", 192)])
def test_gradients_lie_in_memory_as_their_weights_do(name: str, resolution: int) -> None:
    """Else DDP copies them at every step, and warns."""
    model = MaskedImageModel(name, resolution)
    model(torch.randn(2, 3, resolution, resolution), torch.ones(2, 2, 2, dtype=torch.bool)).sum().backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.stride() == parameter.stride()
