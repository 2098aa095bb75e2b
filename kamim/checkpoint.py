"""Checkpoints: a directory of safetensors and JSON, written beside and renamed. Nothing is unpickled.

RUN/checkpoints/step-00001200/       model.safetensors   weights, by parameter name
                                     optimizer.safetensors  the optimiser's state, as <parameter>.<field>
                                     state.json          kind of run, step, configuration, versions, checksums

What has a final name was whole and durable when it got it. A name that ends in .partial is of something half-written or
half-removed, which the next save clears away.
"""

import json
import logging
import os
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
from kamim.store import checksum, fsync, make_durable

FORMAT = 1
PARTIAL = ".partial"
Kind = Literal["pretrain", "linprobe", "finetune"]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay: the `newest` so many, and those at multiples of `every` steps for good."""

    newest: int
    every: int | None = None

    def drops(self, steps: list[int]) -> list[int]:
        """Those of `steps`, ascending, that need not stay."""
        return [step for step in steps[: -self.newest] if not self.every or step % self.every]


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
    run: Path, step: int, kind: Kind, config: Mapping[str, Any], model: nn.Module, optimizer: Optimizer, keep: Keep
) -> Path:
    """Writes RUN/checkpoints/step-*, durable and whole; once it stands, drops those that need not stay.

    Later ones than `step` are dropped, too: the run went back behind them, as they were damaged. Raises OSError
    where it cannot be written (a full disk); what was there before is there still.
    """
    weights = {name: t.contiguous() for name, t in model.state_dict().items()}
    files = {"model.safetensors": weights, "optimizer.safetensors": _optimizer_state(model, optimizer)}
    final = _write(_path(run, step), step, kind, config, files, has_head=True)
    for later in [other for other in saved(run) if other > step]:
        _remove(_path(run, later))
    tidy(run, step, keep)
    return final


def tidy(run: Path, step: int, keep: Keep) -> None:
    """Drops checkpoints up to `step` that need not stay, and what is half-written or half-removed."""
    for old in keep.drops([other for other in saved(run) if other <= step]):
        _remove(_path(run, old))
    for left in (run / "checkpoints").glob(f"step-*{PARTIAL}"):
        shutil.rmtree(left, ignore_errors=True)


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
    partial = final.with_name(final.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for name, tensors in files.items():
            save_tensors(tensors, partial / name)
        state = {
            "format": FORMAT, "kamim": kamim.__version__, "torch": torch.__version__, "kind": kind,
            "step": step, "config": config, "has_head": has_head,
            "checksums": {name: checksum(partial / name) for name in files},
        }  # fmt: skip
        (partial / "state.json").write_text(json.dumps(state, indent=2))
        make_durable(partial)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"{final}: cannot be written: {' '.join(str(error).split())}") from error
    if final.exists():
        _remove(final)
    partial.rename(final)
    fsync(final.parent)
    return final


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """A safetensors file with the mode that new files have, where the library gives it 0600. Raises OSError."""
    try:
        save_file(tensors, file, metadata={"format": "pt"})  # which transformers asks for
    except SafetensorError as error:  # its own for a full disk
        raise OSError(f"{file}: {error}") from error
    os.umask(mask := os.umask(0))  # can only be read by setting it
    file.chmod(0o666 & ~mask)


def _remove(path: Path) -> None:
    """Its name goes first, so that what is half-removed is not taken for a checkpoint."""
    shutil.rmtree(path.rename(path.with_name(f"{path.name}.old{PARTIAL}")), ignore_errors=True)


def _path(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def saved(run: Path) -> list[int]:
    """Steps of a run's checkpoints, ascending, whole or not."""
    numbers = (path.name.removeprefix("step-") for path in (run / "checkpoints").glob("step-*"))
    return sorted(int(number) for number in numbers if number.isdigit())


def at(run: Path, step: int) -> Checkpoint:
    """A run's checkpoint after `step` steps. Raises ValueError where it is missing or damaged."""
    return read(_path(run, step))


def latest(run: Path, most: int | None = None) -> Checkpoint | None:
    """The newest whole checkpoint of a run directory (of at most `most` steps), or None where it has none.

    Damaged ones are passed over with a warning. Raises ValueError where all are damaged.
    """
    problem = None
    for step in reversed([step for step in saved(run) if most is None or step <= most]):
        try:
            found = at(run, step)
        except (ValueError, OSError) as error:
            problem = error
            log.warning("%s; taking the checkpoint before", error)
        else:
            return found
    if problem is not None:
        raise ValueError(f"{run}: has no checkpoint that is whole; remove {run / 'checkpoints'} to start anew")
    return None


def read(path: Path) -> Checkpoint:
    """A checkpoint directory, or the newest one of a run directory. Raises ValueError where it is neither."""
    file = path / "state.json"
    if not file.is_file():
        found = latest(path)
        if found is None:
            raise ValueError(f"{path}: neither a checkpoint (state.json) nor a run that has one")
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
            raise ValueError(f"{path / name}: is missing or damaged")
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
