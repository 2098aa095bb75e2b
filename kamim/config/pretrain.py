"""Configuration of pretraining.

Defaults are the paper's (section 4.1), or the released code's if the paper gives none, so a preset in configs/ holds
only the keys that differ. `kamim config show NAME` prints every key of a preset with its meaning.
"""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import pydantic
from pydantic import Field

from kamim import KamimError
from kamim.config.schema import (
    Beta,
    Count,
    Duration,
    Fraction,
    Natural,
    NotNegative,
    Positive,
    Section,
    Seed,
    in_steps,
    one_of,
)
from kamim.detectors import names as detector_names
from kamim.method.geometry import CROP_RATIO
from kamim.method.keypoints import FOOTPRINTS
from kamim.method.masking import masked_count
from kamim.models.architectures import architecture, check_maskable, check_patches
from kamim.models.presets import Positions


class Model(Section):
    """The encoder."""

    name: str = "vit_base"
    """A preset (vit_tiny, vit_small, vit_base, swin_tiny, swin_base, vit_demo, ...) or the name of a ViT or Swin of
    timm, such as vit_large_patch16_224, which is created as timm does, at data.resolution."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Stochastic depth rate of the last block. The released code uses none, for Swin and ViT alike."""
    positions: Positions | None = None
    """Positions of a ViT's patches: learned from N(0, 0.02), as in the released code; sincos, fixed sine-cosine ones,
    as MAE's; or relative, biases of attention that all blocks share, as microsoft/SimMIM's. null is those of the
    architecture: learned for the paper's ViTs."""

    @pydantic.model_validator(mode="after")
    def _has_positions(self) -> Self:
        architecture(self.name, self.positions)
        return self

    @pydantic.field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        architecture(value)
        return value

    @property
    def patch_size(self) -> int:
        """Side of a model patch in px."""
        return architecture(self.name).patch_size


class Decoder(Section):
    """MAE's decoder, a small ViT. The defaults are the public code's."""

    width: Annotated[int, Field(gt=0, multiple_of=4)] = 512
    """Width of its tokens, a multiple of 4 and of heads."""
    depth: Count = 8
    """Number of its blocks."""
    heads: Count = 16
    """Heads of its attention."""

    @pydantic.model_validator(mode="after")
    def _divides(self) -> Self:
        if self.width % self.heads:
            raise KamimError(f"width = {self.width}: must be a multiple of heads = {self.heads}")
        return self


class Data(Section):
    """The training data."""

    store: Path
    """A store made by `kamim preprocess`."""
    resolution: Annotated[int, Field(gt=0, le=65_535)] = 192
    """Side of the crops in px."""
    crop_scale: tuple[Fraction, Fraction] = (0.67, 1.0)
    """Smallest and largest share of the image's area that a random resized crop covers."""
    crop_ratio: tuple[Positive, Positive] = CROP_RATIO
    """Smallest and largest ratio of a crop's width to its height."""
    flip_v: bool = True
    """Whether half of the crops are flipped vertically (upside down), as in the released code."""
    flip_h: bool = True
    """Whether half of the crops are flipped horizontally."""
    drop_last: bool = True
    """Whether an epoch leaves out the samples that do not fill a step. With false it ends with a short step, as in
    the released code."""
    order: Literal["shuffled", "chunked"] = "shuffled"
    """Order of an epoch's samples. chunked is for stores larger than memory: chunks of 64 neighbouring samples are
    shuffled, then the samples of every 256 chunks, so that the store is read in long runs."""
    workers: Count | None = None
    """Number of loader threads of a process; null is one per core, divided among the processes of a machine."""
    on_error: Literal["stop", "skip"] = "stop"
    """Whether a sample that cannot be loaded stops the run, or is left out of its micro-batch and logged (skip)."""

    @pydantic.model_validator(mode="after")
    def _ordered(self) -> Self:
        for key in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, key)
            if low > high:
                raise KamimError(f"{key} = [{low}, {high}]: the first must not be larger than the second")
        return self


class Mask(Section):
    """SimMIM's masks."""

    patch_size: Count = 32
    """Side of a mask block in px."""
    ratio: Fraction = 0.6
    """Share of the blocks that are masked."""


class Weighting(Section):
    """Eq. 2: the weights W of KAMIM."""

    detector: str = "fast"
    """Detector of the keypoints: fast, sift, orb, or a registered one."""
    footprint: str = "ring"
    """Pixels that a keypoint sets in the map F: ring as in the released code, point as in the paper's text."""
    patch_size: Annotated[int, Field(gt=0, le=128)] = 8
    """w_ps: side of a cell of W in px."""
    temperature: Positive = 0.25
    """T of Eq. 2: the smaller, the more the weights W differ."""
    keypoints: Literal["store", "online"] = "store"
    """Whether keypoints come from the store or are detected on every crop (online). The latter reproduces the released
    code only on a store of originals (`kamim preprocess --pixels original`)."""
    normalize: bool = False
    """Whether W is divided by its mean over the image, so that T does not scale the loss. The paper does not do so."""

    @pydantic.field_validator("detector")
    @classmethod
    def _known_detector(cls, value: str) -> str:
        return one_of(value, detector_names())

    @pydantic.field_validator("footprint")
    @classmethod
    def _known_footprint(cls, value: str) -> str:
        return one_of(value, FOOTPRINTS)


class Optim(Section):
    """AdamW and the cosine schedule."""

    COSINE_AFTER_WARMUP: ClassVar[bool] = False  # whether the cosine begins after the warm-up, not below it

    lr: Positive = 8e-4
    """Learning rate for batch_size samples per step over all ranks, not scaled, to which the warm-up rises. The cosine
    starts from it at step 0, and the warm-up replaces its beginning: the largest rate is that of the last warm-up step,
    and the cosine follows at a lower one."""
    weight_decay: NotNegative = 0.05
    """AdamW's weight decay, of every parameter unless a key below or a mode exempts some."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """AdamW's betas."""
    clip_grad: Positive | None = 1.0
    """Largest gradient norm; null does not clip."""
    batch_size: Count = 2048
    """Samples per step, over all ranks."""
    micro_batch: Count = 256
    """Samples that a rank computes at once; it changes a run by rounding only."""
    epochs: Count = 100
    """Number of passes over the samples."""
    warmup_epochs: Natural = 10
    """Epochs of linear warm-up."""
    cosine_epochs: Count | None = None
    """Epoch at which the cosine reaches min_lr, counted from the start of the run, warm-up included; null is epochs."""
    warmup_lr: NotNegative = 1e-6
    """Learning rate at the start of the warm-up."""
    min_lr: NotNegative = 1e-5
    """Learning rate at the end of the cosine."""

    @pydantic.model_validator(mode="after")
    def _ordered(self) -> Self:
        name, end = ("epochs", self.epochs) if self.cosine_epochs is None else ("cosine_epochs", self.cosine_epochs)
        if self.warmup_epochs >= end:
            raise KamimError(f"warmup_epochs = {self.warmup_epochs}: must be less than {name} = {end}")
        if self.cosine_epochs is not None and self.cosine_epochs > self.epochs:
            raise KamimError(f"cosine_epochs = {self.cosine_epochs}: must not be more than epochs = {self.epochs}")
        return self

    def schedule(self, steps_per_epoch: int) -> tuple[int, int, int]:
        """Returns the optimiser steps of the run, of its warm-up, and to the cosine's end."""
        end = self.epochs if self.cosine_epochs is None else self.cosine_epochs
        return self.epochs * steps_per_epoch, self.warmup_epochs * steps_per_epoch, end * steps_per_epoch


class PretrainOptim(Optim):
    """Optim with durations in any unit."""

    duration: Duration | None = None
    """Overrides epochs, in any unit: 5000 steps, 0.5 epochs or 1e6 examples."""
    warmup: Duration | None = None
    """Overrides warmup_epochs, in any unit."""
    cosine: Duration | None = None
    """Overrides cosine_epochs, in any unit."""
    decay_all: bool = True
    """false exempts vectors (biases, norms), positions and tokens from weight decay. The released code does not."""

    def schedule(self, steps_per_epoch: int) -> tuple[int, int, int]:
        """Returns the steps as Optim does. Raises KamimError unless warmup < cosine <= duration."""
        total, warmup, end = super().schedule(steps_per_epoch)
        if self.duration is not None:
            total = in_steps(self.duration, self.batch_size, steps_per_epoch)
            end = end if self.cosine_epochs is not None else total
        if self.warmup is not None:
            warmup = in_steps(self.warmup, self.batch_size, steps_per_epoch)
        if self.cosine is not None:
            end = in_steps(self.cosine, self.batch_size, steps_per_epoch)
        if not warmup < end <= total:
            raise KamimError(
                f"optim: a warm-up of {warmup} steps, a cosine to step {end} and {total} steps in all do not fit "
                "together; set duration, warmup and cosine so that warmup < cosine <= duration"
            )
        return total, warmup, end


class Compute(Section):
    """Device and precision of the computation."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device of the computation: cuda, cpu, or auto, which is cuda if available, otherwise cpu."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of the computation. bf16 is autocast; weights and Eq. 1 to 3 stay in fp32. auto is bf16 on cuda and
    fp32 on a CPU. On a CPU with bf16 instructions (avx512_bf16, AMX), bf16 trains about 3 times as fast as fp32.
    `kamim eval` validates trained classifiers and reconstructs in fp32; features that it extracts, as for kNN and the
    probe sweep, have this precision and are kept as bf16."""
    compile: bool | Literal["auto"] = "auto"
    """Whether to use torch.compile; auto is true on cuda only."""
    threads: Count | None = None
    """Threads of torch's operations on a CPU, in every process; null is OMP_NUM_THREADS if that is set (torchrun sets
    it to 1), otherwise the number of cores that the process may use."""


class Log(Section):
    """Loggers besides metrics.jsonl and TensorBoard."""

    wandb: bool | str = False
    """Weights & Biases: true, or the name of a project."""


class OnlineProbe(Section):
    """A kNN probe of the features during pretraining. Only the first process computes it."""

    train: Path
    """A labelled store, with any classes."""
    val: Path
    """A store with the same classes."""
    every_epochs: Count = 10
    """Epochs between two probes."""
    per_class: Count | None = 100
    """Training samples of each class at most; null is all."""


class LabelFree(Section):
    """Measures of the features so far that need no labels: RankMe, uniformity and alpha-ReQ."""

    images: Annotated[int, Field(ge=2, le=10**12)] = 2048
    """Images whose features are measured, from all over data.store; all of them if it has fewer."""
    every_epochs: Count = 10
    """Epochs between two measurements."""


class Plateau(Section):
    """Shows when a model has learned more than to paint a colour: a ViT whose attention is still uniform has not."""

    images: Annotated[int, Field(ge=2)] = 64
    """Images on which attention is measured, from all over data.store; all of them if it has fewer."""
    every_epochs: Count = 1
    """Epochs between two measurements."""


class Pretrain(Section):
    """Configuration of `kamim pretrain`."""

    PRESETS: ClassVar[str] = "pretrain"

    data: Data
    method: Literal["simmim", "mae"] = "simmim"
    """simmim: masked patches are replaced by a token, a linear head reconstructs them, the loss is Eq. 1 or Eq. 3.
    mae: the encoder sees the visible patches only, a decoder reconstructs the others, the loss is the squared error."""
    model: Model = Model()
    decoder: Decoder | None = None
    """MAE's decoder; null is that of the public code. SimMIM has none."""
    mask: Mask = Mask()
    weighting: Weighting | None = Weighting()
    """W of KAMIM (Eq. 2), by which the error of every pixel is multiplied. null is SimMIM, or MAE, itself."""
    optim: PretrainOptim = PretrainOptim()
    norm_pix_loss: bool = False
    """Whether the target of every patch is normalised by its own mean and deviation, as in MAE. A patch is the area
    that one output token reconstructs: a model patch of a ViT, 32 px for a Swin."""
    init_from: Path | None = None
    """A run, a checkpoint or a file that `kamim import` reads, whose weights initialise the model; null initialises it
    randomly."""
    compute: Compute = Compute()
    out: Path
    """Folder of the run, for its checkpoints, metrics and report."""
    seed: Seed = 0
    """Seed of every random draw."""
    checkpoint_epochs: Count = 5
    """Epochs between two checkpoints."""
    keep_checkpoints: Count = 3
    """Number of newest checkpoints that are kept."""
    keep_every_epochs: Count | None = None
    """Epochs between two checkpoints that are kept permanently; null is none."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """Whether a loss or gradient that is not finite stops the run, or its step is skipped."""
    log: Log = Log()
    panel_epochs: Count | None = 10
    """Epochs between two pictures of a few reconstructed samples; null is none."""
    probe: OnlineProbe | None = None
    """A kNN probe of the features during training; null is none."""
    label_free: LabelFree | None = None
    """Measures of the features during training that need no labels; null is none, `{}` is the defaults."""
    plateau: Plateau | None = None
    """A measure during training of how selective attention is, and the loss of each crop's mean colour to compare with;
    null is none, `{}` is the defaults. A ViT only."""

    @pydantic.model_validator(mode="after")
    def _fits(self) -> Self:
        r = self.data.resolution
        cell = None if self.weighting is None else self.weighting.patch_size
        check_patches(self.model.patch_size, self.mask.patch_size, cell, r)
        architecture(self.model.name).check_resolution(r)
        if self.plateau is not None and not architecture(self.model.name).is_vit:
            raise KamimError(f"plateau: measures the attention of a ViT, {self.model.name} is a Swin; leave it out")
        if self.method == "mae":
            self._check_mae()
        elif self.decoder is not None:
            raise KamimError("decoder: SimMIM has none; leave it out, or set method = mae")
        return self

    def _check_mae(self) -> None:
        check_maskable(self.model.name, self.model.positions)
        grid = self.data.resolution // self.mask.patch_size
        if masked_count(grid, self.mask.ratio) == grid**2:
            raise KamimError(
                f"mask.ratio = {self.mask.ratio}: masks all {grid} x {grid} blocks, but MAE's encoder needs a visible "
                f"one; must be at most {1 - 1 / grid**2:.4g}"
            )

    @property
    def title(self) -> str:
        """The name of the method: SimMIM, KAMIM, MAE, or KAMIM-MAE, which is MAE with KAMIM's weights."""
        base = "SimMIM" if self.method == "simmim" else "MAE"
        return base if self.weighting is None else "KAMIM" if self.method == "simmim" else "KAMIM-MAE"

    @property
    def mae_decoder(self) -> Decoder | None:
        """MAE's decoder; None for SimMIM."""
        return None if self.method == "simmim" else self.decoder or Decoder()

    @property
    def normalised_patches(self) -> int | None:
        """Side in px of the patches that norm_pix_loss normalises; None without it."""
        return architecture(self.model.name).stride if self.norm_pix_loss else None


def patches_that_fit(name: str, resolution: int) -> dict[str, Any]:
    """Keys of Pretrain that make its mask and weights fit an architecture at this resolution in px.

    None if the defaults fit. Otherwise mask blocks of the size that fits and is nearest to the default, no weighting.
    """
    patch, block = architecture(name).patch_size, Mask().patch_size
    if resolution % Weighting().patch_size == 0 and resolution % block == 0 and block % patch == 0:
        return {}
    fitting = [size for size in range(patch, resolution + 1, patch) if resolution % size == 0]
    return {"mask": {"patch_size": min(fitting, key=lambda size: abs(size - block))}, "weighting": None}
