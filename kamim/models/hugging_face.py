"""kamim's weights as a folder that Hugging Face's from_pretrained loads: config.json, weights, preprocessing."""

import re
from typing import Any

import torch
from timm.layers import Attention, Mlp
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from kamim import KamimError
from kamim.models.architectures import architecture
from kamim.models.masked_image_model import MaskedImageModel
from pipelines.batch import IMAGENET_MEAN, IMAGENET_STD

State = dict[str, Tensor]
BILINEAR = 2  # PIL.Image.Resampling

# kamim's names -> those of transformers 4, which 5 reads too; TYPE stands for vit or swin.
_TO_HUGGING_FACE = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^head\.", "decoder."),
        (r"^mask_token$", "TYPE.embeddings.mask_token"),
        (r"^encoder\.cls_token$", "TYPE.embeddings.cls_token"),
        (r"^encoder\.pos_embed$", "TYPE.embeddings.position_embeddings"),
        (r"^encoder\.patch_embed\.proj\.", "TYPE.embeddings.patch_embeddings.projection."),
        (r"^encoder\.patch_embed\.norm\.", "TYPE.embeddings.norm."),
        (r"^encoder\.norm\.", "TYPE.layernorm."),
        (r"^encoder\.blocks\.", "TYPE.encoder.layer."),
        (r"^encoder\.layers\.", "TYPE.encoder.layers."),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
        (r"\.attn\.proj\.", ".attention.output.dense."),
        (r"\.attn\.", ".attention.SELF."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    )
)
_PLAIN_VIT = re.compile(
    r"cls_token|pos_embed|patch_embed\.proj\.(weight|bias)|norm\.(weight|bias)"
    r"|blocks\.\d+\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(weight|bias)"
)


def preprocessor(resolution: int) -> dict[str, Any]:
    """Returns preprocessor_config.json: what AutoImageProcessor does to an image before the model sees it.

    As kamim evaluates: the whole image resized to a square of `resolution` px, bilinear, and normalised with ImageNet's
    mean and standard deviation. transformers antialiases where it shrinks an image, kamim does not.
    """
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": resolution, "width": resolution},
        "resample": BILINEAR,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
    }


def to_hugging_face(state: State, name: str, resolution: int, has_head: bool) -> tuple[dict[str, Any], State]:
    """Returns config.json and weights that Hugging Face's from_pretrained loads.

    For ViTForMaskedImageModeling or SwinForMaskedImageModeling, and for ViTModel or SwinModel of an encoder alone.
    Raises KamimError for an encoder that these cannot express, such as one with register tokens.
    """
    with torch.device("meta"):
        encoder = MaskedImageModel(name, resolution).encoder
    known = architecture(name)
    _check_plain(name, encoder, state)
    config: dict[str, Any] = {"image_size": resolution, "patch_size": known.patch_size, "encoder_stride": known.stride}
    if isinstance(encoder, VisionTransformer):
        kind, prefix, inner = "vit", "ViT", "attention"
        block = encoder.blocks[0]
        config |= {
            "hidden_size": encoder.embed_dim,
            "num_hidden_layers": len(encoder.blocks),
            "num_attention_heads": block.attn.num_heads,
            "intermediate_size": block.mlp.fc1.out_features,
            "layer_norm_eps": encoder.norm.eps,
        }
    else:
        kind, prefix, inner = "swin", "Swin", "self"
        config |= {
            "embed_dim": encoder.embed_dim,
            "depths": [len(layer.blocks) for layer in encoder.layers],
            "num_heads": [layer.blocks[0].attn.num_heads for layer in encoder.layers],
            "window_size": encoder.layers[0].blocks[0].window_size[0],
            "layer_norm_eps": encoder.norm.eps,
        }
    config |= {"model_type": kind, "architectures": [f"{prefix}{'ForMaskedImageModeling' if has_head else 'Model'}"]}
    weights: State = {}
    for ours, value in state.items():
        theirs = re.sub(r"layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", ours)
        for pattern, replacement in _TO_HUGGING_FACE:
            theirs = pattern.sub(replacement, theirs)
        theirs = theirs.replace("TYPE", kind).replace("SELF", inner)
        if ".qkv." in theirs:
            parts = zip(("query", "key", "value"), value.chunk(3), strict=True)
            weights |= {theirs.replace(".qkv.", f".{part}."): tensor.contiguous() for part, tensor in parts}
        else:
            weights[theirs] = value[None, None] if ours == "mask_token" else value
    return config, weights


def _check_plain(name: str, encoder: VisionTransformer | SwinTransformer, state: State) -> None:
    """Raises KamimError for an encoder that is not made as Hugging Face's ViT or Swin, whatever its size."""
    if isinstance(encoder, SwinTransformer):
        plain = len({block.window_size for layer in encoder.layers for block in layer.blocks}) == 1
    else:
        names = {key.removeprefix("encoder.") for key in state if key.startswith("encoder.")}
        plain = (
            all(_PLAIN_VIT.fullmatch(name) for name in names)
            and {"cls_token", "pos_embed", "blocks.0.attn.qkv.bias", "patch_embed.proj.bias"} <= names
            and not encoder.no_embed_class
            and all(type(b) is Block and type(b.attn) is Attention and type(b.mlp) is Mlp for b in encoder.blocks)
            and type(encoder.blocks[0].mlp.act) is nn.GELU
        )
    if not plain:
        kind = "Swin" if isinstance(encoder, SwinTransformer) else "ViT"
        raise KamimError(f"a {name} has parts that Hugging Face's {kind} does not have; export it in timm's layout")
