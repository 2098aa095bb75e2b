"""Weights from elsewhere -> kamim's names, and back to timm's and Hugging Face's.

Understood: the authors' released checkpoints (Hugging Face ViT and Swin ForMaskedImageModeling, bare or under
`model_state_dict`; names of transformers 4 and 5), MoCo v3's released ViTs, microsoft/SimMIM's released Swins,
and timm state dicts. Files are safetensors, or pickles read with weights_only and nothing less.
"""

import math
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from kamim import KamimError
from kamim.models.architectures import ARCHITECTURES
from kamim.models.masked_image_model import MaskedImageModel
from kamim.storage.escape import one_line

State = dict[str, Tensor]
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PATCHES, POSITIONS = "encoder.patch_embed.proj.weight", "encoder.pos_embed"

# Names of transformers (4 and 5), microsoft/SimMIM and MoCo v3 -> names of timm, below `encoder.`.
_RENAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^(?:module\.|_orig_mod\.)+", ""),
        (r"^base_encoder\.", ""),
        (r"^(?:vit|swin)\.embeddings\.mask_token$|^encoder\.mask_token$", "mask_token"),
        (r"^decoder\.0\.", "head.0."),
        (r"^(?:vit|swin)\.", "encoder."),
        (r"^encoder\.encoder\.", "encoder."),
        (r"^encoder\.embeddings\.cls_token", "encoder.cls_token"),
        (r"^encoder\.embeddings\.position_embeddings", "encoder.pos_embed"),
        (r"^encoder\.embeddings\.patch_embeddings\.projection\.", "encoder.patch_embed.proj."),
        (r"^encoder\.embeddings\.norm\.", "encoder.patch_embed.norm."),
        (r"^encoder\.layernorm\.", "encoder.norm."),
        (r"^encoder\.layers?\.(\d+)\.(?!blocks|downsample)", r"encoder.blocks.\1."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.attention\.(?:attention\.|self\.)?(query|key|value)\.", r".attn.\1."),
        (r"\.attention\.q_proj\.", ".attn.query."),
        (r"\.attention\.k_proj\.", ".attn.key."),
        (r"\.attention\.v_proj\.", ".attn.value."),
        (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
        (r"\.attention\..*relative_position_bias_table$", ".attn.relative_position_bias_table"),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    )
)
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
_IGNORED = re.compile(r"relative_position_index|attn_mask|momentum_encoder|predictor|base_encoder\.head\.")


@dataclass(frozen=True)
class Foreign:
    """Weights in kamim's names. has_head: with mask token and pixel head, so that it can reconstruct."""

    architecture: str
    resolution: int
    state: State
    has_head: bool


def load(path: Path, resolution: int | None = None) -> Foreign:
    """The weights in a file of any layout named above. Raises ValueError, naming the file, where it holds none."""
    state = read_file(path)
    try:
        return convert(state, resolution)
    except ValueError as error:
        raise KamimError(f"{path}: {error}") from error


def read_file(path: Path) -> State:
    """Tensors of a checkpoint file, by its own names. Raises ValueError where it holds none."""
    if not path.is_file():
        raise KamimError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        _check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch's unpickler raises whatever a damaged or hostile pickle leads to
        raise KamimError(f"{path}: not a checkpoint of tensors alone ({_reason(error)})") from error
    for key in ("model_state_dict", "state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise KamimError(f"{path}: holds no state dict")
    return content


def _check_archive(path: Path) -> None:
    """Raises ValueError for a zip archive that would inflate, before it does: torch.save compresses nothing."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return  # the form of before torch 1.6
        entries = zipfile.ZipFile(file).infolist()
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise KamimError("a TorchScript program; save its state_dict() with torch.save")
    inflated, size = sum(entry.file_size for entry in entries), path.stat().st_size
    if inflated > size:
        raise KamimError(f"{size:,} bytes that inflate to {inflated:,}; save them with torch.save, uncompressed")


def _reason(error: Exception) -> str:
    """Why a file was refused, without torch's advice, which is to load anything."""
    said = one_line(error).rpartition("WeightsUnpickler error: ")[2]
    if called := re.search(r"GLOBAL (\S+)", said):
        return f"it calls {called[1]}"
    first = said.partition(". ")[0][:200]
    if "weights_only" in first or "Weights only" in first:
        return "its form may hold more than tensors"
    return type(error).__name__ if not first or isinstance(error, LookupError) else first


def convert(state: State, resolution: int | None = None, wanted: str | None = None) -> Foreign:
    """Any layout named above -> kamim's, for images of side `resolution` (None: as trained; a Swin's 192).

    Positions are interpolated for another resolution, relative position biases for another window. Raises
    ValueError, naming what is odd, for weights that are none of kamim's architectures, or not of the one wanted.
    """
    renamed = _rename(state)
    renamed = _merge_qkv(renamed)
    if "encoder.layers.0.downsample.reduction.weight" in renamed:  # others merge after a stage, timm before the next
        renamed = {re.sub(r"layers\.(\d+)\.downsample", _next_stage, name): value for name, value in renamed.items()}
    if "mask_token" in renamed:
        renamed["mask_token"] = renamed["mask_token"].flatten()
    architecture = _architecture(renamed)
    if wanted not in (None, architecture):
        raise KamimError(f"these are a {architecture}'s weights, the model asked for is a {wanted}")
    has_head = {"mask_token", "head.0.weight", "head.0.bias"} <= renamed.keys()
    if not has_head:
        renamed = {name: value for name, value in renamed.items() if name.startswith("encoder.")}
    resolution = resolution or _trained_resolution(architecture, renamed)
    with torch.device("meta"):
        model = MaskedImageModel(architecture, resolution)
    fitted = _fit(renamed, model)
    expected = {name for name in model.state_dict() if has_head or name.startswith("encoder.")}
    for name in sorted(expected ^ fitted.keys()):
        where = "is missing" if name in expected else f"is not part of a {architecture}"
        raise KamimError(f"{name} {where}; these weights are of another kind")
    return Foreign(architecture, resolution, fitted, has_head)


def _rename(state: State) -> State:
    renamed: State = {}
    for name, value in state.items():
        if _IGNORED.search(name):
            continue
        check_tensor(name, value)
        for pattern, replacement in _RENAMES:
            name = pattern.sub(replacement, name)
        if not name.startswith(("encoder.", "head.0.", "mask_token")):
            if name.startswith(("head", "fc_norm")):
                continue  # a classifier or a projector, which no evaluation here uses
            name = f"encoder.{name}"
        renamed[name] = value
    return renamed


def check_tensor(name: str, value: Tensor) -> None:
    """Raises ValueError for weights that are no plain array of floats, or larger than what their file holds of them."""
    if value.dtype not in DTYPES:
        raise KamimError(f"{name} is {_name(value.dtype)}; must be one of {', '.join(map(_name, DTYPES))}")
    if value.layout != torch.strided or value.device.type != "cpu":
        raise KamimError(f"{name} is {_name(value.layout)} on {value.device.type}; must be a plain array")
    if value.nbytes > value.untyped_storage().nbytes():
        raise KamimError(f"{name} is {list(value.shape)}, of which the file holds a part")


def _name(constant: object) -> str:
    """What torch calls a dtype or a layout."""
    return str(constant).removeprefix("torch.")


def _merge_qkv(state: State) -> State:
    merged: State = {}
    for name, value in state.items():
        if ".attn.query." in name:
            parts = {part: state.get(name.replace(".query.", f".{part}.")) for part in ("query", "key", "value")}
            found = [part for part in parts.values() if part is not None and part.ndim]
            if len({part.shape for part in found}) != 1 or len(found) < 3:
                shapes = ", ".join(f"{p} {'missing' if t is None else list(t.shape)}" for p, t in parts.items())
                raise KamimError(f"{name}: query, key and value must be of one shape ({shapes})")
            merged[name.replace(".query.", ".qkv.")] = torch.cat(found)
        elif ".attn.key." not in name and ".attn.value." not in name:
            merged[name] = value
    return merged


def _next_stage(match: re.Match[str]) -> str:
    return f"layers.{int(match[1]) + 1}.downsample"


def _shape(model: MaskedImageModel) -> tuple[int, int, bool]:
    return _signature({name: value for name, value in model.state_dict().items() if name.startswith("encoder.")})


def _signature(state: State) -> tuple[int, int, bool]:
    """(width of the patch embedding, number of blocks, whether it is a Swin): tells the architectures apart."""
    width = state[PATCHES].shape[0]
    blocks = {name.partition(".norm1.")[0] for name in state if ".norm1." in name}
    return width, len(blocks), any("relative_position_bias_table" in name for name in state)


def _architecture(state: State) -> str:
    if PATCHES not in state:
        raise KamimError(f"no patch embedding among its {len(state)} tensors; these are no ViT's or Swin's weights")
    if state[PATCHES].ndim != 4:
        raise KamimError(f"{PATCHES} is {list(state[PATCHES].shape)}, a ViT's or Swin's has 4 dimensions")
    for name in ARCHITECTURES:
        with torch.device("meta"):
            if _shape(MaskedImageModel(name, 192)) == _signature(state):
                return name
    width, blocks, swin = _signature(state)
    kind = "Swin" if swin else "ViT"
    raise KamimError(f"a {kind} of width {width} with {blocks} blocks; known are {', '.join(ARCHITECTURES)}")


def _trained_resolution(architecture: str, state: State) -> int:
    if POSITIONS not in state:
        return 192
    return _side(state[POSITIONS]) * ARCHITECTURES[architecture].patch_size


def _side(positions: Tensor) -> int:
    """Tokens along a side, of a table of positions [1, 1 + side^2, D]. Raises ValueError for another shape."""
    side = math.isqrt(positions.shape[1] - 1) if positions.ndim == 3 and positions.shape[1] > 1 else 0
    if positions.ndim != 3 or positions.shape[1] != 1 + side**2 or not side:
        raise KamimError(f"{POSITIONS} is {list(positions.shape)}, must be [1, 1 + n * n, width]")
    return side


def _fit(state: State, model: MaskedImageModel) -> State:
    """Position tables resized to what the model holds."""
    fitted: State = {}
    own = model.state_dict()
    for name, value in state.items():
        wanted = own[name].shape if name in own else value.shape
        if value.shape != wanted and name == POSITIONS and _side(value) and value.shape[::2] == wanted[::2]:
            side = _side(own[name])
            value = resample_abs_pos_embed(value, [side, side], num_prefix_tokens=1)
        elif value.shape != wanted and name.endswith("relative_position_bias_table") and _is_window(value, wanted[1]):
            assert isinstance(model.encoder, SwinTransformer)
            window = model.encoder.get_submodule(name.removeprefix("encoder.").rpartition(".")[0]).window_size
            value = resize_rel_pos_bias_table(value, new_window_size=window, new_bias_shape=wanted)
        elif value.shape != wanted:
            raise KamimError(f"{name} is {tuple(value.shape)}, a {model.name}'s is {tuple(wanted)}")
        fitted[name] = value.detach().clone().contiguous()
    return fitted


def _is_window(table: Tensor, heads: int) -> bool:
    """Whether these are biases of a square window: [(2 w - 1)^2, heads]."""
    side = math.isqrt(table.shape[0]) if table.ndim == 2 else 0
    return side % 2 == 1 and table.shape == (side**2, heads)


def to_timm(state: State) -> State:
    """The encoder alone, in timm's names: what timm.create_model(..., checkpoint_path=FILE) loads."""
    return {name.removeprefix("encoder."): value for name, value in state.items() if name.startswith("encoder.")}


def to_hugging_face(state: State, architecture: str, resolution: int, has_head: bool) -> tuple[dict[str, Any], State]:
    """config.json and weights that Hugging Face's from_pretrained loads.

    For ViTForMaskedImageModeling or SwinForMaskedImageModeling, and for ViTModel or SwinModel of an encoder alone.
    """
    with torch.device("meta"):
        encoder = MaskedImageModel(architecture, resolution).encoder
    known = ARCHITECTURES[architecture]
    config: dict[str, Any] = {
        "image_size": resolution, "patch_size": known.patch_size, "encoder_stride": known.stride,
    }  # fmt: skip
    if isinstance(encoder, VisionTransformer):
        kind, name, inner = "vit", "ViT", "attention"
        block = encoder.blocks[0]
        config |= {
            "hidden_size": encoder.embed_dim, "num_hidden_layers": len(encoder.blocks),
            "num_attention_heads": block.attn.num_heads, "intermediate_size": block.mlp.fc1.out_features,
            "layer_norm_eps": encoder.norm.eps,
        }  # fmt: skip
    else:
        kind, name, inner = "swin", "Swin", "self"
        config |= {
            "embed_dim": encoder.embed_dim, "depths": [len(layer.blocks) for layer in encoder.layers],
            "num_heads": [layer.blocks[0].attn.num_heads for layer in encoder.layers],
            "window_size": known.options["window_size"], "layer_norm_eps": encoder.norm.eps,
        }  # fmt: skip
    config |= {"model_type": kind, "architectures": [f"{name}{'ForMaskedImageModeling' if has_head else 'Model'}"]}
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
