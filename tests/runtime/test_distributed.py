"""One process or several (gloo, on a CPU): equal samples, equal losses, and runs that resume on other ranks.

A run of N ranks consists of N forks of a helper process, which has imported everything and computed nothing.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kamim.training import checkpoint
from kamim.training.replay import replay

HELPER = """  # trains runs given as JSON: [[ranks, stop after step or 0, arguments of test_pretrain.config], ...]
import json, os, signal, socket, sys, traceback
import torch
from runs import config
from dataclasses import replace
from kamim.method.masking import block_masks
from kamim.runtime import distributed
from kamim.training.objective import MaskedReconstruction
from kamim.training.pretrain import pretrain
from kamim.training.data import training_loader
from kamim.storage.store import Store

torch.set_num_threads(1)
asked = json.loads(sys.argv[1])
given = config(*asked[0][2])
for batch in training_loader(given, Store(given.data.store), distributed.start("cpu")).micro_batches(0, 1):
    block_masks(0, 0, batch.indices, 2, 0.5)  # kernels are loaded once for all
for ranks, stop, (out, store, *more) in asked:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            os.environ.update(
                RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
            )
            seen = []
            skips = any(option == "on_nonfinite=skip" for option in more)
            def losses(objective, batch, plain=MaskedReconstruction.__call__):
                if batch.loss_weight:
                    seen.append([batch.step, batch.indices.tolist()])
                made = plain(objective, batch)
                spoilt = skips and [batch.step, rank] == [3, 1]
                return replace(made, loss=made.loss * (float("nan") if spoilt else 1))
            MaskedReconstruction.__call__ = losses
            def progress(done, total, metrics):
                if done == stop and rank == ranks - 1:  # one rank alone hears of it
                    os.kill(os.getpid(), signal.SIGUSR1)
            try:
                pretrain(config(out, store, *more), progress)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            with open(f"{out}/seen-{ranks}-{rank}.json", "w") as file:
                json.dump(seen, file)
            os._exit(0)
        children.append(child)
    if any(os.waitpid(child, 0)[1] for child in children):
        sys.exit(1)
"""
UNEVEN = (
    "optim.batch_size=10",
    "optim.micro_batch=2",
    "optim.epochs=3",
    "model.drop_path=0.5",
)  # on 4 ranks 2, 3, 2, 3 samples: 1 or 2 micro-batches
# 7, 7, 7 and 3 of 24 samples: on 4 ranks the last step has 0, 1, 1, 1, on 2 ranks it has 1, 2
SHORT = ("optim.batch_size=7", "optim.micro_batch=2", "optim.epochs=2", "data.drop_last=false")
SAMPLES = {"": [10] * 6, "short": [7, 7, 7, 3] * 2}  # of every step


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def seen(run: Path, ranks: int) -> dict[int, list[int]]:
    """Samples of every step, in the order of the ranks."""
    found: dict[int, list[int]] = {}
    for rank in range(ranks):
        for step, indices in json.loads((run / f"seen-{ranks}-{rank}.json").read_text()):
            found.setdefault(step, []).extend(indices)
    return found


@pytest.fixture(scope="module")
def runs(stores: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    asked = [[ranks, 0, [f"{out}/{ranks}", str(stores["zarr"]), *UNEVEN]] for ranks in (1, 2, 4)]
    moved = [[ranks, stop, [f"{out}/moved", str(stores["zarr"]), *UNEVEN]] for ranks, stop in ((4, 2), (1, 3), (2, 0))]
    asked += [[ranks, 0, [f"{out}/short{ranks}", str(stores["zarr"]), *SHORT]] for ranks in (1, 2, 4)]
    moved += [[r, stop, [f"{out}/shortmoved", str(stores["zarr"]), *SHORT]] for r, stop in ((1, 3), (4, 4), (2, 0))]
    spoilt = [[2, 0, [f"{out}/spoilt", str(stores["zarr"]), *UNEVEN, "on_nonfinite=skip"]]]
    done = subprocess.run(
        [sys.executable, "-c", HELPER, json.dumps([*asked, *moved, *spoilt])],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])},
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("kind", ["", "short"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_losses_do_not_depend_on_the_number_of_ranks(ranks: int, kind: str, runs: Path) -> None:
    """Equal up to the order of summation, which AdamW's first steps amplify if a gradient is nearly 0."""
    one, several = lines(runs / f"{kind}1"), lines(runs / f"{kind}{ranks}")
    assert [a["samples"] for a in one] == [b["samples"] for b in several] == SAMPLES[kind]
    for a, b in zip(one, several, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["loss_unweighted"] == pytest.approx(a["loss_unweighted"], rel=1e-4)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
        assert (b["lr"], b["weight_max"]) == (a["lr"], pytest.approx(a["weight_max"], rel=1e-6))
        assert b["weight_mean"] == pytest.approx(a["weight_mean"], rel=1e-5)
    assert seen(runs / f"{kind}{ranks}", ranks) == seen(runs / f"{kind}1", 1)


def test_a_run_goes_on_with_another_number_of_ranks(runs: Path) -> None:
    """Four ranks stopped after step 2, one after step 3, two to the end: every step's samples, once and in order."""
    whole, moved = lines(runs / "1"), lines(runs / "moved")
    assert [line["loss"] for line in moved] == pytest.approx([line["loss"] for line in whole], rel=1e-4)
    parts = [seen(runs / "moved", ranks) for ranks in (4, 1, 2)]
    assert [sorted(part) for part in parts] == [[0, 1], [2], [3, 4, 5]]
    assert parts[0] | parts[1] | parts[2] == seen(runs / "1", 1)
    assert checkpoint.saved(runs / "moved")[-1] == 6


def test_a_run_goes_on_behind_and_before_a_short_step(runs: Path) -> None:
    """One rank stops before the short step, four ranks (one without samples) right after it, two train to the end."""
    whole, moved = lines(runs / "short1"), lines(runs / "shortmoved")
    assert [line["loss"] for line in moved] == pytest.approx([line["loss"] for line in whole], rel=1e-4)
    parts = [seen(runs / "shortmoved", ranks) for ranks in (1, 4, 2)]
    assert [sorted(part) for part in parts] == [[0, 1, 2], [3], [4, 5, 6, 7]]
    assert parts[0] | parts[1] | parts[2] == seen(runs / "short1", 1)
    assert len(replay(runs / "shortmoved", 3, "cpu").samples) == 3


def test_one_ranks_trouble_is_everyones(runs: Path) -> None:
    """The second of two ranks has a NaN loss at step 3: both skip the step, and both are in the record."""
    run = runs / "spoilt"
    assert [line["skipped"] for line in lines(run)] == [0, 0, 0, 1, 0, 0]
    assert [line["loss"] for line in lines(run)[:3]] == [line["loss"] for line in lines(runs / "2")[:3]]
    ranks = json.loads((run / "nonfinite/step-00000003.json").read_text())["ranks"]
    assert [i for rank in ranks for part in rank for i in part["indices"]] == seen(run, 2)[3]
    assert [part["loss"] == "nan" for rank in ranks for part in rank] == [False] * 3 + [True] * 3
    found = replay(run, None, "cpu")
    assert [sample.index for sample in found.samples] == seen(run, 2)[3]
    assert sum(sample.loss for sample in found.samples[:2]) / 2 == pytest.approx(ranks[0][0]["loss"], rel=1e-4)
