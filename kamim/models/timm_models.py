"""Any ViT or Swin of timm by its name: what it needs to be known about one before it is trained."""

import math
from difflib import get_close_matches
from functools import cache

import timm
import torch
from timm.layers import Attention, PatchEmbed
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

from kamim import KamimError
from kamim.models.presets import ARCHITECTURES, Architecture

MODULES = ("vision_transformer", "swin_transformer", "deit")  # of timm, with the models that are considered
USUAL = "vit_small_patch16_224 or swin_tiny_patch4_window7_224"


def names() -> list[str]:
    """Returns timm's names of models in MODULES, without tags of pretrained weights."""
    return [name for module in MODULES for name in timm.list_models(module=module)]


@cache
def describe(name: str) -> Architecture:
    """Returns the timm model `name`, read from the model itself, which is created without memory for its weights.

    A model that pools patch tokens into one is created without that: its final norm is then applied to every token, and
    its attention pooling is left out. Raises KamimError for a name that timm does not have, with the nearest ones, and
    for a model without the patches, the attention or the square images that kamim needs.
    """
    if name not in names():
        raise KamimError(_unknown(name))
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    if isinstance(model, SwinTransformer):
        return _swin(name, model)
    assert isinstance(model, VisionTransformer), name
    return _vit(name, model)


def _unknown(name: str) -> str:
    """Returns what is wrong with a name that is not one of `names()`, and names that are possible."""
    known, presets = names(), ", ".join(ARCHITECTURES)
    if timm.is_model(name) and name.partition(".")[0] not in known:
        return f"timm's {name} is not one of the ViTs and Swins that can be pretrained; choose {presets}, or {USUAL}"
    offered = [*ARCHITECTURES, *(other for other in known if not other.startswith("test_"))]
    nearest = get_close_matches(name[:100], offered, n=4)
    hint = f"; the nearest names are {', '.join(nearest)}" if nearest else f", such as {USUAL}"
    return f"must be one of {presets}, or a ViT or Swin of timm{hint}"


def _vit(name: str, model: VisionTransformer) -> Architecture:
    if type(model.patch_embed) is not PatchEmbed:
        raise KamimError(
            f"timm's {name} embeds patches by {type(model.patch_embed).__name__}, which mixes masked ones in"
        )
    for block in model.blocks:
        if type(attention := getattr(block, "attn", None)) is not Attention:
            kind = type(block if attention is None else attention).__name__
            raise KamimError(f"timm's {name} is made of {kind}, not of the plain attention blocks that kamim reads")
    options: dict[str, object] = {}
    if model.global_pool != "token":
        options["global_pool"] = ""
    if model.dynamic_img_size:
        options["dynamic_img_size"] = False
    patch = model.patch_embed.patch_size[0]
    return Architecture(
        name, patch_size=patch, stride=patch, multiple=patch, options=options, prefix=model.num_prefix_tokens
    )


def _swin(name: str, model: SwinTransformer) -> Architecture:
    patch = model.patch_embed.patch_size[0]
    windows = [patch * 2**number * stage.blocks[0].window_size[0] for number, stage in enumerate(model.layers)]
    stride = patch * 2 ** (len(model.layers) - 1)
    return Architecture(name, patch_size=patch, stride=stride, multiple=math.lcm(stride, *windows), options={})
