"""Benchmarks evaluation: augmentation, the frozen forward pass, the probe sweep and attentive probes, interleaved."""

import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import simplejpeg
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchvision.transforms import v2
from torchvision.transforms.functional import pil_to_tensor

from kamim import KamimError
from kamim.bench.baselines import one_thread
from kamim.bench.originals import accepted, check_jpeg
from kamim.bench.rounds import Run, even_batch, interleaved, paired
from kamim.config.pretrain import Compute
from kamim.evaluation.attentive import CachedTokens, build_head, fitted
from kamim.evaluation.classifier_training import make_optimizer
from kamim.evaluation.options import Attentive, AttentivePooling, SweepOptim
from kamim.evaluation.probe import Frozen
from kamim.evaluation.probe_sweep import sweep
from kamim.models.masked_image_model import build_encoder
from kamim.models.presets import ARCHITECTURES
from kamim.models.readout import Readout, depth, resolve, width
from kamim.runtime.distributed import World
from kamim.storage.images import ImageReader
from kamim.storage.store import Store
from pipelines.augment import Augment, mixed_batch
from pipelines.loader import Loader
from pipelines.plan import Plan
from preprocess.sources import Source

SWEEP = {"images": 50_000, "poolings": 3, "lrs": 10, "epochs": 10, "classes": 10}
PROBE_EPOCHS = 100
ATTENTIVE_IMAGES = 1024
POOLINGS: tuple[AttentivePooling, ...] = get_args(AttentivePooling)
PASSES = 4  # epochs of our loader in one measured pass, since its first batch costs more than the others

Decode = Callable[[int], Tensor]  # index -> uint8 [3, H, W]


class TorchvisionDataset(torch.utils.data.Dataset[torch.Tensor]):
    """Samples of the evaluation from torchvision's transforms: for training if augmented, otherwise for validation."""

    def __init__(self, decode: Decode, count: int, resolution: int, augmented: bool):
        self._decode, self._count = decode, count
        resize = v2.Resize((resolution, resolution), antialias=False)
        erase = v2.RandomErasing(0.5, scale=(0.02, 0.33), ratio=(0.3, 3.3))
        self._transform = v2.Compose([resize, v2.TrivialAugmentWide(), erase] if augmented else [resize])

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._transform(self._decode(index))


def _stored(images: ImageReader, index: int) -> Tensor:
    return torch.from_numpy(simplejpeg.decode_jpeg(images.data(index))).permute(2, 0, 1)


def _original(source: Source, index: int) -> Tensor:
    return pil_to_tensor(Image.open(Path(source.location, source.items[index].key)).convert("RGB"))


def torchvision_rate(
    decode: Decode, count: int, resolution: int, batch: int, workers: int, augmented: bool
) -> Callable[[], int]:
    """Returns a pass of a DataLoader with one worker process per core."""
    loader = torch.utils.data.DataLoader(
        TorchvisionDataset(decode, count, resolution, augmented),
        even_batch(count, batch, workers),
        num_workers=workers,
        persistent_workers=True,
        worker_init_fn=one_thread,
    )
    return lambda: sum(len(images) for images in loader)


def our_rate(store: Store, resolution: int, batch: int, augmented: bool, mixed: bool) -> Callable[[], int]:
    """Returns a pass of our loader: whole images, one thread per core, with augmentation and mixing if set."""
    plan = Plan(len(store), batch, batch, seed=0, drop_last=False)
    loader = Loader(store, plan, resolution, augment=Augment(resolution) if augmented else None)

    def run() -> int:
        images = 0
        for batch in loader.micro_batches(0, PASSES * plan.steps_per_epoch):
            if mixed:
                mixed_batch(batch, len(store.manifest.classes), 0)
            images += len(batch)
        return images

    return run


def forward_rate(model: str, resolution: int, batch: int, block: int | None) -> Callable[[], int]:
    """Returns a pass of a frozen encoder over a batch, up to `block`, or through all blocks if it is None."""
    encoder = build_encoder(model, resolution)
    frozen = Frozen(encoder, Readout(resolve(encoder, block or "last"), "mean", "none"), Compute(), torch.device("cpu"))
    images = torch.zeros(batch, 3, resolution, resolution)

    def run() -> int:
        frozen(images)
        return batch

    return run


def attentive_rate(name: AttentivePooling, tokens: Tensor) -> Callable[[], int]:
    """An epoch of an attentive probe's training, in one step, on cached tokens [N, T, D]."""
    options = fitted(Attentive(), len(tokens))
    labels = torch.arange(len(tokens)) % SWEEP["classes"]
    cached = CachedTokens(tokens, labels, torch.device("cpu"))
    head = build_head(name, tokens.shape[2], SWEEP["classes"], options.queries, options.abmilp_depth, seed=0)
    optimizer = make_optimizer([{"params": list(head.parameters()), "weight_decay": 0.0}], options.optim)
    batches = cached.batches(cached.shuffled(options.optim, 0, World(0, 1, torch.device("cpu"))))

    def run() -> int:
        for batch in batches(0, 1):
            (cross_entropy(head(cached.read(batch.indices)), batch.labels) * batch.loss_weight).backward()
        optimizer.step()
        optimizer.zero_grad()
        return len(tokens)

    return run


def bench(
    store: Store,
    source: Source,
    model: str,
    resolution: int,
    batch: int,
    rounds: int,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Returns images per second (medians of the rounds), ratios, and hours of a sweep and of one probe, on the CPU.

    Attentive probes train on noise in place of the tokens of ATTENTIVE_IMAGES images, which takes as long.
    torchvision reads the originals, as the released code does; torchvision_stored reads the JPEGs of the store.
    Raises KamimError if the store holds raw pixels or images without a label.
    """
    check_jpeg(store)
    if unlabelled := int((store.images.labels < 0).sum()):
        raise KamimError(f"store = {store.path}: has {unlabelled} images without a label; this benchmark mixes labels")
    source = accepted(source, store)
    workers = len(os.sched_getaffinity(0))
    encoder = build_encoder(model, resolution)
    block = resolve(encoder, "paper")
    original, stored = partial(_original, source), partial(_stored, store.images)
    torchvision = partial(torchvision_rate, resolution=resolution, batch=batch, workers=workers)
    ours = partial(our_rate, store, resolution, batch)
    grid = resolution // ARCHITECTURES[model].stride
    tokens = torch.randn(ATTENTIVE_IMAGES, grid * grid, width(encoder, block)).to(torch.bfloat16)
    runs: dict[str, Run] = {
        "torchvision_resized": torchvision(original, len(source.items), augmented=False),
        "torchvision": torchvision(original, len(source.items), augmented=True),
        "torchvision_stored": torchvision(stored, len(store), augmented=True),
        "loader": ours(augmented=False, mixed=False),
        "augmented": ours(augmented=True, mixed=False),
        "mixed": ours(augmented=True, mixed=True),
        "forward": forward_rate(model, resolution, 8, None),
        "forward_to_block": forward_rate(model, resolution, 8, block),
        **{name: attentive_rate(name, tokens) for name in POOLINGS},
    }
    rates = interleaved(runs, rounds, progress)
    rate = {name: statistics.median(of_rounds) for name, of_rounds in rates.items()}
    seconds = _sweep_seconds(encoder.num_features)
    readouts = depth(encoder) * SWEEP["poolings"]
    sweep_hours = (SWEEP["images"] / rate["forward"] + seconds * readouts) / 3600
    probe_hours = SWEEP["images"] * PROBE_EPOCHS * (1 / rate["mixed"] + 1 / rate["forward_to_block"]) / 3600
    return {
        "images_per_second": rate,
        "ratios": {
            "loader_over_torchvision": paired(rates["loader"], rates["torchvision_resized"]),
            "augmented_over_torchvision": paired(rates["augmented"], rates["torchvision"]),
            "augmented_over_torchvision_stored": paired(rates["augmented"], rates["torchvision_stored"]),
            "block_over_whole_pass": paired(rates["forward"], rates["forward_to_block"]),
            "probe_over_sweep": probe_hours / sweep_hours,
            "ep_over_mean_time": paired(rates["mean"], rates["ep"]),
            "abmilp_over_mean_time": paired(rates["mean"], rates["abmilp"]),
        },
        "hours": {"probe": probe_hours, "sweep": sweep_hours},
        "block": block,
        "model": model,
        "rounds": rates,
        "workers": workers,
        "batch": batch,
        "sweep": {**SWEEP, "readouts": readouts},
    }


def _sweep_seconds(width: int) -> float:
    """Returns the seconds of the sweep of one readout, measured on constant features."""
    features = torch.zeros(SWEEP["images"], width, dtype=torch.bfloat16)
    labels = torch.arange(SWEEP["images"]) % SWEEP["classes"]
    start = time.perf_counter()
    sweep(
        {Readout(1, "mean", "none"): (features, features[:1])},
        labels,
        labels[:1],
        SWEEP["classes"],
        [0.1] * SWEEP["lrs"],
        SweepOptim(epochs=SWEEP["epochs"]),
        0,
        torch.device("cpu"),
        lambda done, total: None,
    )
    return time.perf_counter() - start
