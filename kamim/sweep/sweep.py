"""`kamim sweep`: trains and evaluates run after run, and keeps the tables of the results so far."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kamim.evaluation.evaluate import evaluate, tasks_of
from kamim.evaluation.evaluated_model import load_evaluated_model, planned_model
from kamim.evaluation.modes import MODES, read_file
from kamim.evaluation.results import FILE, Result
from kamim.evaluation.task_progress import Position
from kamim.reporting import page
from kamim.runtime import distributed
from kamim.runtime.distributed import World
from kamim.storage.ownership import check_results, mark_results, refuse_links
from kamim.sweep import grid
from kamim.sweep import table as grid_table
from kamim.sweep.grid import Grid, GridPoint
from kamim.sweep.table import SweepResults
from kamim.training.prepare import prepare
from kamim.training.pretrain import pretrain
from kamim.training.run_folder import is_run
from kamim.training.trainer import Progress

COMMAND = "sweep"
ShowTask = Callable[[Position], Progress]  # returns the function that shows the progress of a task


def run_grid(sweep: Grid, progress: ShowTask, shard: tuple[int, int] = (1, 1)) -> SweepResults:
    """Trains and evaluates every point, and returns the results in the sweep's folder. Finished work is kept.

    shard: (i, n) takes every n-th run, from the i-th on (1 <= i <= n), with the baselines that belong to it; other
    processes take the rest. progress(position) gives the function that shows the progress of one task.

    Raises KamimError before any work for an invalid run or evaluation, KeyboardInterrupt if a signal stopped
    it.
    """
    points = grid.points(sweep)
    with distributed.joined(grid.evaluation(sweep, points).compute.device) as world:  # one process group throughout
        _check_out(sweep, points)
        _check(sweep, points, world)
        world.barrier()  # all ranks have checked
        if world.is_main:
            mark_results(sweep.out, COMMAND)
        mine = points[shard[0] - 1 :: shard[1]]
        baselines = {
            point.name: [row for row in grid.baselines(sweep) if row.checkpoint.endswith(f":{point.checkpoint}")]
            for point in mine
        }
        count = sum(1 + len(sweep.modes) * (1 + len(baselines[point.name])) for point in mine)
        done = 0
        for point in mine:
            config, position = grid.pretraining(sweep, point), Position(1, f"pretrain {point.name}", count)
            if not pretrain(config, _after(done, count, progress)(position)).finished:
                raise KeyboardInterrupt
            evaluate(grid.evaluation(sweep, [point]), sweep.modes, _after(done + 1, count, progress))
            done += 1 + len(sweep.modes)
            for baseline in baselines[point.name]:
                _evaluate_baseline(sweep, baseline, _after(done, count, progress))
                done += len(sweep.modes)
            if world.is_main:
                grid_table.save(SweepResults(sweep, finished(sweep)))
            world.barrier()
        return SweepResults(sweep, finished(sweep))


def _after(done: int, count: int, progress: ShowTask) -> ShowTask:
    """Shows tasks as those of a sweep of `count` tasks, of which `done` come before."""

    def show(position: Position) -> Progress:
        return progress(Position(done + position.number, position.name, count))

    return show


def finished(sweep: Grid) -> list[Result[Any]]:
    """Returns the results in the sweep's folder, of its points and baselines, in their order."""
    rows = (*grid.points(sweep), *grid.baselines(sweep))
    files = [sweep.out / grid.EVALUATION / row.name / mode / FILE for row in rows for mode in sweep.modes]
    return [read_file(file) for file in files if file.exists()]


def _check_out(sweep: Grid, points: Sequence[GridPoint]) -> None:
    """Raises KamimError if the sweep's folder holds files but no sweep, or links in place of its files and folders."""

    check_results(sweep.out, COMMAND, lambda _: _of_earlier_version(sweep.out, points))
    names = (grid_table.PAGE, *grid_table.TABLES, grid.EVALUATION, *(point.name for point in points))
    refuse_links(sweep.out / name for name in names)


def _of_earlier_version(out: Path, points: Sequence[GridPoint]) -> bool:
    """Returns whether a folder without a marker holds the page of a sweep or, without a page, one of its runs."""
    if (out / grid_table.PAGE).exists():
        return page.title_of(out / grid_table.PAGE).startswith(grid_table.TITLE)
    return any(map(is_run, (out / point.name for point in points)))


def _check(sweep: Grid, points: Sequence[GridPoint], world: World) -> None:
    configs = [(point.name, grid.pretraining(sweep, point)) for point in points]
    for _, config in configs:
        with prepare(config):
            pass
    models = [planned_model(name, config) for name, config in configs]
    tasks_of(grid.evaluation(sweep, points), sweep.modes, models, world)


def _evaluate_baseline(sweep: Grid, baseline: GridPoint, progress: ShowTask) -> None:
    config = grid.evaluation(sweep, [baseline])
    model = load_evaluated_model(config.checkpoint[0])
    evaluate(config, [mode for mode in sweep.modes if MODES[mode].applies(model)], progress)
