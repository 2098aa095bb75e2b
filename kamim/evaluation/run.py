"""`kamim eval`: every check before any work; then mode by mode, each result kept where it can be found again."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from kamim import KamimError
from kamim.evaluation import report
from kamim.evaluation.config import Evaluation
from kamim.evaluation.modes import SHOWN, TASKS, applies
from kamim.evaluation.setting import Setting, Task
from kamim.evaluation.subject import Subject, load_subject
from kamim.reporting import page
from kamim.reporting.plots import reconstruction_sheet
from kamim.storage import lock
from kamim.storage.flatten import flat_text
from kamim.storage.store import Store, write_whole
from kamim.training import distributed, machine
from kamim.training.data import check_area
from kamim.training.distributed import World
from kamim.training.trainer import Progress
from pipelines.samples import all_samples, some_per_class


def evaluate(
    config: Evaluation, modes: Sequence[str] | None, progress: Callable[[str], Progress]
) -> list[dict[str, Any]]:
    """Every mode on every checkpoint: a result each, with all that led to it. progress(title) shows one.

    modes: None for all that a checkpoint has what they need for. In config.out a page shows all that is there.

    Raises ValueError for what cannot be evaluated before any work, KeyboardInterrupt where a signal stopped it.
    """
    with distributed.joined(config.compute.device) as world:
        machine.use_threads(config.compute.threads)
        if world.size > 1 and config.out is None:
            raise KamimError("--out: is missing; several processes need a folder that all of them see")
        tasks = tasks_of(config, modes, [load_subject(spec) for spec in config.checkpoint], world)
        with _workplace(config.out, world) as root:
            folders = [root / task.subject.name / task.mode for task in tasks]
            for task, folder in zip(tasks, folders, strict=True):
                _check_free(folder, task.settings)
            world.barrier()  # everyone has looked
            results = [_run(task, folder, world, progress) for task, folder in zip(tasks, folders, strict=True)]
            if config.out is not None and world.is_main:
                _report(config.out)
        return results


@contextmanager
def _workplace(out: Path | None, world: World) -> Iterator[Path]:
    """The folder of an evaluation: `out`, for it alone, or one that is removed."""
    if out is None:
        with TemporaryDirectory() as root:
            yield Path(root)
    else:
        with lock.alone(out, "--out", world):
            yield out


def tasks_of(config: Evaluation, modes: Sequence[str] | None, subjects: Sequence[Subject], world: World) -> list[Task]:
    """What there is to do. Raises ValueError for what cannot be evaluated."""
    _distinct([subject.name for subject in subjects])
    setting = _setting(config, world, subjects)
    return [
        TASKS[mode](setting, subject) for subject in subjects for mode in modes or TASKS
        if modes is not None or applies(mode, subject)
    ]  # fmt: skip


def _distinct(names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise KamimError(f"--checkpoint: {name} is the name of two; give each its own, as NAME=CHECKPOINT")
        if "/" in name or name.startswith("."):
            raise KamimError(
                f"--checkpoint {name}=...: the name becomes a folder, so it must not hold / or begin with ."
            )


def _setting(config: Evaluation, world: World, subjects: Sequence[Subject]) -> Setting:
    val, train = Store(config.val), None if config.train is None else Store(config.train)
    for subject in subjects:
        for store in filter(None, (train, val)):
            check_area(store, subject.resolution, smallest_crop=1.0)
    samples = None if train is None else all_samples(train)
    if config.per_class is not None and train is not None:
        samples = some_per_class(train, config.per_class, config.seed)
    return Setting(config, world, samples, all_samples(val))


def _run(task: Task, folder: Path, world: World, progress: Callable[[str], Progress]) -> dict[str, Any]:
    """A task's result: from its folder where it is there already, else made, and left there."""
    file = folder / "result.json"
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "settings.json", task.settings)
    world.barrier()
    if not file.exists():
        made = {**task.settings, **task.run(folder, progress(f"{task.mode} {task.subject.name}"))}
        world.barrier()
        if world.is_main:
            _write(file, made)
        return made
    result: dict[str, Any] = json.loads(file.read_text())
    return result


def _check_free(folder: Path, settings: dict[str, Any]) -> None:
    """Raises ValueError where another evaluation lives in the folder.

    How the checkpoint was pretrained is not compared: its weights' checksum says which one it is.
    """
    file = folder / "settings.json"
    asked = dict(flat_text(settings))
    there = dict(flat_text(json.loads(file.read_text()))) if file.exists() else asked
    for key in (key for key in {**there, **asked} if not key.startswith("pretraining")):
        if asked.get(key) != there.get(key):
            raise KamimError(
                f"--out {folder}: holds another evaluation ({key} {there.get(key, 'nothing')} there, "
                f"{asked.get(key, 'nothing')} asked for); choose another --out, or remove it"
            )


def _write(file: Path, content: dict[str, Any]) -> None:
    write_whole(file, (json.dumps(content, indent=2) + "\n").encode())


def _report(out: Path) -> None:
    """index.html, of every result below `out`, and its reconstructions side by side."""
    files = sorted(out.glob("*/*/result.json"))
    results = [json.loads(file.read_text()) for file in files]
    sheets: dict[tuple[bytes, bytes], list[tuple[str, np.ndarray]]] = {}
    shown: dict[tuple[bytes, bytes], tuple[np.ndarray, np.ndarray]] = {}
    for file, result in zip(files, results, strict=True):
        if result["mode"] == "reconstruct":
            with np.load(file.with_name(SHOWN)) as arrays:
                originals, masks, made = (arrays[name] for name in ("originals", "masks", "made"))
            same = originals.tobytes(), masks.tobytes()  # only then do reconstructions compare
            shown[same] = originals, masks
            sheets.setdefault(same, []).append((result["name"], made))
    pictures = [
        (page.png(reconstruction_sheet(*shown[same], rows, "")), "Original, masked, and what each makes of it.")
        for same, rows in sheets.items()
    ]
    report.save_report(results, pictures, out / "index.html")
