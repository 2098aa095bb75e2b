"""Few labels: accuracy by the number of labelled images per class, on features that are computed once."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from kamim import KamimError
from kamim.evaluation.context import EvalContext, Task, features_of, task
from kamim.evaluation.evaluated_model import EvaluatedModel
from kamim.evaluation.few_label_classifiers import CachedClassifiers
from kamim.evaluation.options import FewShot
from kamim.evaluation.results import FewShotAccuracy, ShotAccuracy
from kamim.reporting.intervals import estimate
from kamim.training.trainer import Progress
from pipelines.samples import n_per_class


def few_shot_task(context: EvalContext, evaluated: EvaluatedModel) -> Task:
    """Fits a logistic regression and nearest neighbours with increasing numbers of labelled images."""
    options, samples = context.config.few_shot, context.labelled()
    readout = evaluated.readout(options)
    drawn = _drawn(samples.labels, options, context.config.seed)

    def run(folder: Path, progress: Progress) -> FewShotAccuracy:
        train, val = features_of(context, evaluated, [readout], folder, progress)
        shots, done, total = [], 0, sum(len(subsets) for _, subsets in drawn)
        for per_class, subsets in drawn:
            accuracies = []
            for rows in subsets:
                known = train[readout][rows], samples.labels[rows]
                classifiers = CachedClassifiers(
                    *known, len(samples.classes), options.k, options.temperature, context.world.device
                )
                accuracies.append(classifiers.top1(val[readout], context.val.labels))
                done += 1
                progress(done, total, {})
            linear, neighbours = map(estimate, zip(*accuracies, strict=True))
            shots.append(
                ShotAccuracy(
                    per_class,
                    len(subsets[0]),
                    linear.mean,
                    linear.deviation or 0.0,
                    neighbours.mean,
                    neighbours.deviation or 0.0,
                )
            )
        return FewShotAccuracy(tuple(shots))

    return task("few-shot", context, evaluated, run, protocol="msn", options=options, readout=readout)


def _drawn(labels: Tensor, options: FewShot, seed: int) -> list[tuple[int | None, Sequence[Tensor]]]:
    """Returns, for each per_class, the places of the labelled samples, int64 [n]: of every draw, or of all once.

    Numbers for which a class has samples, but too few, are left out. Raises KamimError if none is left.
    """
    counts = labels.bincount()
    smallest = int(counts[counts > 0].min())
    possible = [n for n in options.per_class if n is None or n <= smallest]
    if not possible:
        raise KamimError(f"few_shot.per_class = {list(options.per_class)}: the smallest class has {smallest} images")
    everything = [torch.arange(len(labels))]
    return [
        (
            n,
            everything
            if n is None
            else [torch.from_numpy(n_per_class(labels.numpy(), n, seed + draw)) for draw in range(options.draws)],
        )
        for n in possible
    ]
