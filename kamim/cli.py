"""The command line: parses, calls one function, shows progress, and says a user's mistake in one line."""

import functools
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="Keypoint Aware Masked Image Modelling.")
store_app = typer.Typer(no_args_is_help=True, help="Look at a store.")
app.add_typer(store_app, name="store")
bench_app = typer.Typer(no_args_is_help=True, help="Measure fidelity and speed on this machine.")
app.add_typer(bench_app, name="bench")
out_console = Console(soft_wrap=True, highlight=False, markup=False)
err_console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
_debug = False

RESUMABLE = 75  # exit code of a run stopped by SIGINT or SIGTERM with its state saved (EX_TEMPFAIL)


@app.callback()
def _options(debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False) -> None:
    global _debug
    _debug = debug
    out_console.quiet = not _is_main()


def _is_main() -> bool:
    """Whether this is the one process of torchrun's that talks to the user."""
    return os.environ.get("RANK", "0") == "0"


def _says_errors(command: Callable[..., None]) -> Callable[..., None]:
    """A user's mistake becomes one line on stderr and exit code 1."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except typer.Exit:  # a RuntimeError too
            raise
        except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
            if _debug:
                raise
            err_console.print(f"error: {' '.join(str(error).split())}", style="red")
            raise typer.Exit(1) from None

    return wrapped


class _Rate(ProgressColumn):
    """Images per second, over the recent past."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        factor = task.fields.get("factor", 1)
        return Text("" if speed is None else f"{speed * factor:,.0f} images/s")


@contextmanager
def _bar(title: str, factor: int = 1) -> Iterator["_Update"]:
    """A progress bar; factor: images per step. Where there is no terminal, a line at every tenth."""
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
        _Rate(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=err_console, disable=not (err_console.is_terminal and _is_main())) as progress:
        yield _Update(progress, progress.add_task(title, total=None, note="", factor=factor))


@contextmanager
def _terminable() -> Iterator[None]:
    """Inside, SIGTERM, which is how a batch system stops a job, is a Ctrl-C."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Update:
    """What moves a bar: update(done, total, note)."""

    def __init__(self, progress: Progress, task: TaskID):
        self._progress, self._task, self._tenths = progress, task, 0

    def __call__(self, done: int, total: int, note: str = "") -> None:
        self._progress.update(self._task, completed=done, total=total, note=note)
        if self._progress.disable and _is_main() and done * 10 // total > self._tenths:
            err_console.print(f"{self._progress.tasks[0].description}: {done}/{total} {note}")
        self._tenths = done * 10 // total


Overrides = Annotated[list[str] | None, typer.Argument(help="key=value overrides, such as optim.lr=1e-3")]
ConfigFile = Annotated[
    Path | None, typer.Option("-c", "--config", help="YAML file, such as configs/pretrain/demo.yaml")
]


@app.command()
@_says_errors
def preprocess(
    dataset: Annotated[str, typer.Argument(help="imagefolder, imagenet or sample")],
    out: Annotated[Path, typer.Option(help="The store to make.")],
    source: Annotated[Path | None, typer.Option(help="Folder of the source images.")] = None,
    split: Annotated[str, typer.Option(help="train or val")] = "train",
    detectors: Annotated[str, typer.Option(help="Comma-separated, of fast, sift, orb.")] = "fast",
    images: Annotated[str, typer.Option(help="ffcv, zarr, or auto: ffcv where it is installed.")] = "auto",
    raw: Annotated[bool, typer.Option(help="Store pixels, not JPEGs: 8 times the space, faster to read.")] = False,
    quality: Annotated[int, typer.Option(help="JPEG quality, 1 to 100.")] = 90,
    resolution: Annotated[int, typer.Option(help="Side of the training crops in px.")] = 192,
    crop_scale: Annotated[str, typer.Option(help="Smallest and largest area of a crop.")] = "0.67,1.0",
    workers: Annotated[int, typer.Option(help="Processes; 0: one per core.")] = 0,
    strict: Annotated[bool, typer.Option(help="Stop at the first unreadable image.")] = False,
) -> None:
    """Finds keypoints once and writes a store. Started again, it continues."""
    from preprocess.build import build, make_job
    from preprocess.sources import list_source

    if workers < 0:
        raise ValueError(f"--workers {workers}: must be 0 (one per core) or more")
    listed = list_source(dataset, source, split)
    job = make_job(
        dataset, split, listed, detectors=tuple(filter(None, detectors.split(","))), images=images,
        encoding="raw" if raw else "jpeg", quality=quality, resolution=resolution, crop_scale=_pair(crop_scale),
        out=out,
    )  # fmt: skip
    try:
        with _terminable(), _bar(f"preprocess {dataset} {split}") as update:
            fresh = build(
                job, listed, out, workers=workers or len(os.sched_getaffinity(0)), strict=strict, progress=update
            )
    except KeyboardInterrupt:
        err_console.print("stopped; the same command again continues where it was")
        raise typer.Exit(RESUMABLE) from None
    if not fresh:
        out_console.print(f"{out} is complete already")
    _show_store(out)


def _pair(text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--crop-scale {text}: must be two numbers, such as 0.67,1.0") from None
    return low, high


def _show_store(path: Path) -> None:
    from kamim.store import Store

    manifest = Store(path).manifest
    size = sum(file.stat().st_blocks * 512 for file in path.rglob("*") if file.is_file())
    out_console.print(
        f"{path}: {manifest.count} images of {len(manifest.classes) or 'no'} classes ({manifest.job.images}, "
        f"{manifest.job.encoding}), keypoints: {', '.join(manifest.rules) or 'none'}; {size / 1e6:,.1f} MB"
    )
    if manifest.rejects:
        out_console.print(f"{manifest.rejects} files could not be read: {path / 'rejects.csv'}")


@app.command()
@_says_errors
def pretrain(
    overrides: Overrides = None,
    config: ConfigFile = None,
    print_config: Annotated[bool, typer.Option(help="Show the resolved configuration and stop.")] = False,
) -> None:
    """Trains SimMIM or KAMIM on a store. Started again, it resumes from the newest checkpoint."""
    from kamim.config import Pretrain, dump, load

    resolved = load(Pretrain, config, overrides or ())
    if print_config:
        out_console.print(dump(resolved), end="")
        return
    from kamim.compose import run_pretrain

    method = "simmim" if resolved.weighting is None else "kamim"
    with _bar(f"pretrain {method} {resolved.model.name}", factor=resolved.optim.batch_size) as update:
        outcome = run_pretrain(
            resolved, lambda done, total, m: update(done, total, f"loss {m['loss']:.4f}" if m else "")
        )
    if not outcome.finished:
        err_console.print(f"stopped after step {outcome.step}, saved; the same command again continues")
        raise typer.Exit(RESUMABLE)
    out_console.print(f"{resolved.out}: {outcome.step} steps done")


@app.command(name="eval")
@_says_errors
def evaluate(
    overrides: Overrides = None,
    mode: Annotated[str, typer.Option(help="linprobe")] = "linprobe",
    checkpoint: Annotated[str | None, typer.Option(help="A run, one of its checkpoints, or random:RUN.")] = None,
    train: Annotated[Path | None, typer.Option(help="Store to train the probe on.")] = None,
    val: Annotated[Path | None, typer.Option(help="Store to measure on.")] = None,
    config: ConfigFile = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
) -> None:
    """Evaluates a checkpoint with the paper's linear probe."""
    from kamim.config import Probe, load

    _check_folder("--json", json_out)
    if mode != "linprobe":
        raise ValueError(f"--mode {mode}: must be linprobe")
    named = {"checkpoint": checkpoint, "train": train, "val": val}
    resolved = load(Probe, config, overrides or (), {key: value for key, value in named.items() if value is not None})
    from kamim.compose import run_linprobe

    with _bar("linprobe", factor=resolved.optim.batch_size) as update:
        result = run_linprobe(resolved, lambda done, total, m: update(done, total, f"loss {m['loss']:.4f}"))
    out_console.print(
        f"top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} % on {result['val']['images']} images "
        f"of {result['classes']} classes; {result['checkpoint']}"
    )
    _write_json(json_out, result)


@app.command(name="import")
@_says_errors
def import_(
    file: Annotated[Path, typer.Argument(help="The authors', MoCo v3's, microsoft/SimMIM's or timm's weights.")],
    out: Annotated[Path, typer.Option(help="The checkpoint to make.")],
    resolution: Annotated[int | None, typer.Option(help="Side of the images; default: as trained.")] = None,
) -> None:
    """Makes a checkpoint of weights from elsewhere."""
    from kamim import checkpoint, interop

    made = interop.convert(interop.read_file(file), resolution)
    checkpoint.save_imported(out, made.architecture, made.resolution, made.state, made.has_head)
    head = "with its pixel head" if made.has_head else "encoder alone"
    out_console.print(f"{out}: {made.architecture} at {made.resolution} px, {head}")


@app.command()
@_says_errors
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A run, or one of its checkpoints.")],
    out: Annotated[Path, typer.Option(help="The file to make, .safetensors.")],
) -> None:
    """Writes the encoder as timm's create_model(..., checkpoint_path=OUT) loads it."""
    from safetensors.torch import save_file

    from kamim import interop
    from kamim.checkpoint import read
    from kamim.models import ARCHITECTURES

    if out.suffix != ".safetensors":
        raise ValueError(f"--out {out}: must end in .safetensors")
    _check_folder("--out", out)
    found = read(checkpoint)
    save_file(interop.to_timm(found.model_state()), out)
    architecture = ARCHITECTURES[found.config.model.name]
    options = "".join(f", {key}={value}" for key, value in architecture.options.items())
    out_console.print(
        f"{out}: timm.create_model('{architecture.timm_name}', img_size={found.config.data.resolution}, "
        f"num_classes=0{options}, checkpoint_path='{out}')",
    )


@app.command()
@_says_errors
def weights(
    image: Annotated[Path, typer.Argument(help="Any image file.")],
    detector: Annotated[str, typer.Option(help="fast, sift or orb")] = "fast",
    footprint: Annotated[str, typer.Option(help="ring (the released code) or point (the paper's text)")] = "ring",
    patch_size: Annotated[int, typer.Option(help="w_ps in px")] = 8,
    temperature: Annotated[float, typer.Option(help="T")] = 0.25,
    out: Annotated[Path | None, typer.Option(help="Write W here, .npy, float32 [H / w_ps, W / w_ps].")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture here, .png.")] = None,
) -> None:
    """Keypoints and weights W (Eq. 2) of an image as it is, without a resize."""
    import numpy as np

    from kamim.compose import image_weights, plot_weights
    from preprocess.decode import decode

    weighting = _weighting(detector, footprint, patch_size, temperature)
    if not image.is_file():
        raise ValueError(f"{image}: no such file")
    try:
        found = image_weights(decode(image.read_bytes()), weighting)
    except ValueError as error:
        raise ValueError(f"{image}: {error}") from error
    w = found.weights
    out_console.print(
        f"{image}: {found.keypoints} {detector} keypoints; density mean {found.omega.mean():.4f}, "
        f"max {found.omega.max():.4f}; W {w.shape[0]}x{w.shape[1]}, mean {w.mean():.3f}, max {w.max():.3f}"
    )
    if plot is not None:
        plot_weights({image.name: found}, weighting, plot)
    if out is not None:
        with out.open("wb") as file:
            np.save(file, w)


def _weighting(detector: str, footprint: str, patch_size: int, temperature: float) -> Any:
    from kamim.config import Weighting, load

    keys = {"detector": detector, "footprint": footprint, "patch_size": patch_size, "temperature": temperature}
    return load(Weighting, None, given=keys)


@app.command()
@_says_errors
def analyze(
    checkpoint: Annotated[
        list[str], typer.Option(help="NAME=RUN, NAME=random:RUN, NAME=timm:MODEL or NAME=timm:MODEL@FILE.safetensors.")
    ],
    store: Annotated[Path, typer.Option(help="Images to look at.")],
    out: Annotated[Path, typer.Option(help="Where pictures, analysis.json and index.html go.")],
    figures: Annotated[str, typer.Option(help="all, or some of 2,3,..,10,features,cka,weights,probe.")] = "all",
    images: Annotated[int | None, typer.Option(help="For curves; all, 1000 at most, where not given.")] = None,
    classes: Annotated[str, typer.Option(help="Three, comma-separated; the store's first where not given.")] = "",
    layer: Annotated[int | None, typer.Option(help="Figure 5: block, from 1; the last where not given.")] = None,
    head: Annotated[int | None, typer.Option(help="Figure 5: head, from 1; the mean where not given.")] = None,
    query: Annotated[
        list[str] | None, typer.Option(help="Figure 5: X,Y of a query token, as shares of the sides; repeatable.")
    ] = None,
    probe: Annotated[list[Path] | None, typer.Option(help="A result of kamim eval --json; repeatable.")] = None,
    seed: Annotated[int, typer.Option(help="Of images, masks, t-SNE and intervals.")] = 0,
) -> None:
    """The paper's analyses of one or several checkpoints side by side: figures 2 to 10 and more."""
    from kamim.analysis.request import Request, parse_figures, parse_query, read_probe
    from kamim.compose import run_analysis
    from kamim.store import Store

    chosen = {"queries": tuple(parse_query(text) for text in query)} if query else {}
    request = Request(
        figures=parse_figures(figures), images=images, classes=tuple(filter(None, classes.split(","))), layer=layer,
        head=head, seed=seed, probes=tuple(read_probe(file) for file in probe or ()), **chosen,
    )  # fmt: skip
    with _bar(f"analyze {store.name}") as update:
        lines = run_analysis(checkpoint, Store(store), request, out, update)
    for line in lines:
        out_console.print(line)
    out_console.print(f"{out / 'index.html'}")


@store_app.command()
@_says_errors
def info(path: Path) -> None:
    """What a store holds."""
    from kamim.store import Store

    _show_store(path)
    out_console.print_json(Store(path).manifest.model_dump_json(exclude={"checksums", "classes"}))


@store_app.command()
@_says_errors
def verify(path: Path) -> None:
    """Compares every file with its checksum; exit code 1 where one differs."""
    from kamim.store import Store, checksums

    expected, found = Store(path).manifest.checksums, checksums(path)
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    for name in wrong:
        state = "missing" if name not in found else "not in the manifest" if name not in expected else "damaged"
        err_console.print(f"{path / name}: {state}")
    if wrong:
        raise typer.Exit(1)
    out_console.print(f"{path}: {len(expected)} files, all as written")


@store_app.command()
@_says_errors
def preview(
    path: Path,
    out: Annotated[Path, typer.Option(help="The picture, .png.")],
    detector: Annotated[str, typer.Option(help="One of the store's.")] = "fast",
    footprint: Annotated[str, typer.Option(help="ring or point")] = "ring",
    patch_size: Annotated[int, typer.Option(help="w_ps in px")] = 8,
    temperature: Annotated[float, typer.Option(help="T")] = 0.25,
    images: Annotated[int, typer.Option(min=1, help="How many crops.")] = 6,
    seed: Annotated[int, typer.Option(help="Which crops.")] = 0,
) -> None:
    """A sheet of random crops as training sees them, with keypoints and weights."""
    from kamim import compose
    from kamim.store import Store

    compose.preview(Store(path), _weighting(detector, footprint, patch_size, temperature), images, seed, out)
    out_console.print(f"{out}")


@bench_app.command(name="loader")
@_says_errors
def bench_loader(
    store: Annotated[Path, typer.Option(help="A JPEG store of --source, with FAST keypoints.")],
    source: Annotated[Path, typer.Option(help="The image folder it was made of.")],
    batch: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 256,
    rounds: Annotated[int, typer.Option(min=1, help="Measured passes of each.")] = 5,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write rates and ratios here.")] = None,
) -> None:
    """Images per second of the loader, the released code's way, stock FFCV, and JPEG decoding alone."""
    from kamim.bench.loader import bench
    from kamim.store import Store
    from preprocess.sources import list_source

    _check_folder("--json", json_out)
    with _bar("bench loader") as update:
        result = bench(Store(store), list_source("imagefolder", source, "train"), batch, rounds, update)
    for name, rate in result["images_per_second"].items():
        out_console.print(f"{name:12} {rate:8,.0f} images/s")
    for name, ratio in result["ratios"].items():
        out_console.print(f"{name:22} {ratio:6.2f}")
    _write_json(json_out, result)


@bench_app.command(name="fidelity")
@_says_errors
def bench_fidelity(
    source: Annotated[Path, typer.Option(help="An image folder.")],
    detectors: Annotated[str, typer.Option(help="Comma-separated.")] = "fast,sift,orb",
    images: Annotated[int, typer.Option(min=1, help="How many, one random crop of each.")] = 400,
    patch_size: Annotated[int, typer.Option(help="w_ps in px")] = 8,
    temperature: Annotated[float, typer.Option(help="T")] = 0.25,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write every number here.")] = None,
) -> None:
    """How well stored keypoints stand for keypoints found on every crop."""
    from kamim.bench.fidelity import Setting, fidelity
    from preprocess.sources import list_source

    _check_folder("--json", json_out)
    names = tuple(detectors.split(","))
    for name in names:
        _weighting(name, "ring", patch_size, temperature)
    setting = Setting(patch_size=patch_size, temperature=temperature)
    with _bar("bench fidelity") as update:
        rows = fidelity(list_source("imagefolder", source, "train"), names, setting, images, update)
    for row in rows:
        out_console.print(
            f"{row['detector']:5} {row['footprint']:5} correlation of W {row['weight_correlation']:.3f}, floor "
            f"{row['weight_correlation_floor']:.3f} (share {row['share_of_floor']:.3f}); mean W "
            f"{row['mean_weight']:.2f}, online {row['mean_weight_online']:.2f}"
        )
    _write_json(json_out, rows)


def _check_folder(option: str, file: Path | None) -> None:
    """Before any work: whether the file can be there at all."""
    if file is not None and not file.absolute().parent.is_dir():
        raise ValueError(f"{option} {file}: the folder {file.absolute().parent} does not exist")


def _write_json(file: Path | None, content: Any) -> None:
    if file is not None:
        file.write_text(json.dumps(content, indent=2) + "\n")


@app.command()
@_says_errors
def demo(
    out: Annotated[Path, typer.Option(help="Where stores, runs and pictures go.")] = Path("runs/demo"),
) -> None:
    """The whole way on real photographs, on a CPU: preprocess, pretrain twice, probe three times, look."""
    from kamim.demo import run_demo

    with _bar("demo") as update:
        run_demo(out, out_console, update)


def main() -> None:
    """Entry point of the `kamim` script."""
    app()
