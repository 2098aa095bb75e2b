"""Fine-tuning: trains the whole encoder with a linear layer on the mean of its last, normed patch tokens."""

from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kamim.models.readout import depth, prefix, tokens_after


class Classifier(nn.Module):
    """Maps images to logits: final LayerNorm, class token dropped, mean, one linear layer (the released code's)."""

    def __init__(self, encoder: VisionTransformer | SwinTransformer, classes: int):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.num_features, classes)

    def forward(self, images: Tensor) -> Tensor:
        """images: float [B, 3, R, R], normalised. Returns [B, classes]."""
        tokens = self.encoder.norm(tokens_after(self.encoder, images, depth(self.encoder)))
        logits: Tensor = self.head(tokens[:, prefix(self.encoder) :].mean(dim=1))
        return logits


class ModelEma(nn.Module):
    """A classifier and, with a decay, the exponential moving average of its weights; saved together."""

    def __init__(self, model: Classifier, decay: float | None):
        super().__init__()
        self.model = model
        self.average = None if decay is None else AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
        if self.average is not None:
            self.average.requires_grad_(False)

    def update(self) -> None:
        """Updates the average after an optimiser step."""
        if self.average is not None:
            self.average.update_parameters(self.model)

    @property
    def best(self) -> nn.Module:
        """The measured model: the average, if there is one."""
        return self.model if self.average is None else self.average


def parameter_groups(model: Classifier, weight_decay: float, layer_decay: float | None) -> list[dict[str, object]]:
    """Returns one group, or groups by depth with lr_scale = layer_decay^i: i is 0 for the head, 1 for the last block.

    With a decay, vectors (biases, norms), positions and tokens have no weight decay, as timm, BEiT and MAE have it. A
    table of position biases that all blocks share has i = 0 and no weight decay, as in BEiT and microsoft/SimMIM.
    """
    if layer_decay is None:
        return [{"params": list(model.parameters()), "weight_decay": weight_decay}]
    shared = {name for name, _ in model.encoder.named_parameters() if name.startswith("rel_pos_bias.")}
    fixed = model.encoder.no_weight_decay() | shared
    groups = param_groups_layer_decay(model.encoder, weight_decay, fixed, layer_decay=layer_decay)
    if not shared:  # timm's i is 0 for the last block, or for such a table, which it takes for a layer above the blocks
        for group in groups:
            group["lr_scale"] *= layer_decay
    head = [([model.head.bias], 0.0), ([model.head.weight], weight_decay)]
    return [*groups, *({"params": parameters, "weight_decay": decay} for parameters, decay in head)]
