"""Rebuilds the damaged shards of a store and publishes the original store again, bit for bit."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import cv2

from kamim import KamimError
from kamim.storage import log_file
from kamim.storage.files import checksum
from kamim.storage.manifest import STAMPS, Job, Manifest, agreed_manifest, component_of, parse_manifest, seal
from kamim.storage.store import Store
from preprocess import fingerprint
from preprocess.assemble import DAMAGE, assemble, take_apart
from preprocess.build import Say, ShardFiles, in_order, make_shards, stopping
from preprocess.fingerprint import Progress
from preprocess.plan import BuildPlan
from preprocess.shards import checksum_of, write_shard
from preprocess.sources import Source
from preprocess.verify import LINK, SEALED, STRANGE, Problem, problems
from preprocess.workspace import Workspace


def repair(path: Path, source: Callable[[Job], Source], *, workers: int, progress: Progress, say: Say) -> list[Problem]:
    """Repairs the files of a store and returns their faults. source: lists a job's source, if needed.

    Raises KamimError if neither the store nor the source is sufficient to restore it; and Stopped.
    """
    space = Workspace(path)
    with space.locked(), stopping():
        damage = problems(path)
        strange = [problem.where for problem in damage if problem.what == STRANGE]
        if strange:
            raise KamimError(f"{path / strange[0]}: is not the store's; move it elsewhere, then repair")
        content = agreed_manifest(path)
        if content is None:
            if damage[0].what.startswith(LINK):
                raise KamimError(f"{path / damage[0].where}: is {damage[0].what}")
            raise KamimError(f"{path}: its manifest and the backup are both damaged; preprocess it again")
        manifest = parse_manifest(content, path)
        for problem in damage:
            if problem.where not in (*manifest.checksums, *SEALED):
                raise KamimError(
                    f"{path / problem.where}: {problem.what}, although the files are as the manifest says, so that "
                    "nothing tells what is right; preprocess it again"
                )
        job = manifest.job.model_copy(update={"opencv": cv2.__version__})
        if space.begun() not in (None, job):
            raise KamimError(f"{space.partial}: holds an unfinished job; finish or remove it, then repair")
        if {problem.where for problem in damage} & set(SEALED):
            seal(path, content)
        broken = {component_of(name) for name in manifest.checksums.keys() & {p.where for p in damage}}
        if broken:
            with log_file.logged(space.log, f"repair of {', '.join(sorted(broken))}"):
                _rebuild(_plan(job, manifest, source(job), broken, path, progress), space, workers, progress, say)
                seal(space.store, content)
                space.publish()
        space.clear()
    return damage


def _plan(job: Job, manifest: Manifest, source: Source, broken: set[str], path: Path, progress: Progress) -> BuildPlan:
    """Returns a plan of the finished store's own job for the broken components."""
    source_hashes = fingerprint.source_hashes(source, job.fingerprint, len(os.sched_getaffinity(0)), progress)
    stored = path / STAMPS
    if stored.is_file() and checksum(stored) == manifest.source:
        before = fingerprint.from_file(stored)
        if len(before) != len(source_hashes):
            fingerprint.check_unchanged(before, source_hashes, source, path, job.fingerprint)
        source_hashes = before  # a copied source suffices if it gives the same bytes
    make = tuple(component for component in job.components if component in broken)
    keep = tuple(component for component in job.components if component not in broken)
    return BuildPlan(job, source, source_hashes, manifest, "", keep, make)


def _rebuild(plan: BuildPlan, space: Workspace, workers: int, progress: Progress, say: Say) -> None:
    """Writes the complete store, except its manifest, to space.store."""
    assert plan.store is not None
    folders = plan.folders(space)
    space.claim(plan.job, plan.source_hashes, folders.values(), shared=False)
    for component, folder in folders.items():
        kept = _salvage(Store(space.out), component, folder)
        say(f"{component}: {kept:,} of {plan.job.shards:,} shards are whole; the others are rebuilt from the source")
    shard_files = make_shards(plan, space, range(plan.job.shards), workers, None, False, progress)
    _check(plan, space, shard_files)
    assembled = assemble(plan, in_order(plan, shard_files), space.out, space.store)
    differ = [name for name in assembled.checksums if assembled.checksums[name] != plan.store.checksums.get(name)]
    if differ:
        raise KamimError(
            f"{space.out / differ[0]}: comes out different with the packages of today; preprocess into another out=..."
        )


def _salvage(opened: Store, component: str, folder: Path) -> int:
    """Writes the intact shards of a damaged component and returns their number."""
    try:
        shard = take_apart(opened, component)
    except DAMAGE:
        return 0
    whole = 0
    for number, expected in enumerate(opened.manifest.shards[component]):
        try:
            content = shard(number)
        except DAMAGE:
            continue
        if hashlib.sha256(content).hexdigest() == expected:
            write_shard(folder, number, content)
            whole += 1
    return whole


def _check(plan: BuildPlan, space: Workspace, shard_files: ShardFiles) -> None:
    """Removes shards that differ from those of the store. Raises KamimError if there are any."""
    assert plan.store is not None
    wrong = [
        (number, component)
        for component, files in shard_files.items()
        for number, file in files.items()
        if checksum_of(file) != plan.store.shards[component][number]
    ]
    for number, component in wrong:
        shard_files[component][number].unlink()
    if wrong:
        now = fingerprint.source_hashes(plan.source, plan.job.fingerprint, len(os.sched_getaffinity(0)))
        fingerprint.check_unchanged(plan.source_hashes, now, plan.source, space.out, plan.job.fingerprint)
        number, component = wrong[0]
        raise KamimError(
            f"source = {plan.source.location}: shard {number + 1} of {component} comes out different although the "
            f"source did not change; made with OpenCV {plan.store.opencv[component]}, here is {cv2.__version__}"
        )
