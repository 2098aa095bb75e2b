"""What evaluation costs: augmentation, the frozen forward pass, the probe sweep; ratios of one interleaved run."""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import simplejpeg
import torch
from torchvision.transforms import v2

from kamim.config import Compute, SweepOptim
from kamim.evaluation.probe import Frozen
from kamim.evaluation.readout import Readout, resolve
from kamim.evaluation.sweep import sweep
from kamim.models import build_encoder
from kamim.store import Store
from pipelines.augment import random_erasing, trivial_augment_wide
from pipelines.loader import Loader
from pipelines.plan import Plan

SWEEP = {"images": 50_000, "poolings": 3, "lrs": 10, "epochs": 10, "classes": 10}
PROBE_EPOCHS = 100


class TorchvisionDataset(torch.utils.data.Dataset[torch.Tensor]):
    """Training samples of the evaluation as torchvision makes them, from the same stored JPEGs."""

    def __init__(self, store: Store, resolution: int):
        self._images = store.images
        self._transform = v2.Compose(
            [
                v2.Resize((resolution, resolution), antialias=False), v2.TrivialAugmentWide(),
                v2.RandomErasing(0.5, scale=(0.02, 0.33), ratio=(0.3, 3.3)),
            ]
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self._images.labels)

    def __getitem__(self, index: int) -> torch.Tensor:
        pixels = torch.from_numpy(simplejpeg.decode_jpeg(self._images.data(index))).permute(2, 0, 1)
        return self._transform(pixels)


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def torchvision_rate(store: Store, resolution: int, batch: int, workers: int) -> Callable[[], int]:
    """A DataLoader with a worker process per core."""
    loader = torch.utils.data.DataLoader(
        TorchvisionDataset(store, resolution), batch, num_workers=workers, persistent_workers=True,
        worker_init_fn=_one_thread,
    )  # fmt: skip
    return lambda: sum(len(images) for images in loader)


def our_rate(store: Store, resolution: int, batch: int, augmented: bool) -> Callable[[], int]:
    """The loader's whole images, and the batched augmentation of them."""
    plan = Plan(len(store), batch, batch, seed=0, drop_last=False)
    loader = Loader(store, plan, resolution)

    def run() -> int:
        seen = 0
        for made in loader.steps(0, plan.steps_per_epoch):
            if augmented:
                images = made.images.permute(0, 3, 1, 2).contiguous()
                images = trivial_augment_wide(images, 0, made.epoch, made.indices)
                random_erasing(images, 0, made.epoch, made.indices)
            seen += len(made)
        return seen

    return run


def forward_rate(model: str, resolution: int, batch: int, block: int | None) -> Callable[[], int]:
    """A frozen encoder's pass to `block`, or through all of it, in whole images."""
    encoder = build_encoder(model, resolution)
    frozen = Frozen(encoder, Readout(resolve(encoder, block or "last"), "mean", "none"), Compute(), torch.device("cpu"))
    images = torch.zeros(batch, 3, resolution, resolution)

    def run() -> int:
        frozen(images)
        return batch

    return run


def bench(
    store: Store, model: str, resolution: int, batch: int, rounds: int, progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Images per second (medians of the rounds), ratios, and what a sweep costs beside one probe, on the CPU."""
    workers = len(os.sched_getaffinity(0))
    encoder = build_encoder(model, resolution)
    block = resolve(encoder, "paper")
    runs = {
        "torchvision": torchvision_rate(store, resolution, batch, workers),
        "loader": our_rate(store, resolution, batch, augmented=False),
        "augmented": our_rate(store, resolution, batch, augmented=True),
        "forward": forward_rate(model, resolution, 8, None),
        "forward_to_block": forward_rate(model, resolution, 8, block),
    }
    rates: dict[str, list[float]] = {name: [] for name in runs}
    total = len(runs) * (rounds + 1)
    for turn in range(rounds + 1):  # the first warms and is not counted
        for number, (name, run) in enumerate(runs.items()):
            start = time.perf_counter()
            images = run()
            if turn:
                rates[name].append(images / (time.perf_counter() - start))
            progress(turn * len(runs) + number + 1, total)
    rate = {name: statistics.median(made) for name, made in rates.items()}
    seconds = _sweep_seconds(encoder.num_features)
    readouts = len(encoder.blocks if hasattr(encoder, "blocks") else encoder.layers) * SWEEP["poolings"]
    sweep_hours = (SWEEP["images"] / rate["forward"] + seconds * readouts) / 3600
    probe_hours = SWEEP["images"] * PROBE_EPOCHS * (1 / rate["augmented"] + 1 / rate["forward_to_block"]) / 3600
    return {
        "images_per_second": rate,
        "ratios": {
            "augmented_over_torchvision": rate["augmented"] / rate["torchvision"],
            "block_over_whole_pass": rate["forward"] / rate["forward_to_block"],
            "probe_over_sweep": probe_hours / sweep_hours,
        },
        "hours": {"probe": probe_hours, "sweep": sweep_hours}, "block": block, "model": model, "rounds": rates,
        "workers": workers, "batch": batch, "sweep": {**SWEEP, "readouts": readouts},
    }  # fmt: skip


def _sweep_seconds(width: int) -> float:
    """What the sweep itself takes for one readout, measured on noise."""
    features = torch.zeros(SWEEP["images"], width, dtype=torch.bfloat16)
    labels = torch.arange(SWEEP["images"]) % SWEEP["classes"]
    start = time.perf_counter()
    sweep(
        {Readout(1, "mean", "none"): (features, features[:1])}, labels, labels[:1], SWEEP["classes"],
        [0.1] * SWEEP["lrs"], SweepOptim(epochs=SWEEP["epochs"]), 0, torch.device("cpu"), lambda done, total: None,
    )  # fmt: skip
    return time.perf_counter() - start
