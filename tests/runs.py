"""Small pretraining runs, and their results."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kamim.config.pretrain import Pretrain
from kamim.config.schema import load
from kamim.runtime.distributed import World
from kamim.training import checkpoint

WORLD = World(0, 1, torch.device("cpu"))


def config(out: Path, store: Path, *more: str) -> Pretrain:
    given = (
        f"data.store={store}",
        "data.resolution=64",
        "data.workers=1",
        "model.name=vit_demo",
        f"out={out}",
        "seed=3",
        "optim.batch_size=12",
        "optim.micro_batch=12",
        "optim.epochs=4",
        "optim.warmup_epochs=1",
        "compute.device=cpu",
        "checkpoint_epochs=1",
    )
    return load(Pretrain, None, [*given, *more])


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def quiet(done: int, total: int, metrics: dict[str, float]) -> None:
    """No progress bar."""


def weights(run: Path) -> dict[str, torch.Tensor]:
    found = checkpoint.latest(run)
    assert found is not None
    return load_file(found.path / "model.safetensors")


def board(run: Path) -> EventAccumulator:
    found = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    found.Reload()
    return found
