"""Reads stores of any content in separate processes and reports the outcomes.

As a program: python isolated.py FOLDER STEPS WHOLE SOURCE reads each of FOLDER/* in a fork of a process that has read
WHOLE, a sound store, before, so that nothing has to be imported or compiled again. Prints a JSON object per store.
"""

import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

TESTS = Path(__file__).parent
SECONDS = 60  # of a step, after which it counts as one that hangs
ROOM = 4 << 30  # bytes of memory that a step may take beyond what the process has
SIDE = 64

Outcome = dict[str, str]  # how: fine, refused or broken; what: the digest of the batches, the lines, or the fault


def outcomes(
    folder: Path, steps: Sequence[str], whole: Path, source: Path | None = None
) -> dict[str, dict[str, Outcome]]:
    """Returns the outcome of each step for each store in a folder, by name of the store and step."""
    command = [sys.executable, str(TESTS / "isolated.py"), *map(str, (folder, ",".join(steps), whole, source or ""))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines())


def load(path: Path, _: Path) -> Outcome:
    """Two epochs of batches with the counts of every detector."""
    import torch

    from kamim.storage.store import Store
    from pipelines.counts import CachedCounts
    from pipelines.loader import Crop, Loader
    from pipelines.plan import Plan

    digest = hashlib.sha256()
    try:
        store = Store(path)
        plan = Plan(len(store), 4, 4, seed=0, drop_last=False)
        for name in (None, *store.detectors):
            counter = None if name is None else CachedCounts(store.keypoints(name), "ring", 8)
            for batch in Loader(store, plan, SIDE, crop=Crop(), counter=counter, workers=1).micro_batches(
                0, 2 * plan.steps_per_epoch
            ):
                counts = torch.empty(0) if batch.counts is None else batch.counts
                for array in (batch.images, counts, batch.labels):
                    digest.update(array.numpy().tobytes())
    except (ValueError, OSError, RuntimeError) as error:  # what the commands make one line of
        return {"how": "refused", "what": str(error)}
    return {"how": "fine", "what": digest.hexdigest()}


def command(*arguments: str) -> Outcome:
    """Runs a command and returns its output."""
    from typer.testing import CliRunner

    from kamim.cli import app

    result = CliRunner().invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return {"how": "broken", "what": repr(result.exception)}
    if result.exit_code == 0:
        return {"how": "fine", "what": result.stdout}
    lines = result.stderr.splitlines()
    if result.exit_code != 1 or not lines or any(re.search("Traceback|^  File", line) for line in lines):
        return {"how": "broken", "what": f"exit code {result.exit_code}: {result.stderr}"}
    return {"how": "refused", "what": result.stderr}


def preview(path: Path, _: Path) -> Outcome:
    """`kamim store preview`, without the picture, which takes longer than everything else."""
    from kamim.reporting import plots
    from kamim.storage.store import Store

    plots.weights_sheet = lambda *arguments: None
    try:
        detector = Store(path).detectors[0]
    except ValueError:
        detector = "fast"
    return command("store", "preview", str(path), "--out", str(path.with_name("preview.png")), "--detector", detector)


def verify(path: Path, _: Path) -> Outcome:
    return command("store", "verify", str(path), "--deep")


def repair(path: Path, source: Path) -> Outcome:
    return command("store", "verify", str(path), "--repair", "--source", str(source))


STEPS: dict[str, Callable[[Path, Path], Outcome]] = {
    "load": load,
    "preview": preview,
    "verify": verify,
    "repair": repair,
}


def isolated(steps: Sequence[str], path: Path, source: Path) -> dict[str, Outcome]:
    """Runs steps in a fork of this process; steps after one that kills the fork run in another."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for step in steps:
            signal.alarm(SECONDS)
            try:
                outcome = STEPS[step](path, source)
            except BaseException as error:  # noqa: BLE001 - nothing may leave the fork
                outcome = {"how": "broken", "what": repr(error)}
            os.write(writing, (json.dumps(outcome) + "\n").encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        ended = [json.loads(line) for line in stream]
    _, status = os.waitpid(child, 0)
    found = dict(zip(steps, ended, strict=False))
    if not os.WIFSIGNALED(status):
        return found
    number = os.WTERMSIG(status)
    fault = "hangs" if number == signal.SIGALRM else signal.Signals(number).name
    died, *rest = steps[len(ended) :]
    return found | {died: {"how": "broken", "what": fault}} | (isolated(rest, path, source) if rest else {})


def main() -> None:
    folder, steps, whole, source = Path(sys.argv[1]), sys.argv[2].split(","), Path(sys.argv[3]), Path(sys.argv[4])
    import pytest
    from conftest import Inline, small_pages

    import preprocess.repair
    import preprocess.sources

    preprocess.executors.ProcessPoolExecutor = Inline
    small_pages(pytest.MonkeyPatch())
    for step in (load, preview, verify):
        end = step(whole, source)  # not within the assert, which python -O leaves out
        assert end["how"] == "fine", end
    for path in sorted(folder.iterdir()):
        print(json.dumps((path.name, isolated(steps, path, source))), flush=True)


if __name__ == "__main__":
    main()
