"""The preprocessing job: builds and publishes the store of a listed source.

The source is divided into shards. Each shard is one idempotent task (preprocess/shards.py) that writes one file per
component, named by its own checksum, to OUT.partial. Once all exist, they are joined in order with the components that
a finished store already has (preprocess/assemble.py), and the result is renamed to OUT. So the bytes do not depend on
the number of workers, machines or restarts, and OUT exists only if it is complete.
"""

import errno
import shutil
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import BrokenExecutor, CancelledError
from contextlib import contextmanager
from pathlib import Path

from kamim import KamimError
from kamim.storage import log_file
from kamim.storage.files import checksum
from kamim.storage.manifest import Job, seal
from preprocess import executors
from preprocess.assemble import Disagreement, Files, assemble, check_agreement
from preprocess.estimate import Estimate, disk_needed, estimate, sample
from preprocess.fingerprint import Progress
from preprocess.plan import BuildPlan, plan_build
from preprocess.shards import ShardTask, checksum_of, finished
from preprocess.sources import Source
from preprocess.workspace import Workspace

Say = Callable[[str], None]  # prints a line for the user
ShardFiles = dict[str, dict[int, Path]]  # shard files by component and number


class Stopped(RuntimeError):
    """A job ended early, but its finished shards are kept; the message names the cause and how to resume."""


def build(
    job: Job,
    source: Source,
    out: Path,
    *,
    workers: int,
    strict: bool,
    progress: Progress,
    cluster: str | None = None,
    say: Say = lambda line: None,
) -> bool:
    """Runs the job, or the rest of it. Returns False if `out` is already this job's store.

    Raises KamimError if `out` or its partial state belongs to another job, if no image is readable, if the source has
    changed or the disk is too small, and, with strict, at the first unreadable image; and Stopped.
    """
    space = Workspace(out)
    with space.locked(), stopping():
        plan = plan_build(job, source, space, progress)
        if plan.done:
            space.clear()
            return False
        with _logged(plan, space, plan.summary(), say):
            shards = make_shards(plan, space, range(plan.job.shards), workers, cluster, strict, progress)
            _publish(plan, space, shards)
    return True


def build_share(
    job: Job,
    source: Source,
    out: Path,
    *,
    share: tuple[int, int],
    workers: int,
    strict: bool,
    progress: Progress,
    cluster: str | None = None,
    say: Say = lambda line: None,
) -> None:
    """Builds the i-th of n shares of the shards, (i, n) = share, 1 <= i <= n, while other processes build theirs."""
    space = Workspace(out)
    with space.locked(shared=True), stopping():
        plan = plan_build(job, source, space, progress)
        if plan.done:
            return
        with _logged(plan, space, f"share {share[0]} of {share[1]}: {plan.summary()}", say):
            numbers = range(share[0] - 1, plan.job.shards, share[1])
            make_shards(plan, space, numbers, workers, cluster, strict, progress, shared=True)


def publish_shares(job: Job, source: Source, out: Path) -> bool:
    """Joins the shards of all shares. Returns False if `out` is the store already. Raises Stopped if one is missing."""
    space = Workspace(out)
    with space.locked(), stopping():
        plan = plan_build(job, source, space)
        if plan.done:
            space.clear()
            return False
        with _logged(plan, space, "publish", lambda line: None):
            _publish(plan, space, _shared_shards(plan, space))
    return True


def _shared_shards(plan: BuildPlan, space: Workspace) -> ShardFiles:
    """Returns the shards that shares have built. Raises Stopped if some are missing."""
    numbers = range(plan.job.shards)
    shard_files: ShardFiles = {name: finished(folder, numbers) for name, folder in plan.folders(space).items()}
    missing = [str(n + 1) for n in numbers if any(n not in files for files in shard_files.values())]
    if missing:
        raise Stopped(
            f"{len(missing)} of {len(numbers)} shards are missing, number {', '.join(missing[:20])}"
            f"{' ...' if len(missing) > 20 else ''}; of n shares, number k is built by share (k - 1) % n + 1"
        )
    return shard_files


@contextmanager
def _logged(plan: BuildPlan, space: Workspace, line: str, say: Say) -> Iterator[None]:
    """Prints the source and the plan of a job, and logs them and the end of the context."""
    for listed in (*plan.source.summary(), line):
        say(listed)
    with log_file.logged(space.log, line):
        for listed in plan.source.summary():
            log_file.write_line(space.log, listed)
        with stopping():
            yield


@contextmanager
def stopping() -> Iterator[None]:
    """Turns the exceptions that end a resumable job into Stopped: a lost worker, lack of memory, a full disk, a
    limit of the size of files."""
    try:
        yield
    except (BrokenExecutor, CancelledError) as error:
        raise Stopped("a worker process died (out of memory?); rerun the command to resume") from error
    except MemoryError as error:
        raise Stopped("out of memory; rerun the command to resume, with fewer workers to need less") from error
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise Stopped(
                "a file would be larger than the limit of this shell (`ulimit -f`); raise the limit and rerun the "
                "command to resume"
            ) from error
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise Stopped("the disk is full; free some space and rerun the command to resume") from error


def make_shards(
    plan: BuildPlan,
    space: Workspace,
    numbers: Collection[int],
    workers: int,
    cluster: str | None,
    strict: bool,
    progress: Progress,
    shared: bool = False,
) -> ShardFiles:
    """Returns the shard files of `numbers`, after building those that are missing or damaged and checking each."""
    folders = plan.folders(space)
    space.claim(plan.job, plan.source_hashes, folders.values(), shared)
    shard_files: ShardFiles = {component: finished(folder, numbers) for component, folder in folders.items()}
    missing = {n: [c for c in plan.make if n not in shard_files[c]] for n in numbers}
    missing = {n: components for n, components in missing.items() if components}
    total = sum(len(plan.items(n)) for n in numbers)
    done = total - sum(len(plan.items(n)) for n in missing)
    progress(done, total)
    if not missing:
        return shard_files
    tasks = (
        ShardTask(plan.job, n, plan.items(n), plan.source.read, {c: folders[c] for c in components}, strict)
        for n, components in missing.items()
    )
    with executors.dask(cluster) if cluster else executors.local(workers) as (executor, ahead):
        one = executor.submit(estimate, plan.job, plan.make, plan.source.read, sample(plan)).result()
        _check_disk(plan, space, shard_files, missing, one)
        for task, names in executors.results(executor, ahead, tasks):
            for component, name in names.items():
                file = folders[component] / name
                if checksum(file) != checksum_of(file):
                    raise Stopped(f"{file}: was damaged on its way; rerun the command to rebuild it")
                shard_files[component][task.number] = file
            if (done + len(task.items)) * 10 // total > done * 10 // total:
                log_file.write_line(space.log, f"{done + len(task.items):,} of {total:,} images")
            done += len(task.items)
            progress(done, total)
    return shard_files


def _check_disk(
    plan: BuildPlan, space: Workspace, shard_files: ShardFiles, missing: dict[int, list[str]], one: Estimate
) -> None:
    """Raises KamimError if the disk is too small for what is missing."""
    images = {c: sum(len(plan.items(n)) for n, wanted in missing.items() if c in wanted) for c in plan.make}
    needed, _ = disk_needed(plan.job, {c: list(files.values()) for c, files in shard_files.items()}, images, one)
    free = shutil.disk_usage(space.partial).free
    if needed > free:
        raise KamimError(
            f"out = {space.out}: needs about {needed / 1e9:,.2f} GB more while it is built, and its disk has "
            f"{free / 1e9:,.2f} GB free; free some space, or choose another out=..."
        )


def in_order(plan: BuildPlan, shard_files: ShardFiles) -> Files:
    """Returns the shard files of every component in the order in which they are joined."""
    return {component: [files[n] for n in range(plan.job.shards)] for component, files in shard_files.items()}


def _publish(plan: BuildPlan, space: Workspace, shard_files: ShardFiles) -> None:
    """Joins all shards and renames the result to `out`."""
    shards = in_order(plan, shard_files)
    try:
        check_agreement(plan, shards, space.out)
    except Disagreement as error:
        for number in error.numbers:
            for files in shard_files.values():
                files[number].unlink()
        raise Stopped(f"{error}; rerun the command to rebuild its shard") from error
    manifest = assemble(plan, shards, space.out, space.store)
    seal(space.store, manifest.model_dump_json(indent=2).encode())
    space.publish()
    log_file.write_line(space.log, f"{manifest.count:,} images are stored, {manifest.rejects:,} could not be read")
