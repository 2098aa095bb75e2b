"""Encoders with attention to analyse, and their names in figures."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import Attention
from timm.models.swin_transformer import SwinTransformer, WindowAttention
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from kamim import KamimError
from kamim.models.attention import blocks
from kamim.models.interop import check_tensor
from kamim.storage.escape import one_line
from kamim.training.model import Model


@dataclass(frozen=True, eq=False)
class AnalysedModel:
    """A checkpoint to analyse. model: with its pixel head, if it has one. about: its origin, for analysis.json."""

    name: str
    encoder: VisionTransformer | SwinTransformer
    resolution: int
    model: Model | None
    about: dict[str, Any]

    @property
    def is_vit(self) -> bool:
        """Whether all tokens attend to all tokens, as figures 5 to 10 need; a Swin's windows do not."""
        return isinstance(self.encoder, VisionTransformer)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(blocks(self.encoder))

    @property
    def prefix(self) -> int:
        """Class and register tokens before the patch tokens."""
        return int(self.encoder.num_prefix_tokens) if self.is_vit else 0

    @property
    def patch(self) -> int:
        """Side of a ViT's token in px."""
        return int(self.encoder.patch_embed.patch_size[0])

    @property
    def grid(self) -> int:
        """Tokens along a side of a ViT."""
        return self.resolution // self.patch


def checked_encoder(name: str, model: nn.Module) -> VisionTransformer | SwinTransformer:
    """Returns the model itself. Raises KamimError if the analysis does not support its attention."""
    allowed = VisionTransformer | SwinTransformer
    if isinstance(model, allowed) and all(
        isinstance(getattr(block, "attn", None), Attention | WindowAttention) for block in blocks(model)
    ):
        height, width = model.patch_embed.img_size
        if height == width:
            return model
        raise KamimError(f"checkpoint = {name}: takes images of {height}x{width} px, the analysis needs square ones")
    raise KamimError(
        f"checkpoint = {name}: a {type(model).__name__} has no attention that the analysis knows; give a ViT or a "
        "Swin (timm's VisionTransformer or SwinTransformer)"
    )


def timm_encoder(spec: str, seed: int) -> VisionTransformer | SwinTransformer:
    """Builds timm's MODEL_NAME with random weights, or MODEL_NAME@FILE with those of a safetensors file.

    The file holds a state dict under timm's names; a classifier in it (head.*) is left out. Raises KamimError
    for an unknown model, one without attention, or a file that does not fit.
    """
    name, _, file = spec.partition("@")
    torch.manual_seed(seed)
    try:
        model = timm.create_model(name, num_classes=0)
    except RuntimeError as error:
        raise KamimError(f"checkpoint = timm:{name}: {error}; timm.list_models() names all") from error
    encoder = checked_encoder(f"timm:{name}", model)
    if file:
        _load(encoder, Path(file))
    return encoder


def _load(encoder: nn.Module, file: Path) -> None:
    if not file.is_file():
        raise KamimError(f"checkpoint = {file}: no such file")
    try:
        state = {key: value for key, value in load_file(file).items() if not key.startswith("head.")}
        for key, value in state.items():
            check_tensor(key, value)
    except (SafetensorError, LookupError, ValueError) as error:  # LookupError: torch lacks a dtype
        raise KamimError(f"{file}: not the weights of a timm model: {one_line(error)}") from error
    own = encoder.state_dict()
    for key in sorted(own.keys() | state.keys()):
        in_file, in_model = (tuple(d[key].shape) if key in d else "nothing" for d in (state, own))
        if in_file != in_model:
            raise KamimError(f"{file}: another architecture ({key} is {in_file} in the file, {in_model} in the model)")
    encoder.load_state_dict(state)
