"""What only a GPU can show, in one run: that cuda gives the CPU's losses, and how fast a ViT-B trains.

    python benchmarks/gpu_check.py [--json OUT]

Builds a small store of the sample photographs, then: (1) trains a small ViT for 30 steps on the CPU in fp32 and on
cuda in fp32 and bf16, and compares the losses; (2) times `kamim pretrain` of a ViT-B at 192 px, compiled, bf16,
KAMIM and SimMIM, fed by the loader and fed one batch again and again (what the loader costs); (3) compares MixUp and
CutMix on cuda with the CPU's, pixel for pixel, and every mode of `kamim eval` in fp32, number by number. Without a GPU
it says so and exits with 0.
"""

import argparse
import json
import tempfile
import time
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kamim import store
from kamim.batch import Batch
from kamim.compose.evaluation import run_evaluation
from kamim.compose.training import run_pretrain
from kamim.config import Evaluation, Pretrain, load
from kamim.distributed import World
from kamim.pretrain import pretrain
from pipelines.augment import mixed_batch
from pipelines.counts import CachedCounts
from pipelines.loader import Crop, Loader, feed
from pipelines.plan import Plan
from preprocess.build import build
from preprocess.plan import make_job
from preprocess.sources import list_source

CUDA = torch.device("cuda")


def make_store(out: Path, resolution: int) -> Path:
    """The sample photographs' training patches, for crops of `resolution`."""
    source = list_source("sample", None, "train")
    job = make_job(
        "sample", "train", source, detectors=("fast",), images="zarr", encoding="jpeg", quality=90,
        resolution=resolution, crop_scale=(0.67, 1.0),
    )  # fmt: skip
    build(job, source, out, workers=8, strict=True, progress=lambda done, total: None)
    return out


def losses(run: Path) -> list[float]:
    """A run's loss at every step."""
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def same_losses(folder: Path) -> dict[str, Any]:
    """Largest relative difference of 30 steps' losses to the CPU's."""
    data = make_store(folder / "small", 96)
    made = {}
    for name, device, precision, compiled in (
        ("cpu", "cpu", "fp32", "false"), ("cuda_fp32", "cuda", "fp32", "false"), ("cuda_bf16", "cuda", "bf16", "true")
    ):  # fmt: skip
        config = load(Pretrain, None, [
            f"data.store={data}", "data.resolution=96", "model.name=vit_demo", f"out={folder / name}", "optim.epochs=1",
            "optim.batch_size=85", "optim.warmup_epochs=0", f"compute.device={device}",
            f"compute.precision={precision}", f"compute.compile={compiled}",
        ])  # fmt: skip
        run_pretrain(config, lambda *_: None)
        made[name] = np.array(losses(folder / name))
    return {
        name: float(np.abs(made[name] / made["cpu"] - 1).max()) for name in ("cuda_fp32", "cuda_bf16")
    }  # fmt: skip


def step_rate(config: Pretrain, batches: Any, steps: int) -> float:
    """Images per second of the last half of `steps` optimiser steps."""
    marks: list[float] = []

    def note(done: int, total: int, metrics: dict[str, float]) -> None:
        torch.cuda.synchronize()
        marks.append(time.perf_counter())

    pretrain(config, batches, steps, World(0, 1, CUDA), note)
    half = len(marks) // 2
    return config.optim.batch_size * (len(marks) - half) / (marks[-1] - marks[half - 1])


def training(folder: Path) -> dict[str, Any]:
    """Images per second of a ViT-B, from the loader and from one batch on the device."""
    data = store.Store(make_store(folder / "large", 192))
    rates = {}
    for method in ("kamim", "simmim"):
        counter = CachedCounts(data.keypoints("fast"), "ring", 8) if method == "kamim" else None
        plan = Plan(len(data), 512, 512, seed=0)
        loader = Loader(data, plan, 192, crop=Crop(), counter=counter, pin=True)
        fixed = next(iter(feed(loader.steps(0, 1), CUDA)))
        for name, batches in (
            ("loader", lambda first, stop, loader=loader: feed(loader.steps(first, stop), CUDA)),
            ("one_batch", lambda first, stop, fixed=fixed: again(fixed, stop - first)),
        ):
            config = load(Pretrain, None, [
                f"data.store={data.path}", f"out={folder / f'{method}_{name}'}", "optim.batch_size=512",
                "optim.micro_batch=512", "optim.epochs=1", "optim.warmup_epochs=0", "compute.device=cuda",
                *(["weighting=null"] if method == "simmim" else []),
            ])  # fmt: skip
            rates[f"{method}_{name}"] = step_rate(config, batches, 40)
    return {**rates, "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9}


def again(batch: Batch, steps: int) -> Any:
    """The same batch for every step."""
    from dataclasses import replace

    return (replace(given, step=step) for step, given in enumerate(repeat(batch, steps)))


def same_mixing() -> dict[str, Any]:
    """The largest difference of normalised and mixed batches on cuda from the CPU's, in standard deviations."""
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (256, 192, 192, 3), np.uint8))
    differences = []
    for step in range(8):  # MixUp and CutMix are both among them
        batch = Batch(images, None, torch.arange(256) % 10, np.arange(256), 0, step, last=True, share=1.0)
        (ours, _), (theirs, _) = (mixed_batch(given, 10, 0) for given in (batch, batch.to(CUDA)))
        differences.append((ours - theirs.cpu()).abs().max().item())
    return {"largest_difference": max(differences)}


def same_evaluation(folder: Path) -> dict[str, Any]:
    """Every mode on the CPU and on cuda, on the run and the store of same_losses: its headline on each."""
    shown = {
        "linprobe": lambda r: r["top1"], "finetune": lambda r: r["top1"], "knn": lambda r: r["k"]["5"]["top1"],
        "probe-sweep": lambda r: r["best"]["top1"], "reconstruct": lambda r: r["honest"]["psnr"],
    }  # fmt: skip
    made: dict[str, Any] = {}
    for device in ("cpu", "cuda"):
        config = load(Evaluation, None, [
            f"checkpoint=[run={folder / 'cpu'}]", f"train={folder / 'small'}", f"val={folder / 'small'}",
            f"compute.device={device}", "compute.precision=fp32", "compute.compile=false", "sweep.optim.batch_size=64",
            *(f"{mode}.optim.{key}" for mode in ("linprobe", "finetune")
              for key in ("batch_size=64", "epochs=2", "warmup_epochs=0")),
        ])  # fmt: skip
        start = time.perf_counter()
        results = run_evaluation(config, None, lambda title: lambda *_: None)
        made[device] = {r["mode"]: shown[r["mode"]](r) for r in results} | {"seconds": time.perf_counter() - start}
    return made


def main() -> None:
    """Runs all of it and prints one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_check: no CUDA device here, nothing checked")
        return
    with tempfile.TemporaryDirectory() as folder:
        result = {
            "device": torch.cuda.get_device_name(), "torch": torch.__version__,
            "losses": same_losses(Path(folder)), "mixing": same_mixing(),
            "evaluation": same_evaluation(Path(folder)),
            "training": training(Path(folder)),
        }  # fmt: skip
    print(json.dumps(result, indent=2))
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
