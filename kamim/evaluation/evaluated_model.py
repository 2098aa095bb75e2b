"""Loads models of checkpoints: runs, files of foreign weights, untrained networks, or raw pixels."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kamim.evaluation.config import CachedFeatures
from kamim.models import interop
from kamim.models.architectures import ARCHITECTURES
from kamim.models.file_kind import named
from kamim.models.masked_image_model import MaskedImageModel
from kamim.models.readout import Encoder, Pixels, Readout, check, resolve
from kamim.storage import store
from kamim.storage.files import checksum
from kamim.training import checkpoint
from kamim.training.config import Mask, Pretrain
from pipelines.plan import Plan


@dataclass(frozen=True)
class Origin:
    """The origin of weights. The fields are those of kamim.evaluation.results.EvalSettings."""

    checkpoint: str
    architecture: str
    step: int = 0
    weights: str | None = None
    pretraining: Mapping[str, Any] | None = None
    run_seed: int | None = None


@dataclass(frozen=True)
class EvaluatedModel:
    """A checkpoint to evaluate. model: with its pixel head, if it has one. mask: that of its pretraining."""

    name: str
    encoder: Encoder
    model: MaskedImageModel | None
    resolution: int
    mask: Mask
    origin: Origin

    def readout(self, options: CachedFeatures) -> Readout:
        """Returns the requested readout of the encoder. Raises KamimError if it has no such features."""
        readout = Readout(resolve(self.encoder, options.block), options.pooling, options.norm)
        check(self.encoder, readout)
        return readout


def load_evaluated_model(spec: str) -> EvaluatedModel:
    """Loads [NAME=]RUN, a run, one of its checkpoints or a file of foreign weights; or random:RUN or pixels:RUN.

    Raises KamimError if it does not exist.
    """
    name, source = named(spec)
    if source.startswith("pixels:"):
        config = checkpoint.read(Path(source.removeprefix("pixels:"))).config
        stride = ARCHITECTURES[config.model.name].stride
        return EvaluatedModel(name, Pixels(stride), None, config.data.resolution, config.mask, Origin(source, "pixels"))
    loaded = load_model(source)
    return EvaluatedModel(
        name, loaded.model.encoder, loaded.model if loaded.has_head else None, loaded.model.resolution, loaded.mask,
        loaded.origin,
    )  # fmt: skip


def planned_model(name: str, config: Pretrain) -> EvaluatedModel:
    """Builds the model that a run of `config` will give, without its weights: enough for every check."""
    with torch.device("meta"):
        model = MaskedImageModel(config.model.name, config.data.resolution)
    with_head = None if config.norm_pix_loss else model
    origin = Origin(str(config.out), config.model.name)
    return EvaluatedModel(name, model.encoder, with_head, config.data.resolution, config.mask, origin)


@dataclass(frozen=True)
class LoadedModel:
    """A model from a checkpoint. has_head: whether its head outputs pixels. mask: that of its pretraining."""

    model: MaskedImageModel
    has_head: bool
    mask: Mask
    origin: Origin


def load_model(source: str) -> LoadedModel:
    """Loads a checkpoint, a file of foreign weights, or random:CHECKPOINT, untrained weights from its seed."""
    random, path = source.startswith("random:"), Path(source.removeprefix("random:"))
    if not random and (file := interop.weights_file(path)):
        return _foreign(path, file)
    saved = checkpoint.read(path)
    origin = Origin(str(saved.path), saved.config.model.name, saved.step)
    if not random:
        makes_pixels = saved.has_head and not saved.config.norm_pix_loss
        seed = None if saved.step == 0 else saved.config.seed  # imported weights are of step 0
        origin = replace(origin, weights=saved.weights, pretraining=_pretraining(saved), run_seed=seed)
        return LoadedModel(saved.build_model(), makes_pixels, saved.config.mask, origin)
    torch.manual_seed(saved.config.seed)
    model = MaskedImageModel(saved.config.model.name, saved.config.data.resolution)
    origin = Origin(source, saved.config.model.name, run_seed=saved.config.seed)
    return LoadedModel(model, True, saved.config.mask, origin)


def _foreign(path: Path, file: Path) -> LoadedModel:
    weights = interop.load(path)
    model = MaskedImageModel(weights.architecture, weights.resolution)
    model.load_state_dict(weights.state, strict=weights.has_head)
    origin = Origin(str(path), weights.architecture, weights=checksum(file))
    return LoadedModel(model, weights.has_head, Mask(), origin)


PRETRAINING: Any = {  # keys of Pretrain that shape a run
    "data": {"resolution", "crop_scale", "crop_ratio", "flip_v", "flip_h", "drop_last", "order", "on_error"},
    "model": {"drop_path"}, "mask": True,
    "weighting": True, "optim": True, "norm_pix_loss": True, "init_from": True,
}  # fmt: skip


def _pretraining(saved: checkpoint.Checkpoint) -> dict[str, Any] | None:
    """Returns the pretraining keys that kamim.evaluation.paper compares, or None if kamim did not train it.

    If its store is not on this machine, the keys that are read from it are None: dataset, samples, images (how they are
    encoded), and complete, whether it is trained to its last step.
    """
    config = saved.config
    if saved.step == 0:
        return None
    try:
        manifest = store.read_manifest(config.data.store)
    except ValueError:  # its store is not on this machine
        dataset, samples, images, complete = None, None, None, None
    else:
        size = min(config.optim.batch_size, manifest.count)  # the store may be another by now
        plan = Plan(manifest.count, size, size, config.seed, drop_last=config.data.drop_last)
        steps, _, _ = config.optim.schedule(plan.steps_per_epoch)
        dataset, samples, images = manifest.job.dataset, manifest.count, manifest.job.encoding
        complete = saved.step == steps
    return {
        "method": "simmim" if config.weighting is None else "kamim", "dataset": dataset, "samples": samples,
        "images": images, "complete": complete, "epochs": config.optim.duration or config.optim.epochs,
        **config.model_dump(mode="json", include=PRETRAINING),
    }  # fmt: skip
