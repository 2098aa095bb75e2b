"""`kamim sweep`: run after run, then their evaluation, then the table. Started again, it goes on where it was."""

from collections.abc import Callable

from kamim.evaluation import grid
from kamim.evaluation.grid import Grid, Table
from kamim.evaluation.run import evaluate, tasks_of
from kamim.evaluation.subject import subject_to_be
from kamim.storage import lock
from kamim.training import distributed, pretrain
from kamim.training.trainer import Progress


def run_grid(sweep: Grid, progress: Callable[[str], Progress]) -> Table:
    """Every setting trained and evaluated; what is done already is left as it is. progress(title) shows one.

    Raises ValueError for a setting or an evaluation that cannot be, before any work; KeyboardInterrupt where a signal
    stopped it.
    """
    runs = [(setting.name, grid.pretraining(sweep, setting)) for setting in grid.settings(sweep)]
    evaluation = grid.evaluation(sweep)
    with distributed.joined(evaluation.compute.device) as world:  # one group of processes for all that follows
        for _, config in runs:
            pretrain.check(config)
        tasks_of(evaluation, sweep.modes, [subject_to_be(name, config) for name, config in runs], world)
        with lock.alone(sweep.out, "out =", world):
            for number, (name, config) in enumerate(runs, 1):
                if not pretrain.pretrain(config, progress(f"{number}/{len(runs)} {name}")).finished:
                    raise KeyboardInterrupt
            results = evaluate(evaluation, sweep.modes, progress)
            made = grid.table(sweep, results)
            if world.is_main:
                grid.save(sweep, made, results)
        return made
