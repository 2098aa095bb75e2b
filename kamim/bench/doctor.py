"""`kamim doctor`: checks the machine and a store, benchmarks loader and model, and names the bottleneck."""

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch

from kamim.config.pretrain import Pretrain
from kamim.runtime import distributed, machine
from kamim.runtime.device import should_compile
from kamim.runtime.distributed import World
from kamim.storage.store import Store
from kamim.training.data import cautions, training_loader
from kamim.training.pretrain import build_trainer
from pipelines.batch import Batch
from pipelines.loader import Loader, default_workers

BATCH = {"cuda": 256, "cpu": 16}  # images per measured step, at most the configuration's
STEPS = {"cuda": 20, "cpu": 3}
SECONDS = 4.0  # duration of the measurement of the loader
SPARE = 1.1  # a loader this many times as fast as the model keeps it busy

Print = Callable[[str], None]


def examine(store: Path | None, config: Pretrain | None, print_line: Print) -> bool:
    """Prints the machine and the store, if given, line by line and, with a configuration, rates and the bottleneck.

    Returns False if the loader is the bottleneck. Raises KamimError if there is no store, it is damaged, or the
    configuration does not fit it.
    """
    for name, value in machine.describe((*machine.LIBRARIES, "ffcv")).items():
        text = ", ".join(value) or "none" if isinstance(value, list) else value or "not installed"
        print_line(f"{name:14} {text}")
    print_line(f"{'free':14} {shutil.disk_usage(Path()).free / 1e9:,.1f} GB of disk here")
    if store is None:
        print_line(f"{'store':14} none given; --store STORE checks one, and -c PRESET benchmarks its training")
        return True
    opened = Store(store)
    manifest = opened.manifest
    job = manifest.job
    encoding = f"JPEG q{job.quality}" if job.encoding == "jpeg" else job.encoding
    print_line(
        f"{'store':14} {store}: {manifest.count:,} images of {len(manifest.classes):,} classes, {encoding} "
        f"({job.images}), for {job.resolution} px; keypoints: {', '.join(opened.detectors) or 'none'}; "
        f"{manifest.rejects} rejected"
    )
    opened.check()
    print_line(f"{'':14} every image and keypoint lies within its file; `kamim store verify --deep` reads all of them")
    return True if config is None else _rates(config, opened, print_line)


def _rates(config: Pretrain, opened: Store, print_line: Print) -> bool:
    """Measures loader and model, and prints which is the bottleneck and what helps."""
    with distributed.joined(config.compute.device) as world:
        batches = training_loader(config, opened, world)
        for line in cautions(config, opened):
            print_line(f"{'note':14} {line}")
        first = next(iter(batches.micro_batches(0, 1)))
        loader = _loader_rate(batches)
        model = _model_rate(config, batches, first, world)
        threads = config.data.workers or default_workers()
        each = "1 thread" if threads == 1 else f"{threads} threads, {loader / threads:,.0f} on each"
        print_line(f"{'loader':14} {loader:,.0f} images/s on {each}")
        print_line(f"{'model':14} {model:,.0f} images/s, {config.model.name} on {world.device.type}, one process")
        print_line(f"{'duration':14} {_duration(config, batches, min(loader, model))}")
        if loader >= SPARE * model:
            print_line(f"{'bottleneck':14} the {world.device.type}: the loader is {loader / model:,.1f} times as fast")
            for line in _for_the_model(config, world):
                print_line(f"{'':14} {line}")
            return True
        print_line(f"{'bottleneck':14} the loader: it reaches {loader / model:.0%} of the model's rate")
        for line in _for_the_loader(config, opened, model, loader / threads):
            print_line(f"{'':14} {line}")
        return False


def _duration(config: Pretrain, batches: Loader, rate: float) -> str:
    """Returns how long the whole run takes in one process at `rate` images per second."""
    steps, _, _ = config.optim.schedule(batches.plan.steps_per_epoch)
    seconds = round(steps * config.optim.batch_size / rate)
    return (
        f"{timedelta(seconds=seconds)} (h:mm:ss) for {steps:,} steps of {config.optim.batch_size:,} images at "
        f"{rate:,.0f} images/s in one process, except checkpoints, panels and probes"
    )


def _loader_rate(batches: Loader) -> float:
    """Returns images per second, after the first batches have filled the buffers."""
    images, start = 0, 0.0
    for number, batch in enumerate(batches.micro_batches(0, 1 << 40)):
        if number < 4:
            start = time.perf_counter()
            continue
        images += len(batch)
        if time.perf_counter() - start > SECONDS:
            break
    return images / (time.perf_counter() - start)


def _model_rate(config: Pretrain, batches: Loader, batch: Batch, world: World) -> float:
    """Returns images per second of complete steps on one batch that is already loaded."""
    kind = world.device.type
    size, count = min(BATCH[kind], len(batch)), STEPS[kind]
    counts = None if batch.counts is None else batch.counts[:size].clone()
    loaded = replace(
        batch,
        images=batch.images[:size].clone(),
        counts=counts,
        labels=batch.labels[:size],
        last=True,
        loss_weight=1.0,
        indices=batch.indices[:size],
    ).to(world.device)
    trainer = build_trainer(config, batches, world)
    start = 0.0
    for step in range(2 + count):
        trainer.train_step(step, [replace(loaded, step=step)])
        if step <= 1:  # the first steps compile and warm up
            _finish(world)
            start = time.perf_counter()
    _finish(world)
    return size * count / (time.perf_counter() - start)


def _finish(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def _for_the_model(config: Pretrain, world: World) -> Iterator[str]:
    if world.device.type == "cpu":
        yield "training on a CPU is slow; use a GPU if there is one"
        return
    if config.compute.precision == "fp32":
        yield "compute.precision=bf16 is faster"
    if not should_compile(config.compute, world.device):
        yield "compute.compile=true is faster"
    if torch.cuda.device_count() > 1:
        yield f"torchrun --nproc_per_node {torch.cuda.device_count()} -m kamim pretrain ... uses all GPUs"


def _for_the_loader(config: Pretrain, opened: Store, model: float, each: float) -> Iterator[str]:
    cores, needed = machine.describe()["cores"], int(np.ceil(SPARE * model / each))
    threads = config.data.workers or cores
    if threads < min(needed, cores):
        yield f"data.workers={min(needed, cores)}: this machine has {cores} cores"
    if needed > cores:
        yield f"{needed} cores would suffice if the loader scales with them; this machine has {cores}"
    if config.weighting is not None and config.weighting.keypoints == "online":
        yield "weighting.keypoints=store: keypoints are currently detected on every crop"
    if opened.manifest.job.encoding == "original":
        yield "kamim preprocess --pixels jpeg: images no larger than crops need decode several times as fast"
    if opened.manifest.job.encoding == "jpeg":
        yield "kamim preprocess --pixels yuv420: several times as fast and about four times as large"
