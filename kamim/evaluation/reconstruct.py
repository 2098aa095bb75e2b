"""How well masked images are reconstructed: PSNR (dB) and SSIM, by two conventions, a batch at a time.

Both classes take update(originals, made, masks): uint8 [B, H, W, 3]; float [B, 3, H, W] in normalised units, as the
model gives it; bool [B, H, W], True where masked. compute() gives {"psnr", "ssim"} of all batches, on all ranks.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics.aggregation import MaxMetric, MeanMetric, MinMetric
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from pipelines.batch import IMAGENET_MEAN, IMAGENET_STD, normalise


class Paper:
    """The authors' numbers: whole images, what the model makes of visible patches included, in normalised units.

    PSNR: one mean squared error of all values; its peak is the range of the originals seen and 0, as torchmetrics had
    it by default before it asked for a range (torchmetrics #3135). SSIM: mean over images with torchmetrics' defaults,
    whose range is the larger of originals' and reconstructions' in the same batch, so that it varies a little with the
    batch size.
    """

    def __init__(self, device: torch.device):
        self._error = PeakSignalNoiseRatio(data_range=1.0).to(device).set_dtype(torch.float64)
        self._ssim = StructuralSimilarityIndexMeasure().to(device)
        self._low, self._high = MinMetric().to(device), MaxMetric().to(device)

    def update(self, originals: Tensor, made: Tensor, masks: Tensor) -> None:
        """See above. masks is not used."""
        target, made = normalise(originals), made.float()
        self._error.update(made, target)
        self._ssim.update(made, target)
        self._low.update(target.min())
        self._high.update(target.max())

    def compute(self) -> dict[str, float]:
        """psnr in dB, ssim."""
        peak = max(float(self._high.compute()), 0.0) - min(float(self._low.compute()), 0.0)
        return {"psnr": float(self._error.compute()) + 20 * math.log10(peak), "ssim": float(self._ssim.compute())}


class Honest:
    """Masked pixels only, in [0, 1], reconstructions clipped to it.

    PSNR: one mean squared error of all masked values, peak 1. SSIM: the map (Gaussian window, sigma 1.5, range 1) of
    images whose visible patches are the original's, averaged over all masked values; near a patch's edge its window
    reaches over to visible pixels.
    """

    def __init__(self, device: torch.device):
        self._psnr = PeakSignalNoiseRatio(data_range=1.0).to(device).set_dtype(torch.float64)
        self._ssim = MeanMetric().to(device).set_dtype(torch.float64)

    def update(self, originals: Tensor, made: Tensor, masks: Tensor) -> None:
        """See above."""
        target = originals.permute(0, 3, 1, 2) / 255
        mean, std = (made.new_tensor(c, dtype=torch.float32)[:, None, None] for c in (IMAGENET_MEAN, IMAGENET_STD))
        hidden = masks[:, None].expand_as(target)
        shown = torch.where(hidden, (made.float() * std + mean).clamp(0, 1), target)
        self._psnr.update(shown[hidden], target[hidden])
        _, ssim = structural_similarity_index_measure(shown, target, data_range=1.0, return_full_image=True)
        self._ssim.update(ssim[hidden])

    def compute(self) -> dict[str, float]:
        """psnr in dB, ssim."""
        return {"psnr": float(self._psnr.compute()), "ssim": float(self._ssim.compute())}


CONVENTIONS: Mapping[str, type[Paper] | type[Honest]] = {"paper": Paper, "honest": Honest}
