"""`kamim eval`: every check before any work; then one task after the other, each with its result in its own folder."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from kamim import KamimError
from kamim.evaluation.context import EvalContext, Task
from kamim.evaluation.evaluated_model import EvaluatedModel, load_evaluated_model
from kamim.evaluation.modes import MODES, read_file
from kamim.evaluation.options import Evaluation
from kamim.evaluation.report import page as report
from kamim.evaluation.results import ABOUT, FILE, EvalSettings, Result
from kamim.evaluation.task_progress import Position
from kamim.reporting import page
from kamim.runtime import distributed, lock, machine
from kamim.runtime.distributed import World
from kamim.storage import overlap, ownership
from kamim.storage.files import write_whole
from kamim.storage.flatten import flat_text
from kamim.storage.log_file import write_line
from kamim.storage.store import Store
from kamim.training.data import check_area
from kamim.training.run_folder import LOG
from kamim.training.trainer import Progress
from pipelines.samples import all_samples, some_per_class

COMMAND = "eval"
PAGE, SETTINGS = "index.html", "settings.json"
_LOG = logging.getLogger(__name__)


def evaluate(
    config: Evaluation, modes: Sequence[str] | None, progress: Callable[[Position], Progress], strict: bool = False
) -> list[Result[Any]]:
    """Runs every mode on every checkpoint and returns a result for each, with its settings.

    modes: None for all that apply to a checkpoint. progress(position) gives the function that shows the progress of one
    task. With config.out, results are kept there, and a page shows all of them. strict: as in load_evaluated_model;
    otherwise the log of a task names the damaged checkpoints.

    Raises KamimError before any work for an invalid evaluation, and KeyboardInterrupt if a signal stopped it.
    """
    with distributed.joined(config.compute.device) as world:
        machine.use_threads(config.compute.threads)
        if world.size > 1 and config.out is None:
            raise KamimError("out: is missing; several processes need a folder that all of them see")
        models = [load_evaluated_model(spec, strict) for spec in config.checkpoint]
        tasks = tasks_of(config, modes, models, world)
        world.check_same({f"{t.settings.mode} {t.settings.name}": _identity(t.settings.as_json()) for t in tasks})
        if world.is_main and any(task.majority_top1 is not None for task in tasks):
            _warn_of_overlap(config)
        with _workplace(config.out, [model.name for model in models], world) as root:
            folders = [root / task.settings.name / task.settings.mode for task in tasks]
            for task, folder in zip(tasks, folders, strict=True):
                _check_free(folder, task.settings)
            world.barrier()  # all ranks have checked
            if config.out is not None and world.is_main:
                ownership.mark_results(config.out, COMMAND)
            results = []
            damaged = {model.name: model.damaged for model in models}
            for number, (task, folder) in enumerate(zip(tasks, folders, strict=True), 1):
                name = f"{task.settings.mode} {task.settings.name}"
                position = Position(number, name, len(tasks))
                results.append(_run(task, folder, damaged[task.settings.name], world, progress, position))
            if config.out is not None and world.is_main:
                _report(config.out, [model.name for model in models])
        return results


def _warn_of_overlap(config: Evaluation) -> None:
    """Logs a warning if the training and the validation store share images."""
    assert config.train is not None and config.val is not None
    if line := overlap.caution(Store(config.train), Store(config.val)):
        _LOG.warning("%s", line)


@contextmanager
def _workplace(out: Path | None, names: Sequence[str], world: World) -> Iterator[Path]:
    """Yields the folder of an evaluation: `out`, with the checkpoints' folders locked, or a temporary folder."""
    if out is None:
        with TemporaryDirectory() as root:
            yield Path(root)
    else:
        ownership.check_results(out, COMMAND, holds_results)
        ownership.refuse_links((out / PAGE, *(out / name for name in names)))
        with ExitStack() as locks:
            for name in names:
                locks.enter_context(lock.alone(out / name, "out", world))
            yield out


def holds_results(folder: Path) -> bool:
    """Returns whether a folder without a marker holds the page of an evaluation or, without a page, a task of one."""
    if (folder / PAGE).exists():
        return page.title_of(folder / PAGE) == report.TITLE
    return any(_settings_of(task) is not None for task in folder.glob("*/*"))


def tasks_of(
    config: Evaluation, modes: Sequence[str] | None, models: Sequence[EvaluatedModel], world: World
) -> list[Task]:
    """Returns the tasks of an evaluation by model. Raises one KamimError that lists all faults."""
    _check_names([model.name for model in models])
    context = _context(config, world, models)
    tasks: list[Task] = []
    faults: dict[str, None] = {}  # in order, and once if checkpoints share them
    for model in models:
        for mode in modes or MODES:
            if modes is None and not (MODES[mode].applies(model) and MODES[mode].configured(config)):
                continue
            try:
                tasks.append(MODES[mode].plan(context, model))
            except KamimError as error:
                faults[str(error)] = None
    if faults:
        raise KamimError("; ".join(faults))
    return tasks


def _check_names(names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise KamimError(f"checkpoint: {name} is the name of two; give each its own, as NAME=CHECKPOINT")
        if "/" in name or name.startswith("."):
            raise KamimError(
                f"checkpoint = {name}=...: the name becomes a folder, so it must not hold / or begin with ."
            )


def _context(config: Evaluation, world: World, models: Sequence[EvaluatedModel]) -> EvalContext:
    train, val = (None if path is None else Store(path) for path in (config.train, config.val))
    for model in models:
        for store in filter(None, (train, val)):
            check_area(store, model.resolution, smallest_crop=1.0)
    samples = None if train is None else all_samples(train)
    if config.per_class is not None and train is not None:
        samples = some_per_class(train, config.per_class, config.seed)
    return EvalContext(config, world, samples, None if val is None else all_samples(val))


def _run(
    task: Task,
    folder: Path,
    damaged: Sequence[str],
    world: World,
    progress: Callable[[Position], Progress],
    position: Position,
) -> Result[Any]:
    """Returns a task's result: read from its folder if it exists, else measured and written to it."""
    file = folder / FILE
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / SETTINGS, task.settings.as_json())
        for line in damaged:
            write_line(folder / LOG, line)
    world.barrier()
    if not file.exists():
        measured = task.run(folder, progress(position))
        result = Result(replace(task.settings, command=machine.command_line()), measured, task.majority_top1)
        world.barrier()
        if world.is_main:
            _write(file, result.as_json())
        return result
    return read_file(file)


def _check_free(folder: Path, settings: EvalSettings) -> None:
    """Raises KamimError if the folder holds links, a task with other settings, or files but no task.

    How the checkpoint was pretrained is not compared, since the checksum of its weights identifies it.
    """
    ownership.refuse_links(ownership.everything(folder))
    requested = dict(flat_text(_identity(settings.as_json())))
    existing = requested
    if names := ownership.names_in(folder):
        if (stored := _settings_of(folder)) is None:
            raise KamimError(f"{folder}: holds {names[0]} and no evaluation; choose another folder for the results")
        existing = dict(flat_text(_identity(stored)))
    for key in {**existing, **requested}:
        if requested.get(key) != existing.get(key):
            raise KamimError(
                f"{folder}: holds another evaluation ({key} {existing.get(key, 'nothing')} there, "
                f"{requested.get(key, 'nothing')} requested); remove it, or choose another folder for the results"
            )


def _settings_of(folder: Path) -> dict[str, Any] | None:
    """Returns the recorded settings of a task from its folder, or None if there are none."""
    try:
        stored = json.loads((folder / SETTINGS).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return stored if isinstance(stored, dict) and stored.get("mode") == folder.name else None


def _identity(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that shape a result."""
    return {key: value for key, value in settings.items() if key not in ABOUT}


def _write(file: Path, content: dict[str, Any]) -> None:
    write_whole(file, (json.dumps(content, indent=2) + "\n").encode())


def _report(out: Path, names: Sequence[str]) -> None:
    """Writes index.html, of every result below `out`: the checkpoints `names` in this order, then others by name."""
    others = {folder.name for folder in out.iterdir() if folder.is_dir()} - set(names)
    files = [out / name / mode / FILE for name in (*names, *sorted(others)) for mode in MODES]
    results = {file.parent: read_file(file) for file in files if file.exists()}
    pictures = {
        name: list(mode.pictures([(r.settings.name, at) for at, r in results.items() if r.settings.mode == name]))
        for name, mode in MODES.items()
    }
    report.save_report(list(results.values()), pictures, out / PAGE)
