"""Ranks started one by one, as by srun: all end, with one line each, if one of them cannot run, and signals stop them.

The ranks are forks of a helper process, which has imported everything.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kamim.cli import RESUMABLE

HELPER = """  # runs ranks given as JSON, [[name, arguments of every rank or null, signal], ...]; prints how they end
import json, os, signal, socket, sys, time
from pathlib import Path
import torch
import kamim.training.pretrain, kamim.training.report, torch.utils.tensorboard
from kamim.cli import app

torch.set_num_threads(1)
folder, scenarios = Path(sys.argv[1]), json.loads(sys.argv[2])
ended = {}
for name, ranks, end in scenarios:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = {}
    for rank, arguments in enumerate(ranks):
        if arguments is None:
            continue
        children[rank] = os.fork()
        if children[rank] == 0:
            os.environ.update(
                RANK=str(rank), WORLD_SIZE=str(len(ranks)), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
            )
            output = os.open(folder / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT)
            os.dup2(output, 1), os.dup2(output, 2)
            try:
                app(["pretrain", *arguments])
            except SystemExit as error:
                sys.stdout.flush()
                os._exit(error.code or 0)
            os._exit(99)
    if end == "kill":
        metrics = folder / name / "metrics.jsonl"
        while not (metrics.is_file() and metrics.read_text().count("\\n") > 1):
            time.sleep(0.05)
        os.kill(children[1], signal.SIGKILL)
    elif end == "terminate":
        time.sleep(3)
        for child in children.values():
            os.kill(child, signal.SIGTERM)
    codes = {rank: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for rank, child in children.items()}
    outputs = {rank: (folder / f"{name}-{rank}").read_text() for rank in children}
    ended[name] = [codes, outputs]
print(json.dumps(ended))
"""


def arguments(store: Path, out: Path, *more: str) -> list[str]:
    return [
        f"data.store={store}",
        f"out={out}",
        "data.resolution=64",
        "data.workers=1",
        "model.name=vit_demo",
        "mask.patch_size=16",
        "optim.batch_size=12",
        "optim.epochs=500",
        "optim.warmup_epochs=1",
        "compute.device=cpu",
        "panel_epochs=null",
        "checkpoint_epochs=500",
        *more,
    ]


@pytest.fixture(scope="module")
def ended(stores: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Exit codes and outputs of the ranks of every scenario."""
    folder, store = tmp_path_factory.mktemp("ranks"), stores["zarr"]
    normal = arguments(store, folder / "kill")
    other = [*normal, "out=" + str(folder / "x")]
    scenarios = [
        ["first lacks its store", [arguments(folder / "none", folder / "x"), other], ""],
        ["second lacks its store", [other, arguments(folder / "none", folder / "x")], ""],
        ["another seed", [other, [*other, "seed=1"]], ""],
        ["another size", [other, [*other, "optim.batch_size=6"]], ""],
        ["another key", [other, ["optim.nothing=1"]], ""],
        ["kill", [normal, normal], "kill"],
        ["first alone", [other, None], "terminate"],
        ["second alone", [None, other], "terminate"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", HELPER, str(folder), json.dumps(scenarios)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


LACKS = "not a kamim store (no manifest.json)"


@pytest.mark.parametrize(
    ("scenario", "first", "second"),
    [
        ("first lacks its store", LACKS, f"rank 0 failed: .*{LACKS}"),
        ("second lacks its store", f"rank 1 failed: .*{LACKS}", LACKS),
        ("another seed", *["seed: is 1 on rank 1, 0 on rank 0"] * 2),
        ("another size", *["optim.batch_size: is 6 on rank 1, 12 on rank 0; start all ranks with the same"] * 2),
        ("another key", "rank 1 failed: ", "nothing: unknown key"),
    ],
)
def test_ranks_that_do_not_fit_end_with_one_line_each(
    scenario: str, first: str, second: str, ended: dict[str, Any]
) -> None:
    codes, outputs = ended[scenario]
    assert codes == {"0": 1, "1": 1}
    for output, pattern in zip(outputs.values(), (first, second), strict=True):
        assert output.startswith("error: ") and output.count("\n") == 1, output
        for part in pattern.split(".*"):
            assert part in output


def test_a_killed_rank_is_no_bug(ended: dict[str, Any]) -> None:
    codes, outputs = ended["kill"]
    assert codes == {"0": 1, "1": -9}
    assert (
        outputs["0"].splitlines()[-1].startswith("error: rank 0 lost another of the 2 ranks, which failed or was kill")
    )
    assert "bug" not in outputs["0"] and "Traceback" not in outputs["0"]


@pytest.mark.parametrize(("scenario", "rank"), [("first alone", "0"), ("second alone", "1")])
def test_signals_stop_a_rank_that_waits_for_the_others(scenario: str, rank: str, ended: dict[str, Any]) -> None:
    codes, _ = ended[scenario]
    assert codes == {rank: RESUMABLE}
