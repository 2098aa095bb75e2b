"""Checkpoints: directories of safetensors and JSON files, published by a rename. Nothing is unpickled.

RUN/checkpoints/step-00001200/       model.safetensors      weights by parameter name
                                     optimizer.safetensors  optimiser state as <parameter>.<field>
                                     state.json             kind of run, step, configuration, versions, checksums

A directory without the suffix .partial is complete and fsynced. One with it is half-written or half-removed; the next
save removes it. A directory that holds other files than these three is not kamim's, and is left alone.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

import kamim
from kamim import KamimError
from kamim.config.pretrain import Pretrain, patches_that_fit
from kamim.config.schema import load
from kamim.models.architectures import architecture
from kamim.models.interop import Foreign
from kamim.storage import lock
from kamim.storage.escape import one_line
from kamim.storage.files import checksum, fsync, make_durable
from kamim.storage.ownership import discard_unfinished, holds_only, refuse_links, unfinished
from kamim.training.model import Model, build_model
from kamim.training.run_folder import CHECKPOINTS

FORMAT = 1
STATE = "state.json"
MODEL: Literal["model.safetensors"] = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
FILES = (MODEL, OPTIMIZER, STATE)
PARTIAL = ".partial"
Kind = Literal["pretrain", "linprobe", "attentive", "finetune", "segment"]
_NAME = re.compile("step-([0-9]{8}|[1-9][0-9]{8,})")  # as _path names them
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Keep:
    """Retention of checkpoints: the `newest` n, and permanently those at multiples of `every` steps."""

    newest: int
    every: int | None = None

    def drops(self, steps: list[int]) -> list[int]:
        """Returns the steps (given in ascending order) whose checkpoints are to be removed."""
        return [step for step in steps[: -self.newest] if not self.every or step % self.every]


class State(pydantic.BaseModel):
    """The untrusted content of state.json. checksums: sha256 of the other files, by name."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True)

    format: Literal[1]
    kamim: str
    torch: str
    kind: Kind = "pretrain"
    step: Annotated[int, pydantic.Field(ge=0, lt=2**63)]
    config: dict[str, Any]
    has_head: bool
    checksums: dict[Literal["model.safetensors", "optimizer.safetensors"], str]

    @pydantic.model_validator(mode="after")
    def _whole(self) -> Self:
        if MODEL not in self.checksums:
            raise KamimError(f"names no checksum of {MODEL}")
        return self


@dataclass(frozen=True)
class Checkpoint:
    """A saved state of a run of `kind`. step: optimiser steps done. weights: sha256 of model.safetensors.

    has_head: False for an imported encoder without a pixel head. damaged: a line for each newer checkpoint of its run
    that is damaged, newest first, if it was read as the newest of the run.
    """

    path: Path
    kind: Kind
    step: int
    settings: dict[str, Any]
    has_head: bool
    weights: str
    damaged: tuple[str, ...] = ()

    @cached_property
    def config(self) -> Pretrain:
        """The configuration of the pretraining. Raises KamimError if it is not a pretraining checkpoint."""
        if self.kind != "pretrain":
            raise KamimError(f"{self.path}: is of kind {self.kind}, not a pretraining checkpoint")
        return _pretraining(self.settings)

    def model_state(self) -> dict[str, Tensor]:
        """Returns the weights by parameter name. Raises KamimError if the file is not safetensors."""
        return _load_tensors(self.path / MODEL)

    def build_model(self) -> Model:
        """Returns the model with its weights, on the CPU. Raises KamimError if the weights do not fit the model."""
        state = self.model_state()
        with torch.device("meta"):  # weights are compared before the model takes any memory
            own = build_model(self.config).state_dict()
        expected = {key for key in own if self.has_head or key.startswith("encoder.")}  # an encoder may come alone
        _check_fits(self.path, state, {key: own[key] for key in own if key in expected})
        model = build_model(self.config)
        model.load_state_dict(state, strict=self.has_head)
        return model


def save(
    run: Path, step: int, kind: Kind, config: Mapping[str, Any], model: nn.Module, optimizer: Optimizer, keep: Keep
) -> Path:
    """Writes RUN/checkpoints/step-* atomically and durably, then removes the checkpoints that `keep` drops.

    Checkpoints later than `step` are removed too: they were damaged, and the run resumed before them. Raises OSError if
    it cannot be written (a full disk); existing checkpoints are then kept.
    """
    weights = {name: t.contiguous() for name, t in model.state_dict().items()}
    files = {MODEL: weights, OPTIMIZER: _optimizer_state(model, optimizer)}
    final = _path(run, step)
    _write(final, final.with_name(final.name + PARTIAL), step, kind, config, files, has_head=True)
    for later in [other for other in saved(run) if other > step]:
        _remove(_path(run, later))
    tidy(run, step, keep)
    return final


def tidy(run: Path, step: int, keep: Keep) -> None:
    """Removes the checkpoints up to `step` that `keep` drops, and half-written or half-removed directories."""
    for old in keep.drops([other for other in saved(run) if other <= step]):
        _remove(_path(run, old))
    for leftover in (run / CHECKPOINTS).glob(f"step-*{PARTIAL}"):
        _delete(leftover)


def save_imported(out: Path, weights: Foreign) -> Path:
    """Writes imported weights as a checkpoint at `out`. Raises KamimError if `out` exists."""
    given: dict[str, Any] = {
        "data": {"store": "imported", "resolution": weights.resolution},
        "out": out,
        "model": {"name": weights.architecture, "positions": weights.positions},
        **patches_that_fit(weights.architecture, weights.resolution),
    }
    if weights.decoder is not None:  # its authors' recipe, which the file does not hold
        patch = architecture(weights.architecture).patch_size
        given |= {
            "method": "mae",
            "decoder": asdict(weights.decoder),
            "mask": {"patch_size": patch, "ratio": 0.75},
            "norm_pix_loss": True,
            "weighting": None,
        }
    config = load(Pretrain, None, given=given)
    with lock.alone(out, "out"):
        if out.exists():
            raise KamimError(f"out = {out}: exists already; choose another or remove it")
        discard_unfinished(out)
        content = config.model_dump(mode="json")
        _write(out, unfinished(out), 0, "pretrain", content, {MODEL: weights.state}, weights.has_head)
    return out


def _write(
    final: Path,
    partial: Path,
    step: int,
    kind: Kind,
    config: Mapping[str, Any],
    files: dict[str, dict[str, Tensor]],
    has_head: bool,
) -> None:
    if final.exists() and not holds_only(final, FILES):
        raise OSError(f"{final}: holds files that kamim did not write; move it elsewhere")
    _delete(partial)
    try:
        partial.mkdir(parents=True)
        for name, tensors in files.items():
            save_tensors(tensors, partial / name)
        state = {
            "format": FORMAT,
            "kamim": kamim.__version__,
            "torch": torch.__version__,
            "kind": kind,
            "step": step,
            "config": config,
            "has_head": has_head,
            "checksums": {name: checksum(partial / name) for name in files},
        }
        (partial / STATE).write_text(json.dumps(state, indent=2))
        make_durable(partial)
    except OSError as error:
        _delete(partial)
        raise OSError(f"{final}: cannot be written: {one_line(error)}") from error
    if final.exists():
        _remove(final)
    partial.rename(final)
    fsync(final.parent)


def save_tensors(tensors: dict[str, Tensor], file: Path, about: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file with the default file mode (the library sets 0600). Raises OSError.

    about: further entries of its metadata.
    """
    try:
        save_file(tensors, file, metadata={"format": "pt", **(about or {})})  # transformers requires format
    except SafetensorError as error:  # raised for a full disk
        raise OSError(f"{file}: {error}") from error
    _sort_metadata(file)
    os.umask(mask := os.umask(0))  # the umask can only be read by setting it
    file.chmod(0o666 & ~mask)


def _sort_metadata(file: Path) -> None:
    """Sorts the metadata in the header of a safetensors file, which the library writes in an order of its own."""
    with file.open("r+b") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(content) <= size, "the same header in another order"
        opened.seek(8)
        opened.write(content.ljust(size))


def _remove(path: Path) -> None:
    """Removes a checkpoint. It is renamed first, so that a half-removed one is not read as a checkpoint."""
    if holds_only(path, FILES):
        _delete(path.rename(path.with_name(f"{path.name}.old{PARTIAL}")))


def _delete(folder: Path) -> None:
    if holds_only(folder, FILES):
        shutil.rmtree(folder, ignore_errors=True)


def _path(run: Path, step: int) -> Path:
    return run / CHECKPOINTS / f"step-{step:08d}"


def saved(run: Path) -> list[int]:
    """Returns the steps of a run's checkpoints in ascending order, damaged ones included.

    Raises KamimError if one of them, or their folder, is a link.
    """
    folders = [path for path in (run / CHECKPOINTS).glob("step-*") if _NAME.match(path.name)]  # unfinished ones, too
    refuse_links((run / CHECKPOINTS, *folders))
    whole = (path for path in folders if _NAME.fullmatch(path.name))
    return sorted(
        int(path.name[5:]) for path in whole if holds_only(path, FILES) or any((path / name).exists() for name in FILES)
    )


def at(run: Path, step: int) -> Checkpoint:
    """Reads a run's checkpoint after `step` steps. Raises KamimError if it is missing or damaged."""
    checkpoint = read(_path(run, step))
    if checkpoint.step != step:
        raise KamimError(f"{checkpoint.path / STATE}: is of step {checkpoint.step}, its folder of step {step}")
    return checkpoint


def latest(run: Path, most: int | None = None, strict: bool = False) -> Checkpoint | None:
    """Reads the newest undamaged checkpoint of a run (of at most `most` steps); None if the run has no checkpoint.

    Damaged ones are skipped with a warning. Raises KamimError if all are damaged and, if `strict`, for a damaged one.
    """
    damaged: list[str] = []
    for step in reversed([step for step in saved(run) if most is None or step <= most]):
        try:
            checkpoint = at(run, step)
        except (KamimError, OSError) as error:
            if strict:
                raise KamimError(f"{error} (--strict)") from error
            damaged.append(f"{error}; using the checkpoint before it")
            _LOG.warning(damaged[-1])
        else:
            return replace(checkpoint, damaged=tuple(damaged))
    if damaged:
        raise KamimError(f"{run}: has only damaged checkpoints; remove {run / 'checkpoints'} to start anew")
    return None


def read(path: Path, strict: bool = False) -> Checkpoint:
    """Reads a checkpoint directory, or the newest one of a run directory. Raises KamimError if it is neither.

    strict: also raises KamimError if the newest one of a run is damaged, instead of reading the one before it.
    """
    file = path / STATE
    refuse_links(path / name for name in FILES)
    if not file.is_file():
        newest = latest(path, strict=strict)
        if newest is None:
            raise KamimError(f"{path}: neither a checkpoint (state.json) nor a run that has one")
        return newest
    try:
        state = State.model_validate_json(file.read_bytes())
        if state.kind == "pretrain":
            _pretraining(state.config)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        message = ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))
        raise KamimError(f"{file}: not a checkpoint's state: {one_line(message)}") from error
    except KamimError as error:
        raise KamimError(f"{file}: not a checkpoint's state: {one_line(error)}") from error
    for name, expected in state.checksums.items():
        if not (path / name).is_file() or checksum(path / name) != expected:
            raise KamimError(f"{path / name}: is missing or damaged")
    return Checkpoint(path, state.kind, state.step, state.config, state.has_head, state.checksums[MODEL])


def _pretraining(settings: dict[str, Any]) -> Pretrain:
    return load(Pretrain, None, given=settings)


def _load_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, LookupError) as error:  # LookupError: a dtype that torch does not have
        raise KamimError(f"{file}: not a file of tensors: {one_line(error)}") from error


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: Optimizer) -> None:
    """Loads weights and optimiser state. Raises KamimError if they are of another architecture or optimiser."""
    load_weights(checkpoint, model)
    file = checkpoint.path / OPTIMIZER
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    own = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in trained}
    fields: dict[str, dict[str, Tensor]] = {}
    for key, value in _load_tensors(file).items():
        name, _, field = key.rpartition(".")
        shape = () if field == "step" else own[name].shape if name in own else None
        if value.shape != shape or not value.is_floating_point():
            raise KamimError(f"{file}: {key} is {_about(value)}, which is not of this model's optimiser")
        fields.setdefault(name, {})[field] = value
    if fields and fields.keys() != own.keys():
        raise KamimError(f"{file}: lacks the state of {min(own.keys() ^ fields.keys())}")
    for name in fields:  # fused AdamW keeps its step on the device too
        optimizer.state[own[name]] = {f: v.to(own[name].device) for f, v in fields[name].items()}


def load_weights(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Loads weights into `model`. Raises KamimError, naming the first difference, if the architecture differs."""
    state = checkpoint.model_state()
    _check_fits(checkpoint.path, state, model.state_dict())
    model.load_state_dict(state)


def _check_fits(path: Path, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raises KamimError, naming the first difference, unless weights have the model's names, shapes and types."""
    for name in sorted(own.keys() | state.keys()):
        stored, expected = (_about(d[name]) if name in d else "nothing" for d in (state, own))
        if stored != expected:
            raise KamimError(
                f"{path}: holds another architecture than the requested model "
                f"({name} is {stored} in the checkpoint, {expected} in the model)"
            )


def _about(tensor: Tensor) -> str:
    """Returns the shape as text, with the dtype unless it is floating-point."""
    shape = str(tuple(tensor.shape))
    return shape if tensor.is_floating_point() else f"{shape} of {tensor.dtype}"


def _optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}.{field}": value.contiguous()
        for name, parameter in model.named_parameters()
        for field, value in optimizer.state[parameter].items()
    }
