"""`kamim demo`: the whole pipeline on the sample photographs, and its results."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kamim import KamimError
from kamim.analysis.analyze import run_analysis
from kamim.analysis.request import Request
from kamim.cli import pictures
from kamim.config.pretrain import Pretrain, Weighting
from kamim.config.schema import load
from kamim.evaluation.evaluate import evaluate
from kamim.evaluation.options import Evaluation
from kamim.evaluation.results import Accuracy, Result, headline
from kamim.storage.manifest import MANIFEST
from kamim.storage.ownership import check_results, everything, mark_results, refuse_links
from kamim.storage.store import Store
from kamim.training import metrics
from kamim.training.pretrain import pretrain
from kamim.training.trainer import Progress
from preprocess.build import build
from preprocess.plan import make_job
from preprocess.sources import list_source, photograph

DETECTORS = ("fast", "sift", "orb")
SHOWN = ("astronaut.png", "coffee.png", "china.jpg")  # photographs in the pictures of weights
NEXT = (
    "next, with images of your own in class folders:",
    "    kamim preprocess imagefolder --source DIR --out stores/own --resolution 96",
    "    kamim pretrain -c demo data.store=stores/own out=runs/own",
)
Update = Callable[[int, int, str], None]


def run_demo(out: Path, console: Console, update: Update) -> None:
    """Preprocesses, pretrains KAMIM and SimMIM from one seed, probes both and random weights; prints the results.

    A rerun resumes, and reads what is complete. Raises KamimError if a training run was interrupted, or if `out` holds
    files but no demo.
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
    evaluation = load(Evaluation, Path("demo"), given={"checkpoint": checkpoints, **stores, "out": out / "eval"})
    results = evaluate(evaluation, ["linprobe"], lambda position: _named(update, str(position)))
    files = _pictures(out, stores["val"], runs)
    console.print(_table(runs, results, len(Store(stores["train"]).manifest.classes)))
    console.print(
        "Top-1 in per cent, with Wilson's 95 % interval, on validation patches cut from another part of each "
        "photograph. The two losses are of different objectives (Eq. 1 and Eq. 3) and do not compare. A minute of "
        "training with one seed on a few photographs shows that the machinery works, not which method is better: over "
        "three seeds and 50 epochs of Imagenette, KAMIM brings no gain over SimMIM (docs/results.md)."
    )
    for file in files:
        console.print(f"picture: {file}")
    for page in (*(config.out / "report.html" for config in runs.values()), out / "eval/index.html"):
        console.print(f"page: {page}")
    for line in NEXT:
        console.print(line)


def _named(update: Update, name: str) -> Progress:
    return lambda done, total, _: update(done, total, name)


def _preprocess(split: str, store: Path, resolution: int, update: Update) -> None:
    source = list_source("sample", None, split)
    job = make_job(
        "sample",
        split,
        source,
        detectors=DETECTORS,
        pixels="jpeg",
        quality=90,
        resolution=resolution,
        crop_scale=(0.67, 1.0),
        out=store,
    )
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


def _table(runs: dict[str, Pretrain], results: Sequence[Result[Accuracy]], classes: int) -> Table:
    table = Table("", "top-1 %", "first loss", "last loss", "images/s")
    table.add_row("chance", f"{100 / classes:.2f}", "", "", "")
    for result in results:
        name, cells = result.settings.name, ["", "", ""]
        if name in runs:
            lines = metrics.read(runs[name].out)
            rate = statistics.median(line["images_per_second"] for line in lines)
            cells = [f"{lines[0]['loss']:.3f}", f"{lines[-1]['loss']:.3f}", f"{rate:.0f}"]
        table.add_row(name, headline(result), *cells)
    return table
