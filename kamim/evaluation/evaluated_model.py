"""Loads models of checkpoints: runs, files of foreign weights, untrained networks, or raw pixels."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kamim import KamimError
from kamim.config.pretrain import Mask, Pretrain
from kamim.evaluation.options import CachedFeatures
from kamim.models import interop
from kamim.models.architectures import architecture
from kamim.models.file_kind import named
from kamim.models.presets import Positions
from kamim.models.readout import Encoder, Pixels, Readout, check, resolve
from kamim.storage.files import checksum
from kamim.storage.manifest import read_manifest
from kamim.training import checkpoint
from kamim.training.model import Model, build_model
from pipelines.plan import Plan


@dataclass(frozen=True)
class Origin:
    """The origin of weights. The fields are those of kamim.evaluation.results.EvalSettings.

    positions: those of the architecture's patches, if they are not its own.
    """

    checkpoint: str
    architecture: str
    positions: Positions | None = None
    step: int = 0
    weights: str | None = None
    pretraining: Mapping[str, Any] | None = None
    run_seed: int | None = None


@dataclass(frozen=True)
class EvaluatedModel:
    """A checkpoint to evaluate. model: with its pixel head, if it has one. mask: that of its pretraining.

    damaged: as in kamim.training.checkpoint.Checkpoint.
    """

    name: str
    encoder: Encoder
    model: Model | None
    resolution: int
    mask: Mask
    origin: Origin
    damaged: tuple[str, ...] = ()

    def readout(self, options: CachedFeatures) -> Readout:
        """Returns the requested readout of the encoder. Raises KamimError if it has no such features."""
        readout = Readout(resolve(self.encoder, options.block), options.pooling, options.norm)
        check(self.encoder, readout)
        return readout


def load_evaluated_model(spec: str, strict: bool = False) -> EvaluatedModel:
    """Loads [NAME=]RUN, a run, one of its checkpoints or a file of foreign weights; or random:RUN or pixels:RUN.

    Raises KamimError if it does not exist and, if `strict`, if the newest checkpoint of a run is damaged.
    """
    name, source = named(spec)
    if source.startswith("pixels:"):
        config = checkpoint.read(Path(source.removeprefix("pixels:")), strict).config
        stride = architecture(config.model.name).stride
        return EvaluatedModel(name, Pixels(stride), None, config.data.resolution, config.mask, Origin(source, "pixels"))
    loaded = load_model(source, strict)
    return EvaluatedModel(
        name,
        loaded.model.encoder,
        loaded.model if loaded.has_head else None,
        loaded.model.resolution,
        loaded.mask,
        loaded.origin,
        loaded.damaged,
    )


def planned_model(name: str, config: Pretrain) -> EvaluatedModel:
    """Builds the model that a run of `config` will give, without its weights: enough for every check."""
    with torch.device("meta"):
        model = build_model(config)
    with_head = None if config.norm_pix_loss else model
    origin = _origin(str(config.out), config)
    return EvaluatedModel(name, model.encoder, with_head, config.data.resolution, config.mask, origin)


@dataclass(frozen=True)
class LoadedModel:
    """A model from a checkpoint. has_head: whether its head outputs pixels. mask: that of its pretraining.

    damaged: as in kamim.training.checkpoint.Checkpoint.
    """

    model: Model
    has_head: bool
    mask: Mask
    origin: Origin
    damaged: tuple[str, ...] = ()


def load_model(source: str, strict: bool = False) -> LoadedModel:
    """Loads a checkpoint, a file of foreign weights, or random:CHECKPOINT, untrained weights from its seed."""
    random, path = source.startswith("random:"), Path(source.removeprefix("random:"))
    if not random and (file := interop.weights_file(path)):
        return _foreign(path, file)
    saved = checkpoint.read(path, strict)
    if not random:
        makes_pixels = saved.has_head and not saved.config.norm_pix_loss
        seed = None if saved.step == 0 else saved.config.seed  # imported weights are of step 0
        origin = replace(
            _origin(str(saved.path), saved.config),
            step=saved.step,
            weights=saved.weights,
            pretraining=_pretraining(saved),
            run_seed=seed,
        )
        return LoadedModel(saved.build_model(), makes_pixels, saved.config.mask, origin, saved.damaged)
    torch.manual_seed(saved.config.seed)
    origin = replace(_origin(source, saved.config), run_seed=saved.config.seed)
    return LoadedModel(build_model(saved.config), True, saved.config.mask, origin, saved.damaged)


def _origin(source: str, config: Pretrain) -> Origin:
    return Origin(source, config.model.name, config.model.positions)


def _foreign(path: Path, file: Path) -> LoadedModel:
    weights = interop.load(path)
    origin = Origin(str(path), weights.architecture, weights.positions, weights=checksum(file))
    makes_pixels = (
        weights.has_head and weights.decoder is None
    )  # a MAE's are normalised patches, as its authors train it
    return LoadedModel(weights.build_model(), makes_pixels, Mask(), origin)


PRETRAINING: Any = {  # keys of Pretrain that shape a run
    "data": {"resolution", "crop_scale", "crop_ratio", "flip_v", "flip_h", "drop_last", "order", "on_error"},
    "model": {"drop_path"},
    "mask": True,
    "weighting": True,
    "optim": True,
    "norm_pix_loss": True,
    "init_from": True,
}


def _pretraining(saved: checkpoint.Checkpoint) -> dict[str, Any] | None:
    """Returns the pretraining keys that kamim.evaluation.report.paper compares, or None if kamim did not train it.

    If its store is not on this machine, the keys that are read from it are None: dataset, samples, images (how they are
    encoded), and complete, whether it is trained to its last step.
    """
    config = saved.config
    if saved.step == 0:
        return None
    try:
        manifest = read_manifest(config.data.store)
    except KamimError:  # its store is not on this machine
        dataset, samples, images, complete = None, None, None, None
    else:
        size = min(config.optim.batch_size, manifest.count)  # the store may be another by now
        plan = Plan(manifest.count, size, size, config.seed, drop_last=config.data.drop_last)
        steps, _, _ = config.optim.schedule(plan.steps_per_epoch)
        dataset, samples, images = manifest.job.dataset, manifest.count, manifest.job.encoding
        complete = saved.step == steps
    later = {"positions": config.model.positions, "decoder": config.decoder and config.decoder.model_dump(mode="json")}
    return {
        "method": config.title.lower(),
        "dataset": dataset,
        "samples": samples,
        "images": images,
        "complete": complete,
        "epochs": config.optim.duration or config.optim.epochs,
        **config.model_dump(mode="json", include=PRETRAINING),
        **{key: value for key, value in later.items() if value is not None},  # results of before do not have them
    }
