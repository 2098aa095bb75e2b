"""Checks on a GPU, in one run, that cuda gives the CPU's losses, and benchmarks the training of a ViT-B.

    python benchmarks/gpu_check.py [--json OUT]

Builds a small store of the sample photographs, then: (1) trains a small ViT for 30 steps on the CPU in fp32 and on
cuda in fp32 and bf16, and compares the losses; (2) lists the operations that wait for the device in ten steps of the
loop; (3) runs `kamim bench train` of a ViT-B at 192 px, compiled, bf16, and prints each result with its aim; (4)
compares MixUp and CutMix on cuda with those on the CPU, pixel by pixel, and every mode of `kamim eval` in fp32, number
by number. Without a GPU it prints a message and exits with 0.
"""

import argparse
import json
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from kamim.bench.train import Ours, bench
from kamim.config.pretrain import Pretrain
from kamim.config.schema import load
from kamim.evaluation.evaluate import evaluate
from kamim.evaluation.options import Evaluation
from kamim.training.pretrain import pretrain
from pipelines.augment import mixed_batch
from pipelines.batch import Batch
from preprocess.build import build
from preprocess.plan import make_job
from preprocess.sources import list_source, photograph

CUDA = torch.device("cuda")


def make_store(out: Path, resolution: int) -> Path:
    """Builds a store of the sample photographs' training patches, for crops of `resolution` px."""
    source = list_source("sample", None, "train")
    job = make_job(
        "sample",
        "train",
        source,
        detectors=("fast",),
        container="zarr",
        pixels="jpeg",
        quality=90,
        resolution=resolution,
        crop_scale=(0.67, 1.0),
    )
    build(job, source, out, workers=8, strict=True, progress=lambda done, total: None)
    return out


def losses(run: Path) -> list[float]:
    """Returns the loss of a run at every step."""
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def same_losses(folder: Path) -> dict[str, Any]:
    """Returns the largest relative difference of the losses of 30 steps to those on the CPU."""
    data = make_store(folder / "small", 96)
    by_device = {}
    for name, device, precision, compiled in (
        ("cpu", "cpu", "fp32", "false"),
        ("cuda_fp32", "cuda", "fp32", "false"),
        ("cuda_bf16", "cuda", "bf16", "true"),
    ):
        config = load(
            Pretrain,
            None,
            [
                f"data.store={data}",
                "data.resolution=96",
                "model.name=vit_demo",
                f"out={folder / name}",
                "optim.epochs=1",
                "optim.batch_size=85",
                "optim.warmup_epochs=0",
                f"compute.device={device}",
                f"compute.precision={precision}",
                f"compute.compile={compiled}",
            ],
        )
        pretrain(config, lambda *_: None)
        by_device[name] = np.array(losses(folder / name))
    return {name: float(np.abs(by_device[name] / by_device["cpu"] - 1).max()) for name in ("cuda_fp32", "cuda_bf16")}


def synchronisations(folder: Path) -> list[str]:
    """Returns the operations that wait for the device in ten steps of a small ViT, after a first pass; none should."""
    config = load(
        Pretrain,
        None,
        [
            f"data.store={folder / 'small'}",
            "data.resolution=96",
            "model.name=vit_demo",
            f"out={folder / 'waits'}",
            "optim.batch_size=64",
            "optim.micro_batch=32",
        ],
    )
    ours = Ours(config, 10)
    list(ours())
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        list(ours())
        torch.cuda.set_sync_debug_mode("default")
    return [f"{warning.filename}:{warning.lineno}: {warning.message}" for warning in recorded]


def photographs(folder: Path, count: int) -> Path:
    """Writes an image folder of `count` JPEGs of 500x375 px, cropped from the sample photographs."""
    random, photos = np.random.default_rng(0), [photograph(name) for name in ("astronaut.png", "coffee.png")]
    (folder / "photographs").mkdir(parents=True)
    for i in range(count):
        photo = photos[i % len(photos)]
        top, left = (int(random.integers(side - size + 1)) for side, size in zip(photo.shape, (375, 500), strict=False))
        Image.fromarray(photo[top : top + 375, left : left + 500]).save(folder / f"photographs/{i}.jpg", quality=90)
    return folder


def training(folder: Path) -> dict[str, Any]:
    """Runs `kamim bench train` of a ViT-B at 192 px, compiled, bf16, and adds each aim with its result."""
    source = list_source("imagefolder", photographs(folder / "photographs", 2048), "train")
    job = make_job(
        "imagefolder",
        "train",
        source,
        detectors=("fast",),
        container="zarr",
        pixels="jpeg",
        quality=90,
        resolution=192,
        crop_scale=(0.67, 1.0),
    )
    build(job, source, folder / "large", workers=8, strict=True, progress=lambda done, total: None)
    result = bench(folder / "large", source, "vit_base", 512, 30, 3, lambda done, total: None)
    return {
        **result,
        "aims": {
            "FLOP utilisation, at least 0.45": result["flop_utilisation"]["kamim"],
            "data-wait share, less than 0.02": result["data_wait_share"]["kamim"],
            "over the plain loop, at least 2": result["ratios"]["kamim_over_plain"],
            "KAMIM over SimMIM, at least 0.99": result["ratios"]["kamim_over_simmim"],
        },
    }


def same_mixing() -> dict[str, Any]:
    """Returns the largest difference of normalised and mixed batches between cuda and CPU, in standard deviations."""
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (256, 192, 192, 3), np.uint8))
    differences = []
    for step in range(8):  # includes both MixUp and CutMix
        batch = Batch(images, None, torch.arange(256) % 10, np.arange(256), 0, step, last=True, loss_weight=1.0)
        (on_cpu, _), (on_cuda, _) = (mixed_batch(source, 10, 0) for source in (batch, batch.to(CUDA)))
        differences.append((on_cpu - on_cuda.cpu()).abs().max().item())
    return {"largest_difference": max(differences)}


def same_evaluation(folder: Path) -> dict[str, Any]:
    """Returns the main result of every mode on the CPU and on cuda, for the run and the store of same_losses."""
    main_result = {
        "linprobe": lambda m: m.top1,
        "finetune": lambda m: m.top1,
        "knn": lambda m: m.k[5].top1,
        "probe-sweep": lambda m: m.best.top1,
        "reconstruct": lambda m: m.honest.psnr,
        "few-shot": lambda m: m.shots[0].linear,
        "corruptions": lambda m: m.mean_linear,
    }
    by_device: dict[str, Any] = {}
    for device in ("cpu", "cuda"):
        config = load(
            Evaluation,
            None,
            [
                f"checkpoint=[run={folder / 'cpu'}]",
                f"train={folder / 'small'}",
                f"val={folder / 'small'}",
                f"compute.device={device}",
                "compute.precision=fp32",
                "compute.compile=false",
                "sweep.optim.batch_size=64",
                "sweep.optim.epochs=1",
                "sweep.optim.warmup_epochs=0",
                *(
                    f"{mode}.optim.{key}"
                    for mode in ("linprobe", "finetune")
                    for key in ("batch_size=64", "epochs=2", "warmup_epochs=0")
                ),
            ],
        )
        start = time.perf_counter()
        results = evaluate(config, None, lambda title: lambda *_: None)
        by_device[device] = {r.settings.mode: main_result[r.settings.mode](r.measured) for r in results} | {
            "seconds": time.perf_counter() - start
        }
    return by_device


def main() -> None:
    """Runs all checks and prints one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_check: no CUDA device here, nothing checked")
        return
    with tempfile.TemporaryDirectory() as folder:
        result = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "losses": same_losses(Path(folder)),
            "synchronisations": synchronisations(Path(folder)),
            "mixing": same_mixing(),
            "evaluation": same_evaluation(Path(folder)),
            "training": training(Path(folder)),
        }
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
