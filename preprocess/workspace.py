"""The paths of a job: OUT, the finished store; OUT.partial, its unfinished parts; OUT.log, its log; and its lock.

    OUT.partial/job.json      the job
    OUT.partial/stamps.npy    its source, see preprocess.fingerprint
    OUT.partial/shards/       <component>-<key>/<number>-<sha256>.safetensors
    OUT.partial/store/        the store as it is being assembled
    OUT.partial/replaced/     the store that had OUT's name, for the moment between two renames

A component's key is a digest of all that shapes its bytes, so shards of different jobs never mix.
"""

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pydantic

from kamim import KamimError
from kamim.storage import lock, log_file
from kamim.storage.files import fsync, make_durable, write_whole
from kamim.storage.manifest import BACKUP, MANIFEST, STAMPS, Job, Manifest, read_manifest
from kamim.storage.ownership import lock_file, names_in, refuse_links
from preprocess import fingerprint


class Workspace:
    """The paths that belong to one store `out`."""

    def __init__(self, out: Path):
        lock.check_local("out", out)
        # Other machines have other working directories; a link to a store stays one.
        self.out = out = out.resolve() if out.is_symlink() else out.absolute()
        self.partial = out.with_name(out.name + ".partial")
        self.lock = lock_file(out)
        self.log = out.with_name(out.name + ".log")
        self.job_file = self.partial / "job.json"
        self.stamps_file = self.partial / STAMPS
        self.shards = self.partial / "shards"
        self.store = self.partial / "store"
        self.replaced = self.partial / "replaced"

    @contextmanager
    def locked(self, shared: bool = False) -> Iterator[None]:
        """Locks `out` in the context; with shared, only against processes that do not share.

        An interrupted publication is completed first. Raises KamimError if another process is working, and if
        `out` or its partial state belongs to something else.
        """
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise KamimError(f"out = {self.out}: cannot be created: {error.strerror}") from error
        busy = f"{self.lock}: another process is at work on this store; wait until it is done"
        with lock.held(self.lock, busy, shared):
            self.check_ownership()
            self._recover(shared)
            yield

    def check_ownership(self) -> None:
        """Raises KamimError if `out` or its partial state belongs to something else."""
        rest = (self.job_file, self.shards, self.store, self.replaced)
        refuse_links((self.partial, self.stamps_file, *rest))
        own = {self.stamps_file.name}
        if self.begun() is not None:  # the job is written after the stamps, and removed after all the rest
            own |= {path.name for path in rest}
        is_file = self.partial.exists() and not self.partial.is_dir()
        if is_file or {*names_in(self.partial)} - own:
            raise KamimError(f"{self.partial}: is not this job's; remove it or choose another out=...")
        log_file.check_log(self.log)
        if self.out.exists() and not (self.out / MANIFEST).exists() and not (self.out / BACKUP).exists():
            raise KamimError(f"out = {self.out}: exists already and is not a kamim store; choose another out=...")

    def _recover(self, shared: bool) -> None:
        cut_short = self.store.exists() and self.replaced.exists() and not self.out.exists()
        if shared:
            if cut_short:
                raise KamimError(f"{self.partial}: its publication was cut short; finish it with --publish first")
            return
        if cut_short:
            self.store.rename(self.out)
            fsync(self.out.parent)
        shutil.rmtree(self.replaced, ignore_errors=True)

    def finished(self) -> Manifest | None:
        """Returns the manifest of the finished store, or None."""
        return read_manifest(self.out) if self.out.exists() else None

    def begun(self) -> Job | None:
        """Returns the job of the partial state. Raises KamimError if this version does not know the job."""
        if not self.job_file.exists():
            return None
        try:
            return Job.model_validate_json(self.job_file.read_bytes())
        except pydantic.ValidationError:
            raise KamimError(f"{self.job_file}: damaged, or of another kamim; remove {self.partial}") from None

    def begun_source_hashes(self) -> np.ndarray | None:
        """Returns the source hashes of the partial state. Raises KamimError if they are damaged."""
        if not (self.job_file.exists() and self.stamps_file.exists()):
            return None
        try:
            return fingerprint.from_file(self.stamps_file)
        except KamimError:
            raise KamimError(f"{self.stamps_file}: damaged; remove {self.partial}") from None

    def claim(self, job: Job, source_hashes: np.ndarray, folders: Collection[Path], shared: bool) -> None:
        """Records the job that owns the partial state, and creates the folders of its shards.

        Removes folders of another job unless shared. Raises KamimError if shared and the state is another job's.
        """
        begun = self.begun()
        if shared and begun not in (None, job):
            raise KamimError(
                f"{self.partial}: holds a job of other parameters, which shares may be at work on; "
                "finish it, or remove it when none is"
            )
        if begun != job:
            self.partial.mkdir(exist_ok=True)
            write_whole(self.stamps_file, fingerprint.to_bytes(source_hashes))
            write_whole(self.job_file, job.model_dump_json(indent=2).encode())
        if not shared and self.shards.exists():
            for folder in set(self.shards.iterdir()) - set(folders):
                shutil.rmtree(folder)
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)

    def publish(self) -> None:
        """Renames the assembled store to the final name, replacing the existing one, and cleans up."""
        make_durable(self.store)
        if self.out.exists():
            self.out.rename(self.replaced)
        self.store.rename(self.out)
        fsync(self.out.parent)
        self.clear()

    def clear(self) -> None:
        """Removes the partial state; the job, which shows whose it is, after everything that takes time."""
        for folder in (self.shards, self.store, self.replaced, self.partial):
            shutil.rmtree(folder, ignore_errors=True)
