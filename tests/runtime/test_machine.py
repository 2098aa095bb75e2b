"""Threads of torch on a CPU."""

import os
from pathlib import Path

import pytest
import torch
from runs import WORLD, config

from kamim.config.schema import load
from kamim.evaluation.evaluate import evaluate
from kamim.evaluation.options import Evaluation
from kamim.runtime import machine
from kamim.storage.store import Store
from kamim.training.data import training_loader
from kamim.training.pretrain import build_trainer


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records the number of threads that torch is set to."""
    found: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    return found


@pytest.mark.parametrize(
    ("variable", "given", "used"),
    [("2", None, 2), ("2", 3, 3), ("5,2", None, 5), ("", 3, 3), ("", None, 7), ("0", None, 1)],
)
def test_threads_are_the_given_or_openmps_or_the_cores(
    variable: str, given: int | None, used: int, threads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(7)))
    machine.use_threads(given)
    assert threads == [used]


def test_a_run_computes_with_as_many_threads_as_it_asks_for(
    stores: dict[str, Path], tmp_path: Path, threads: list[int]
) -> None:
    given = config(tmp_path, stores["zarr"], "compute.threads=3")
    build_trainer(given, training_loader(given, Store(stores["zarr"]), WORLD), WORLD)
    assert threads == [3]


def test_an_evaluation_computes_with_as_many_threads_as_it_asks_for(tmp_path: Path, threads: list[int]) -> None:
    keys = {"checkpoint": ("nowhere",), "val": tmp_path, "compute": {"threads": 3}}
    with pytest.raises(ValueError, match="nowhere: neither a checkpoint"):
        evaluate(load(Evaluation, None, given=keys), None, lambda title: lambda done, total, values: None)
    assert threads == [3]
