"""Opens and checks everything that a run needs, before anything is written. What needs no torch is checked first."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kamim import KamimError
from kamim.config.pretrain import Pretrain
from kamim.runtime import rendezvous
from kamim.storage.manifest import read_manifest
from kamim.storage.store import Store
from kamim.training import run_folder

if TYPE_CHECKING:
    from kamim.runtime.distributed import World
    from kamim.training.callbacks import Probe
    from pipelines.loader import Loader


@dataclass(frozen=True)
class Prepared:
    """A run that can begin. steps: optimiser steps in all. fresh: whether config.out must not hold a run."""

    config: Pretrain
    fresh: bool
    world: "World"
    store: Store
    loader: "Loader"
    probe: "Probe | None"
    steps: int


@contextmanager
def prepare(config: Pretrain, fresh: bool = False) -> Iterator[Prepared]:
    """Opens the store, loader and probe of a run in the context, in which the ranks are joined.

    fresh: config.out must not hold a run. Raises KamimError, on all ranks, if the configuration does not fit its store
    or this machine, config.out holds something else or a run of another configuration, the ranks differ, or a logger
    is missing.
    """
    with rendezvous.ending_together():
        store = open_store(config)
        run_folder.check_free(config, store, fresh)

        from kamim.runtime import distributed  # these import torch, which takes seconds
        from kamim.training import metrics
        from kamim.training.callbacks import open_probe
        from kamim.training.data import training_loader

        with distributed.joined(config.compute.device) as world:
            metrics.check_installed(config.log)
            loader = training_loader(config, store, world)
            steps, _, _ = config.optim.schedule(loader.plan.steps_per_epoch)
            if world.is_main:
                metrics.log_in(config.log)
            probe = open_probe(config)
            run_folder.check_ranks(config, store, world)
            yield Prepared(config, fresh, world, store, loader, probe, steps)


def open_store(config: Pretrain) -> Store:
    """Returns a run's store, and reads nothing but manifests, without torch.

    Raises KamimError if it lacks the run's keypoints, or if init_from or a store of the probe is missing.
    """
    store = Store(config.data.store)
    begun = (config.out / run_folder.CONFIG).is_file()  # a run that resumes reads init_from only without a checkpoint
    if config.init_from is not None and not begun and not config.init_from.exists():
        raise KamimError(f"init_from = {config.init_from}: no such file or folder")
    if config.probe is not None:
        read_manifest(config.probe.train)
        read_manifest(config.probe.val)
    run_folder.check_keypoints(config, store)
    return store
