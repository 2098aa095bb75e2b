"""The evaluation modes: MODES holds every property of a mode except its options.

A new mode is an entry here, a name in kamim.evaluation.options.ModeName, and a section of options in Evaluation.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from kamim import KamimError
from kamim.evaluation import sections, tasks
from kamim.evaluation.context import EvalContext, Task
from kamim.evaluation.corruptions import corruptions_task
from kamim.evaluation.evaluated_model import EvaluatedModel
from kamim.evaluation.few_shot import few_shot_task
from kamim.evaluation.options import Evaluation
from kamim.evaluation.results import (
    Accuracy,
    AttentiveAccuracy,
    FewShotAccuracy,
    KnnAccuracy,
    Measured,
    Reconstructions,
    Result,
    Robustness,
    Segmentation,
    ShapeBias,
    SweepAccuracy,
)
from kamim.evaluation.segment_task import segment_task
from kamim.evaluation.shape_bias import shape_bias_task
from kamim.models.readout import Pixels
from kamim.reporting import page

M = TypeVar("M", bound=Measured)


@dataclass(frozen=True)
class Mode(Generic[M]):
    """One way to evaluate a checkpoint.

    plan: builds the task; raises KamimError for an unsuitable checkpoint or configuration. measured: the type of its
    measurement. title: of its section in the report. column: of its headline in tables. section: parts of the page (see
    kamim.reporting.page). applies: whether a checkpoint has what the mode needs; configured: whether a configuration
    has. pictures: (PNG, caption) from the tasks' folders, by checkpoint. chosen_on_val: whether the headline is the
    best of several numbers on the validation store.
    """

    plan: Callable[[EvalContext, EvaluatedModel], Task]
    measured: type[M]
    title: str
    column: str
    section: Callable[[Sequence[Result[M]]], Iterator[page.Part]]
    applies: Callable[[EvaluatedModel], bool] = lambda _: True
    configured: Callable[[Evaluation], bool] = lambda _: True
    pictures: Callable[[Sequence[tuple[str, Path]]], Iterator[tuple[bytes, str]]] = lambda _: iter(())
    chosen_on_val: bool = False


MODES: Mapping[str, Mode[Any]] = {
    "linprobe": Mode(tasks.linprobe_task, Accuracy, "Linear probe", "linear probe", sections.classified),
    "finetune": Mode(
        tasks.finetune_task,
        Accuracy,
        "Fine-tuning",
        "fine-tuned",
        sections.classified,
        applies=lambda evaluated: not isinstance(evaluated.encoder, Pixels),
    ),
    "knn": Mode(
        tasks.knn_task, KnnAccuracy, "Nearest neighbours", "kNN, best k on val", sections.neighbours, chosen_on_val=True
    ),
    "attentive": Mode(
        tasks.attentive_task,
        AttentiveAccuracy,
        "Attentive probes",
        "attentive (ep)",
        sections.attentive_probes,
        pictures=sections.attention_sheets,
    ),
    "probe-sweep": Mode(
        tasks.sweep_task, SweepAccuracy, "Probe sweep", "probe sweep, best on val", sections.swept, chosen_on_val=True
    ),
    "reconstruct": Mode(
        tasks.reconstruct_task,
        Reconstructions,
        "Reconstruction",
        "PSNR, honest (dB)",
        sections.reconstructed,
        applies=lambda evaluated: evaluated.model is not None and evaluated.resolution % evaluated.mask.patch_size == 0,
        pictures=sections.reconstruction_sheets,
    ),
    "segment": Mode(
        segment_task,
        Segmentation,
        "Semantic segmentation",
        "segmentation, mIoU",
        sections.segmented,
        configured=lambda config: config.segment.train is not None and config.segment.val is not None,
        pictures=sections.segmentation_sheets,
    ),
    "few-shot": Mode(few_shot_task, FewShotAccuracy, "Few labels", "linear, fewest labels", sections.few_labels),
    "corruptions": Mode(
        corruptions_task, Robustness, "Corrupted images", "linear, corrupted images", sections.corrupted
    ),
    "shape-bias": Mode(
        shape_bias_task,
        ShapeBias,
        "Shape or texture",
        "shape bias",
        sections.shape_biases,
        configured=lambda config: config.shape_bias.images is not None,
    ),
}


def read_result(content: Any) -> Result[Any]:
    """Parses the content of a result.json. Raises KamimError if it is not a result."""
    mode = str(content.get("mode")) if isinstance(content, dict) else ""
    if mode not in MODES:
        raise KamimError(f"not a result of kamim eval (mode {mode!r}; must be one of {', '.join(MODES)})")
    return Result.from_json(content, MODES[mode].measured)


def read_file(file: Path) -> Result[Any]:
    """Reads a result.json. Raises KamimError, which names the file, if it is not a result."""
    try:
        return read_result(json.loads(file.read_bytes()))
    except (ValueError, RecursionError) as error:
        raise KamimError(f"{file}: {error}; remove it and rerun the command to measure again") from error
