"""The GPU part of docs/results.md, in pieces of a few minutes: rerun the command until it prints "complete".

    python benchmarks/gpu_study.py --images imagenette [--cifar cifar10] [--minutes 9] [--work DIR] [--out DIR] [--tiny]

imagenette holds train/<class>/ and val/<class>/, cifar10 likewise. The stages run in this order, and each is skipped
once it is complete: (a) benchmarks/gpu_check.py; (b) stores of Imagenette at 192 px; (c) `kamim sweep imagenette_gpu`:
ViT-S/16, 200 epochs of SimMIM and of KAMIM with rings and with points, evaluated by every mode of the sweep; (d) the
figures of the three encoders; (e) CIFAR-10 at 192 px, the paper's Table 3: `kamim sweep cifar10_gpu`, ViT-S and then
ViT-B. After --minutes the stage in progress is stopped by SIGTERM, saves its state and resumes in the next call.

Every call writes the results so far to --out: summary.json (times, versions, results), results.tar.gz (result files,
metrics, pages and figures) and, with --encoder RUN, that run's newest weights in half precision as
RUN.safetensors.part<N>, in pieces of at most 15 MiB that `cat` joins. --tiny is a rehearsal with settings that a CPU
finishes in minutes. Without a GPU and without --tiny the script prints so and exits with 0.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save

RESUMABLE = 75  # kamim's exit code for "stopped, rerun to resume"
PIECE = 15 << 20
SHORT = {"epochs": 2, "warmup_epochs": 1, "batch_size": 64, "micro_batch": 64}
TINY = [
    "pretrain.model.name=vit_demo",
    "pretrain.data.resolution=64",
    "pretrain.compute.device=cpu",
    "evaluation.compute.device=cpu",
    "evaluation.per_class=20",
    *(
        f"{section}.optim.{key}={value}"
        for key, value in SHORT.items()
        for section in ("pretrain", "evaluation.linprobe", "evaluation.attentive")
    ),
    "evaluation.sweep.optim.epochs=2",
    "evaluation.sweep.optim.batch_size=64",
]
TINY_AXES = "axes=[{name: method, variants: {simmim: {weighting: null}}}]"  # no ViT-B on a CPU


class Study:
    """Runs commands until the deadline, and keeps what each took in `work`/stages.json."""

    def __init__(self, work: Path, minutes: float):
        self.work, self._deadline = work, time.monotonic() + 60 * minutes
        work.mkdir(parents=True, exist_ok=True)
        self._file = work / "stages.json"
        self.stages: dict[str, dict[str, object]] = json.loads(self._file.read_text()) if self._file.exists() else {}

    def stage(self, name: str, command: Sequence[str]) -> bool:
        """Runs a command unless it is complete. Returns whether it is; a failed stage is reported and passed over."""
        state = self.stages.setdefault(name, {"complete": False, "seconds": 0.0, "calls": 0})
        if state["complete"]:
            return True
        left = self._deadline - time.monotonic()
        if left < 5:
            return False
        print(f"== {name}: {' '.join(command)}", flush=True)
        start = time.monotonic()
        with (self.work / f"{name}.log").open("a") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            code = _wait(process, left)
        state["seconds"] = float(state["seconds"]) + time.monotonic() - start  # type: ignore[arg-type]
        state["calls"] = int(state["calls"]) + 1  # type: ignore[call-overload]
        state |= {"complete": code == 0, "exit": code}
        self._file.write_text(json.dumps(self.stages, indent=2))
        print(f"== {name}: exit {code} after {state['seconds']:.0f} s", flush=True)
        if code not in (0, RESUMABLE):
            print("\n".join((self.work / f"{name}.log").read_text().splitlines()[-30:]), flush=True)
        return code == 0


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int:
    """The exit code; after `seconds` the process is told to stop, and killed if it does not within a minute."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def kamim(*arguments: object) -> list[str]:
    """A command line of the kamim that this Python imports."""
    return [sys.executable, "-m", "kamim", *map(str, arguments)]


def preprocess(study: Study, name: str, images: Path, resolution: int) -> bool:
    """Both splits' stores, raw: decoding costs more than memory at this size."""
    for split in ("train", "val"):
        out = study.work / f"stores/{name}-{split}"
        if not study.stage(
            f"{name}-{split}",
            kamim(
                "preprocess",
                "imagefolder",
                "--source",
                images / split,
                "--split",
                split,
                "--out",
                out,
                "--resolution",
                resolution,
                "--detectors",
                "fast",
                "--pixels",
                "raw",
            ),
        ):
            return False
    return True


def sweep(study: Study, name: str, data: str, tiny: bool) -> bool:
    """`kamim sweep NAME` on the stores of `data`, below `work`."""
    stores = [f"{split}={study.work}/stores/{data}-{split}" for split in ("train", "val")]
    small = [*TINY, *([TINY_AXES] if name == "cifar10_gpu" else [])] if tiny else []
    return study.stage(
        name,
        kamim(
            "sweep",
            name,
            f"pretrain.data.store={study.work}/stores/{data}-train",
            *(f"{section}.{store}" for section in ("pretrain.probe", "evaluation") for store in stores),
            f"out={study.work / name}",
            *small,
        ),
    )


def runs_of(folder: Path) -> list[Path]:
    """The runs of a sweep."""
    return sorted(file.parent for file in folder.glob("*/config.yaml"))


def save_outputs(study: Study, out: Path, encoder: str) -> None:
    """Writes summary.json, results.tar.gz and the encoder's pieces, none of which is needed to resume."""
    out.mkdir(parents=True, exist_ok=True)
    results = [json.loads(file.read_text()) for file in sorted(study.work.glob("*/evaluation/*/*/result.json"))]
    check = study.work / "gpu_check.json"
    about = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "stages": study.stages,
        "gpu_check": json.loads(check.read_text()) if check.exists() else None,
        "results": results,
    }
    (out / "summary.json").write_text(json.dumps(about, indent=1))
    kept = [
        file
        for file in sorted(study.work.rglob("*"))
        if file.is_file()
        and file.suffix in (".json", ".jsonl", ".md", ".html", ".yaml", ".log", ".png", ".csv")
        and "stores" not in file.parts
        and "checkpoints" not in file.parts
        and file.stat().st_size < 4 << 20
    ]
    with tarfile.open(out / "results.tar.gz", "w:gz") as tar:
        for file in kept:
            tar.add(file, file.relative_to(study.work))
    for run in runs_of(study.work / "imagenette_gpu"):
        checkpoints = sorted(run.glob("checkpoints/step-*/model.safetensors"))
        if run.name == encoder and checkpoints:
            whole = save({name: tensor.half() for name, tensor in load_file(checkpoints[-1]).items()})
            for number, at in enumerate(range(0, len(whole), PIECE)):
                (out / f"{run.name}.safetensors.part{number}").write_bytes(whole[at : at + PIECE])


def main() -> None:
    """The stages in order, for as long as the time allows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--cifar", type=Path)
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--work", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-out"))
    parser.add_argument("--encoder", default="", help="the run whose weights are saved, such as ring")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    if not given.tiny and not torch.cuda.is_available():
        print("gpu_study: no CUDA device here; --tiny rehearses it on a CPU")
        return
    study, resolution = Study(given.work, given.minutes), 64 if given.tiny else 192
    check = Path(__file__).with_name("gpu_check.py")
    study.stage("gpu_check", [sys.executable, str(check), "--json", str(given.work / "gpu_check.json")])
    complete = preprocess(study, "imagenette", given.images, resolution)
    complete = complete and sweep(study, "imagenette_gpu", "imagenette", given.tiny)
    if complete:
        named = [f"--checkpoint={run.name}={run}" for run in runs_of(given.work / "imagenette_gpu")]
        complete = study.stage(
            "figures",
            kamim("analyze", *named, "--store", given.work / "stores/imagenette-val", "--out", given.work / "figures"),
        )
    if complete and given.cifar is not None:
        complete = preprocess(study, "cifar10", given.cifar, resolution) and sweep(
            study, "cifar10_gpu", "cifar10", given.tiny
        )
    save_outputs(study, given.out, given.encoder)
    print("complete" if complete else "not complete: rerun the same command to resume", flush=True)


if __name__ == "__main__":
    main()
