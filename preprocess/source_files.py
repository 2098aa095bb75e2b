"""Names the source file of every image of a store, which itself keeps only a hash of each."""

import os

from kamim import KamimError
from kamim.storage.manifest import STAMPS
from kamim.storage.store import Store
from preprocess import fingerprint
from preprocess.assemble import stored_rejects
from preprocess.sources import Source, printable


def source_files(opened: Store, source: Source) -> list[str | None]:
    """Returns the key of every image within its source, such as its path below the folder; None if that has changed.

    source: listed as the store's job lists it. An item is recognised by its hash, so items may have been added.
    Raises KamimError if the source has none of the store's items, or if rejected items have changed, since the numbers
    of the others depend on them.
    """
    manifest = opened.manifest
    hashes = fingerprint.source_hashes(source, manifest.job.fingerprint, len(os.sched_getaffinity(0)))
    known = dict(zip(hashes.tolist(), (item.key for item in source.items), strict=True))
    keys = [known.get(stamp) for stamp in fingerprint.from_file(opened.path / STAMPS).tolist()]
    if not any(keys):
        raise KamimError(
            f"source = {source.location}: is not what {opened.path} was made from, or its files were copied or edited "
            "since (a file is known by its path, label, size and time)"
        )
    rejected = {name for shard in stored_rejects(opened.path, manifest) for name, _ in shard}
    keys = [key for key in keys if key is None or printable(key) not in rejected]
    if len(keys) != len(opened):
        raise KamimError(
            f"source = {source.location}: files that {opened.path} lists in rejects.csv have changed since"
        )
    return keys
