"""The linear probe: one layer trained on a frozen encoder."""

import torch
from torch import Tensor, nn

from kamim.config.pretrain import Compute
from kamim.models.readout import Encoder, Readout, fixed, prefix, tokens_after
from kamim.runtime.device import should_compile


class Frozen:
    """The frozen part of a probe: the encoder up to the block that is read, without gradients, compiled on a GPU.

    It returns features float32 [B, F], or the patch tokens float32 [B, N, D] for the joint norm, which is trained.
    """

    def __init__(self, encoder: Encoder, readout: Readout, compute: Compute, device: torch.device):
        self._encoder = encoder.to(device).eval().requires_grad_(False)
        self._readout = readout
        self._read = torch.compile(self._features) if should_compile(compute, device) else self._features

    def _features(self, images: Tensor) -> Tensor:
        tokens = tokens_after(self._encoder, images, self._readout.block)
        if self._readout.norm == "joint":
            return tokens[:, prefix(self._encoder) :]
        return fixed(self._encoder, tokens, self._readout)

    def __call__(self, images: Tensor) -> Tensor:
        """Maps images, float [B, 3, R, R], normalised, to features, in the precision of the surrounding autocast."""
        with torch.no_grad():
            return self._read(images).float()


class Head(nn.Module):
    """One linear layer on the features of Frozen, after the norm that depends on training data, if any.

    joint: the released code's affine LayerNorm over N and D together, before the mean (Table 5). batch: a BatchNorm
    without affine on features that the encoder's own norm and pooling gave, as in MAE's probe.
    """

    def __init__(self, readout: Readout, shape: torch.Size, classes: int, init_std: float | None = None):
        """Takes the shape of one image's features, [F] or [N, D]. init_std: see kamim.evaluation.options.Linprobe."""
        super().__init__()
        self.joint = nn.LayerNorm(list(shape)) if readout.norm == "joint" else None
        self.batch = nn.BatchNorm1d(shape[-1], 1e-6, affine=False) if readout.norm == "batch" else nn.Identity()
        self.linear = nn.Linear(shape[-1], classes)
        if init_std is not None:
            nn.init.normal_(self.linear.weight, std=init_std)
            nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Returns logits float32 [B, classes], without autocast, since a head takes little time."""
        with torch.autocast(features.device.type, enabled=False):
            if self.joint is not None:
                features = self.joint(features).mean(dim=1)
            logits: Tensor = self.linear(self.batch(features))
        return logits


def build_head(
    frozen: Frozen, readout: Readout, resolution: int, classes: int, device: torch.device, init_std: float | None = None
) -> Head:
    """Builds a head for the features that `frozen` returns for images of resolution x resolution px."""
    shape = frozen(torch.zeros(1, 3, resolution, resolution, device=device)).shape[1:]
    return Head(readout, shape, classes, init_std).to(device)
