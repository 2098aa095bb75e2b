"""The tasks of the evaluation modes: each function checks a checkpoint and a configuration, and returns the task."""

import io
import logging
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from torch.nn.functional import one_hot

from kamim import KamimError
from kamim.config.pretrain import Compute
from kamim.evaluation import attentive, finetune, probe
from kamim.evaluation.attentive import CachedTokens
from kamim.evaluation.classifier_training import CrossEntropy, Finish, Read, accuracy, make_optimizer
from kamim.evaluation.context import EvalContext, Task, features_of, task
from kamim.evaluation.evaluated_model import EvaluatedModel
from kamim.evaluation.options import Attentive, ClassifierOptim, Finetune, Linprobe
from kamim.evaluation.probe_sweep import sweep
from kamim.evaluation.reconstruct import CONVENTIONS
from kamim.evaluation.report import paper
from kamim.evaluation.results import Accuracy, AttentiveAccuracy, KnnAccuracy, Reconstructions, SweepAccuracy, best_row
from kamim.evaluation.sections import ATTENTION, SHOWN
from kamim.models.knn import knn
from kamim.models.masked_image_model import build_encoder
from kamim.models.readout import Pixels, Readout, check, depth, has_class_token, resolve, width
from kamim.runtime.device import parallel
from kamim.runtime.distributed import World
from kamim.storage.files import write_whole
from kamim.training.checkpoint import Keep, Kind
from kamim.training.data import whole_images
from kamim.training.objective import Reconstruction, reconstruct
from kamim.training.trainer import Progress, Run, Trainer
from pipelines.augment import Augment, mixed_batch
from pipelines.batch import Batch, normalise
from pipelines.loader import Crop, Loader
from pipelines.plan import Plan, largest_batch
from pipelines.samples import Samples

NOT_COMPILED = Compute(compile=False)  # for a head, which takes little time
FP32 = Compute(precision="fp32")  # for reconstructions, as in the released code's notebook
_LOG = logging.getLogger(__name__)
CROP = Crop(scale=(0.08, 1.0), flip_v=False)  # torchvision's defaults, which MAE's and DINOv2's probes use


def linprobe_task(context: EvalContext, evaluated: EvaluatedModel) -> Task:
    """Trains one linear layer on a frozen encoder."""
    config, options, samples = context.config, _clipped(context.config.linprobe, evaluated), context.labelled()
    readout = Readout(resolve(evaluated.encoder, options.block), options.pooling, options.norm)
    check(evaluated.encoder, readout)
    _check_size("linprobe.optim.batch_size", options.optim.batch_size, samples)

    def run(folder: Path, progress: Progress) -> Accuracy:
        device = context.world.device
        frozen = probe.Frozen(evaluated.encoder, readout, config.compute, device)
        torch.manual_seed(config.seed)
        head = probe.build_head(frozen, readout, evaluated.resolution, len(samples.classes), device, options.init_std)
        loader, finish = _training(options.augment, context, samples, evaluated.resolution, options.optim)
        network = parallel(head, NOT_COMPILED, context.world)
        groups = [{"params": list(head.parameters()), "weight_decay": options.optim.weight_decay}]
        trainer = Trainer(
            _run("linprobe", folder, options, loader, Keep(1)),
            head,
            network,
            make_optimizer(groups, options.optim),
            CrossEntropy(network, frozen, finish, config.compute, config.seed),
            loader.micro_batches,
            context.world,
        )
        _fit(trainer, progress)
        return _accuracy(context, evaluated, head, frozen)

    return task(
        "linprobe",
        context,
        evaluated,
        run,
        protocol=options.protocol,
        options=options,
        readout=readout,
        epochs=options.optim.epochs,
    )


def attentive_task(context: EvalContext, evaluated: EvaluatedModel) -> Task:
    """Trains attentive probes, one after the other, on the cached patch tokens of a frozen encoder."""
    config, samples = context.config, context.labelled()
    options = attentive.fitted(config.attentive, len(samples.indices))
    readout = Readout(resolve(evaluated.encoder, options.block), "tokens", options.norm)
    check(evaluated.encoder, readout)
    d = width(evaluated.encoder, readout.block)
    if "ep" in options.poolings and d % options.queries:
        raise KamimError(
            f"attentive.queries = {options.queries}: does not divide {d}, the width of block {readout.block} of "
            f"{evaluated.name}"
        )
    attentive.even_micro_batch(options.optim, context.world.size)

    def run(folder: Path, progress: Progress) -> AttentiveAccuracy:
        train, val = (
            CachedTokens(features[readout].unflatten(1, (-1, d)), part.labels, context.world.device)
            for features, part in zip(
                features_of(context, evaluated, [readout], folder, progress), (samples, context.val), strict=True
            )
        )
        heads = {}
        for name in options.poolings:
            head = attentive.build_head(
                name, d, len(samples.classes), options.queries, options.abmilp_depth, config.seed
            )
            heads[name] = head.to(context.world.device)
            _fit_head(context, options, name, head, train, folder / name, progress)
        if context.world.is_main:
            batch = _spread(context, evaluated.resolution, options.shown)
            tokens = val.read(np.searchsorted(context.val.indices, batch.indices))
            maps = attentive.attention_maps(heads, tokens)
            write_whole(folder / ATTENTION, _npz(originals=batch.images.cpu(), **maps))
        plan = val.in_order(config.batch_size, context.world)

        def measure(head: nn.Module) -> Accuracy:
            batches = val.batches(plan)(0, plan.steps_per_epoch)
            return accuracy(head, lambda batch: val.read(batch.indices), batches, context.world)

        return AttentiveAccuracy({name: measure(head) for name, head in heads.items()})

    return task(
        "attentive",
        context,
        evaluated,
        run,
        protocol="ep",
        options=options,
        readout=readout,
        epochs=options.optim.epochs,
    )


def _fit_head(
    context: EvalContext,
    options: Attentive,
    name: str,
    head: nn.Module,
    train: CachedTokens,
    folder: Path,
    progress: Progress,
) -> None:
    """Trains one attentive probe, or the rest of its training."""
    config, optim, world = context.config, options.optim, context.world
    plan = train.shuffled(optim, config.seed, world)
    network = parallel(head, NOT_COMPILED, world)
    groups = [{"params": list(head.parameters()), "weight_decay": optim.weight_decay}]
    every = options.checkpoint_epochs * plan.steps_per_epoch
    about = {**options.model_dump(mode="json"), "pooling": name}
    classes = len(context.labelled().classes)
    run = Run(folder, "attentive", about, optim, plan.steps_per_epoch, every, Keep(1))

    def finish(batch: Batch) -> tuple[Tensor, Tensor]:
        return train.read(batch.indices), one_hot(batch.labels, classes).float()

    objective = CrossEntropy(network, _identity, finish, config.compute, config.seed)
    _fit(Trainer(run, head, network, make_optimizer(groups, optim), objective, train.batches(plan), world), progress)


def finetune_task(context: EvalContext, evaluated: EvaluatedModel) -> Task:
    """Trains the whole encoder with a linear layer."""
    config, options, samples = context.config, _clipped(context.config.finetune, evaluated), context.labelled()
    if isinstance(evaluated.encoder, Pixels):
        raise KamimError(f"checkpoint = {evaluated.name}: pixels have nothing to fine-tune")
    _check_size("finetune.optim.batch_size", options.optim.batch_size, samples)
    if context.world.is_main:
        _check_average(options, samples)

    def run(folder: Path, progress: Progress) -> Accuracy:
        torch.manual_seed(config.seed)
        origin = evaluated.origin
        encoder = build_encoder(origin.architecture, evaluated.resolution, options.drop_path, origin.positions)
        encoder.load_state_dict(evaluated.encoder.state_dict())
        encoder.requires_grad_(True)  # sine-cosine positions too, as MAE's code
        model = finetune.Classifier(encoder, len(samples.classes)).to(context.world.device)
        groups = finetune.parameter_groups(model, options.optim.weight_decay, options.layer_decay)
        ema = finetune.ModelEma(model, options.ema)
        network = parallel(model, config.compute, context.world)
        loader, finish = _training("paper", context, samples, evaluated.resolution, options.optim)
        trainer = Trainer(
            _run("finetune", folder, options, loader, Keep(options.keep_checkpoints)),
            ema,
            network,
            make_optimizer(groups, options.optim),
            CrossEntropy(network, _identity, finish, config.compute, config.seed),
            loader.micro_batches,
            context.world,
            after_update=ema.update,
        )
        _fit(trainer, progress)
        return _accuracy(context, evaluated, ema.best, _identity)

    return task("finetune", context, evaluated, run, protocol="paper", options=options, epochs=options.optim.epochs)


def knn_task(context: EvalContext, evaluated: EvaluatedModel) -> Task:
    """Classifies by the nearest neighbours among the training samples."""
    options, samples = context.config.knn, context.labelled()
    readout = evaluated.readout(options)
    _check_size("knn.k", max(options.k), samples)

    def run(folder: Path, progress: Progress) -> KnnAccuracy:
        train, val = features_of(context, evaluated, [readout], folder, progress)
        accuracies = knn(
            train[readout],
            samples.labels,
            val[readout],
            context.val.labels,
            len(samples.classes),
            context.world.device,
            lambda done, total: progress(done, total, {}),
            options.k,
            options.temperature,
        )
        return KnnAccuracy({int(k): Accuracy(**accuracy) for k, accuracy in accuracies.items()})

    return task("knn", context, evaluated, run, protocol=options.protocol, options=options, readout=readout)


def sweep_task(context: EvalContext, evaluated: EvaluatedModel) -> Task:
    """Trains linear probes of every block, pooling, norm and learning rate at once."""
    options, samples, encoder = context.config.sweep, context.labelled(), evaluated.encoder
    _check_size("sweep.optim.batch_size", options.optim.batch_size, samples)
    readouts = [
        Readout(block, pooling, norm)
        for block in range(1, depth(encoder) + 1)
        for pooling in options.poolings
        for norm in options.norms
        if pooling != "cls" or has_class_token(encoder)
    ]
    if not readouts:
        raise KamimError(f"sweep.poolings = {list(options.poolings)}: {evaluated.name} has no class token; add mean")

    def run(folder: Path, progress: Progress) -> SweepAccuracy:
        train, val = features_of(context, evaluated, readouts, folder, progress)
        rows = sweep(
            {readout: (train[readout], val[readout]) for readout in readouts},
            samples.labels,
            context.val.labels,
            len(samples.classes),
            options.lrs,
            options.optim,
            context.config.seed,
            context.world.device,
            lambda done, total: progress(done, total, {}),
        )
        return SweepAccuracy(tuple(rows), best_row(rows))

    return task("probe-sweep", context, evaluated, run, protocol="sweep", options=options, epochs=options.optim.epochs)


def reconstruct_task(context: EvalContext, evaluated: EvaluatedModel) -> Task:
    """Measures the reconstruction of masked validation images, and keeps some for a picture."""
    options, model = context.config.reconstruct, evaluated.model
    if model is None:
        raise KamimError(f"checkpoint = {evaluated.name}: has no head trained to reconstruct pixels")
    if evaluated.resolution % evaluated.mask.patch_size:
        raise KamimError(
            f"checkpoint = {evaluated.name}: takes images of {evaluated.resolution} px, no multiple of the mask's "
            f"{evaluated.mask.patch_size} px"
        )
    mask = evaluated.mask.model_copy(update={"ratio": options.mask_ratio or evaluated.mask.ratio})

    def reconstructed(batch: Batch) -> Reconstruction:
        with torch.no_grad():
            return reconstruct(model, batch, mask, context.config.seed, 0, FP32)

    def run(folder: Path, progress: Progress) -> Reconstructions:
        world, loader = context.world, context.in_order(context.val, evaluated.resolution)
        model.to(world.device).eval()
        metrics = {name: CONVENTIONS[name](world.device) for name in options.conventions}
        steps = loader.plan.steps_per_epoch
        for batch in loader.micro_batches(0, steps):
            if len(batch):  # a rank may have no samples of a short last step
                reconstruction = reconstructed(batch)
                for metric in metrics.values():
                    metric.update(batch.images, reconstruction.output, reconstruction.masked_pixels)
            progress(batch.step + 1, steps, {})
        measured = Reconstructions(**{name: metric.compute() for name, metric in metrics.items()})
        if world.is_main:
            batch = _spread(context, evaluated.resolution, options.shown)
            reconstruction = reconstructed(batch)
            masks, pixels = reconstruction.masked_pixels.cpu(), reconstruction.pixels(None).cpu()
            write_whole(folder / SHOWN, _npz(originals=batch.images.cpu(), masks=masks, made=pixels))
        return measured

    return task(
        "reconstruct", context, evaluated, run, protocol="paper", options=options, mask_ratio=mask.ratio, trains=False
    )


def _npz(**arrays: Tensor) -> bytes:
    """Returns the content of an .npz file."""
    stream = io.BytesIO()
    content: dict[str, Any] = {name: tensor.numpy() for name, tensor in arrays.items()}
    np.savez(stream, **content)
    return stream.getvalue()


def _spread(context: EvalContext, resolution: int, count: int) -> Batch:
    """Returns `count` validation samples, evenly spaced, since stores are often sorted by class; for one process."""
    numbers = context.val.indices
    count = min(count, len(numbers))
    chosen = Samples(context.val.store, numbers[np.linspace(0, len(numbers) - 1, count).astype(np.int64)])
    loader = whole_images(chosen, resolution, count, context.config.workers, World(0, 1, context.world.device))
    return next(iter(loader.micro_batches(0, 1)))


def _training(
    augment: str, context: EvalContext, samples: Samples, resolution: int, optim: ClassifierOptim
) -> tuple[Loader, Finish]:
    """Builds a loader of augmented batches, and the function that finishes each batch on the device."""
    classes = len(samples.classes)
    if augment == "paper":
        loader = context.training(samples, resolution, optim, augment=Augment(resolution))
        return loader, partial(mixed_batch, num_classes=classes, seed=context.config.seed)

    def unmixed(batch: Batch) -> tuple[Tensor, Tensor]:
        return normalise(batch.images), one_hot(batch.labels, classes).float()

    return context.training(samples, resolution, optim, crop=CROP), unmixed


def _run(kind: Kind, folder: Path, options: Linprobe | Finetune, loader: Loader, keep: Keep) -> Run:
    """Returns the folder, schedule and checkpoints of a classifier's training."""
    per_epoch = loader.plan.steps_per_epoch
    every = options.checkpoint_epochs * per_epoch
    return Run(folder, kind, options.model_dump(mode="json"), options.optim, per_epoch, every, keep)


O = TypeVar("O", Linprobe, Finetune)


def _clipped(options: O, evaluated: EvaluatedModel) -> O:
    """Returns the options, with the released code's clip_grad for the checkpoint's architecture if none is given."""
    if "clip_grad" in options.optim.model_fields_set:
        return options
    clip_grad = paper.CLIP_GRAD["swin" if isinstance(evaluated.encoder, SwinTransformer) else "vit"]
    return options.model_copy(update={"optim": options.optim.model_copy(update={"clip_grad": clip_grad})})


def _check_size(key: str, size: int, samples: Samples) -> None:
    """Raises KamimError if there are fewer training samples than `size`."""
    if size > (most := len(samples.indices)):
        remedy = f"set {key}=[{most}]" if key == "knn.k" else f"set {key}={largest_batch(most)}"
        raise KamimError(f"{key} = {size}: more than the {most} training samples ({remedy})")


def _check_average(options: Finetune, samples: Samples) -> None:
    """Warns if the moving average of the weights, over 1 / (1 - ema) steps, reaches back to the first ones."""
    optim = options.optim
    plan = Plan(len(samples.indices), optim.batch_size, optim.micro_batch, seed=0)
    steps, _, _ = optim.schedule(plan.steps_per_epoch)
    if options.ema is not None and 1 / (1 - options.ema) > steps:
        _LOG.warning(
            "finetune.ema = %g: averages the weights of about %.0f steps, training has %d, so untrained weights are "
            "part of what is measured; set it well below 1 - 1 / steps = %.3g",
            options.ema,
            1 / (1 - options.ema),
            steps,
            1 - 1 / steps,
        )


def _identity(images: Tensor) -> Tensor:
    return images


def _fit(trainer: Trainer, progress: Progress) -> None:
    if not trainer.fit(progress).finished:
        raise KeyboardInterrupt


def _accuracy(context: EvalContext, evaluated: EvaluatedModel, network: nn.Module, read: Read) -> Accuracy:
    loader = context.in_order(context.val, evaluated.resolution)
    batches = loader.micro_batches(0, loader.plan.steps_per_epoch)
    return accuracy(network, lambda batch: read(normalise(batch.images)), batches, context.world)
