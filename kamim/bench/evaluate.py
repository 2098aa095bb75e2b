"""What evaluation costs: augmentation, the frozen forward pass, the probe sweep; ratios of one interleaved run."""

import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import simplejpeg
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.functional import pil_to_tensor

from kamim.bench.rounds import interleaved
from kamim.config import Compute, SweepOptim
from kamim.evaluation.probe import Frozen
from kamim.evaluation.readout import Readout, depth, resolve
from kamim.evaluation.sweep import sweep
from kamim.models import build_encoder
from kamim.store import ImageReader, Store
from pipelines.augment import random_erasing, trivial_augment_wide
from pipelines.loader import Loader
from pipelines.plan import Plan
from preprocess.sources import Source

SWEEP = {"images": 50_000, "poolings": 3, "lrs": 10, "epochs": 10, "classes": 10}
PROBE_EPOCHS = 100


Decode = Callable[[int], Tensor]  # number -> uint8 [3, H, W]


class TorchvisionDataset(torch.utils.data.Dataset[torch.Tensor]):
    """Training samples of the evaluation as torchvision makes them."""

    def __init__(self, decode: Decode, count: int, resolution: int):
        self._decode, self._count = decode, count
        self._transform = v2.Compose(
            [
                v2.Resize((resolution, resolution), antialias=False), v2.TrivialAugmentWide(),
                v2.RandomErasing(0.5, scale=(0.02, 0.33), ratio=(0.3, 3.3)),
            ]
        )  # fmt: skip

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._transform(self._decode(index))


def _stored(images: ImageReader, index: int) -> Tensor:
    return torch.from_numpy(simplejpeg.decode_jpeg(images.data(index))).permute(2, 0, 1)


def _original(source: Source, index: int) -> Tensor:
    return pil_to_tensor(Image.open(Path(source.location, source.items[index].key)).convert("RGB"))


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def torchvision_rate(decode: Decode, count: int, resolution: int, batch: int, workers: int) -> Callable[[], int]:
    """A DataLoader with a worker process per core."""
    loader = torch.utils.data.DataLoader(
        TorchvisionDataset(decode, count, resolution), batch, num_workers=workers, persistent_workers=True,
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
    store: Store, source: Source, model: str, resolution: int, batch: int, rounds: int,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:  # fmt: skip
    """Images per second (medians of the rounds), ratios, and what a sweep costs beside one probe, on the CPU.

    torchvision reads the originals, as the released code does; torchvision_stored the very JPEGs of the store.
    """
    workers = len(os.sched_getaffinity(0))
    encoder = build_encoder(model, resolution)
    block = resolve(encoder, "paper")
    runs = {
        "torchvision": torchvision_rate(partial(_original, source), len(source.items), resolution, batch, workers),
        "torchvision_stored": torchvision_rate(partial(_stored, store.images), len(store), resolution, batch, workers),
        "loader": our_rate(store, resolution, batch, augmented=False),
        "augmented": our_rate(store, resolution, batch, augmented=True),
        "forward": forward_rate(model, resolution, 8, None),
        "forward_to_block": forward_rate(model, resolution, 8, block),
    }
    rates = interleaved(runs, rounds, progress)
    rate = {name: statistics.median(made) for name, made in rates.items()}
    seconds = _sweep_seconds(encoder.num_features)
    readouts = depth(encoder) * SWEEP["poolings"]
    sweep_hours = (SWEEP["images"] / rate["forward"] + seconds * readouts) / 3600
    probe_hours = SWEEP["images"] * PROBE_EPOCHS * (1 / rate["augmented"] + 1 / rate["forward_to_block"]) / 3600
    return {
        "images_per_second": rate,
        "ratios": {
            "augmented_over_torchvision": rate["augmented"] / rate["torchvision"],
            "augmented_over_torchvision_stored": rate["augmented"] / rate["torchvision_stored"],
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
