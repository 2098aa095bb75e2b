"""The task of `--mode segment`: checks first, then trains and measures the linear segmentation probe."""

import io
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from kamim import KamimError
from kamim.evaluation import segment
from kamim.evaluation.classifier_training import make_optimizer
from kamim.evaluation.context import EvalContext, Task
from kamim.evaluation.dense import DenseLoader
from kamim.evaluation.evaluated_model import EvaluatedModel
from kamim.evaluation.mask_folder import MaskFolder
from kamim.evaluation.results import EvalSettings, SampleSet, Segmentation
from kamim.evaluation.sections import PICTURE
from kamim.evaluation.segment import FrozenTokens, PixelCrossEntropy, SegmentationHead
from kamim.models.readout import resolve, token_map
from kamim.runtime.device import parallel
from kamim.runtime.distributed import World
from kamim.storage.files import write_whole
from kamim.training.checkpoint import Keep
from kamim.training.trainer import Progress, Run, Trainer
from pipelines.batch import normalise
from pipelines.loader import Crop
from pipelines.plan import Plan, largest_batch


def segment_task(context: EvalContext, evaluated: EvaluatedModel) -> Task:
    """Trains a batch norm and a 1x1 layer on the patch tokens of a frozen encoder."""
    config, options, world = context.config, context.config.segment, context.world
    train, val = context.mask_folders
    block = resolve(evaluated.encoder, options.block)
    width = _token_width(evaluated, block)
    if options.optim.batch_size > len(train):
        raise KamimError(
            f"segment.optim.batch_size = {options.optim.batch_size}: more than the {len(train)} images of "
            f"{train.path}; set segment.optim.batch_size={largest_batch(len(train))}"
        )
    plan = Plan(
        len(train), options.optim.batch_size, options.optim.micro_batch, config.seed, rank=world.rank, world=world.size
    )
    crop = Crop(options.crop_scale, flip_v=False)
    loader = DenseLoader(train, plan, evaluated.resolution, crop, config.workers, world.device)

    def run(folder: Path, progress: Progress) -> Segmentation:
        torch.manual_seed(config.seed)
        head = SegmentationHead(width, len(train.classes)).to(world.device)
        read = FrozenTokens(evaluated.encoder, block, config.compute, world.device)
        network = parallel(head, config.compute.model_copy(update={"compile": False}), world)
        groups = [{"params": list(head.parameters()), "weight_decay": options.optim.weight_decay}]
        training = Run(
            folder,
            "segment",
            options.model_dump(mode="json"),
            options.optim,
            plan.steps_per_epoch,
            options.checkpoint_epochs * plan.steps_per_epoch,
            Keep(1),
        )
        trainer = Trainer(
            training,
            head,
            network,
            make_optimizer(groups, options.optim),
            PixelCrossEntropy(network, read, config.compute),
            loader.micro_batches,
            world,
        )
        if not trainer.fit(progress).finished:
            raise KeyboardInterrupt
        whole = _in_order(val, np.arange(len(val)), options.optim.micro_batch, evaluated, context, world)
        batches = whole.micro_batches(0, whole.plan.steps_per_epoch)
        confusion = segment.measure(head, read, batches, val, len(val.classes), world)
        if world.is_main:
            _keep_picture(folder / PICTURE, context, evaluated, val, head, read)
        return segment.segmentation(confusion, val.classes, options.ignore_index)

    settings = EvalSettings(
        mode="segment",
        name=evaluated.name,
        **asdict(evaluated.origin),
        resolution=evaluated.resolution,
        seed=config.seed,
        train=_samples(train),
        val=_samples(val),
        classes=len(val.classes),
        protocol="dinov3",
        block=block,
        epochs=options.optim.epochs,
        options=options.model_dump(mode="json"),
    )
    return Task(settings, run)


def _samples(folder: MaskFolder) -> SampleSet:
    return SampleSet(str(folder.path), "masks", len(folder), folder.fingerprint)


def _token_width(evaluated: EvaluatedModel, block: int) -> int:
    """Returns D of the tokens. Raises KamimError if there is a single token per image, which cannot be segmented."""
    device = next((p.device for p in evaluated.encoder.parameters()), torch.device("cpu"))
    with torch.no_grad():
        side = evaluated.resolution
        _, width, height, _ = token_map(evaluated.encoder, torch.zeros(1, 3, side, side, device=device), block).shape
    if height < 2:
        raise KamimError(
            f"checkpoint = {evaluated.name}: block {block} has one token for an image of {side} px; segmentation "
            "needs more"
        )
    return width


def _in_order(
    folder: MaskFolder, chosen: np.ndarray, size: int, evaluated: EvaluatedModel, context: EvalContext, world: World
) -> DenseLoader:
    """Loads the chosen samples once, as whole images, in steps of `size` on each rank."""
    plan = Plan(
        len(chosen),
        max(min(size * world.size, len(chosen)), world.size),
        size,
        seed=0,
        order="stored",
        drop_last=False,
        rank=world.rank,
        world=world.size,
        listed=chosen,
    )
    return DenseLoader(folder, plan, evaluated.resolution, None, context.config.workers, world.device)


def _keep_picture(
    file: Path,
    context: EvalContext,
    evaluated: EvaluatedModel,
    val: MaskFolder,
    head: SegmentationHead,
    read: FrozenTokens,
) -> None:
    """Writes some validation images, evenly spaced, with their true and their predicted classes."""
    count = min(context.config.segment.shown, len(val))
    chosen, alone = np.linspace(0, len(val) - 1, count).astype(np.int64), World(0, 1, context.world.device)
    (batch,) = _in_order(val, chosen, count, evaluated, context, alone).micro_batches(0, 1)
    with torch.no_grad():
        logits: Tensor = interpolate(head(read(normalise(batch.images))), batch.labels.shape[1:], mode="bilinear")
    arrays = io.BytesIO()
    np.savez_compressed(
        arrays,
        images=batch.images.cpu(),
        truth=batch.labels.short().cpu(),
        predicted=logits.argmax(dim=1).short().cpu(),
        classes=np.array(val.classes),
    )
    write_whole(file, arrays.getvalue())
