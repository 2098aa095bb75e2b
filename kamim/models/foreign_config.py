"""config.json of a folder of weights, of transformers or of timm: what the weights themselves do not hold."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kamim import KamimError
from kamim.storage.escape import one_line

# What kamim's encoders compute, and transformers' ViT and Swin by default. Other values keep the shapes of the weights.
COMPUTED = {"hidden_act": "gelu", "qkv_bias": True}


@dataclass(frozen=True)
class Hints:
    """Properties of an encoder that its weights do not determine. architecture: its name, if it has to be that.

    norm_eps: the epsilon of its LayerNorms. heads: of each block of a ViT. decoder_heads: of MAE's decoder. None is
    unknown.
    """

    architecture: str | None = None
    norm_eps: float | None = None
    heads: int | None = None
    decoder_heads: int | None = None


def read_hints(file: Path) -> Hints:
    """Reads a config.json. The name in a timm folder is not checked.

    Raises KamimError if it is not JSON, or of an encoder that computes something else than kamim's from such weights.
    """
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise KamimError(f"{file.name} is not JSON: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise KamimError(f"{file.name} holds {type(content).__name__}, must hold keys and values")
    if isinstance(name := content.get("architecture"), str):
        return Hints(name)
    for key, value in COMPUTED.items():
        if content.get(key, value) != value:
            raise _unlike(file, content, key, f"kamim's encoders have {json.dumps(value)} only")
    side, eps = content.get("image_size"), content.get("layer_norm_eps")
    if isinstance(side, list) and len(set(map(str, side))) > 1:
        raise _unlike(file, content, "image_size", "must be a square")
    if eps is not None and not (type(eps) in (int, float) and math.isfinite(eps) and eps > 0):
        raise _unlike(file, content, "layer_norm_eps", "must be a number above 0, such as 1e-12")
    for key in ("num_attention_heads", "decoder_num_attention_heads"):
        if key in content and not (type(content[key]) is int and content[key] > 0):
            raise _unlike(file, content, key, "must be a whole number above 0")
    return Hints(
        norm_eps=None if eps is None else float(eps),
        heads=content.get("num_attention_heads"),
        decoder_heads=content.get("decoder_num_attention_heads"),
    )


def _unlike(file: Path, content: dict[str, Any], key: str, allowed: str) -> KamimError:
    return KamimError(f"{file.name}: {key} = {one_line(json.dumps(content[key]))[:100]}: {allowed}")
