"""Shape bias: whether a linear probe sees the shape or the texture of cue-conflict images.

Source: Geirhos et al., "ImageNet-trained CNNs are biased towards texture" (ICLR 2019), and their
`code/probabilities_to_decision.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from torch import Tensor

from kamim import KamimError
from kamim.evaluation import logistic
from kamim.evaluation.context import EvalContext, Task
from kamim.evaluation.cue_conflict import open_cue_conflicts
from kamim.evaluation.dense import DenseLoader
from kamim.evaluation.evaluated_model import EvaluatedModel
from kamim.evaluation.features import extract
from kamim.evaluation.results import EvalSettings, SampleSet, ShapeBias
from kamim.training.trainer import Progress
from pipelines.labels import check_labels
from pipelines.loader import Loader
from pipelines.plan import Plan


def shape_bias_task(context: EvalContext, evaluated: EvaluatedModel) -> Task:
    """Fits a logistic regression to the training store and classifies cue-conflict images with it."""
    config, options, world, samples = context.config, context.config.shape_bias, context.world, context.train
    if samples is None:
        raise KamimError("train: is missing; this mode needs a store to train on")
    check_labels(samples.store, samples.store)
    readout = evaluated.readout(options)
    members = members_of(options.categories, samples.classes)
    if options.images is None:
        raise KamimError("shape_bias.images: is missing; give a folder of cue-conflict images, shape_bias.images=DIR")
    images = open_cue_conflicts(options.images, members)
    size = max(min(config.batch_size, len(images)), world.size)
    plan = Plan(len(images), size, size, seed=0, order="stored", drop_last=False, rank=world.rank, world=world.size)
    conflicts = DenseLoader(images, plan, evaluated.resolution, None, config.workers, world.device)

    def run(folder: Path, progress: Progress) -> ShapeBias:
        def features(loader: Loader | DenseLoader, numbers: np.ndarray, name: str) -> Tensor:
            extracted = extract(
                evaluated.encoder, [readout], loader, numbers, config.compute, world, folder / name, progress
            )
            return extracted[readout]

        shown = features(conflicts, np.arange(len(images)), "conflicts")
        train = features(context.in_order(samples, evaluated.resolution), samples.indices, "train")
        probe = logistic.fit(train, samples.labels, len(samples.classes), world.device)
        decided = decisions(probe.logits(shown).softmax(dim=1), members)
        return shape_bias(images.shapes, images.textures, decided)

    settings = EvalSettings(
        mode="shape-bias",
        name=evaluated.name,
        **asdict(evaluated.origin),
        resolution=evaluated.resolution,
        seed=config.seed,
        batch_size=config.batch_size,
        train=SampleSet(**samples.about),
        val=SampleSet(str(images.path), "cue-conflict", len(images), images.fingerprint),
        classes=len(members),
        protocol="geirhos",
        **asdict(readout),
        options=options.model_dump(mode="json"),
    )
    return Task(settings, run)


def members_of(categories: Mapping[str, Sequence[str]], classes: Sequence[str]) -> Mapping[str, Sequence[int]]:
    """Returns the labels of each category's classes. Raises KamimError for under two categories or unknown classes."""
    if len(categories) < 2:
        raise KamimError(
            "shape_bias.categories: must map two categories or more to classes of the training store, such as "
            "{cat: [tabby], dog: [beagle]}"
        )
    for category, names in categories.items():
        for name in names:
            if name not in classes:
                raise KamimError(f"shape_bias.categories.{category}: the training store has no class {name!r}")
    return {category: [classes.index(name) for name in names] for category, names in categories.items()}


def decisions(probabilities: Tensor, members: Mapping[str, Sequence[int]]) -> list[str]:
    """Returns each image's category, whose classes have the highest mean probability; probabilities: [N, classes]."""
    names = list(members)
    means = [probabilities[:, list(members[name])].mean(dim=1) for name in names]
    return [names[place] for place in np.argmax([mean.cpu().numpy() for mean in means], axis=0)]


def shape_bias(shapes: Sequence[str], textures: Sequence[str], decided: Sequence[str]) -> ShapeBias:
    """Measures shape decisions among shape and texture decisions, from the categories of every image."""
    by_shape = np.array([decision == shape for decision, shape in zip(decided, shapes, strict=True)])
    by_texture = np.array([decision == texture for decision, texture in zip(decided, textures, strict=True)])

    def bias(chosen: np.ndarray) -> float | None:
        right, wrong = int(by_shape[chosen].sum()), int(by_texture[chosen].sum())
        return 100 * right / (right + wrong) if right + wrong else None

    everything, categories = np.ones(len(shapes), bool), np.array(shapes)
    return ShapeBias(
        int(by_shape.sum()),
        int(by_texture.sum()),
        int((~by_shape & ~by_texture).sum()),
        {name: bias(categories == name) for name in sorted(set(shapes))},
        bias(everything),
    )
