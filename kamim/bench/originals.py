"""A store and the image files that it was made of, as the benchmarks compare them."""

from dataclasses import replace

import numpy as np

from kamim import KamimError
from kamim.storage.store import Store
from preprocess.assemble import stored_rejects
from preprocess.decode import Undecodable, decode
from preprocess.sources import Item, Source, printable


def check_jpeg(store: Store) -> None:
    """Raises ValueError for a store of raw pixels."""
    if store.images.raw:
        raise KamimError(f"--store {store.path}: holds raw pixels; this benchmark compares JPEG stores")


def accepted(source: Source, store: Store) -> Source:
    """The source without the files that the store rejected: other libraries' loaders stop at most of them."""
    rejected = {name for shard in stored_rejects(store.path, store.manifest) for name, _ in shard}
    return replace(source, items=[item for item in source.items if printable(item.key) not in rejected])


def read(source: Source, item: Item) -> tuple[bytes | np.ndarray, np.ndarray]:
    """An image as its source gives it, and RGB uint8 [H, W, 3]. Raises ValueError, which names an undecodable file."""
    data = source.read(item)
    try:
        return data, decode(data)
    except Undecodable as error:
        raise KamimError(f"--source {source.location}: {printable(item.key)}: {error}; remove it") from error
