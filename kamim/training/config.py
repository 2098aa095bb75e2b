"""Configuration of pretraining.

Defaults are the paper's (section 4.1, and the released code's where the paper is silent), so a preset in configs/ holds
only what differs. `kamim config show NAME` prints every key of a preset with its meaning.
"""

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

import pydantic
from pydantic import Field

from kamim import KamimError
from kamim.detectors import names as detector_names
from kamim.method.geometry import CROP_RATIO
from kamim.method.keypoints import FOOTPRINTS
from kamim.models.architectures import ARCHITECTURES
from kamim.training.settings import (
    Count,
    Duration,
    Fraction,
    NotNegative,
    Positive,
    Section,
    Seed,
    in_steps,
    one_of,
)


class Model(Section):
    """The encoder."""

    name: str = "vit_base"
    """A key of kamim.models.architectures.ARCHITECTURES."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Stochastic depth rate of the last block. The released code has none, for a Swin as for a ViT."""

    @pydantic.field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        return one_of(value, list(ARCHITECTURES))

    @property
    def patch_size(self) -> int:
        """Side of a model patch in px."""
        return ARCHITECTURES[self.name].patch_size


class Data(Section):
    """What is trained on."""

    store: Path
    """A store made by `kamim preprocess`."""
    resolution: Annotated[int, Field(gt=0, le=65_535)] = 192
    """Side of the crops in px."""
    crop_scale: tuple[Fraction, Fraction] = (0.67, 1.0)
    """Smallest and largest share of the image's area that a random resized crop shows."""
    crop_ratio: tuple[Positive, Positive] = CROP_RATIO
    """Smallest and largest ratio of a crop's width to its height."""
    flip_v: bool = True
    """Whether half of the crops are flipped vertically, turned upside down, as the released code's are."""
    flip_h: bool = True
    """Whether half of the crops are flipped horizontally."""
    drop_last: bool = True
    """Whether an epoch leaves out the samples that do not fill a step, or ends with a short step, as the released
    code's."""
    workers: Count | None = None
    """Loader threads; null is one per core."""
    on_error: Literal["stop", "skip"] = "stop"
    """Whether a sample that cannot be loaded stops the run, or is left out of its batch, counted and logged."""

    @pydantic.model_validator(mode="after")
    def _ordered(self) -> Self:
        for key in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, key)
            if low > high:
                raise KamimError(f"{key} = [{low}, {high}]: the first must not be larger than the second")
        return self


class Mask(Section):
    """SimMIM's mask."""

    patch_size: Count = 32
    """Side of a mask block in px."""
    ratio: Fraction = 0.6
    """Share of the blocks that are masked."""


class Weighting(Section):
    """Eq. 2: the weights W of KAMIM."""

    detector: str = "fast"
    """fast, sift, orb, or a registered detector."""
    footprint: str = "ring"
    """What a keypoint sets in the map F: ring is the released code's, point the paper's text's."""
    patch_size: Annotated[int, Field(gt=0, le=128)] = 8
    """w_ps: side of a cell of W in px."""
    temperature: Positive = 0.25
    """T."""
    keypoints: Literal["store", "online"] = "store"
    """Whether keypoints come from the store or are found on every crop. The latter is the released code's way only on a
    store of originals (`kamim preprocess --images-as original`)."""
    normalize: bool = False
    """Whether W is divided by its mean over the image, so that T does not scale the loss. The paper does not."""

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

    lr: Positive = 8e-4
    """Learning rate for batch_size samples per step over all ranks; it is not scaled."""
    weight_decay: NotNegative = 0.05
    """Of every parameter."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Of AdamW."""
    clip_grad: Positive | None = 1.0
    """Largest gradient norm; null does not clip."""
    batch_size: Count = 2048
    """Samples of a step, over all ranks."""
    micro_batch: Count = 256
    """Samples that a rank computes at once; it changes a run by rounding only."""
    epochs: Count = 100
    """Passes over the samples."""
    warmup_epochs: Annotated[int, Field(ge=0)] = 10
    """Epochs of linear warm-up."""
    cosine_epochs: Count | None = None
    """Where the cosine reaches min_lr, counted from the start of the run, warm-up included; null is epochs."""
    warmup_lr: NotNegative = 1e-6
    """Where the warm-up begins."""
    min_lr: NotNegative = 1e-5
    """Where the cosine ends."""

    @pydantic.model_validator(mode="after")
    def _ordered(self) -> Self:
        name, end = ("epochs", self.epochs) if self.cosine_epochs is None else ("cosine_epochs", self.cosine_epochs)
        if self.warmup_epochs >= end:
            raise KamimError(f"warmup_epochs = {self.warmup_epochs}: must be less than {name} = {end}")
        if self.cosine_epochs is not None and self.cosine_epochs > self.epochs:
            raise KamimError(f"cosine_epochs = {self.cosine_epochs}: must not be more than epochs = {self.epochs}")
        return self

    def schedule(self, steps_per_epoch: int) -> tuple[int, int, int]:
        """Optimiser steps: of the run, of its warm-up, and to the cosine's end."""
        end = self.epochs if self.cosine_epochs is None else self.cosine_epochs
        return self.epochs * steps_per_epoch, self.warmup_epochs * steps_per_epoch, end * steps_per_epoch


class PretrainOptim(Optim):
    """Optim, with durations in any unit."""

    duration: Duration | None = None
    """Overrides epochs, in any unit: 5000 steps, 0.5 epochs or 1e6 examples."""
    warmup: Duration | None = None
    """Overrides warmup_epochs, likewise."""
    cosine: Duration | None = None
    """Overrides cosine_epochs, likewise."""
    decay_all: bool = True
    """false spares vectors (biases, norms), positions and tokens the weight decay. The released code does not."""

    def schedule(self, steps_per_epoch: int) -> tuple[int, int, int]:
        """As Optim's. Raises ValueError where the three do not fit together."""
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
    """What a run computes with."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto is cuda where there is one."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16 is autocast; weights and Eq. 1 to 3 stay in fp32. auto is bf16 on cuda, and fp32 on a CPU, where bf16 is
    mostly slower. `kamim eval` validates and reconstructs in fp32 whatever this says."""
    compile: bool | Literal["auto"] = "auto"
    """Whether to torch.compile; auto does on cuda."""
    threads: Count | None = None
    """Threads of torch's operations on a CPU, in every process; null is OMP_NUM_THREADS if that is set (torchrun sets
    it to 1), otherwise the number of cores that the process may use."""


class Log(Section):
    """Where metrics go beside metrics.jsonl and TensorBoard."""

    wandb: bool | str = False
    """Weights & Biases: true, or a project's name."""


class OnlineProbe(Section):
    """Nearest neighbours by the features so far. The first process alone computes them."""

    train: Path
    """A labelled store, of any classes."""
    val: Path
    """A store with the same classes."""
    every_epochs: Count = 10
    """Epochs between two probes."""
    per_class: Count | None = 100
    """Training samples of each class; null is all."""


class Pretrain(Section):
    """`kamim pretrain`."""

    PRESETS: ClassVar[str] = "pretrain"

    data: Data
    model: Model = Model()
    mask: Mask = Mask()
    weighting: Weighting | None = Weighting()
    """null is SimMIM (Eq. 1), otherwise KAMIM (Eq. 3)."""
    optim: PretrainOptim = PretrainOptim()
    norm_pix_loss: bool = False
    """Whether the target of every patch is normalised by its own mean and deviation, as MAE's. A patch is what one
    output token reconstructs: 16 px of a ViT, 32 px of a Swin."""
    init_from: Path | None = None
    """A run, a checkpoint or a file that `kamim import` reads, whose weights the run begins with; null begins with
    random ones."""
    compute: Compute = Compute()
    out: Path
    """The run's folder."""
    seed: Seed = 0
    """Of every random draw."""
    checkpoint_epochs: Count = 5
    """Epochs between two checkpoints."""
    keep_checkpoints: Count = 3
    """How many of the newest checkpoints stay."""
    keep_every_epochs: Count | None = None
    """Epochs between two checkpoints that stay for good; null is none."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What happens where a loss or gradient is not finite."""
    log: Log = Log()
    panel_epochs: Count | None = 10
    """Epochs between two pictures of what the model makes of a few samples; null is none."""
    probe: OnlineProbe | None = None
    """A kNN probe of the features while they train; null is none."""

    @pydantic.model_validator(mode="after")
    def _fits(self) -> Self:
        r = self.data.resolution
        _divides("model patch", self.model.patch_size, "data.resolution", r)
        _divides("mask.patch_size", self.mask.patch_size, "data.resolution", r)
        _divides("model patch", self.model.patch_size, "mask.patch_size", self.mask.patch_size)
        if self.weighting is not None:
            _divides("weighting.patch_size", self.weighting.patch_size, "data.resolution", r)
        ARCHITECTURES[self.model.name].check_resolution(r)
        return self

    @property
    def normalised_patches(self) -> int | None:
        """Side in px of the patches whose targets norm_pix_loss normalises; None without it."""
        return ARCHITECTURES[self.model.name].stride if self.norm_pix_loss else None


def _divides(name: str, part: int, whole_name: str, whole: int) -> None:
    if whole % part:
        raise KamimError(f"{whole_name} = {whole}: must be a multiple of {name} = {part}")
