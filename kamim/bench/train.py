"""Benchmarks training: our KAMIM and SimMIM against a plain loop like the released code's, interleaved.

All do complete steps: loading, forward, backward, clipping, AdamW, a line of metrics. The plain loop trains a Hugging
Face model in eager mode, with a DataLoader that reads the original files and detects FAST keypoints on every crop. A
pass is a number of steps that starts without prefetched data, so it includes the wait for its first batch; the
data-wait share covers the steps after the first. Each loop has a process of its own, so that they share neither memory
nor settings. Peak arithmetic is the rate of this device for products of large square matrices of the same dtype, in
the same rounds.
"""

import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import cached_property, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kamim import KamimError
from kamim.bench.baselines import ReferenceDataset, one_thread
from kamim.bench.crops import PATCH_SIZE, RESOLUTION
from kamim.bench.rounds import Run, interleaved, paired
from kamim.config.pretrain import Pretrain
from kamim.config.schema import load
from kamim.method.loss import masked_l1
from kamim.method.masking import masked_count
from kamim.models.masked_image_model import MaskedImageModel, build_encoder
from kamim.runtime import machine
from kamim.runtime.device import autocast
from kamim.runtime.distributed import World
from kamim.storage.store import Store
from kamim.training.data import training_loader
from kamim.training.metrics import Metrics, TimedBatches, sinks
from kamim.training.pretrain import build_trainer
from kamim.training.trainer import Trainer, by_step
from pipelines.batch import IMAGENET_MEAN, IMAGENET_STD
from preprocess.sources import Source

Pass = Callable[[], Iterator[float]]  # does steps, and yields after each the seconds it waited for data


class Ours:
    """The steps of `kamim pretrain`, without checkpoints and callbacks. length: steps of a pass."""

    def __init__(self, config: Pretrain, length: int):
        """Raises KamimError if the store does not fit the configuration."""
        self._config, self._length, self._world = config, length, World(0, 1, _device())
        self._loader = training_loader(config, Store(config.data.store), self._world)
        self._done = 0

    @cached_property
    def _trainer_and_metrics(self) -> tuple[Trainer, Metrics]:
        self._config.out.mkdir()
        logs = Metrics(sinks(self._config.out, 0, self._config.log, {}))
        return build_trainer(self._config, self._loader, self._world), logs

    def __call__(self) -> Iterator[float]:
        """Does one pass."""
        trainer, metrics = self._trainer_and_metrics
        first, self._done = self._done, self._done + self._length
        batches = TimedBatches(self._loader.micro_batches(first, self._done))
        for step, micro_batches in by_step(batches):
            logged = trainer.train_step(step, micro_batches)
            waited = batches.pop_seconds()
            metrics.add(step, self._config.optim.lr, {**logged, "data_wait": waited})
            yield waited


class OnlineDataset(ReferenceDataset):
    """Normalised crops, weights W and masks, as in the released code's data loader."""

    def __init__(self, source: Source, images: int):
        super().__init__(source)
        self._images = images

    def __len__(self) -> int:
        return self._images

    def __getitem__(self, index: int) -> Any:
        """Returns a crop float [3, R, R], weights float [R / 8, R / 8] and a mask bool [R / 32, R / 32]."""
        crop, weights = super().__getitem__(index % len(self._source.items))
        mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        blocks = (RESOLUTION // 32) ** 2
        mask = torch.zeros(blocks, dtype=torch.bool)
        mask[torch.randperm(blocks)[: masked_count(RESOLUTION // 32, 0.6)]] = True
        return (crop.float() / 255 - mean) / std, weights, mask.view(RESOLUTION // 32, -1)


class Plain:
    """A loop like the released code's: transformers' model in eager mode, bf16 autocast on cuda, online keypoints."""

    def __init__(self, source: Source, config: Pretrain, length: int):
        self._config, self._device = config, _device()
        dataset = OnlineDataset(source, length * config.optim.batch_size)
        self._loader: Any = torch.utils.data.DataLoader(
            dataset,
            config.optim.batch_size,
            shuffle=True,
            num_workers=len(os.sched_getaffinity(0)),
            persistent_workers=True,
            pin_memory=self._device.type == "cuda",
            worker_init_fn=one_thread,
        )

    @cached_property
    def _model_and_optimizer(self) -> tuple[Any, torch.optim.Optimizer]:
        model = hugging_face(self._config.model.name).to(self._device).train()
        optim = self._config.optim
        return model, torch.optim.AdamW(model.parameters(), lr=optim.lr, weight_decay=optim.weight_decay)

    def __call__(self) -> Iterator[float]:
        """Does one pass."""
        model, optimizer = self._model_and_optimizer
        waits = TimedBatches(self._loader)
        for batch in waits:
            images, weights, mask = (tensor.to(self._device) for tensor in batch)
            patches = mask.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)  # 16 px each
            with autocast(self._config.compute, self._device):
                reconstruction = model(images, bool_masked_pos=patches).reconstruction
            loss = masked_l1(images, reconstruction, mask, weights)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()  # the released code logs the loss of every step
            yield waits.pop_seconds()


def hugging_face(name: str) -> Any:
    """Returns transformers' model of our ViT's size. Raises KamimError for a Swin, or without transformers."""
    try:
        from transformers import ViTConfig, ViTForMaskedImageModeling
    except ImportError:
        raise KamimError("the plain loop needs the transformers package: pip install transformers") from None
    encoder = build_encoder(name, RESOLUTION)
    if not isinstance(encoder, VisionTransformer):
        raise KamimError(f"model = {name}: must be a ViT")
    width, heads = encoder.embed_dim, encoder.blocks[0].attn.num_heads
    return ViTForMaskedImageModeling(
        ViTConfig(
            hidden_size=width,
            num_hidden_layers=len(encoder.blocks),
            num_attention_heads=heads,
            intermediate_size=4 * width,
            image_size=RESOLUTION,
            patch_size=16,
            encoder_stride=16,
        )
    )


def flops(name: str) -> int:
    """Returns the floating-point operations of matrix products and convolutions, forward and backward, per image."""
    model = MaskedImageModel(name, RESOLUTION)
    images = torch.zeros(1, 3, RESOLUTION, RESOLUTION)
    mask = torch.ones(1, RESOLUTION // 32, RESOLUTION // 32, dtype=torch.bool)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # fused attention is not counted
        masked_l1(images, model(images, mask), mask).backward()
    return counter.get_total_flops()


def matmul() -> Run:
    """Returns a run that multiplies large matrices and returns its floating-point operations instead of images."""
    side, times, dtype = (8192, 20, torch.bfloat16) if torch.cuda.is_available() else (2048, 4, torch.float32)
    a, b = (torch.randn(side, side, device=_device(), dtype=dtype) for _ in range(2))

    def run() -> int:
        for _ in range(times):
            torch.matmul(a, b)
        _finish()
        return 2 * side**3 * times

    return run


class Measured:
    """Runs passes in a process of their own, as kamim.bench.rounds.Run, and records data-wait and memory."""

    def __init__(self, make: Callable[[], Pass], images: int, stack: ExitStack):
        pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_begin, initargs=(make,))
        self._pool, self._images = stack.enter_context(pool), images
        self.shares: list[float] = []  # share of time spent waiting for data, by pass
        self.memory = 0  # peak memory in bytes, of the GPU or of the process

    def __call__(self) -> int:
        """Does one pass; the first builds model and optimiser."""
        share, self.memory = self._pool.submit(_measure).result()
        self.shares.append(share)
        return self._images


_steps: Pass  # the only pass of this process


def _begin(make: Callable[[], Pass]) -> None:
    global _steps
    _steps = make()


def _measure() -> tuple[float, int]:
    """Returns the share of time spent waiting for data, and the peak memory in bytes."""
    waits, ends = [], []
    for wait in _steps():
        waits.append(wait)
        ends.append(time.perf_counter())
    _finish()
    return sum(waits[1:]) / (time.perf_counter() - ends[0]), _peak_memory()


def bench(
    store: Path,
    source: Source,
    name: str,
    batch: int,
    length: int,
    rounds: int,
    progress: Callable[[int, int], None],
    overrides: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Returns medians of the rounds.

    batch: images per step; length: steps per pass; overrides: of Pretrain, for our loops only. Raises KamimError if the
    store does not fit the configuration, or the transformers package is missing.
    """
    if length < 2:
        raise KamimError(f"steps = {length}: must be 2 or more; the first one's wait is not counted")
    hugging_face(name)
    settings = [
        f"data.store={store}",
        f"data.resolution={RESOLUTION}",
        f"model.name={name}",
        f"optim.batch_size={batch}",
        f"optim.micro_batch={batch}",
        f"weighting.patch_size={PATCH_SIZE}",
    ]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        kamim, simmim, plain = (
            load(Pretrain, None, [*settings, f"out={folder}/{of}", *more])
            for of, more in (("kamim", overrides), ("simmim", ("weighting=null", *overrides)), ("plain", ()))
        )
        for config in (kamim, simmim):
            Ours(config, length)  # raises KamimError here, before it is raised in another process
        loops = {
            of: Measured(make, length * batch, stack)
            for of, make in (
                ("kamim", partial(Ours, kamim, length)),
                ("simmim", partial(Ours, simmim, length)),
                ("plain", partial(Plain, source, plain, length)),
            )
        }
        rates = interleaved({**loops, "matmul": matmul()}, rounds, progress)
    medians = {of: statistics.median(of_rounds) for of, of_rounds in rates.items()}
    arithmetic, each = medians.pop("matmul"), flops(name)
    return {
        "images_per_second": medians,
        "ratios": {
            "kamim_over_plain": paired(rates["kamim"], rates["plain"]),
            "kamim_over_simmim": paired(rates["kamim"], rates["simmim"]),
        },
        "flop_utilisation": {of: rate * each / arithmetic for of, rate in medians.items()},
        "data_wait_share": {of: statistics.median(loop.shares[1:]) for of, loop in loops.items()},
        "peak_memory_gb": {of: loop.memory / 1e9 for of, loop in loops.items()},
        "matmul_flops_per_second": arithmetic,
        "flops_per_image": each,
        "rounds": rates,
        "model": name,
        "batch": batch,
        "steps": length,
        "machine": machine.describe(),
    }


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
