"""The model of a pretraining."""

from kamim.config.pretrain import Decoder, Pretrain
from kamim.models.masked_autoencoder import MaskedAutoencoder
from kamim.models.masked_image_model import MaskedImageModel

Model = MaskedImageModel | MaskedAutoencoder
"""A module (images, mask) -> reconstruction, with an `encoder`, a `name` and a `resolution` in px."""


def build_model(config: Pretrain) -> Model:
    """Returns the model of a run with random weights, on torch's default device."""
    model, resolution = config.model, config.data.resolution
    if config.method == "simmim":
        return MaskedImageModel(model.name, resolution, model.drop_path, model.positions)
    decoder = config.decoder or Decoder()
    return MaskedAutoencoder(
        model.name, resolution, model.drop_path, model.positions, decoder.width, decoder.depth, decoder.heads
    )
