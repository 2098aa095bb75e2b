"""The image files that a store was built from, for benchmarks that compare the two."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain

import numpy as np

from kamim import KamimError
from kamim.storage.store import Store
from preprocess.assemble import stored_rejects
from preprocess.decode import Undecodable, decode
from preprocess.sources import Item, Source, printable
from preprocess.verify import Problem, jpeg_problems


def check_jpeg(store: Store) -> None:
    """Raises KamimError if the store's images are not JPEGs, or if one is damaged, which ends other loaders."""
    if (encoding := store.images.encoding) != "jpeg":
        raise KamimError(f"store = {store.path}: its images are {encoding}; this benchmark compares JPEG stores")

    def problems(index: int) -> list[Problem]:
        return [*jpeg_problems(store.images, index)]

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        for problem in chain.from_iterable(threads.map(problems, range(len(store)))):
            raise KamimError(
                f"store = {store.path}: {problem.what}; put it right with `kamim store verify {store.path} --repair`"
            )


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
