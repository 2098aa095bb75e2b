"""Models from checkpoints, wherever they come from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kamim import KamimError
from kamim.models import interop
from kamim.models.masked_image_model import MaskedImageModel
from kamim.models.readout import Encoder, Pixels
from kamim.storage import store
from kamim.training import checkpoint
from kamim.training.config import Mask, Pretrain
from pipelines.plan import Plan


@dataclass(frozen=True)
class Subject:
    """What is evaluated. model: with its pixel head, where it has one. mask: that of its pretraining."""

    name: str
    encoder: Encoder
    model: MaskedImageModel | None
    resolution: int
    mask: Mask
    about: dict[str, Any]


def load_subject(spec: str) -> Subject:
    """[NAME=]RUN, a run, one of its checkpoints or a file of foreign weights; random:RUN or pixels:RUN.

    Raises ValueError where there is nothing of the kind.
    """
    name, equals, source = spec.partition("=") if "=" in spec else ("", "", spec)
    if not source or (equals and not name):
        raise KamimError(f"--checkpoint {spec}: must be [NAME=]CHECKPOINT, such as KAMIM=runs/demo/kamim")
    kind = next((kind for kind in ("random", "pixels") if source.startswith(f"{kind}:")), "")
    path = Path(source.removeprefix(f"{kind}:"))
    name = name or f"{kind} {path.resolve().name}".strip()
    if kind == "pixels":
        config = checkpoint.read(path).config
        about = {"checkpoint": source, "architecture": "pixels", "step": 0, "weights": None, "pretraining": None}
        return Subject(name, Pixels(), None, config.data.resolution, config.mask, about)
    found = load_model(source)
    return Subject(
        name, found.model.encoder, found.model if found.has_head else None, found.model.resolution, found.mask,
        found.about,
    )  # fmt: skip


def subject_to_be(name: str, config: Pretrain) -> Subject:
    """What a run of `config` will be to an evaluation, without its weights: enough for every check."""
    with torch.device("meta"):
        model = MaskedImageModel(config.model.name, config.data.resolution)
    about = {"architecture": config.model.name}
    whole = None if config.norm_pix_loss else model
    return Subject(name, model.encoder, whole, config.data.resolution, config.mask, about)


@dataclass(frozen=True)
class Loaded:
    """A model, whether it has a head that makes pixels, the mask of its pretraining, and what it is."""

    model: MaskedImageModel
    has_head: bool
    mask: Mask
    about: dict[str, Any]


def load_model(source: str) -> Loaded:
    """A checkpoint, a file of foreign weights, or random:CHECKPOINT for its architecture and seed untrained."""
    random, path = source.startswith("random:"), Path(source.removeprefix("random:"))
    if path.is_file() and not random:
        return _foreign(path)
    found = checkpoint.read(path)
    about = {"checkpoint": str(found.path), "architecture": found.config.model.name, "step": found.step}
    if not random:
        about |= {"weights": found.weights, "pretraining": _pretraining(found)}
        pixels = found.has_head and not found.config.norm_pix_loss  # else its head makes no pixels
        return Loaded(found.build_model(), pixels, found.config.mask, about)
    torch.manual_seed(found.config.seed)
    model = MaskedImageModel(found.config.model.name, found.config.data.resolution)
    about |= {"checkpoint": source, "step": 0, "weights": None, "pretraining": None}
    return Loaded(model, True, found.config.mask, about)


def _foreign(file: Path) -> Loaded:
    made = interop.load(file)
    model = MaskedImageModel(made.architecture, made.resolution)
    model.load_state_dict(made.state, strict=made.has_head)
    about = {
        "checkpoint": str(file), "architecture": made.architecture, "step": 0, "weights": store.checksum(file),
        "pretraining": None,
    }  # fmt: skip
    return Loaded(model, made.has_head, Mask(), about)


PRETRAINING: Any = {  # keys of Pretrain that shape a run
    "data": {"resolution", "crop_scale", "crop_ratio", "flip_v", "flip_h", "drop_last", "on_error"},
    "model": {"drop_path"}, "mask": True,
    "weighting": True, "optim": True, "norm_pix_loss": True, "init_from": True,
}  # fmt: skip


def _pretraining(found: checkpoint.Checkpoint) -> dict[str, Any] | None:
    """How a checkpoint was trained, all that kamim.evaluation.paper compares; None where it came from elsewhere.

    What its store says is None without it: dataset, samples, images (how they are encoded), and complete, whether it is
    trained to its last step.
    """
    config = found.config
    if found.step == 0:
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
        complete = found.step == steps
    return {
        "method": "simmim" if config.weighting is None else "kamim", "dataset": dataset, "samples": samples,
        "images": images, "complete": complete, "epochs": config.optim.duration or config.optim.epochs,
        **config.model_dump(mode="json", include=PRETRAINING),
    }  # fmt: skip
