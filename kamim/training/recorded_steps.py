"""Steps of a run that were not finite, as recorded in its folder, and the step that a replay computes again."""

import json
from pathlib import Path

from kamim import KamimError
from kamim.config.pretrain import Pretrain
from kamim.config.schema import load
from kamim.storage.store import Store
from kamim.training.run_folder import CONFIG, NONFINITE, check_links, check_same_images
from pipelines.plan import Plan


def nonfinite_steps(run: Path) -> dict[int, int]:
    """Returns the recorded steps of a run that were not finite, ascending, with their numbers of ranks.

    Raises KamimError if a record is damaged.
    """
    return dict(map(_recorded, sorted((run / NONFINITE).glob("step-*.json"))))


def _recorded(file: Path) -> tuple[int, int]:
    try:
        return int(file.stem.removeprefix("step-")), len(json.loads(file.read_bytes())["ranks"])
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise KamimError(f"{file}: not the record of a step that was not finite; remove it") from error


def step_to_replay(run: Path, step: int | None) -> tuple[Pretrain, Store, int]:
    """Returns a run's configuration, its store, and the step: `step`, or the newest one that was not finite if None.

    Raises KamimError if there is no such run or step, or if the store was rebuilt.
    """
    if not (run / CONFIG).is_file():
        raise KamimError(f"{run}: not a run of `kamim pretrain` (no {CONFIG})")
    check_links(run)
    config = load(Pretrain, run / CONFIG)
    store, optim = Store(config.data.store), config.optim
    check_same_images(run, store)
    plan = Plan(len(store), optim.batch_size, optim.micro_batch, config.seed, drop_last=config.data.drop_last)
    total, _, _ = optim.schedule(plan.steps_per_epoch)
    if step is None and not (recorded := nonfinite_steps(run)):
        raise KamimError(f"{run}: all recorded losses are finite; give the step=N to replay, 0 to {total - 1}")
    step = max(recorded) if step is None else step
    if not 0 <= step < total:
        raise KamimError(f"step = {step}: the run has steps 0 to {total - 1}")
    return config, store, step
