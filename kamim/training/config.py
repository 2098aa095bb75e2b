"""What a run is told: typed, checked before any work, kept beside every result.

Defaults are the paper's (section 4.1, and the released code where the paper is silent), so a preset in
configs/ says only what differs. A configuration is a YAML file plus key=value overrides; an unknown key, a
wrong type or an impossible combination is a ValueError of one line that names key, value and what is allowed.
"""

import re
import reprlib
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self, TypeVar

import pydantic
import yaml
from pydantic import AfterValidator, Field

from kamim.detectors import names as detector_names
from kamim.method.geometry import CROP_RATIO
from kamim.method.keypoints import FOOTPRINTS
from kamim.models.masked_image_model import ARCHITECTURES
from kamim.models.readout import Norm, Pooling
from kamim.storage.escape import one_line

Fraction = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
NotNegative = Annotated[float, Field(ge=0)]


def _one_of(value: str, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise ValueError(f"must be one of {', '.join(allowed)}")
    return value


def _some(value: tuple[Any, ...]) -> tuple[Any, ...]:
    if not value:
        raise ValueError("must hold one at least")
    return value


SOME = AfterValidator(_some)
DURATION = re.compile(r"(\d+(?:\.\d*)?(?:e\d+)?) *(steps|epochs|examples)")


def _duration(value: str) -> str:
    if DURATION.fullmatch(value) is None:
        raise ValueError("must be a number and its unit, such as 5000 steps, 0.5 epochs or 1e6 examples")
    return value


Duration = Annotated[str, AfterValidator(_duration)]


def in_steps(duration: str, batch_size: int, steps_per_epoch: int) -> int:
    """A Duration in optimiser steps, rounded."""
    found = DURATION.fullmatch(duration)
    assert found is not None, duration
    per_unit = {"steps": 1.0, "epochs": steps_per_epoch, "examples": 1 / batch_size}[found[2]]
    return round(float(found[1]) * per_unit)


_SHORT = reprlib.Repr()  # of a value in a message: YAML's aliases make a few lines endless
_SHORT.maxstring = _SHORT.maxother = 200


class Section(pydantic.BaseModel):
    """A group of keys. Unknown keys are errors; values are fixed once read."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Model(Section):
    """name: a key of ARCHITECTURES. drop_path: stochastic depth rate of the last block; the released code
    has none, for a Swin as for a ViT.
    """

    name: str = "vit_base"
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @pydantic.field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        return _one_of(value, list(ARCHITECTURES))

    @property
    def patch_size(self) -> int:
        """Side of a model patch in px."""
        return ARCHITECTURES[self.name].patch_size


class Data(Section):
    """store: a directory made by `kamim preprocess`. crop_scale, crop_ratio: RandomResizedCrop's.

    drop_last: whether an epoch leaves out the samples that do not fill a step, or ends with a short step, as the
    released code's does. workers: loader threads, null for one per core. on_error: whether a sample that cannot be
    loaded stops the run, or is left out of its batch, counted and logged.
    """

    store: Path
    resolution: Annotated[int, Field(gt=0, le=65_535)] = 192
    crop_scale: tuple[Fraction, Fraction] = (0.67, 1.0)
    crop_ratio: tuple[Positive, Positive] = CROP_RATIO
    drop_last: bool = True
    workers: Count | None = None
    on_error: Literal["stop", "skip"] = "stop"

    @pydantic.model_validator(mode="after")
    def _ordered(self) -> Self:
        for key in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, key)
            if low > high:
                raise ValueError(f"{key} = [{low}, {high}]: the first must not be larger than the second")
        return self


class Mask(Section):
    """SimMIM's mask: blocks of patch_size px, `ratio` of them masked."""

    patch_size: Count = 32
    ratio: Fraction = 0.6


class Weighting(Section):
    """Eq. 2. patch_size is w_ps in px, temperature is T; keypoints come from the store or are found online,
    which is the released code's way on a store of originals alone.

    normalize: W is divided by its mean over the image, so that T does not scale the loss; the paper does not.
    """

    detector: str = "fast"
    footprint: str = "ring"
    patch_size: Annotated[int, Field(gt=0, le=128)] = 8
    temperature: Positive = 0.25
    keypoints: Literal["store", "online"] = "store"
    normalize: bool = False

    @pydantic.field_validator("detector")
    @classmethod
    def _known_detector(cls, value: str) -> str:
        return _one_of(value, detector_names())

    @pydantic.field_validator("footprint")
    @classmethod
    def _known_footprint(cls, value: str) -> str:
        return _one_of(value, FOOTPRINTS)


class Optim(Section):
    """AdamW and the cosine schedule. lr is for `batch_size` samples per step over all ranks, as it stands.

    micro_batch: samples a rank computes at once. cosine_epochs: where the cosine reaches min_lr, counted from
    the start of the run, warm-up included; null for `epochs`. clip_grad: largest gradient norm, null for none.
    """

    lr: Positive = 8e-4
    weight_decay: NotNegative = 0.05
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    clip_grad: Positive | None = 1.0
    batch_size: Count = 2048
    micro_batch: Count = 256
    epochs: Count = 100
    warmup_epochs: Annotated[int, Field(ge=0)] = 10
    cosine_epochs: Count | None = None
    warmup_lr: NotNegative = 1e-6
    min_lr: NotNegative = 1e-5

    @pydantic.model_validator(mode="after")
    def _ordered(self) -> Self:
        name, end = ("epochs", self.epochs) if self.cosine_epochs is None else ("cosine_epochs", self.cosine_epochs)
        if self.warmup_epochs >= end:
            raise ValueError(f"warmup_epochs = {self.warmup_epochs}: must be less than {name} = {end}")
        if self.cosine_epochs is not None and self.cosine_epochs > self.epochs:
            raise ValueError(f"cosine_epochs = {self.cosine_epochs}: must not be more than epochs = {self.epochs}")
        return self

    def schedule(self, steps_per_epoch: int) -> tuple[int, int, int]:
        """Optimiser steps: of the run, of its warm-up, and to the cosine's end."""
        end = self.epochs if self.cosine_epochs is None else self.cosine_epochs
        return self.epochs * steps_per_epoch, self.warmup_epochs * steps_per_epoch, end * steps_per_epoch


class PretrainOptim(Optim):
    """Optim. duration, warmup, cosine: epochs, warmup_epochs and cosine_epochs in any unit, such as 5000 steps,
    0.5 epochs or 1e6 examples; where set, they stand over those.

    decay_all: false spares vectors (biases, norms), positions and tokens the weight decay; the released code does not.
    """

    duration: Duration | None = None
    warmup: Duration | None = None
    cosine: Duration | None = None
    decay_all: bool = True

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
            raise ValueError(
                f"optim: a warm-up of {warmup} steps, a cosine to step {end} and {total} steps in all do not fit "
                "together; set duration, warmup and cosine so that warmup < cosine <= duration"
            )
        return total, warmup, end


class ClassifierOptim(Optim):
    """Optim, with the evaluation's defaults. algorithm: sgd and lars have momentum 0.9; lars is MAE's, which neither
    adapts the rate of vectors (biases, norms) nor decays them. clip_grad: where it is not given, paper's protocol and
    fine-tuning clip as the released code, a Swin's gradients at 1.0 and a ViT's not at all.
    """

    algorithm: Literal["adamw", "sgd", "lars"] = "adamw"
    lr: Positive = 5e-3
    clip_grad: Positive | None = None
    micro_batch: Count = 2048
    warmup_lr: NotNegative = 2.5e-6
    min_lr: NotNegative = 2.5e-6


class FinetuneOptim(ClassifierOptim):
    """ClassifierOptim, in micro-batches that a whole network can train on."""

    micro_batch: Count = 256


class SweepOptim(Optim):
    """Optim, for features that are there already. lr is not used: see ProbeSweep.lrs."""

    clip_grad: None = None
    batch_size: Count = 1024
    epochs: Count = 10
    warmup_epochs: Annotated[int, Field(ge=0)] = 1
    warmup_lr: NotNegative = 0.0
    min_lr: NotNegative = 0.0


class Compute(Section):
    """device: auto is cuda where there is one. precision: bf16 is autocast (weights and Eq. 1 to 3 stay fp32);
    auto is bf16 on cuda and fp32 on a CPU, where bf16 is mostly slower; `kamim eval` validates and reconstructs in fp32
    whatever is said. compile: torch.compile; auto: on cuda.
    threads: of torch's operations on a CPU, in every process; null is OMP_NUM_THREADS if that is set (torchrun sets it
    to 1), otherwise the number of cores that the process may use.
    """

    device: Literal["auto", "cuda", "cpu"] = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    compile: bool | Literal["auto"] = "auto"
    threads: Count | None = None


class Log(Section):
    """Beside metrics.jsonl and TensorBoard. wandb: Weights & Biases; true, or a project's name."""

    wandb: bool | str = False


class OnlineProbe(Section):
    """Nearest neighbours by the features so far. train, val: labelled stores, of any classes.

    per_class: so many training samples of each class, null for all. The first process alone does it.
    """

    train: Path
    val: Path
    every_epochs: Count = 10
    per_class: Count | None = 100


class Pretrain(Section):
    """`kamim pretrain`. weighting: null is SimMIM (Eq. 1), else KAMIM (Eq. 3).

    norm_pix_loss: the target of every patch is normalised by its own mean and deviation, as MAE's; a patch is what
    one output token reconstructs (16 px of a ViT, 32 px of a Swin). init_from: a run, a checkpoint or a file that
    `kamim import` reads, whose weights the run begins with; null for random ones. on_nonfinite: what happens where a
    loss or gradient is not finite. Checkpoints are made every checkpoint_epochs; the newest keep_checkpoints stay,
    and one every keep_every_epochs for good (null for none).
    panel_epochs: epochs between two pictures of what the model makes of a few samples; null for none.
    """

    data: Data
    model: Model = Model()
    mask: Mask = Mask()
    weighting: Weighting | None = Weighting()
    optim: PretrainOptim = PretrainOptim()
    norm_pix_loss: bool = False
    init_from: Path | None = None
    compute: Compute = Compute()
    out: Path
    seed: Seed = 0
    checkpoint_epochs: Count = 5
    keep_checkpoints: Count = 3
    keep_every_epochs: Count | None = None
    on_nonfinite: Literal["stop", "skip"] = "stop"
    log: Log = Log()
    panel_epochs: Count | None = 10
    probe: OnlineProbe | None = None

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


PROTOCOLS: Mapping[str, dict[str, Any]] = MappingProxyType({
    "paper": {},
    # He et al., Masked Autoencoders Are Scalable Vision Learners, appendix A.1 and main_linprobe.py.
    "mae": {
        "block": "last", "pooling": "cls", "norm": "batch", "augment": "crop", "init_std": 0.01,
        "optim": {
            "algorithm": "lars", "lr": 6.4, "weight_decay": 0.0, "clip_grad": None, "batch_size": 16384,
            "micro_batch": 2048, "epochs": 90, "warmup_lr": 0.0, "min_lr": 0.0,
        },
    },
    # Oquab et al., DINOv2, appendix B.3: without its search over learning rates, which is --mode probe-sweep.
    "dinov2": {
        "block": "last", "pooling": "cls_mean", "norm": "final", "augment": "crop", "init_std": 0.01,
        "optim": {
            "algorithm": "sgd", "lr": 0.01, "weight_decay": 0.0, "clip_grad": None, "batch_size": 1024,
            "micro_batch": 1024, "epochs": 10, "warmup_epochs": 0, "warmup_lr": 0.0, "min_lr": 0.0,
        },
    },
})  # fmt: skip


class Linprobe(Section):
    """The linear probe. protocol gives the defaults of the other keys: the paper's, MAE's or DINOv2's.

    block: whose output is read, from 1 (of a Swin: its stage), last, or paper: a ViT's 8th, a Swin's last.
    pooling, norm: see kamim.models.readout and kamim.evaluation.probe. augment: paper is TrivialAugmentWide,
    RandomErasing and MixUp or CutMix, mixed within a micro-batch; crop is a random resized crop and a flip.
    init_std: of the layer's weights before training, its biases being 0; null for torch's own of both.
    """

    protocol: Literal["paper", "mae", "dinov2"] = "paper"
    block: Count | Literal["paper", "last"] = "paper"
    pooling: Pooling = "mean"
    norm: Norm = "none"
    augment: Literal["paper", "crop"] = "paper"
    init_std: Positive | None = None
    optim: ClassifierOptim = ClassifierOptim()
    checkpoint_epochs: Count = 10

    @pydantic.model_validator(mode="before")
    @classmethod
    def _defaults(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("protocol", "paper") not in PROTOCOLS:
            return given
        defaults = PROTOCOLS[given.get("protocol", "paper")]
        optim = given.get("optim")
        if isinstance(optim, Mapping | None):
            given = {**given, "optim": {**defaults.get("optim", {}), **(optim or {})}}
        return {**defaults, **given}


class Finetune(Section):
    """Everything trains: the released code's recipe. drop_path: as in Model. layer_decay: of the learning rate, per
    block from the end.

    ema: decay of a moving average of the weights, which is then what is measured.
    """

    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    layer_decay: Fraction | None = None
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    optim: FinetuneOptim = FinetuneOptim()
    checkpoint_epochs: Count = 5
    keep_checkpoints: Count = 2


KNN_PROTOCOLS: Mapping[str, dict[str, Any]] = MappingProxyType({
    "linprobe": {},
    # Caron et al., Emerging Properties in Self-Supervised Vision Transformers, and eval_knn.py.
    "dino": {"k": (10, 20, 100, 200), "block": "last", "pooling": "cls", "norm": "final"},
})  # fmt: skip


class Knn(Section):
    """Nearest neighbours by cosine, whose votes are weighted as DINO's. protocol gives the defaults of the other keys.

    protocol: linprobe reads the features of the paper's linear probe, dino those of DINO, the class token of the last
    block behind the final norm; DINO reports k = 20. block, pooling, norm: as in Linprobe.
    """

    protocol: Literal["linprobe", "dino"] = "linprobe"
    k: Annotated[tuple[Count, ...], SOME] = (5, 10, 20, 100)
    temperature: Positive = 0.07
    block: Count | Literal["paper", "last"] = "paper"
    pooling: Pooling = "mean"
    norm: Literal["none", "token", "final"] = "none"

    @pydantic.model_validator(mode="before")
    @classmethod
    def _defaults(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("protocol", "linprobe") not in KNN_PROTOCOLS:
            return given
        return {**KNN_PROTOCOLS[given.get("protocol", "linprobe")], **given}


class ProbeSweep(Section):
    """A linear probe of every block, pooling, norm and learning rate at once, on features without augmentation.

    Poolings that the encoder does not have (a Swin has no class token) are left out.
    """

    poolings: Annotated[tuple[Literal["mean", "cls", "max"], ...], SOME] = ("mean", "cls", "max")
    norms: Annotated[tuple[Literal["none", "token"], ...], SOME] = ("none", "token")
    lrs: Annotated[tuple[Positive, ...], SOME] = (1e-4, 3e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.3)
    optim: SweepOptim = SweepOptim()


class Reconstruct(Section):
    """PSNR and SSIM of masked images: see kamim.evaluation.reconstruct. shown: images in the picture.

    mask_ratio: as trained where null; the released code's notebook has 0.4.
    """

    conventions: Annotated[tuple[Literal["paper", "honest"], ...], SOME] = ("paper", "honest")
    mask_ratio: Fraction | None = None
    shown: Count = 6


class Evaluation(Section):
    """`kamim eval`: what is evaluated, and a section for every mode.

    checkpoint: [NAME=]RUN, a run, one of its checkpoints or a file that `kamim import` reads; random:RUN is the
    same architecture untrained, pixels:RUN no encoder at all. train, val: stores. per_class: so many training
    samples of each class, null for all. batch_size: where nothing trains. out: where state, features and
    results stay, so that a stopped evaluation goes on; null for nowhere.
    """

    checkpoint: Annotated[tuple[str, ...], SOME]
    train: Path | None = None
    val: Path
    per_class: Count | None = None
    batch_size: Count = 256
    compute: Compute = Compute()
    workers: Count | None = None
    seed: Seed = 0
    out: Path | None = None
    linprobe: Linprobe = Linprobe()
    finetune: Finetune = Finetune()
    knn: Knn = Knn()
    sweep: ProbeSweep = ProbeSweep()
    reconstruct: Reconstruct = Reconstruct()


def _divides(name: str, part: int, whole_name: str, whole: int) -> None:
    if whole % part:
        raise ValueError(f"{whole_name} = {whole}: must be a multiple of {name} = {part}")


C = TypeVar("C", bound=Section)


def load(kind: type[C], file: Path | None, overrides: Sequence[str] = (), given: Mapping[str, Any] | None = None) -> C:
    """Reads a YAML file (or nothing), applies `key.key=value` overrides (values are YAML), checks the whole.

    given: top-level keys that stand over both, taken as they are. Raises ValueError of one line.
    """
    tree: dict[str, Any] = {}
    if file is not None:
        if not file.is_file():
            raise ValueError(f"-c {file}: no such file")
        try:
            tree = yaml.safe_load(file.read_text()) or {}
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, no such date
            raise ValueError(f"{file}: not YAML: {one_line(error)}") from error
        if not isinstance(tree, dict):
            raise ValueError(f"{file}: must hold keys and values, holds {type(tree).__name__}")
    for override in overrides:
        _apply(tree, override)
    tree.update(given or {})
    try:
        return kind.model_validate(tree)
    except pydantic.ValidationError as error:
        raise ValueError("; ".join(_line(kind, e) for e in error.errors())) from None


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ValueError(f"{override!r}: overrides are key=value, such as optim.lr=1e-3 or weighting=null")
    *parents, name = key.split(".")
    for parent in parents:
        if parent in tree and tree[parent] is None:
            raise ValueError(f"{override!r}: {parent} is null here; take a preset that has it, or set {parent}={{...}}")
        if not isinstance(tree.get(parent), dict):
            tree[parent] = {}
        tree = tree[parent]
    try:
        tree[name] = _number(yaml.safe_load(value))
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ValueError(f"{override!r}: the value is not YAML") from None


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as text and 2026-11-22 as a date; people mean a number and a name."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return str(value) if isinstance(value, date) else value


def _line(kind: type[Section], error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"] if not str(part).startswith(("float", "constrained", "literal")))
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing" and isinstance(error["loc"][-1], int):
        return f"{key.rpartition('.')[0]}: has too few values"
    if error["type"] == "missing":
        return f"{key}: is missing; set it in the file or as {key}=..."
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key; allowed are {', '.join(_fields(kind, error['loc'][:-1]))}"
    if error["type"] == "value_error" and isinstance(error["input"], dict | Section):
        return f"{key}.{message}" if key and " = " in message else message
    return f"{key} = {_SHORT.repr(error['input'])}: {message[:1].lower()}{message[1:]}"


def _fields(kind: type[Section], location: Sequence[Any]) -> list[str]:
    for part in location:
        annotation = kind.model_fields[part].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        kind = next(o for o in options if isinstance(o, type) and issubclass(o, Section))
    return list(kind.model_fields)


def dump(config: Section, exclude: Any = None) -> str:
    """The resolved configuration as YAML, less the keys in `exclude`; load() reads the whole back to the same."""
    text: str = yaml.safe_dump(config.model_dump(mode="json", exclude=exclude), sort_keys=False)
    return text
