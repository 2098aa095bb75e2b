"""The image files that a store was built from, for benchmarks that compare the two."""

from dataclasses import replace

import numpy as np

from kamim import KamimError
from kamim.storage.store import Store
from preprocess.assemble import stored_rejects
from preprocess.decode import Undecodable, decode
from preprocess.sources import Item, Source, printable


def check_jpeg(store: Store) -> None:
    """Raises KamimError if the store's images are not JPEGs."""
    if (encoding := store.images.encoding) != "jpeg":
        raise KamimError(f"store = {store.path}: its images are {encoding}; this benchmark compares JPEG stores")


def accepted(source: Source, store: Store) -> Source:
    """Returns the source without the files that the store rejected; most of them stop other libraries' loaders."""
    rejected = {name for shard in stored_rejects(store.path, store.manifest) for name, _ in shard}
    return replace(source, items=[item for item in source.items if printable(item.key) not in rejected])


def read(source: Source, item: Item) -> tuple[bytes | np.ndarray, np.ndarray]:
    """Returns an item's data and its RGB pixels, uint8 [H, W, 3]. Raises KamimError if it cannot be decoded."""
    data = source.read(item)
    try:
        return data, decode(data)
    except Undecodable as error:
        raise KamimError(f"source = {source.location}: {printable(item.key)}: {error}; remove it") from error
