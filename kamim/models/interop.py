"""Weights of other projects -> kamim's names, and back to timm's.

Layouts that are read: the authors' released checkpoints (Hugging Face ViT and Swin ForMaskedImageModeling, bare or
under `model_state_dict`; names of transformers 4 and 5), Hugging Face folders of ViT, ViTMAE, DINOv2 and Swin, timm
state dicts and folders, and the public checkpoints of microsoft/SimMIM, MAE, DINO, DINOv2 and MoCo v3. Files are
safetensors, or pickles read with weights_only.
"""

import logging
import math
import re
import warnings
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor

from kamim import KamimError
from kamim.models.architectures import architecture
from kamim.models.file_kind import ARCHITECTURE, DECODER_HEADS, WEIGHTS, check_weights
from kamim.models.foreign_config import Hints, read_hints
from kamim.models.mae_layout import DecoderSize, decoder_names, decoder_size, fit_decoder
from kamim.models.masked_autoencoder import MaskedAutoencoder
from kamim.models.masked_image_model import MaskedImageModel
from kamim.models.presets import ARCHITECTURES, Architecture, Positions
from kamim.storage.escape import one_line

State = dict[str, Tensor]
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PATCHES, POSITIONS = "encoder.patch_embed.proj.weight", "encoder.pos_embed"
SHARED_BIAS = "encoder.rel_pos_bias.relative_position_bias_table"
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")  # of Hugging Face
# What authors keep beside the weights in a pickle: options, as plain data. CfgNode is microsoft/SimMIM's dict.
OPTIONS: list[Any] = [Namespace, (OrderedDict, "yacs.config.CfgNode")]
# Models of timm that public checkpoints are of, beside the presets. Any other is read if it is named.
PUBLIC = (
    "vit_tiny_patch16_224",
    "vit_small_patch16_224",
    "vit_base_patch16_224",
    "vit_large_patch16_224",
    "vit_huge_patch14_224",
    "vit_small_patch8_224",
    "vit_base_patch8_224",
    "swin_tiny_patch4_window7_224",
    "swin_small_patch4_window7_224",
    "swin_base_patch4_window7_224",
    "swin_large_patch4_window7_224",
    "swin_base_patch4_window12_384",
    "swin_large_patch4_window12_384",
)
MAX_TENSORS, MAX_NAME = 10_000, 500  # tensors of a file, and characters of a name; the largest public ViTs have 1,000
TIMM_EPS, HUGGING_FACE_EPS = 1e-6, 1e-12  # of a ViT's LayerNorms, by default
HEAD_WIDTH = 64  # features of an attention head of a ViT, by Vaswani et al. 2017 and nearly all models since
MOCO_SMALL, MOCO_HEADS = 384, 12  # width and heads of MoCo v3's ViT-S, whose heads have half that width
_LOG = logging.getLogger(__name__)

# Names of transformers (4 and 5), microsoft/SimMIM, MoCo v3 and DINO -> names of timm, below `encoder.`.
_RENAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^(?:module\.|_orig_mod\.)+", ""),
        (r"^(?:base_encoder|backbone)\.", ""),
        (r"^(?:(?:vit|swin|dinov2\w*)\.)?embeddings\.mask_token$|^encoder\.mask_token$", "mask_token"),
        (r"^decoder\.0\.", "head.0."),
        (r"^(?:vit|swin|dinov2\w*)\.", "encoder."),
        (r"^encoder\.encoder\.", "encoder."),
        (r"^(embeddings|layernorm)\.", r"encoder.\1."),
        (r"^encoder\.embeddings\.(cls_token|register_tokens)", r"encoder.\1"),
        (r"^encoder\.embeddings\.position_embeddings", "encoder.pos_embed"),
        (r"^encoder\.embeddings\.patch_embeddings\.projection\.", "encoder.patch_embed.proj."),
        (r"^encoder\.embeddings\.norm\.", "encoder.patch_embed.norm."),
        (r"^encoder\.layernorm\.", "encoder.norm."),
        (r"^(?:encoder\.)?layers?\.(\d+)\.(?!blocks|downsample)", r"encoder.blocks.\1."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.attention\.(?:attention\.|self\.)?(query|key|value)\.", r".attn.\1."),
        (r"\.attention\.q_proj\.", ".attn.query."),
        (r"\.attention\.k_proj\.", ".attn.key."),
        (r"\.attention\.v_proj\.", ".attn.value."),
        (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
        (r"\.attention\.(?:\w+\.){0,2}relative_position_bias_table$", ".attn.relative_position_bias_table"),
        (r"\.gamma_([12])$|\.layer_scale([12])\.lambda1$", r".ls\1\2.gamma"),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    )
)
# Buffers, and parts of a method that its evaluation leaves out. A MAE's mask token is of its decoder, too.
_IGNORED = re.compile(
    r"relative_position_index|attn_mask|momentum_encoder|predictor|base_encoder\.head\.|^(?:module\.)?decoder_"
    r"|^decoder\.(?:decoder_|mask_token$)"  # Hugging Face's MAE
)
# Classifiers, projectors and poolings, which no evaluation here uses.
_HEADS = ("head", "fc_norm", "attn_pool", "pooler", "classifier", "encoder.pooler")
_TIMM_NAMES = re.compile(r"^(?:module\.|base_encoder\.|backbone\.)*blocks\.\d+\.attn\.qkv\.")


@dataclass(frozen=True)
class Foreign:
    """Weights in kamim's names. has_head: with all that it needs to reconstruct.

    That is SimMIM's mask token and pixel head, or MAE's decoder, whose size is then `decoder`. positions: "relative"
    for an architecture whose own are absolute; None is its own.
    """

    architecture: str
    resolution: int
    state: State
    has_head: bool
    positions: Positions | None = None
    decoder: DecoderSize | None = None

    def build_model(self) -> MaskedImageModel | MaskedAutoencoder:
        """Returns a model of these weights."""
        if self.decoder is None:
            model: MaskedImageModel | MaskedAutoencoder = MaskedImageModel(
                self.architecture, self.resolution, positions=self.positions
            )
        else:
            model = MaskedAutoencoder(self.architecture, self.resolution, **asdict(self.decoder))
        model.load_state_dict(self.state, strict=self.has_head)
        return model


@dataclass(frozen=True)
class _Kind:
    """Properties of an encoder that the shapes of its weights determine."""

    swin: bool
    width: int
    blocks: int
    patch: int
    registers: int
    layer_scale: bool
    shared_bias: bool

    def __str__(self) -> str:
        return f"a {'Swin' if self.swin else 'ViT'} of width {self.width} with {self.blocks} blocks"

    def details(self) -> str:
        """Returns __str__ and all other properties."""
        parts = [f"{self}", f"patches of {self.patch} px", f"{self.registers} registers"]
        return ", ".join(parts + ["layer scale"] * self.layer_scale + ["shared position biases"] * self.shared_bias)


def weights_file(path: Path) -> Path | None:
    """Returns the file of weights at `path`: itself, or that of a Hugging Face folder; None if it is neither."""
    if path.is_file():
        return path
    if (path / "config.json").is_file():
        return next((path / name for name in FOLDER_FILES if (path / name).is_file()), None)
    return None


def load(path: Path, resolution: int | None = None, name: str | None = None) -> Foreign:
    """Loads the weights of a file, or of a Hugging Face folder, of any layout named above.

    resolution: side of the images in px; None is as trained. name: the architecture, see architectures.architecture;
    None finds it. Raises KamimError, naming the file, if it holds none, or those of another architecture.
    """
    file = weights_file(path)
    if file is None:
        raise KamimError(f"{path}: no such file, and no folder with a config.json and {' or '.join(FOLDER_FILES)}")
    state = read_file(file)
    try:
        hints = _file_hints(file)
        if name is not None:
            hints = replace(hints, architecture=_known(name))
        return convert(state, resolution, hints)
    except KamimError as error:
        raise KamimError(f"{path}: {error}") from error


def _file_hints(file: Path) -> Hints:
    """Reads hints from config.json beside the file, or from the metadata of an exported file."""
    config = file.parent / "config.json"
    if file.name in FOLDER_FILES and config.is_file():
        hints = read_hints(config)
        return hints if hints.architecture is None else hints_of(_known(hints.architecture))
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as opened:
            about = opened.metadata() or {}
        if name := about.get(ARCHITECTURE):
            return replace(hints_of(_known(name)), decoder_heads=_decoder_heads(about))
    return Hints()


def _decoder_heads(about: Mapping[str, str]) -> int | None:
    """Returns the heads of a MAE's decoder by an export's metadata. Raises KamimError if it is not such a number."""
    heads = about.get(DECODER_HEADS)
    if heads is None:
        return None
    if not re.fullmatch("[1-9][0-9]{0,3}", heads):
        raise KamimError(f"{DECODER_HEADS} = {one_line(heads)[:100]}: must be a whole number from 1 to 9999")
    return int(heads)


def hints_of(name: str) -> Hints:
    """Returns everything that is to be known about an architecture."""
    facts = _facts(name, architecture(name))
    return Hints(name, facts.norm_eps, facts.heads)


def _known(name: str) -> str:
    """Returns the name. Raises KamimError unless it is that of an architecture."""
    try:
        architecture(name)
    except KamimError as error:
        raise KamimError(f"model = {one_line(name)[:100]}: {error}") from error
    return name


def _conventions(state: State) -> Hints:
    """Returns what the layout of a state dict, under its own names, implies: timm's epsilon for timm's names and
    SimMIM's, otherwise Hugging Face's; 12 heads for MoCo v3's ViT-S, None for others."""
    of_timm = any(_TIMM_NAMES.match(name) or name.endswith(".attn.q_bias") for name in state)
    positions = next((value for name, value in state.items() if name.rpartition(".")[2] == "pos_embed"), None)
    moco = any("base_encoder." in name for name in state) or (positions is not None and _is_moco(positions))
    small = any(
        name.endswith("patch_embed.proj.weight") and value.shape[:1] == (MOCO_SMALL,) for name, value in state.items()
    )
    return Hints(norm_eps=TIMM_EPS if of_timm else HUGGING_FACE_EPS, heads=MOCO_HEADS if moco and small else None)


def _is_moco(positions: Tensor) -> bool:
    """Returns whether a table of positions is MoCo v3's, which is not trained: 0 for the class token, then sines and
    cosines of the row, then of the column (MAE's has the column first). It shows MoCo's weights under other names."""
    side = math.isqrt(max(0, positions.shape[1] - 1)) if positions.ndim == 3 else 0
    if side < 2 or positions.shape != (1, 1 + side**2, MOCO_SMALL):
        return False
    angles = torch.arange(side)[:, None] / 10_000 ** (torch.arange(MOCO_SMALL // 4) / (MOCO_SMALL // 4))
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    table = torch.cat([waves.repeat_interleave(side, dim=0), waves.repeat(side, 1)], dim=1)
    expected = torch.cat([torch.zeros(1, MOCO_SMALL), table])
    return torch.allclose(positions[0].float(), expected, atol=0.01)  # also in half precision


def read_file(path: Path) -> State:
    """Returns the tensors of a checkpoint file, by its own names. Raises KamimError if it holds none."""
    if not path.is_file():
        raise KamimError(f"{path}: no such file")
    check_weights(path)
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            _check_archive(path)
            with torch.serialization.safe_globals(OPTIONS):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch's unpickler raises whatever a damaged or hostile pickle leads to
        raise KamimError(f"{path}: not a checkpoint of tensors alone ({_reason(error)}); {WEIGHTS}") from error
    for key in ("model_state_dict", "state_dict", "model", "teacher"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise KamimError(f"{path}: holds no state dict")
    _check_names(path, content)
    return content


def _check_names(path: Path, names: Collection[str]) -> None:
    """Raises KamimError for more tensors, or longer names, than any encoder has."""
    if len(names) > MAX_TENSORS:
        raise KamimError(f"{path}: holds {len(names):,} tensors; must be at most {MAX_TENSORS:,}")
    for name in names:
        if len(name) > MAX_NAME:
            raise KamimError(f"{path}: {name}: a tensor's name of {len(name):,} characters; must be at most {MAX_NAME}")


def _check_archive(path: Path) -> None:
    """Raises KamimError for a compressed zip archive before it is inflated; torch.save does not compress."""
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
    """Returns the reason of torch's refusal, without its advice to load the file anyway."""
    reason = one_line(error).rpartition("WeightsUnpickler error: ")[2]
    if called := re.search(r"GLOBAL (\S+)", reason):
        return f"it calls {called[1]}"
    first = reason.partition(". ")[0][:200]
    if "weights_only" in first or "Weights only" in first:
        return "its form may hold more than tensors"
    return type(error).__name__ if not first or isinstance(error, LookupError) else first


def convert(state: State, resolution: int | None = None, hints: Hints | None = None) -> Foreign:
    """Converts weights of any layout named above, for images of side `resolution` in px; None is as trained.

    Positions are interpolated for another resolution, relative position biases for another window, which is logged as
    a warning. Raises KamimError, naming what differs, for weights of no architecture that is known, or not of the one
    that hints name.
    """
    renamed = _rename(state)
    if PATCHES not in renamed:
        raise KamimError(f"no patch embedding among its {len(state)} tensors; {_other_kind(state)}")
    for key, value in state.items():
        if not _IGNORED.search(key):
            check_tensor(key, value)
    renamed = _merge_qkv(_fold_registers(renamed))
    if "encoder.layers.0.downsample.reduction.weight" in renamed:  # others merge after a stage, timm before the next
        renamed = {re.sub(r"layers\.(\d+)\.downsample", _next_stage, name): value for name, value in renamed.items()}
    if "mask_token" in renamed:
        renamed["mask_token"] = renamed["mask_token"].flatten()
    name = _architecture(renamed, resolution, hints or Hints(), _conventions(state))
    has_head = {"mask_token", "head.0.weight", "head.0.bias"} <= renamed.keys()
    if not has_head:
        renamed = {key: value for key, value in renamed.items() if key.startswith("encoder.")}
    resolution = resolution or _trained_resolution(name, renamed)
    architecture(name).check_resolution(resolution, "resolution")
    positions: Positions | None = "relative" if SHARED_BIAS in renamed else None
    with torch.device("meta"):
        model = MaskedImageModel(name, resolution, positions=positions)
    fitted = _fit(renamed, model)
    expected = {key for key in model.state_dict() if has_head or key.startswith("encoder.")}
    for key in sorted(expected ^ fitted.keys()):
        difference = "is missing" if key in expected else f"is not part of a {name}"
        raise KamimError(f"{key} {difference}; these weights are of another kind")
    _report_windows(renamed, fitted, model)
    if decoder := _decoder(state):
        known_heads = (hints or Hints()).decoder_heads
        size = decoder_size(decoder, known_heads)
        if known_heads is None:
            _LOG.warning("a decoder's weights do not hold its number of heads; %d are assumed, 32 wide", size.heads)
        with torch.device("meta"):
            own = MaskedAutoencoder(name, resolution, **asdict(size)).state_dict()
        fitted |= fit_decoder(decoder, own, resolution // architecture(name).patch_size)
        return Foreign(name, resolution, fitted, has_head=True, decoder=size)
    return Foreign(name, resolution, fitted, has_head, None if positions == architecture(name).positions else positions)


def _decoder(state: State) -> State:
    """Returns the weights of a MAE's decoder under the public code's names; {} if there is none."""
    names = decoder_names(state)
    renamed: State = {}
    for name, public in names.items():
        check_tensor(name, state[name])
        inner = re.sub(r"^decoder_blocks\.", "encoder.blocks.", public)  # a block is named as the encoder's
        for pattern, replacement in _RENAMES:
            inner = pattern.sub(replacement, inner)
        renamed[re.sub(r"^encoder\.blocks\.", "decoder_blocks.", inner)] = state[name]
    return _merge_qkv(renamed)


def _rename(state: State) -> State:
    renamed: State = {}
    pooled_norm: State = {}
    has_decoder = any(name.removeprefix("module.").startswith("decoder_") for name in state)
    for name, value in state.items():
        if _IGNORED.search(name) or (has_decoder and name.removeprefix("module.") == "mask_token"):
            continue
        for pattern, replacement in _RENAMES:
            name = pattern.sub(replacement, name)
        if name.startswith("fc_norm."):
            pooled_norm[name.replace("fc_norm.", "encoder.norm.")] = value
        if name.startswith("head.0.") or not name.startswith(_HEADS):
            renamed[name if name.startswith(("encoder.", "head.0.", "mask_token")) else f"encoder.{name}"] = value
    return {**pooled_norm, **renamed}  # an encoder that norms its pooled tokens has no other final norm


def _other_kind(state: State) -> str:
    """Returns what weights are that hold no patch embedding."""
    if normed := next((name for name in state if name.endswith(("running_mean", "num_batches_tracked"))), None):
        return f"{normed} is of a BatchNorm, so these are a convolutional network's weights, not a ViT's or Swin's"
    return "these are no ViT's or Swin's weights"


def _fold_registers(state: State) -> State:
    """Returns DINOv2's weights with registers as timm has them: the class token's position added to the token."""
    if "encoder.register_tokens" not in state:
        return state
    state = {**state, "encoder.reg_token": state["encoder.register_tokens"]}
    del state["encoder.register_tokens"]
    token, positions = state.get("encoder.cls_token"), state.get(POSITIONS)
    if token is not None and positions is not None and positions.ndim == token.ndim == 3:
        state |= {"encoder.cls_token": token + positions[:, :1], POSITIONS: positions[:, 1:]}
    return state


def check_tensor(name: str, value: Tensor) -> None:
    """Raises KamimError unless a tensor is a plain array of floats, all of which its file holds."""
    if value.dtype not in DTYPES:
        raise KamimError(f"{name} is {_name(value.dtype)}; must be one of {', '.join(map(_name, DTYPES))}")
    if value.layout != torch.strided or value.device.type != "cpu":
        raise KamimError(f"{name} is {_name(value.layout)} on {value.device.type}; must be a plain array")
    if value.nbytes > value.untyped_storage().nbytes():
        raise KamimError(f"{name} is {list(value.shape)}, of which the file holds a part")


def _name(constant: object) -> str:
    """Returns torch's name of a dtype or layout."""
    return str(constant).removeprefix("torch.")


def _merge_qkv(state: State) -> State:
    """Joins query, key and value to one matrix, as in timm; SimMIM's keys, which have no bias, get one of 0."""
    merged: State = {}
    for name, value in state.items():
        if ".attn.query." in name:
            merged[name.replace(".query.", ".qkv.")] = _joined(state, name, ".query.", (".query.", ".key.", ".value."))
        elif name.endswith(".attn.q_bias"):
            query, zeros, other = _joined(state, name, "q_bias", ("q_bias", "q_bias", "v_bias")).chunk(3)
            merged[name.replace("q_bias", "qkv.bias")] = torch.cat([query, torch.zeros_like(zeros), other])
        elif not re.search(r"\.attn\.(?:(?:key|value)\.|v_bias$)", name):
            merged[name] = value
    return merged


def _joined(state: State, name: str, part: str, parts: tuple[str, str, str]) -> Tensor:
    tensors = {other.strip("."): state.get(name.replace(part, other)) for other in parts}
    present = [t for t in (state.get(name.replace(part, other)) for other in parts) if t is not None and t.ndim]
    if len({t.shape for t in present}) != 1 or len(present) < 3:
        shapes = ", ".join(f"{p} {'missing' if t is None else list(t.shape)}" for p, t in tensors.items())
        raise KamimError(f"{name}: query, key and value must be of one shape ({shapes})")
    return torch.cat(present)


def _next_stage(match: re.Match[str]) -> str:
    return f"layers.{int(match[1]) + 1}.downsample"


def _kind(state: State) -> _Kind:
    if state[PATCHES].ndim != 4:
        raise KamimError(f"{PATCHES} is {list(state[PATCHES].shape)}, a ViT's or Swin's has 4 dimensions")
    registers = state.get("encoder.reg_token")
    return _Kind(
        swin=any(name.startswith("encoder.layers.") for name in state),
        width=state[PATCHES].shape[0],
        blocks=len({name.partition(".norm1.")[0] for name in state if ".norm1." in name}),
        patch=state[PATCHES].shape[-1],
        registers=registers.shape[1] if registers is not None and registers.ndim == 3 else 0,
        layer_scale=any(name.endswith(".ls1.gamma") for name in state),
        shared_bias=SHARED_BIAS in state,
    )


def _window(state: State) -> int | None:
    """Returns the tokens along a side of the windows of a Swin's first block."""
    table = state.get("encoder.layers.0.blocks.0.attn.relative_position_bias_table")
    return None if table is None or not _is_window(table) else (math.isqrt(table.shape[0]) + 1) // 2


@dataclass(frozen=True)
class _Facts:
    """The properties by which architectures are compared. heads: of a ViT's blocks. window: see _window."""

    kind: _Kind
    heads: int | None
    window: int | None
    norm_eps: float


@cache
def _facts(name: str, known: Architecture) -> _Facts:
    with torch.device("meta"):
        model = MaskedImageModel(name, known.multiple, positions=known.positions)
    encoder, state = model.encoder, model.state_dict()
    heads = None if isinstance(encoder, SwinTransformer) else encoder.blocks[0].attn.num_heads
    return _Facts(_kind(state), heads, _window(state), encoder.norm.eps)


def _architecture(state: State, resolution: int | None, hints: Hints, assumed: Hints) -> str:
    """Finds the architecture of these weights: of those with their shapes, the one that agrees with most hints.

    In this order: the number of heads, the resolution, a Swin's window, the epsilon of LayerNorm. assumed: what the
    layout implies if neither the weights nor hints say it.
    """
    kind, window, heads = _kind(state), _window(state), hints.heads or assumed.heads
    eps = hints.norm_eps or (None if kind.swin else assumed.norm_eps)
    chosen: tuple[tuple[bool, bool, bool, bool], str, _Facts] | None = None
    for name in [hints.architecture] if hints.architecture else [*ARCHITECTURES, *PUBLIC]:
        known = architecture(name)
        if kind.shared_bias and not known.is_vit:
            continue
        facts = _facts(name, known := known.with_positions("relative" if kind.shared_bias else None))
        usual = None if kind.swin else kind.width // HEAD_WIDTH
        lost = (
            (heads or usual) not in (None, facts.heads),
            bool(resolution and resolution % known.multiple),
            facts.window != window,
            eps not in (None, facts.norm_eps),
        )
        if facts.kind == kind and (chosen is None or lost < chosen[0]):
            chosen = lost, name, facts
            if not any(lost):
                break
    if chosen is None and hints.architecture:
        same = next((name for name in (*ARCHITECTURES, *PUBLIC) if _facts(name, architecture(name)).kind == kind), None)
        theirs = f"a {same}'s weights" if same else f"weights of {kind.details()}"
        requested = _facts(hints.architecture, architecture(hints.architecture)).kind
        raise KamimError(f"these are {theirs}, the requested model is a {hints.architecture}, {requested.details()}")
    if chosen is None:
        raise KamimError(
            f"{kind}; known are {', '.join([*ARCHITECTURES, *PUBLIC])}; give the name of others as model=NAME"
        )
    lost, name, facts = chosen
    if heads not in (None, facts.heads) and not kind.swin:
        raise KamimError(f"{kind} and {heads} heads, a {name} has {facts.heads}; give its name as model=NAME")
    if hints.heads is None and hints.architecture is None and not kind.swin and not kind.shared_bias:
        _LOG.warning(
            "weights do not hold their number of heads; %d are assumed, those of a %s; name the model if it has others",
            facts.heads,
            name,
        )
    if lost[3] and (hints.norm_eps or hints.architecture is None):
        _LOG.warning(
            "LayerNorm's epsilon is %g in a %s, %g is expected of this file; features differ a little",
            facts.norm_eps,
            name,
            eps,
        )
    return name


def _trained_resolution(name: str, state: State) -> int:
    """Returns the side in px of the images that the positions are of; of a Swin, that to which its windows fit."""
    known = architecture(name)
    if POSITIONS in state:
        return _side(state[POSITIONS], _prefix(name)) * known.patch_size
    if SHARED_BIAS in state:
        return (math.isqrt(max(0, len(state[SHARED_BIAS]) - 3)) + 1) // 2 * known.patch_size
    return known.multiple


def _prefix(name: str) -> int:
    """Returns the number of a ViT's positions that are those of class and register tokens."""
    with torch.device("meta"):
        model = MaskedImageModel(name, architecture(name).multiple)
    positions = model.encoder.pos_embed
    return 0 if positions is None else positions.shape[1] - 1


def _side(positions: Tensor, prefix: int) -> int:
    """Returns the side of a table of positions [1, P + side^2, D]. Raises KamimError for another shape."""
    count = positions.shape[1] - prefix if positions.ndim == 3 else 0
    side = math.isqrt(max(0, count))
    if count != side**2 or not side:
        raise KamimError(f"{POSITIONS} is {list(positions.shape)}, must be [1, {prefix} + n * n, width]")
    return side


def _fit(state: State, model: MaskedImageModel) -> State:
    """Resizes tables of positions and of position biases to those of the model at its resolution."""
    fitted: State = {}
    own = model.state_dict()
    for name, value in state.items():
        wanted = own[name].shape if name in own else value.shape
        if value.shape != wanted and name == POSITIONS:
            prefix = _prefix(model.name)
            _side(value, prefix)
            if value.shape[::2] == wanted[::2]:
                side = _side(own[name], prefix)
                value = resample_abs_pos_embed(value, [side, side], num_prefix_tokens=prefix)
        elif value.shape != wanted and name.endswith("relative_position_bias_table"):
            extra = 3 if name == SHARED_BIAS else 0  # to, from and between class tokens
            if value.ndim == 2 and value.shape[1] == wanted[1] and _is_window(value, extra):
                side = (math.isqrt(wanted[0] - extra) + 1) // 2
                with warnings.catch_warnings():  # timm's indexing and searching, which torch warns of
                    warnings.simplefilter("ignore", UserWarning)
                    value = resize_rel_pos_bias_table(value, new_window_size=(side, side), new_bias_shape=tuple(wanted))
        if value.shape != wanted:
            raise KamimError(f"{name} is {tuple(value.shape)}, a {model.name}'s is {tuple(wanted)}")
        fitted[name] = value.detach().clone().contiguous()
    return fitted


def _report_windows(state: State, fitted: State, model: MaskedImageModel) -> None:
    """Logs that a Swin's tables of position biases were interpolated, if they were."""
    tables = [name for name in fitted if name.endswith("relative_position_bias_table") and name != SHARED_BIAS]
    for name in tables:
        if state[name].shape != fitted[name].shape:
            old, new = ((math.isqrt(len(table)) + 1) // 2 for table in (state[name], fitted[name]))
            _LOG.warning(
                "tables of position biases are interpolated from windows of %s tokens to %s, those of a %s at %s px",
                old,
                new,
                model.name,
                model.resolution,
            )
            return


def _is_window(table: Tensor, extra: int = 0) -> bool:
    """Returns whether these are biases of a square window, and `extra` others: [(2 w - 1)^2 + extra, heads]."""
    rows = table.shape[0] - extra if table.ndim == 2 else 0
    side = math.isqrt(max(0, rows))
    return side % 2 == 1 and rows == side**2


def to_timm(state: State) -> State:
    """Returns the encoder under timm's names, which timm.create_model(..., checkpoint_path=FILE) loads."""
    return {name.removeprefix("encoder."): value for name, value in state.items() if name.startswith("encoder.")}
