"""Checkpoints: a directory of safetensors and JSON, written beside and renamed. Nothing is unpickled.

RUN/checkpoints/step-00001200/       model.safetensors   weights, by parameter name
                                     optimizer.safetensors  the optimiser's state, as <parameter>.<field>
                                     state.json          kind of run, step, configuration, versions, checksums
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

import kamim
from kamim.config import Pretrain
from kamim.models import MaskedImageModel
from kamim.store import checksum, publish

FORMAT = 1
Kind = Literal["pretrain", "linprobe", "finetune"]


@dataclass(frozen=True)
class Checkpoint:
    """One saved state of a run of `kind`. step: optimiser steps done. weights: sha256 of model.safetensors.

    has_head: false for an imported encoder without a pixel head.
    """

    path: Path
    kind: Kind
    step: int
    settings: dict[str, Any]
    has_head: bool
    weights: str

    @cached_property
    def config(self) -> Pretrain:
        """How it was pretrained. Raises ValueError where it is no pretraining checkpoint."""
        if self.kind != "pretrain":
            raise ValueError(f"{self.path}: is of kind {self.kind}, not a pretraining checkpoint")
        return Pretrain.model_validate(self.settings)

    def model_state(self) -> dict[str, Tensor]:
        """Weights by parameter name."""
        return load_file(self.path / "model.safetensors")

    def build_model(self) -> MaskedImageModel:
        """The model of this checkpoint, on the CPU, weights loaded."""
        model = MaskedImageModel(self.config.model.name, self.config.data.resolution, self.config.model.drop_path)
        model.load_state_dict(self.model_state(), strict=self.has_head)  # an imported encoder may come alone
        return model


def save(
    run: Path, step: int, kind: Kind, config: Mapping[str, Any], model: nn.Module, optimizer: Optimizer, keep: int
) -> Path:
    """Writes RUN/checkpoints/step-*, durable and whole, and drops all but the newest `keep`."""
    folder = run / "checkpoints"
    weights = {name: t.contiguous() for name, t in model.state_dict().items()}
    files = {"model.safetensors": weights, "optimizer.safetensors": _optimizer_state(model, optimizer)}
    final = _write(folder / f"step-{step:08d}", step, kind, config, files, has_head=True)
    for old in _saved(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def save_imported(path: Path, architecture: str, resolution: int, weights: dict[str, Tensor], has_head: bool) -> Path:
    """Writes weights from elsewhere as a checkpoint at `path`. Raises ValueError where something is there."""
    if path.exists():
        raise ValueError(f"--out {path}: is there already; choose another or remove it")
    config = Pretrain.model_validate(
        {"data": {"store": "imported", "resolution": resolution}, "model": {"name": architecture}, "out": path}
    )
    return _write(path, 0, "pretrain", config.model_dump(mode="json"), {"model.safetensors": weights}, has_head)


def _write(
    final: Path, step: int, kind: Kind, config: Mapping[str, Any], files: dict[str, dict[str, Tensor]], has_head: bool
) -> Path:
    partial = final.with_name(final.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, tensors in files.items():
        save_file(tensors, partial / name)
    state = {
        "format": FORMAT, "kamim": kamim.__version__, "torch": torch.__version__, "kind": kind,
        "step": step, "config": config, "has_head": has_head,
        "checksums": {name: checksum(partial / name) for name in files},
    }  # fmt: skip
    (partial / "state.json").write_text(json.dumps(state, indent=2))
    shutil.rmtree(final, ignore_errors=True)
    publish(partial, final)
    return final


def _saved(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.suffix != ".partial")


def latest(run: Path) -> Checkpoint | None:
    """The newest checkpoint of a run directory, or None where it has none."""
    saved = _saved(run / "checkpoints")
    return read(saved[-1]) if saved else None


def read(path: Path) -> Checkpoint:
    """A checkpoint directory, or the newest one of a run directory. Raises ValueError where it is neither."""
    file = path / "state.json"
    if not file.is_file():
        found = latest(path)
        if found is None:
            raise ValueError(f"--checkpoint {path}: neither a checkpoint (state.json) nor a run that has one")
        return found
    try:
        state: dict[str, Any] = json.loads(file.read_text())
        kind = state.get("kind", "pretrain")
        weights = state["checksums"]["model.safetensors"]
        checkpoint = Checkpoint(path, kind, int(state["step"]), state["config"], state["has_head"], weights)
        if kind == "pretrain":
            Pretrain.model_validate(state["config"])
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: not a checkpoint's state: {' '.join(str(error).split())}") from error
    for name, expected in state["checksums"].items():
        if not (path / name).is_file() or checksum(path / name) != expected:
            raise ValueError(f"{path / name}: is missing or damaged; remove {path} to go on from the one before")
    return checkpoint


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: Optimizer) -> None:
    """Loads weights and optimiser state. Raises ValueError for another architecture."""
    load_weights(checkpoint, model)
    try:
        state = load_file(checkpoint.path / "optimizer.safetensors")
    except SafetensorError as error:
        raise ValueError(f"{checkpoint.path}: {error}") from error
    fields: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        name, _, field = key.rpartition(".")
        fields.setdefault(name, {})[field] = value
    for name, parameter in model.named_parameters():
        if name in fields:  # fused AdamW keeps its step on the device too
            optimizer.state[parameter] = {f: v.to(parameter.device) for f, v in fields[name].items()}


def load_weights(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Loads weights into `model`. Raises ValueError, naming the first difference, for another architecture."""
    state, own = checkpoint.model_state(), model.state_dict()
    for name in sorted(own.keys() | state.keys()):
        there, here = (tuple(d[name].shape) if name in d else "nothing" for d in (state, own))
        if there != here:
            raise ValueError(
                f"{checkpoint.path}: holds another architecture than the model asked for "
                f"({name} is {there} in the checkpoint, {here} in the model)"
            )
    model.load_state_dict(state)


def _optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}.{field}": value.contiguous()
        for name, parameter in model.named_parameters()
        for field, value in optimizer.state[parameter].items()
    }
