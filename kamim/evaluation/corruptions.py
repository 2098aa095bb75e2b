"""Robustness: accuracy on corrupted validation images, of classifiers that are fitted to clean training images."""

from dataclasses import replace
from pathlib import Path

from kamim.evaluation.context import EvalContext, Task, features_of, task
from kamim.evaluation.corrupted_images import STRENGTHS, Corruption
from kamim.evaluation.evaluated_model import EvaluatedModel
from kamim.evaluation.features import extract
from kamim.evaluation.few_label_classifiers import CachedClassifiers
from kamim.evaluation.results import CorruptedAccuracy, Robustness
from kamim.training.trainer import Progress
from pipelines.loader import Loader


def corruptions_task(context: EvalContext, evaluated: EvaluatedModel) -> Task:
    """Fits a logistic regression and nearest neighbours, and measures both on every corruption."""
    config, options, samples = context.config, context.config.corruptions, context.labelled()
    readout = evaluated.readout(options)

    def run(folder: Path, progress: Progress) -> Robustness:
        train, clean = (features[readout] for features in features_of(context, evaluated, [readout], folder, progress))
        classifiers = CachedClassifiers(
            train, samples.labels, len(samples.classes), options.k, options.temperature, context.world.device
        )
        plan = replace(context.in_order(context.val, evaluated.resolution).plan, seed=config.seed)
        rows = []
        for kind in options.kinds:
            for strength in STRENGTHS:
                loader = Loader(
                    context.val.store,
                    plan,
                    evaluated.resolution,
                    augment=Corruption(kind, strength),
                    workers=config.workers,
                    device=context.world.device,
                )
                features = extract(
                    evaluated.encoder,
                    [readout],
                    loader,
                    context.val.indices,
                    config.compute,
                    context.world,
                    folder / f"{kind}-{strength}",
                    progress,
                )
                rows.append(CorruptedAccuracy(kind, strength, *classifiers.top1(features[readout], context.val.labels)))
        return Robustness(*classifiers.top1(clean, context.val.labels), tuple(rows))

    return task("corruptions", context, evaluated, run, protocol="imagenet-c", options=options, readout=readout)
