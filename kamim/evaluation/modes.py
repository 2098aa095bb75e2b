"""The evaluation modes: each checks what it is given, then says how its work is done."""

import io
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.optim import Lars
from torch import Tensor, nn
from torch.nn.functional import one_hot

from kamim import KamimError
from kamim.evaluation import finetune, paper, probe
from kamim.evaluation.classify import CrossEntropy, Finish, Read, accuracy
from kamim.evaluation.config import ClassifierOptim, Finetune, Linprobe
from kamim.evaluation.probe_sweep import best, sweep
from kamim.evaluation.reconstruct import CONVENTIONS
from kamim.evaluation.setting import Setting, Task, features_of, task
from kamim.evaluation.subject import Subject
from kamim.models.knn import knn
from kamim.models.masked_image_model import build_encoder
from kamim.models.readout import Pixels, Readout, check, depth, prefix, resolve
from kamim.storage.store import write_whole
from kamim.training.checkpoint import Keep, Kind
from kamim.training.config import Compute
from kamim.training.data import whole_images
from kamim.training.distributed import World
from kamim.training.reconstruction import Reconstruction, reconstruct
from kamim.training.trainer import Progress, Run, Trainer, parallel
from pipelines.augment import Augment, mixed_batch
from pipelines.batch import Batch, normalise
from pipelines.loader import Crop, Loader
from pipelines.samples import Samples

SHOWN = "shown.npz"  # of a reconstruction: originals, masks, made, as plots.reconstruction_sheet takes them
NOT_COMPILED = Compute(compile=False)  # of a head, which costs next to nothing
FP32 = Compute(precision="fp32")  # of reconstructions, as in the released code's notebook
CROP = Crop(scale=(0.08, 1.0), flip_v=False)  # torchvision's defaults, which MAE's and DINOv2's probes use


def linprobe_task(setting: Setting, subject: Subject) -> Task:
    """One linear layer on a frozen encoder."""
    config, options, samples = setting.config, _clipped(setting.config.linprobe, subject), setting.labelled()
    readout = Readout(resolve(subject.encoder, options.block), options.pooling, options.norm)
    check(subject.encoder, readout)
    _check_size("linprobe.optim.batch_size", options.optim.batch_size, samples)

    def run(folder: Path, progress: Progress) -> dict[str, Any]:
        device = setting.world.device
        frozen = probe.Frozen(subject.encoder, readout, config.compute, device)
        torch.manual_seed(config.seed)
        head = probe.build_head(frozen, readout, subject.resolution, len(samples.classes), device, options.init_std)
        loader, finish = _training(options.augment, setting, samples, subject.resolution, options.optim)
        network = parallel(head, NOT_COMPILED, setting.world)
        groups = [{"params": list(head.parameters()), "weight_decay": options.optim.weight_decay}]
        trainer = Trainer(
            _run("linprobe", folder, options, loader, Keep(1)), head, network, make_optimizer(groups, options.optim),
            CrossEntropy(network, frozen, finish, config.compute, config.seed), loader.steps, setting.world,
        )  # fmt: skip
        _fit(trainer, progress)
        return _accuracy(setting, subject, head, frozen)

    about = {
        "protocol": options.protocol, "block": readout.block, "pooling": readout.pooling, "norm": readout.norm,
        "epochs": options.optim.epochs, "options": options.model_dump(mode="json"),
    }  # fmt: skip
    return task("linprobe", setting, subject, about, run)


def finetune_task(setting: Setting, subject: Subject) -> Task:
    """Everything trains."""
    config, options, samples = setting.config, _clipped(setting.config.finetune, subject), setting.labelled()
    if isinstance(subject.encoder, Pixels):
        raise KamimError(f"--checkpoint {subject.name}: pixels have nothing to fine-tune")
    _check_size("finetune.optim.batch_size", options.optim.batch_size, samples)

    def run(folder: Path, progress: Progress) -> dict[str, Any]:
        torch.manual_seed(config.seed)
        encoder = build_encoder(subject.about["architecture"], subject.resolution, options.drop_path)
        encoder.load_state_dict(subject.encoder.state_dict())
        model = finetune.Classifier(encoder, len(samples.classes)).to(setting.world.device)
        groups = finetune.parameter_groups(model, options.optim.weight_decay, options.layer_decay)
        ema = finetune.ModelEma(model, options.ema)
        network = parallel(model, config.compute, setting.world)
        loader, finish = _training("paper", setting, samples, subject.resolution, options.optim)
        trainer = Trainer(
            _run("finetune", folder, options, loader, Keep(options.keep_checkpoints)), ema, network,
            make_optimizer(groups, options.optim),
            CrossEntropy(network, _as_it_is, finish, config.compute, config.seed), loader.steps, setting.world,
            after_update=ema.update,
        )  # fmt: skip
        _fit(trainer, progress)
        return _accuracy(setting, subject, ema.best, _as_it_is)

    about = {"protocol": "paper", "epochs": options.optim.epochs, "options": options.model_dump(mode="json")}
    return task("finetune", setting, subject, about, run)


def knn_task(setting: Setting, subject: Subject) -> Task:
    """Nearest neighbours among the training samples."""
    options, samples = setting.config.knn, setting.labelled()
    readout = Readout(resolve(subject.encoder, options.block), options.pooling, options.norm)
    check(subject.encoder, readout)
    _check_size("knn.k", max(options.k), samples)

    def run(folder: Path, progress: Progress) -> dict[str, Any]:
        features = features_of(setting, subject, [readout], folder, progress)
        found = knn(
            features[0][readout], samples.labels, features[1][readout], setting.val.labels, len(samples.classes),
            setting.world.device, lambda done, total: progress(done, total, {}), options.k, options.temperature,
        )  # fmt: skip
        return {"k": found}

    about = {
        "protocol": options.protocol, "block": readout.block, "pooling": readout.pooling, "norm": readout.norm,
        "options": options.model_dump(mode="json"),
    }  # fmt: skip
    return task("knn", setting, subject, about, run)


def sweep_task(setting: Setting, subject: Subject) -> Task:
    """Linear probes of every block, pooling, norm and learning rate at once."""
    options, samples, encoder = setting.config.sweep, setting.labelled(), subject.encoder
    _check_size("sweep.optim.batch_size", options.optim.batch_size, samples)
    readouts = [
        Readout(block, pooling, norm) for block in range(1, depth(encoder) + 1) for pooling in options.poolings
        for norm in options.norms if pooling != "cls" or prefix(encoder)
    ]  # fmt: skip
    if not readouts:
        raise KamimError(f"sweep.poolings = {list(options.poolings)}: {subject.name} has no class token; add mean")

    def run(folder: Path, progress: Progress) -> dict[str, Any]:
        train, val = features_of(setting, subject, readouts, folder, progress)
        rows = sweep(
            {readout: (train[readout], val[readout]) for readout in readouts}, samples.labels, setting.val.labels,
            len(samples.classes), options.lrs, options.optim, setting.config.seed, setting.world.device,
            lambda done, total: progress(done, total, {}),
        )  # fmt: skip
        return {"rows": rows, "best": best(rows)}

    about = {"protocol": "sweep", "epochs": options.optim.epochs, "options": options.model_dump(mode="json")}
    return task("probe-sweep", setting, subject, about, run)


def reconstruct_task(setting: Setting, subject: Subject) -> Task:
    """How well masked validation images are reconstructed, and a picture of some."""
    options, model = setting.config.reconstruct, subject.model
    if model is None:
        raise KamimError(f"--checkpoint {subject.name}: has no head trained to reconstruct pixels")
    if subject.resolution % subject.mask.patch_size:
        raise KamimError(
            f"--checkpoint {subject.name}: takes images of {subject.resolution} px, no multiple of the mask's "
            f"{subject.mask.patch_size} px"
        )
    mask = subject.mask.model_copy(update={"ratio": options.mask_ratio or subject.mask.ratio})

    def reconstructed(batch: Batch) -> Reconstruction:
        with torch.no_grad():
            return reconstruct(model, batch, mask, setting.config.seed, 0, FP32)

    def run(folder: Path, progress: Progress) -> dict[str, Any]:
        world, loader = setting.world, setting.in_order(setting.val, subject.resolution)
        model.to(world.device).eval()
        metrics = {name: CONVENTIONS[name](world.device) for name in options.conventions}
        steps = loader.plan.steps_per_epoch
        for batch in loader.steps(0, steps):
            if len(batch):  # a rank may have none of a short last step
                made = reconstructed(batch)
                for metric in metrics.values():
                    metric.update(batch.images, made.output, made.masked_pixels)
            progress(batch.step + 1, steps, {})
        found: dict[str, Any] = {name: metric.compute() for name, metric in metrics.items()}
        if world.is_main:
            batch = _spread(setting, subject.resolution, options.shown)
            made, shown = reconstructed(batch), io.BytesIO()
            np.savez(shown, originals=batch.images.cpu(), masks=made.masked_pixels.cpu(), made=made.pixels(None).cpu())
            write_whole(folder / SHOWN, shown.getvalue())
        return found

    about = {"protocol": "paper", "mask_ratio": mask.ratio, "options": options.model_dump(mode="json"), "train": None}
    return task("reconstruct", setting, subject, about, run)


TASKS: Mapping[str, Callable[[Setting, Subject], Task]] = {
    "linprobe": linprobe_task, "knn": knn_task, "finetune": finetune_task, "reconstruct": reconstruct_task,
    "probe-sweep": sweep_task,
}  # fmt: skip


def _spread(setting: Setting, resolution: int, count: int) -> Batch:
    """`count` validation samples from all over the store, which is often sorted by class; for one process."""
    numbers = setting.val.numbers
    count = min(count, len(numbers))
    chosen = Samples(setting.val.store, numbers[np.linspace(0, len(numbers) - 1, count).astype(np.int64)])
    loader = whole_images(chosen, resolution, count, setting.config.workers, World(0, 1, setting.world.device))
    return next(iter(loader.steps(0, 1)))


def _training(
    augment: str, setting: Setting, samples: Samples, resolution: int, optim: ClassifierOptim
) -> tuple[Loader, Finish]:
    """Augmented batches, and what is still to be done to each of them."""
    classes = len(samples.classes)
    if augment == "paper":
        loader = setting.training(samples, resolution, optim, augment=Augment(resolution))
        return loader, partial(mixed_batch, num_classes=classes, seed=setting.config.seed)

    def unmixed(batch: Batch) -> tuple[Tensor, Tensor]:
        return normalise(batch.images), one_hot(batch.labels, classes).float()

    return setting.training(samples, resolution, optim, crop=CROP), unmixed


def _run(kind: Kind, folder: Path, options: Linprobe | Finetune, loader: Loader, keep: Keep) -> Run:
    """Where a classifier's training keeps its state."""
    per_epoch = loader.plan.steps_per_epoch
    every = options.checkpoint_epochs * per_epoch
    return Run(folder, kind, options.model_dump(mode="json"), options.optim, per_epoch, every, keep)


O = TypeVar("O", Linprobe, Finetune)


def _clipped(options: O, subject: Subject) -> O:
    """The options, with the released code's clip_grad for the subject's architecture where none is given."""
    if "clip_grad" in options.optim.model_fields_set:
        return options
    clip_grad = paper.CLIP_GRAD["swin" if isinstance(subject.encoder, SwinTransformer) else "vit"]
    return options.model_copy(update={"optim": options.optim.model_copy(update={"clip_grad": clip_grad})})


def _check_size(key: str, size: int, samples: Samples) -> None:
    """Raises ValueError where so many training samples are not there."""
    if size > len(samples.numbers):
        raise KamimError(f"{key} = {size}: more than the {len(samples.numbers)} training samples")


def _as_it_is(images: Tensor) -> Tensor:
    return images


def make_optimizer(groups: list[dict[str, Any]], optim: ClassifierOptim) -> torch.optim.Optimizer:
    """With the rates of before the first step."""
    if optim.algorithm == "adamw":
        return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, fused=True)
    if optim.algorithm == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr, momentum=0.9)
    parts = [part for group in groups for part in _lars_parts(group)]
    made: torch.optim.Optimizer = Lars(parts, lr=optim.lr, momentum=0.9)
    return made


def _lars_parts(group: dict[str, Any]) -> list[dict[str, Any]]:
    """Matrices, whose rate adapts even where they have no weight decay, and vectors, which have neither: as MAE's."""
    matrices, vectors = ([p for p in group["params"] if (p.ndim > 1) == wide] for wide in (True, False))
    return [
        {**group, "params": matrices, "always_adapt": True}, {**group, "params": vectors, "weight_decay": 0.0},
    ]  # fmt: skip


def _fit(trainer: Trainer, progress: Progress) -> None:
    if not trainer.fit(progress).finished:
        raise KeyboardInterrupt


def _accuracy(setting: Setting, subject: Subject, network: nn.Module, read: Read) -> dict[str, float]:
    loader = setting.in_order(setting.val, subject.resolution)
    batches = loader.steps(0, loader.plan.steps_per_epoch)
    return accuracy(network, read, batches, setting.world)


def applies(mode: str, subject: Subject) -> bool:
    """Whether a checkpoint has what a mode needs."""
    if mode == "finetune":
        return not isinstance(subject.encoder, Pixels)
    return mode != "reconstruct" or (subject.model is not None and subject.resolution % subject.mask.patch_size == 0)
