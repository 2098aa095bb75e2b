"""Models from checkpoints, wherever they come from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kamim import checkpoint, interop, store
from kamim.config import Mask, Pretrain
from kamim.evaluation.readout import Encoder, Pixels
from kamim.models import MaskedImageModel


@dataclass(frozen=True)
class Subject:
    """What is evaluated. model: with its pixel head, where it has a trained one."""

    name: str
    encoder: Encoder
    model: MaskedImageModel | None
    resolution: int
    about: dict[str, Any]


def load_subject(spec: str) -> Subject:
    """[NAME=]RUN, a run, one of its checkpoints or a file of foreign weights; random:RUN or pixels:RUN.

    Raises ValueError where there is nothing of the kind.
    """
    name, equals, source = spec.rpartition("=")
    if not source or (equals and not name):
        raise ValueError(f"--checkpoint {spec}: must be [NAME=]CHECKPOINT, such as KAMIM=runs/demo/kamim")
    kind, colon, path = source.rpartition(":")
    name = name or f"{kind}{' ' if colon else ''}{Path(path).name}"
    if source.startswith("pixels:"):
        resolution = checkpoint.read(Path(source.removeprefix("pixels:"))).config.data.resolution
        about = {"checkpoint": source, "architecture": "pixels", "step": 0, "reconstructs": False, "weights": None}
        return Subject(name, Pixels(), None, resolution, {**about, "pretraining": None})
    model, about = load_model(source)
    return Subject(name, model.encoder, model if about["reconstructs"] else None, model.resolution, about)


def load_model(source: str) -> tuple[MaskedImageModel, dict[str, Any]]:
    """A model, and what it is: by checkpoint, file, or random:CHECKPOINT for its architecture and seed untrained."""
    random, path = source.startswith("random:"), Path(source.removeprefix("random:"))
    if path.is_file():
        return _foreign(path)
    found = checkpoint.read(path)
    about = {
        "checkpoint": str(found.path), "architecture": found.config.model.name, "step": found.step,
        "reconstructs": found.has_head, "weights": found.weights,
        "mask": found.config.mask.model_dump(), "pretraining": _pretraining(found.config),
    }  # fmt: skip
    if not random:
        return found.build_model(), about
    torch.manual_seed(found.config.seed)
    model = MaskedImageModel(found.config.model.name, found.config.data.resolution)
    return model, {**about, "checkpoint": source, "step": 0, "weights": None, "pretraining": None}


def _foreign(file: Path) -> tuple[MaskedImageModel, dict[str, Any]]:
    made = interop.convert(interop.read_file(file), None)
    model = MaskedImageModel(made.architecture, made.resolution)
    model.load_state_dict(made.state, strict=made.has_head)
    return model, {
        "checkpoint": str(file), "architecture": made.architecture, "step": 0, "reconstructs": made.has_head,
        "weights": store.checksum(file), "mask": Mask().model_dump(), "pretraining": None,
    }  # fmt: skip


def _pretraining(config: Pretrain) -> dict[str, Any]:
    """How a checkpoint was trained: enough to tell whether the paper has a figure for it."""
    try:
        dataset = store.read_manifest(config.data.store).job.dataset
    except ValueError:
        dataset = None  # its store is not on this machine
    return {
        "method": "simmim" if config.weighting is None else "kamim", "dataset": dataset,
        "weighting": None if config.weighting is None else config.weighting.model_dump(),
        "epochs": config.optim.epochs, "resolution": config.data.resolution,
    }  # fmt: skip
