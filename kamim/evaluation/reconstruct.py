"""PSNR (dB) and SSIM of reconstructions of masked images, by two conventions, batch by batch.

Both classes take update(originals, output, masks): uint8 [B, H, W, 3]; the model's output, float [B, 3, H, W] in
normalised units; bool [B, H, W], True for masked pixels. compute() gives the Similarity over all batches and ranks.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics.aggregation import MaxMetric, MeanMetric, MinMetric
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from kamim.evaluation.results import Similarity
from pipelines.batch import IMAGENET_MEAN, IMAGENET_STD, normalise


class WholeImage:
    """The authors' convention: whole images, including the output at visible patches, in normalised units.

    PSNR: one mean squared error of all values. Its peak is the range of the originals and 0, torchmetrics' default
    until it required a range (torchmetrics #3135). SSIM: mean over images with torchmetrics' defaults, whose data range
    is the larger of the originals' and the reconstructions' in a batch, so it varies a little with the batch size.
    """

    def __init__(self, device: torch.device):
        self._error = PeakSignalNoiseRatio(data_range=1.0).to(device).set_dtype(torch.float64)
        self._ssim = StructuralSimilarityIndexMeasure().to(device)
        self._low, self._high = MinMetric().to(device), MaxMetric().to(device)

    def update(self, originals: Tensor, output: Tensor, masks: Tensor) -> None:
        """Adds a batch. masks is not used."""
        target, output = normalise(originals), output.float()
        self._error.update(output, target)
        self._ssim.update(output, target)
        self._low.update(target.min())
        self._high.update(target.max())

    def compute(self) -> Similarity:
        """Returns the similarity over all batches so far."""
        peak = max(float(self._high.compute()), 0.0) - min(float(self._low.compute()), 0.0)
        return Similarity(float(self._error.compute()) + 20 * math.log10(peak), float(self._ssim.compute()))


class MaskedOnly:
    """Masked pixels only, in [0, 1], reconstructions clipped to it.

    PSNR: one mean squared error of all masked values, peak 1. SSIM: the map (Gaussian window, sigma 1.5, range 1) of
    images whose visible patches are the original's, averaged over all masked values; near a patch's edge its window
    includes visible pixels.
    """

    def __init__(self, device: torch.device):
        self._psnr = PeakSignalNoiseRatio(data_range=1.0).to(device).set_dtype(torch.float64)
        self._ssim = MeanMetric().to(device).set_dtype(torch.float64)

    def update(self, originals: Tensor, output: Tensor, masks: Tensor) -> None:
        """Adds a batch."""
        target = originals.permute(0, 3, 1, 2) / 255
        mean, std = (output.new_tensor(c, dtype=torch.float32)[:, None, None] for c in (IMAGENET_MEAN, IMAGENET_STD))
        hidden = masks[:, None].expand_as(target)
        shown = torch.where(hidden, (output.float() * std + mean).clamp(0, 1), target)
        self._psnr.update(shown[hidden], target[hidden])
        _, ssim = structural_similarity_index_measure(shown, target, data_range=1.0, return_full_image=True)
        self._ssim.update(ssim[hidden])

    def compute(self) -> Similarity:
        """Returns the similarity over all batches so far."""
        return Similarity(float(self._psnr.compute()), float(self._ssim.compute()))


CONVENTIONS: Mapping[str, type[WholeImage] | type[MaskedOnly]] = {"paper": WholeImage, "honest": MaskedOnly}
