"""The model of a pretraining, and its optimiser."""

import torch
from torch import nn

from kamim.config.pretrain import Pretrain, PretrainOptim
from kamim.models.masked_autoencoder import MaskedAutoencoder
from kamim.models.masked_image_model import MaskedImageModel

Model = MaskedImageModel | MaskedAutoencoder
"""A module (images, mask) -> reconstruction, with an `encoder`, a `name` and a `resolution` in px."""


def build_model(config: Pretrain) -> Model:
    """Returns the model of a run with random weights, on torch's default device."""
    model, resolution = config.model, config.data.resolution
    decoder = config.mae_decoder
    if decoder is None:
        return MaskedImageModel(model.name, resolution, model.drop_path, model.positions)
    return MaskedAutoencoder(
        model.name, resolution, model.drop_path, model.positions, decoder.width, decoder.depth, decoder.heads
    )


def build_optimizer(optim: PretrainOptim, model: Model) -> torch.optim.Optimizer:
    """Returns fused AdamW. If optim.decay_all is false, vectors, positions and tokens have no weight decay."""
    exempt = {"mask_token", *(f"encoder.{name}" for name in model.encoder.no_weight_decay())}

    def decays(name: str, parameter: nn.Parameter) -> bool:
        return optim.decay_all or not (parameter.ndim < 2 or name in exempt or name.endswith("bias_table"))

    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for name, p in named if decays(name, p) == decayed], "weight_decay": decayed * optim.weight_decay}
        for decayed in (True, False)
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=optim.lr, betas=optim.betas, fused=True)
