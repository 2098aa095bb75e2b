"""Configuration of `kamim eval`: a section for every mode. Defaults are the paper's recipes."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

import pydantic
from pydantic import Field

from kamim import KamimError
from kamim.config.pretrain import Compute, Optim
from kamim.config.schema import Count, Fraction, Natural, NotEmpty, NotNegative, Positive, Section, Seed
from kamim.models.architectures import Norm, Pooling

CorruptionName = Literal["noise", "blur", "contrast", "jpeg"]
BlockName = Count | Literal["paper", "last"]
ModeName = Literal[
    "linprobe",
    "finetune",
    "knn",
    "attentive",
    "probe-sweep",
    "reconstruct",
    "segment",
    "few-shot",
    "corruptions",
    "shape-bias",
]
MODES: tuple[ModeName, ...] = get_args(ModeName)
UNCLASSIFIED = ("reconstruct", "segment", "shape-bias")  # modes that predict no label of the validation store


class ClassifierOptim(Optim):
    """Optim, with the evaluation's defaults."""

    algorithm: Literal["adamw", "sgd", "lars"] = "adamw"
    """sgd and lars have momentum 0.9. lars is MAE's: it neither adapts the rate of vectors (biases, norms) nor decays
    them."""
    lr: Positive = 5e-3
    clip_grad: Positive | None = None
    """Largest gradient norm. If it is not given, the paper's protocol and fine-tuning clip as the released code: a
    Swin's gradients at 1.0, a ViT's not at all."""
    micro_batch: Count = 2048
    warmup_lr: NotNegative = 2.5e-6
    min_lr: NotNegative = 2.5e-6


class FinetuneOptim(ClassifierOptim):
    """ClassifierOptim, in micro-batches that a whole network can train on."""

    micro_batch: Count = 256


class SweepOptim(Optim):
    """Optim, for cached features. lr is not used: see ProbeSweep.lrs."""

    clip_grad: None = None
    batch_size: Count = 1024
    epochs: Count = 10
    warmup_epochs: Natural = 1
    warmup_lr: NotNegative = 0.0
    min_lr: NotNegative = 0.0


PROTOCOLS: Mapping[str, dict[str, Any]] = MappingProxyType(
    {
        "paper": {},
        # He et al., Masked Autoencoders Are Scalable Vision Learners, appendix A.1 and main_linprobe.py.
        "mae": {
            "block": "last",
            "pooling": "cls",
            "norm": "batch",
            "augment": "crop",
            "init_std": 0.01,
            "optim": {
                "algorithm": "lars",
                "lr": 6.4,
                "weight_decay": 0.0,
                "clip_grad": None,
                "batch_size": 16384,
                "micro_batch": 2048,
                "epochs": 90,
                "warmup_lr": 0.0,
                "min_lr": 0.0,
            },
        },
        # Oquab et al., DINOv2, appendix B.3: without its search over learning rates, which is --mode probe-sweep.
        "dinov2": {
            "block": "last",
            "pooling": "cls_mean",
            "norm": "final",
            "augment": "crop",
            "init_std": 0.01,
            "optim": {
                "algorithm": "sgd",
                "lr": 0.01,
                "weight_decay": 0.0,
                "clip_grad": None,
                "batch_size": 1024,
                "micro_batch": 1024,
                "epochs": 10,
                "warmup_epochs": 0,
                "warmup_lr": 0.0,
                "min_lr": 0.0,
            },
        },
    }
)


class Linprobe(Section):
    """The linear probe."""

    protocol: Literal["paper", "mae", "dinov2"] = "paper"
    """Gives the defaults of the other keys: the paper's, MAE's or DINOv2's."""
    block: BlockName = "paper"
    """The block whose output is read, from 1 (a Swin's stage); last; or paper: a ViT's 8th, a Swin's last."""
    pooling: Pooling = "mean"
    """How tokens are pooled: mean or max of the patch tokens, cls (the class token), or cls_mean (both)."""
    norm: Norm = "none"
    """token: a LayerNorm without affine; final: the encoder's own; joint: the released code's LayerNorm over tokens and
    width (Table 5); batch: MAE's BatchNorm without affine."""
    augment: Literal["paper", "crop"] = "paper"
    """paper: TrivialAugmentWide, RandomErasing and MixUp or CutMix, mixed within a micro-batch. crop: a random resized
    crop and a flip."""
    init_std: Positive | None = None
    """Standard deviation of the layer's initial weights, with biases of 0; null is torch's initialisation."""
    optim: ClassifierOptim = ClassifierOptim()
    checkpoint_epochs: Count = 10
    """Epochs between two checkpoints."""

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
    """Fine-tuning: everything trains, by the released code's recipe."""

    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Rate of stochastic depth in the last block."""
    layer_decay: Fraction | None = None
    """Decay of the learning rate per block, from the end; null is none."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of a moving average of the weights, which is then measured instead; null is none."""
    optim: FinetuneOptim = FinetuneOptim()
    checkpoint_epochs: Count = 5
    """Epochs between two checkpoints."""
    keep_checkpoints: Count = 2
    """How many of the newest checkpoints are kept."""


class CachedFeatures(Section):
    """The features that a mode computes once."""

    block: BlockName = "paper"
    """The block whose output is read, from 1 (a Swin's stage); last; or paper: a ViT's 8th, a Swin's last."""
    pooling: Pooling = "mean"
    """How tokens are pooled: mean or max of the patch tokens, cls (the class token), or cls_mean (both)."""
    norm: Literal["none", "token", "final"] = "none"
    """The norm of the features: none; token, a LayerNorm without affine; or final, the encoder's own."""


KNN_PROTOCOLS: Mapping[str, dict[str, Any]] = MappingProxyType(
    {
        "linprobe": {},
        # Caron et al., Emerging Properties in Self-Supervised Vision Transformers, and eval_knn.py.
        "dino": {"k": (10, 20, 100, 200), "block": "last", "pooling": "cls", "norm": "final"},
    }
)


class Knn(CachedFeatures):
    """Nearest neighbours by cosine similarity, whose votes are weighted as DINO's."""

    protocol: Literal["linprobe", "dino"] = "linprobe"
    """Gives the defaults of the other keys: linprobe reads the features of the paper's linear probe, dino those of
    DINO, the class token of the last block after the final norm. DINO reports k = 20."""
    k: Annotated[tuple[Count, ...], NotEmpty] = (5, 10, 20, 100)
    """Numbers of neighbours; one accuracy for each."""
    temperature: Positive = 0.07
    """A neighbour's vote weighs exp(similarity / temperature)."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _defaults(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("protocol", "linprobe") not in KNN_PROTOCOLS:
            return given
        return {**KNN_PROTOCOLS[given.get("protocol", "linprobe")], **given}


AttentivePooling = Literal["ep", "abmilp", "mean"]


class AttentiveOptim(ClassifierOptim):
    """ClassifierOptim, as in efficient probing's code."""

    COSINE_AFTER_WARMUP: ClassVar[bool] = True

    lr: Positive = 5e-3
    """Not used; attentive.blr gives the learning rate."""
    algorithm: Literal["adamw", "sgd", "lars"] = "lars"
    """sgd and lars have momentum 0.9."""
    weight_decay: NotNegative = 0.0
    """Weight decay of every parameter."""
    batch_size: Count = 4096
    """Samples of a step, over all ranks; all training samples if there are fewer."""
    micro_batch: Count = 256
    """Samples that a rank computes at once, and that a batch norm has its statistics of. Micro-batches of a step are as
    even as they can be."""
    epochs: Count = 90
    warmup_lr: NotNegative = 0.0
    min_lr: NotNegative = 0.0


class Attentive(Section):
    """Attentive probes: attention over the patch tokens of a frozen encoder is learned with the linear layer.

    Tokens are computed once and kept in out: 2 bytes a number, 1 GB for 9,469 images and a ViT-S at 192 px.
    """

    poolings: Annotated[tuple[AttentivePooling, ...], NotEmpty] = ("ep", "abmilp", "mean")
    """Which probes are trained, each alone and all alike. ep: efficient probing, several queries (Psomas et al., ICLR
    2026). abmilp: one score a token (Beyond [cls], ICCV 2025). mean: a linear probe of the tokens' mean."""
    queries: Count = 32
    """Queries of ep: a divisor of the encoder's width."""
    abmilp_depth: Count = 1
    """Layers of abmilp's score, with tanh between them. 1 is the command in its README, 2 the default of its code."""
    block: BlockName = "paper"
    """The block whose output is read, from 1 (a Swin's stage); last; or paper: a ViT's 8th, a Swin's last. Efficient
    probing's own results are of the last block."""
    norm: Literal["none", "token", "final"] = "none"
    """The norm of the features: none; token, a LayerNorm without affine; or final, the encoder's own."""
    blr: Positive = 0.1
    """Learning rate for 256 samples: the rate is blr x samples of a step / 256."""
    optim: AttentiveOptim = AttentiveOptim()
    checkpoint_epochs: Count = 30
    """Epochs between two checkpoints."""
    shown: Count = 6
    """Images in the picture of the attention."""


class ProbeSweep(Section):
    """Linear probes of every block, pooling, norm and learning rate at once, on features without augmentation."""

    poolings: Annotated[tuple[Literal["mean", "cls", "max"], ...], NotEmpty] = ("mean", "cls", "max")
    """How tokens are pooled, a probe for each: mean or max of the patch tokens, cls (the class token). Those that the
    encoder lacks (a Swin has no class token) are left out."""
    norms: Annotated[tuple[Literal["none", "token"], ...], NotEmpty] = ("none", "token")
    """The norms of the features, a probe for each: none, and token, a LayerNorm without affine."""
    lrs: Annotated[tuple[Positive, ...], NotEmpty] = (1e-4, 3e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.3)
    """Learning rates, a probe for each."""
    optim: SweepOptim = SweepOptim()


class Reconstruct(Section):
    """PSNR and SSIM of reconstructions of masked images."""

    conventions: Annotated[tuple[Literal["paper", "honest"], ...], NotEmpty] = ("paper", "honest")
    """paper: whole images in normalised units. honest: masked pixels in grey levels."""
    mask_ratio: Fraction | None = None
    """Share of the blocks that are masked; null is as in training. The released code's notebook has 0.4."""
    shown: Count = 6
    """Images in the picture."""


class SegmentOptim(ClassifierOptim):
    """ClassifierOptim, with the defaults of DINOv3's linear segmentation."""

    lr: Positive = 1e-3
    weight_decay: NotNegative = 1e-3
    """Weight decay of every parameter."""
    clip_grad: Positive | None = None
    """Largest gradient norm; null does not clip."""
    batch_size: Count = 16
    micro_batch: Count = 16
    epochs: Count = 40
    warmup_epochs: Natural = 1
    warmup_lr: NotNegative = 0.0
    min_lr: NotNegative = 0.0


class Segment(Section):
    """The linear probe of semantic segmentation: a class for every pixel, from the patch tokens of a frozen encoder."""

    train: Path | None = None
    """A folder to train on: images/, masks/ (a PNG of class indices for each image, of the same name and size) and
    classes.txt (a name on each line; the first line names index 0)."""
    val: Path | None = None
    """A folder to measure on, with the same classes."""
    ignore_index: Annotated[int, Field(ge=0, le=255)] = 255
    """The value in masks of pixels without a class, which neither train nor count."""
    block: BlockName = "last"
    """The block whose patch tokens are read, from 1 (a Swin's stage); last, after the encoder's final norm; or paper: a
    ViT's 8th, a Swin's last."""
    crop_scale: tuple[Fraction, Fraction] = (0.25, 1.0)
    """Smallest and largest share of the image's area that a random resized crop shows."""
    optim: SegmentOptim = SegmentOptim()
    checkpoint_epochs: Count = 10
    """Epochs between two checkpoints."""
    shown: Count = 6
    """Images in the picture."""

    @pydantic.model_validator(mode="after")
    def _ordered(self) -> Self:
        low, high = self.crop_scale
        if low > high:
            raise KamimError(f"crop_scale = [{low}, {high}]: the first must not be larger than the second")
        return self


class FewShot(CachedFeatures):
    """Accuracy with few labels, of a logistic regression and of nearest neighbours."""

    per_class: Annotated[tuple[Count | None, ...], NotEmpty] = (1, 5, 20, None)
    """Labelled images of each class; each gives a result, unless a class has fewer. null is all of them."""
    draws: Count = 5
    """Draws of the labelled images, over which a result is the mean."""
    k: Count = 20
    """Neighbours that vote, or all labelled images if they are fewer."""
    temperature: Positive = 0.07
    """A neighbour's vote weighs exp(similarity / temperature)."""


class Corruptions(CachedFeatures):
    """Accuracy on corrupted images, of a logistic regression and of nearest neighbours on clean training images."""

    kinds: Annotated[tuple[CorruptionName, ...], NotEmpty] = ("noise", "blur", "contrast", "jpeg")
    """Corruptions, those of Hendrycks and Dietterich (2019) at their five strengths."""
    k: Count = 20
    """Neighbours that vote, or all training images if they are fewer."""
    temperature: Positive = 0.07
    """A neighbour's vote weighs exp(similarity / temperature)."""


class ShapeBias(CachedFeatures):
    """Whether a linear probe decides by shape or by texture if an image shows those of two categories."""

    images: Path | None = None
    """A folder of cue-conflict images as Geirhos et al. (2019) publish them: SHAPE/SHAPE<n>-TEXTURE<m>.png."""
    categories: Mapping[str, Annotated[tuple[str, ...], NotEmpty]] = {}
    """The classes of the training store that make each category, such as {cat: [tabby, Egyptian cat]}. Images of other
    categories are left out."""


class Evaluation(Section):
    """`kamim eval`."""

    PRESETS: ClassVar[str] = "eval"

    checkpoint: Annotated[tuple[str, ...], NotEmpty]
    """[NAME=]RUN: a run, one of its checkpoints or a file that `kamim import` reads. random:RUN is the same
    architecture untrained; pixels:RUN uses pixels as features."""
    train: Path | None = None
    """A labelled store to train on."""
    val: Path | None = None
    """The store that is evaluated on; segment has its own folders."""
    per_class: Count | None = None
    """Training samples of each class; null is all."""
    batch_size: Count = 256
    """Images of a batch in which nothing trains."""
    compute: Compute = Compute()
    workers: Count | None = None
    """Loader threads; null is one per core."""
    seed: Seed = 0
    """Seed of every random draw."""
    out: Path | None = None
    """Folder for state, features and results, which lets an interrupted evaluation resume; null keeps nothing."""
    linprobe: Linprobe = Linprobe()
    finetune: Finetune = Finetune()
    knn: Knn = Knn()
    attentive: Attentive = Attentive()
    sweep: ProbeSweep = ProbeSweep()
    reconstruct: Reconstruct = Reconstruct()
    segment: Segment = Segment()
    few_shot: FewShot = FewShot()
    corruptions: Corruptions = Corruptions()
    shape_bias: ShapeBias = ShapeBias()
