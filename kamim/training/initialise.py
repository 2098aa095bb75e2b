"""Begins a run from the weights of another one, or of a file."""

from dataclasses import asdict, replace

from torch import nn

from kamim import KamimError
from kamim.config.pretrain import Pretrain
from kamim.models import interop
from kamim.models.architectures import architecture
from kamim.models.positions import fix_sincos
from kamim.training import checkpoint
from kamim.training.model import Model


def initialise(model: nn.Module, config: Pretrain) -> None:
    """Loads config.init_from, with position embeddings interpolated to the resolution. Missing weights stay random.

    Raises KamimError if it cannot be read or is of another architecture.
    """
    path = config.init_from
    assert path is not None
    try:
        if interop.weights_file(path) is not None:
            converted = interop.load(path, config.data.resolution, config.model.name)
        else:
            saved = checkpoint.read(path)
            decoder = saved.config.mae_decoder
            hints = replace(
                interop.hints_of(saved.config.model.name),
                architecture=config.model.name,
                decoder_heads=None if decoder is None else decoder.heads,
            )
            converted = interop.convert(saved.model_state(), config.data.resolution, hints)
    except KamimError as error:
        raise KamimError(f"init_from = {path}: {str(error).removeprefix(f'{path}: ')}") from error
    own = architecture(converted.architecture, converted.positions).positions
    if (own == "relative") != (architecture(config.model.name, config.model.positions).positions == "relative"):
        raise KamimError(
            f"init_from = {path}: its positions are {own or 'absolute'}; set model.positions={own or 'null'}"
        )
    state, method = converted.state, "simmim" if converted.decoder is None else "mae"
    whole = converted.has_head and method == config.method
    if not whole:
        state = {name: value for name, value in state.items() if name.startswith("encoder.")}
    theirs, ours = converted.decoder, config.mae_decoder
    if theirs is not None and ours is not None and asdict(theirs) != ours.model_dump():
        raise KamimError(
            f"init_from = {path}: its decoder is another; set decoder.width={theirs.width} "
            f"decoder.depth={theirs.depth} decoder.heads={theirs.heads}"
        )
    model.load_state_dict(state, strict=whole)
    if config.model.positions == "sincos":
        assert isinstance(model, Model)
        fix_sincos(model.encoder)  # they stay what they are, whatever positions the weights came with
