"""Results of the evaluation modes, and their JSON: one flat object, the settings first, then what was measured."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from itertools import groupby
from typing import Annotated, Any, ClassVar, Generic, Protocol, TypeVar

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from kamim import KamimError
from kamim.config.schema import Count, Fraction, Natural, NotNegative, Seed
from kamim.reporting.intervals import with_wilson
from kamim.storage.flatten import inside

MAX_DEPTH = 8  # levels of nested settings; those of this version have 3


def _shallow(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns settings. Raises KamimError if they are nested more deeply than MAX_DEPTH."""
    level: list[Any] = [settings]
    for _ in range(MAX_DEPTH):
        level = [inner for value in level for inner in inside(value)]
    if level:
        raise KamimError(f"must be nested at most {MAX_DEPTH} levels deep")
    return settings


def _moderate(value: float) -> float:
    """Returns the value. Raises KamimError if it is beyond 1000, unless it is infinite, as of a perfect copy."""
    if math.isfinite(value) and abs(value) > 1000:
        raise KamimError("must be -1000 to 1000")
    return value


# The ranges of a result's numbers. Within them, every table, interval and plot can be computed.
Percent = Annotated[float, Field(ge=0, le=100)]
Moderate = Annotated[float, AfterValidator(_moderate)]
Settings = Annotated[Mapping[str, Any], AfterValidator(_shallow)]


@dataclass(frozen=True)
class SampleSet:
    """The samples of a store that an evaluation trained or measured on. fingerprint: that of the store's source."""

    store: str
    dataset: str
    images: Count
    fingerprint: str


FILE = "result.json"
# Settings that some results lack.
OPTIONAL = ("positions", "run_seed", "command", "block", "pooling", "norm", "epochs", "mask_ratio")
ABOUT = ("pretraining", "run_seed")  # origin of the weights, whose checksum is compared instead


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """Everything that a result depends on.

    weights is the sha256 of the checkpoint's weights. pretraining holds the keys of Pretrain that shape a run, and is
    None for untrained or foreign weights; versions differ in its keys, so it stays a mapping. run_seed is the seed of
    the run that a checkpoint is of, or with which random weights are drawn; None for raw pixels and foreign weights.
    seed is that of the evaluation. command is the command line of the process that finished the result (see
    kamim.runtime.machine.command_line), and None before that. train is None for modes that train nothing. options are
    the mode's section of the configuration. The OPTIONAL settings are left out of the JSON if they are None. Early
    versions did not write resolution, batch_size, run_seed and command.
    """

    mode: str
    name: str
    checkpoint: str
    architecture: str
    positions: str | None = None
    step: Natural
    weights: str | None
    pretraining: Settings | None = None
    run_seed: Seed | None = None
    command: str | None = None
    resolution: Natural | None = None
    seed: Seed
    batch_size: Natural | None = None
    train: SampleSet | None
    val: SampleSet
    classes: Natural
    protocol: str
    block: Natural | None = None
    pooling: str | None = None
    norm: str | None = None
    epochs: Natural | None = None
    mask_ratio: Fraction | None = None
    options: Settings

    def as_json(self) -> dict[str, Any]:
        """Returns the content of settings.json."""
        return {key: value for key, value in asdict(self).items() if value is not None or key not in OPTIONAL}


class Measured(Protocol):
    """The measurement of a mode: a frozen dataclass whose fields are the keys of the JSON besides the settings.

    score_is_accuracy: whether the score is a share of the validation images in per cent, which has an interval.
    """

    score_is_accuracy: ClassVar[bool]

    @property
    def score(self) -> float | None:
        """The one number that summarises the result, larger is better; None if there is none."""
        ...

    def summary(self, images: int) -> str:
        """Formats the result as a line of the terminal. images: the number of validation images."""
        ...


M_co = TypeVar("M_co", bound=Measured, covariant=True)


@cache
def _reader(kind: Any) -> TypeAdapter[Any]:
    """Returns what reads a value of a type from JSON; building one takes longer than reading."""
    return TypeAdapter(kind)


@dataclass(frozen=True)
class Result(Generic[M_co]):
    """The measurement of one mode on one checkpoint, and its settings.

    majority_top1: top1, in per cent, of always answering the most frequent training class; None for modes that train
    nothing, and in results of early versions.
    """

    settings: EvalSettings
    measured: M_co
    majority_top1: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Returns the content of result.json, and an entry of what `kamim eval --json` writes."""
        measured = {key: value for key, value in asdict(self.measured).items() if value is not None}  # type: ignore[call-overload]
        majority = {} if self.majority_top1 is None else {"majority_top1": self.majority_top1}
        return {**self.settings.as_json(), **json.loads(json.dumps(measured)), **majority}

    @classmethod
    def from_json(cls, content: Any, measured: type[M_co]) -> "Result[M_co]":
        """Reads a result of a mode that measures `measured`, and ignores unknown keys.

        Raises KamimError if keys are missing, of another type, or accuracies outside 0 to 100.
        """
        try:
            settings = _reader(EvalSettings).validate_python(content)
            majority = _reader(Percent | None).validate_python(content.get("majority_top1"))
            return Result(settings, _reader(measured).validate_python(content), majority)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise KamimError(f"not a result of kamim eval ({key}: {first['msg']})") from error


def headline(result: Result[Any]) -> str:
    """Returns the score as tables print it, an accuracy with its Wilson interval; empty if there is no score."""
    score = result.measured.score
    if score is None or not result.measured.score_is_accuracy:
        return score_text(result)
    return with_wilson(score, result.settings.val.images)


def score_text(result: Result[Any]) -> str:
    """Returns the score with two decimals; empty if there is none."""
    return "" if result.measured.score is None else f"{result.measured.score:.2f}"


def majority_lines(results: Iterable[Result[Any]]) -> list[str]:
    """Returns a line for the majority baseline, or one for each if the results have several pairs of stores."""
    baselines = {(r.majority_top1, r.settings.val.images): r for r in results if r.majority_top1 is not None}
    return [
        f"majority class: top-1 {with_wilson(top1, images)} % by always answering the most frequent training class"
        for top1, images in baselines
    ]


@dataclass(frozen=True)
class Accuracy:
    """Shares of the validation samples, in per cent, whose class is the first, or among the first 5, of the scores."""

    score_is_accuracy: ClassVar[bool] = True
    top1: Percent
    top5: Percent

    @property
    def score(self) -> float:
        """top1."""
        return self.top1

    def summary(self, images: int) -> str:
        """Formats both accuracies."""
        return f"top-1 {with_wilson(self.top1, images)} %, top-5 {self.top5:.2f} %"


@dataclass(frozen=True)
class AttentiveAccuracy:
    """The accuracy of each attentive probe, by the name of its pooling: ep, abmilp, mean."""

    score_is_accuracy: ClassVar[bool] = True
    poolings: Mapping[str, Accuracy]

    @property
    def score(self) -> float | None:
        """top1 of efficient probing; None if it was not measured."""
        return self.poolings["ep"].top1 if "ep" in self.poolings else None

    def summary(self, images: int) -> str:
        """Formats top1 of every pooling."""
        return ", ".join(f"{name}: top-1 {with_wilson(one.top1, images)} %" for name, one in self.poolings.items())


@dataclass(frozen=True)
class KnnAccuracy:
    """The accuracy for each number of neighbours k."""

    score_is_accuracy: ClassVar[bool] = True
    k: Mapping[Count, Accuracy]

    @property
    def score(self) -> float:
        """top1 of the best k."""
        return max(accuracy.top1 for accuracy in self.k.values())

    def summary(self, images: int) -> str:
        """Formats top1 of every k."""
        return ", ".join(f"k {k}: top-1 {with_wilson(one.top1, images)} %" for k, one in self.k.items())


@dataclass(frozen=True)
class SweepRow:
    """One linear probe of a sweep: what it reads, its learning rate, and its accuracy in per cent."""

    block: Natural
    pooling: str
    norm: str
    lr: NotNegative
    top1: Percent
    top5: Percent


@dataclass(frozen=True)
class SweepAccuracy:
    """The accuracies of all probes of a sweep, and the best of them."""

    score_is_accuracy: ClassVar[bool] = True
    rows: tuple[SweepRow, ...]
    best: SweepRow

    @property
    def score(self) -> float:
        """top1 of the best row."""
        return self.best.top1

    def summary(self, images: int) -> str:
        """Formats the best row."""
        best = self.best
        probe = f"block {best.block}, {best.pooling}, norm {best.norm}, lr {best.lr:g}"
        return f"best top-1 {with_wilson(best.top1, images)} % ({probe})"


def best_row(rows: Iterable[SweepRow]) -> SweepRow:
    """Returns the row with the highest top1; of equal ones that with the highest top5, then the first."""
    return max(rows, key=lambda row: (row.top1, row.top5))


def best_by_readout(rows: Iterable[SweepRow]) -> list[SweepRow]:
    """Returns the best row of every (block, pooling, norm), sorted by these."""

    def readout(row: SweepRow) -> tuple[int, str, str]:
        return row.block, row.pooling, row.norm

    return [best_row(group) for _, group in groupby(sorted(rows, key=readout), key=readout)]


@dataclass(frozen=True)
class Similarity:
    """How close reconstructions are to the originals: PSNR in dB, and SSIM."""

    psnr: Moderate
    ssim: Moderate


@dataclass(frozen=True)
class Reconstructions:
    """The similarity by each convention of kamim.evaluation.reconstruct; None if it was not measured."""

    score_is_accuracy: ClassVar[bool] = False
    paper: Similarity | None = None
    honest: Similarity | None = None

    @property
    def score(self) -> float | None:
        """PSNR of masked pixels alone; None if it was not measured."""
        return None if self.honest is None else self.honest.psnr

    def summary(self, images: int) -> str:
        """Formats both conventions, without the number of images."""
        measured = {"paper": self.paper, "honest": self.honest}
        return "; ".join(f"{name} PSNR {m.psnr:.2f} dB, SSIM {m.ssim:.4f}" for name, m in measured.items() if m)


@dataclass(frozen=True)
class Segmentation:
    """Intersection over union by class and its mean, and the share of pixels whose class is right, all in per cent.

    iou is None for a class that is in neither the truth nor a prediction, and for an ignored one; miou is the mean
    of the others.
    """

    score_is_accuracy: ClassVar[bool] = False
    miou: Percent
    pixel_accuracy: Percent
    iou: Mapping[str, Percent | None]

    @property
    def score(self) -> float:
        """The mean intersection over union."""
        return self.miou

    @property
    def classes(self) -> str:
        """The number of classes that the mean is over, and of all."""
        return f"{sum(iou is not None for iou in self.iou.values())} of {len(self.iou)}"

    def summary(self, images: int) -> str:
        """Formats the mean intersection over union, its classes, and the accuracy."""
        return f"mIoU {self.miou:.2f} % over {self.classes} classes, pixel accuracy {self.pixel_accuracy:.2f} %"


@dataclass(frozen=True)
class ShotAccuracy:
    """top1 in per cent with a number of labelled images of each class, None for all; images: how many those are.

    linear and knn are means over several draws of the images, and the spreads their sample standard deviations, 0 of a
    single draw.
    """

    per_class: Count | None
    images: Count
    linear: Percent
    linear_spread: Percent
    knn: Percent
    knn_spread: Percent


@dataclass(frozen=True)
class FewShotAccuracy:
    """The accuracy by the number of labelled images of each class."""

    score_is_accuracy: ClassVar[bool] = False
    shots: tuple[ShotAccuracy, ...]

    @property
    def score(self) -> float:
        """linear with the fewest labels."""
        return min(self.shots, key=lambda shot: shot.images).linear

    def summary(self, images: int) -> str:
        """Formats linear with every number of labels."""
        return "linear, " + ", ".join(
            f"{shot.per_class or 'all'} per class: {shot.linear:.2f} %" for shot in self.shots
        )


@dataclass(frozen=True)
class CorruptedAccuracy:
    """top1 in per cent on images with one corruption; strength: 1 .. 5."""

    corruption: str
    strength: Annotated[int, Field(ge=1, le=5)]
    linear: Percent
    knn: Percent


@dataclass(frozen=True)
class Robustness:
    """top1 in per cent on clean and on corrupted images, of classifiers that are fitted to clean images."""

    score_is_accuracy: ClassVar[bool] = False
    linear: Percent
    knn: Percent
    corrupted: tuple[CorruptedAccuracy, ...]

    @property
    def mean_linear(self) -> float:
        """The mean of linear over all corruptions and strengths."""
        return sum(row.linear for row in self.corrupted) / len(self.corrupted)

    @property
    def mean_knn(self) -> float:
        """The mean of knn over all corruptions and strengths."""
        return sum(row.knn for row in self.corrupted) / len(self.corrupted)

    @property
    def score(self) -> float:
        """mean_linear."""
        return self.mean_linear

    def summary(self, images: int) -> str:
        """Formats clean and corrupted accuracies."""
        return f"linear {with_wilson(self.linear, images)} % clean, {self.mean_linear:.2f} % corrupted"


@dataclass(frozen=True)
class ShapeBias:
    """Decisions on images whose shape and texture are of different categories.

    shape, texture, other: numbers of images by whose category was decided for. shape_bias: shape decisions among shape
    and texture decisions, in per cent; by_category: the same for the images of each shape. None if there are none.
    """

    score_is_accuracy: ClassVar[bool] = False
    shape: Natural
    texture: Natural
    other: Natural
    by_category: Mapping[str, Percent | None]
    shape_bias: Percent | None = None

    @property
    def score(self) -> float | None:
        """shape_bias."""
        return self.shape_bias

    def summary(self, images: int) -> str:
        """Formats the bias and the decisions."""
        bias = "undefined" if self.shape_bias is None else f"{self.shape_bias:.2f} %"
        return f"shape bias {bias} ({self.shape} shape, {self.texture} texture, {self.other} other decisions)"
