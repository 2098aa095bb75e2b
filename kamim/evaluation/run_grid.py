"""`kamim sweep`: one run after the other, then their evaluation, then the table. Rerun it to resume."""

from collections.abc import Callable

from kamim.evaluation import grid
from kamim.evaluation.evaluated_model import planned_model
from kamim.evaluation.grid import Grid, Table
from kamim.evaluation.run import evaluate, tasks_of
from kamim.storage import lock
from kamim.training import distributed, pretrain
from kamim.training.trainer import Progress


def run_grid(sweep: Grid, progress: Callable[[str], Progress]) -> Table:
    """Trains and evaluates every setting, except what is done already. progress(title) shows one run or task.

    Raises KamimError before any work if a setting or the evaluation is invalid, and KeyboardInterrupt if a signal
    stopped it.
    """
    runs = [(point.name, grid.pretraining(sweep, point)) for point in grid.points(sweep)]
    evaluation = grid.evaluation(sweep)
    with distributed.joined(evaluation.compute.device) as world:  # one group of processes for all that follows
        for _, config in runs:
            pretrain.check(config)
        tasks_of(evaluation, sweep.modes, [planned_model(name, config) for name, config in runs], world)
        with lock.alone(sweep.out, "out =", world):
            for number, (name, config) in enumerate(runs, 1):
                if not pretrain.pretrain(config, progress(f"{number}/{len(runs)} {name}")).finished:
                    raise KeyboardInterrupt
            results = evaluate(evaluation, sweep.modes, progress)
            table = grid.table(sweep, results)
            if world.is_main:
                grid.save(sweep, table, results)
        return table
