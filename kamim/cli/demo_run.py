"""`kamim demo`: the whole pipeline on the sample photographs, and its results."""

import statistics
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kamim import KamimError
from kamim.analysis.analyze import run_analysis
from kamim.analysis.request import Request
from kamim.cli import pictures
from kamim.evaluation.config import Evaluation
from kamim.evaluation.results import Accuracy
from kamim.evaluation.run import evaluate
from kamim.storage.ownership import check_results, everything, mark_results, refuse_links
from kamim.storage.store import MANIFEST, Store
from kamim.training import metrics
from kamim.training.config import Pretrain, Weighting
from kamim.training.pretrain import pretrain
from kamim.training.settings import load
from kamim.training.trainer import Progress
from preprocess.build import build
from preprocess.plan import make_job
from preprocess.sources import list_source, photograph

DETECTORS = ("fast", "sift", "orb")
SHOWN = ("astronaut.png", "coffee.png", "china.jpg")  # photographs in the pictures of weights
Update = Callable[[int, int, str], None]


def run_demo(out: Path, console: Console, update: Update) -> None:
    """Preprocesses, pretrains KAMIM and SimMIM from one seed, probes both and random weights; prints the results.

    A rerun resumes. Raises KamimError if a training run was interrupted, or if `out` holds files but no demo.
    """
    check_results(out, "demo", lambda out: (out / "stores" / "train" / MANIFEST).is_file())
    refuse_links(path for path in everything(out) if path != out)
    mark_results(out, "demo")
    stores = {split: out / "stores" / split for split in ("train", "val")}
    preset, store = Path("demo"), f"data.store={stores['train']}"
    runs = {
        "KAMIM": load(Pretrain, preset, [store], {"out": out / "kamim"}),
        "SimMIM": load(Pretrain, preset, [store], {"out": out / "simmim", "weighting": None}),
    }
    for split, path in stores.items():
        console.print(f"preprocess {split}: photographs of scikit-image and scikit-learn, {', '.join(DETECTORS)}")
        _preprocess(split, path, runs["KAMIM"].data.resolution, update)
    for name, config in runs.items():
        console.print(f"pretrain {name}: {config.model.name}, {config.optim.epochs} epochs on the CPU")
        if not pretrain(config, _named(update, name)).finished:
            raise KamimError("the demo was stopped; rerun the command to resume")
    console.print("linear probes of random weights, SimMIM and KAMIM")
    checkpoints = (f"random weights=random:{runs['SimMIM'].out}", *(f"{n}={runs[n].out}" for n in ("SimMIM", "KAMIM")))
    evaluation = load(Evaluation, Path("demo"), given={"checkpoint": checkpoints, **stores})
    results = evaluate(evaluation, ["linprobe"], lambda position: _named(update, str(position)))
    accuracies = {result.settings.name: result.measured for result in results}
    files = _pictures(out, stores["val"], runs)
    console.print(_table(runs, accuracies, len(Store(stores["train"]).manifest.classes)))
    console.print(
        "Top-1 in per cent on validation patches cut from another part of each photograph. The two losses are of "
        "different objectives (Eq. 1 and Eq. 3) and do not compare. A minute of training on a few photographs shows "
        "that the machinery works, not which method is better."
    )
    for file in files:
        console.print(f"picture: {file}")


def _named(update: Update, name: str) -> Progress:
    return lambda done, total, _: update(done, total, name)


def _preprocess(split: str, store: Path, resolution: int, update: Update) -> None:
    source = list_source("sample", None, split)
    job = make_job(
        "sample", split, source, detectors=DETECTORS, images="auto", encoding="jpeg", quality=90,
        resolution=resolution, crop_scale=(0.67, 1.0), out=store,
    )  # fmt: skip
    store.parent.mkdir(parents=True, exist_ok=True)
    build(job, source, store, workers=2, strict=True, progress=lambda done, total: update(done, total, split))


def _pictures(out: Path, val: Path, runs: dict[str, Pretrain]) -> list[Path]:
    sheets = []
    for detector in DETECTORS:
        weighting = Weighting(detector=detector)
        images = {name: pictures.image_weights(photograph(name), weighting) for name in SHOWN}
        sheets.append(out / f"weights-{detector}.png")
        pictures.plot_weights(images, weighting, sheets[-1])
    sheets.append(out / "crops.png")
    pictures.preview(Store(val), Weighting(), 6, seed=1, file=sheets[-1])
    named = [f"{name}={config.out}" for name, config in runs.items()]
    figure_2 = out / "reconstructions"
    run_analysis(named, Store(val), Request(figures=("2",)), figure_2, lambda done, total: None)
    return [*sheets, *sorted(figure_2.glob("*.png"))]


def _table(runs: dict[str, Pretrain], accuracies: dict[str, Accuracy], classes: int) -> Table:
    table = Table("", "top-1 %", "first loss", "last loss", "images/s")
    table.add_row("chance", f"{100 / classes:.2f}", "", "", "")
    for name, accuracy in accuracies.items():
        cells = ["", "", ""]
        if name in runs:
            lines = metrics.read(runs[name].out)
            rate = statistics.median(line["images_per_second"] for line in lines)
            cells = [f"{lines[0]['loss']:.3f}", f"{lines[-1]['loss']:.3f}", f"{rate:.0f}"]
        table.add_row(name, f"{accuracy.top1:.2f}", *cells)
    return table
