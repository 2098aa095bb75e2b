"""MAE's decoder in other layouts: the public code's, whose names are ours, and Hugging Face's ViTMAEForPreTraining."""

import re
from dataclasses import dataclass

from torch import Tensor

from kamim import KamimError
from kamim.models.positions import sincos_table

State = dict[str, Tensor]
HEAD_WIDTH = 32  # of the public decoders: width 512, 16 heads
_PART = re.compile(
    r"(?:module\.)?(?:decoder\.)?(mask_token$|decoder_(?:embed|pos_embed|blocks|layers|encoder|norm|pred)\b.*)"
)
# As transformers names blocks, and as its version 5 saves them.
_BLOCKS = re.compile(r"^decoder_(?:layers|encoder\.layer)\.")
_BLOCK = re.compile(r"decoder_blocks\.(\d+)\.")


@dataclass(frozen=True)
class DecoderSize:
    """Width, number of blocks, and heads of MAE's decoder."""

    width: int
    depth: int
    heads: int


def decoder_names(state: State) -> dict[str, str]:
    """Returns {name in a file: public name} of the weights of a MAE's decoder; {} for weights of another method."""
    names = {name: _BLOCKS.sub("decoder_blocks.", match[1]) for name in state if (match := _PART.match(name))}
    return names if "decoder_embed.weight" in names.values() and "decoder_pred.weight" in names.values() else {}


def decoder_size(decoder: State, heads: int | None) -> DecoderSize:
    """Returns the size of a decoder under the public names. heads: None is width / 32, as the public decoders have.

    Raises KamimError if it has no blocks, or a width that is not a multiple of 4 and of the heads.
    """
    embed = decoder["decoder_embed.weight"]
    width = len(embed) if embed.ndim == 2 else 0
    depth = len({match[1] for name in decoder if (match := _BLOCK.match(name))})
    heads = heads or max(1, width // HEAD_WIDTH)
    if not width or not depth or width % heads or width % 4:
        raise KamimError(
            f"decoder_embed.weight is {list(embed.shape)} of a decoder with {depth} blocks and {heads} heads; its "
            "width must be a multiple of 4 and of the heads"
        )
    return DecoderSize(width, depth, heads)


def fit_decoder(decoder: State, own: State, grid: int) -> State:
    """Returns the decoder's weights with sine-cosine positions of a grid x grid image.

    own: the weights of a MaskedAutoencoder of its size. Raises KamimError, naming the first difference.
    """
    expected = {name: value for name, value in own.items() if not name.startswith("encoder.")}
    positions = expected["decoder_pos_embed"]
    classes = positions.shape[1] - grid**2
    fitted = {**decoder, "decoder_pos_embed": sincos_table(positions.shape[2], grid, classes)}
    for name in sorted(expected.keys() | fitted.keys()):
        theirs, ours = (list(d[name].shape) if name in d else "nothing" for d in (fitted, expected))
        if theirs != ours:
            raise KamimError(f"{name} is {theirs}, of such a MAE it is {ours}; these weights are of another kind")
    return {name: value.detach().clone().contiguous() for name, value in fitted.items()}


def to_public(state: State) -> State:
    """Returns a MaskedAutoencoder's weights under the names of the public code, whose encoder has no prefix."""
    return {name.removeprefix("encoder."): value for name, value in state.items()}
