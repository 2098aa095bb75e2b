"""Loaders of other projects, for `kamim bench loader`: the same JPEGs, in their own format, with their own methods.

A peer takes part if its package is installed. Each one runs in a process of its own, since they start threads and
worker processes, set numba's number of threads, or keep shared memory. docs/benchmarks.md lists versions, decoders and
interpolation.
"""

import importlib.util
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from kamim.bench.crops import RATIO, RESOLUTION, SCALE
from kamim.bench.rounds import Run, even_batch
from kamim.storage.store import Store

EPOCHS = 8  # in a measured pass; processes and threads are kept between passes

Epoch = Callable[[], Iterable[np.ndarray | torch.Tensor]]  # the batches of one epoch in a new random order


@dataclass(frozen=True)
class Peer:
    """A loader of another project.

    package: the import name whose presence means that the peer is installed. open: called with (JPEG files, an empty
    folder for the peer's format, batch size, number of threads or worker processes), returns an epoch's batches,
    uint8 [n, R, R, 3] or [n, 3, R, R] with R = RESOLUTION.
    """

    package: str
    open: Callable[[list[Path], Path, int, int], Epoch]


def _slipstream(files: list[Path], folder: Path, batch: int, workers: int) -> Epoch:
    """Its cache of JPEGs; its fused decode and crop, which resizes with stb_image_resize2, in numba's threads."""
    from slipstream import DecodeRandomResizedCrop, SlipstreamLoader

    crop = DecodeRandomResizedCrop(RESOLUTION, scale=SCALE, ratio=RATIO, num_threads=workers)
    source = _SlipstreamSource(files, folder)
    loader = SlipstreamLoader(source, batch, drop_last=False, pipelines={"image": [crop]}, verbose=False)
    return lambda: (batch["image"] for batch in loader)


@dataclass(frozen=True)
class _SlipstreamSource:
    """What slipstream's OptimizedCache.build reads."""

    files: list[Path]
    cache_path: Path
    field_types: ClassVar = {"image": "ImageBytes"}

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, bytes]:
        return {"image": self.files[index].read_bytes()}


def _litdata(files: list[Path], folder: Path, batch: int, workers: int) -> Epoch:
    """Chunks from `optimize`; its JPEG serializer, which decodes with torchvision; worker processes."""
    os.environ |= {
        "LITDATA_DISABLE_VERSION_CHECK": "1",
        "DATA_OPTIMIZER_CACHE_FOLDER": str(folder / "cache"),
        "DATA_OPTIMIZER_DATA_CACHE_FOLDER": str(folder / "data"),
    }
    import litdata

    chunks = str(folder / "chunks")
    names = [str(file) for file in files]
    litdata.optimize(Image.open, names, chunks, chunk_bytes="64MB", num_workers=1, verbose=False)
    crop = v2.RandomResizedCrop(RESOLUTION, SCALE, RATIO, antialias=False)
    dataset = litdata.StreamingDataset(chunks, shuffle=True, transform=crop)
    size = even_batch(len(files), batch, workers)
    loader = litdata.StreamingDataLoader(
        dataset, batch_size=size, shuffle=True, num_workers=workers, persistent_workers=True
    )
    return lambda: loader


def _mosaicml(files: list[Path], folder: Path, batch: int, workers: int) -> Epoch:
    """MDS shards with a column of type jpeg, which Pillow decodes; torchvision's crop of Pillow images; processes."""
    from streaming import MDSWriter, StreamingDataLoader, StreamingDataset

    with MDSWriter(out=str(folder / "mds"), columns={"image": "jpeg"}) as writer:
        for file in files:
            writer.write({"image": Image.open(file)})
    crop = v2.Compose([v2.RandomResizedCrop(RESOLUTION, SCALE, RATIO), v2.PILToTensor()])

    class Crops(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: int) -> torch.Tensor:
            tensor: torch.Tensor = crop(super().__getitem__(index)["image"].convert("RGB"))
            return tensor

    size = even_batch(len(files), batch, workers)
    dataset = Crops(local=str(folder / "mds"), shuffle=True, batch_size=size)
    loader = StreamingDataLoader(
        dataset, batch_size=size, num_workers=workers, persistent_workers=True, multiprocessing_context="fork"
    )
    return lambda: loader


def _spdl(files: list[Path], folder: Path, batch: int, workers: int) -> Epoch:
    """The files themselves; FFmpeg decodes, crops and resizes (bilinear), in the threads of a Pipeline."""
    import spdl.io
    from spdl.pipeline import PipelineBuilder

    def load(file: Path) -> Any:
        packets = spdl.io.demux_image(file.read_bytes())
        top, left, height, width = _random_box(packets.codec.height, packets.codec.width)
        chain = f"crop={width}:{height}:{left}:{top}:exact=1,scale={RESOLUTION}:{RESOLUTION}:flags=bilinear"
        return spdl.io.decode_packets(packets, filter_desc=f"{chain},format=pix_fmts=rgb24")

    def collate(frames: list[Any]) -> np.ndarray:
        return spdl.io.to_numpy(spdl.io.convert_frames(frames))

    def epoch() -> Iterator[np.ndarray]:
        order = [files[index] for index in np.random.permutation(len(files))]
        builder = PipelineBuilder().add_source(order).pipe(load, concurrency=workers).aggregate(batch).pipe(collate)
        pipeline = builder.add_sink(2).build(num_threads=workers, max_failures=0)
        with pipeline.auto_stop():
            yield from pipeline.get_iterator()

    return epoch


def _random_box(height: int, width: int) -> tuple[int, int, int, int]:
    """Draws torchvision's random box (top, left, height, width)."""
    drawn = v2.RandomResizedCrop(RESOLUTION, SCALE, RATIO).make_params([torch.empty(1, height, width)])
    return drawn["top"], drawn["left"], drawn["height"], drawn["width"]


def _turboloader(files: list[Path], folder: Path, batch: int, workers: int) -> Epoch:
    """The files themselves; its decode_jpeg and torchvision's crop, in the threads of its MapDataLoader."""
    import turboloader

    loader = turboloader.MapDataLoader(
        _TurboCrops(files), batch, shuffle=True, num_workers=workers, collate_fn=torch.stack
    )
    numbers = iter(range(1 << 30))

    def epoch() -> Iterator[torch.Tensor]:
        loader.set_epoch(next(numbers))  # on which its order depends
        yield from loader

    return epoch


class _TurboCrops:
    """Crops of JPEG files, decoded by TurboLoader: uint8 [3, R, R]."""

    def __init__(self, files: list[Path]):
        self._files = files
        self._crop = v2.RandomResizedCrop(RESOLUTION, SCALE, RATIO, antialias=False)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> torch.Tensor:
        import turboloader

        rgb = turboloader.decode_jpeg(self._files[index].read_bytes())
        crop: torch.Tensor = self._crop(torch.from_numpy(rgb).permute(2, 0, 1))
        return crop


PEERS = {
    "slipstream": Peer("slipstream", _slipstream),
    "litdata": Peer("litdata", _litdata),
    "mosaicml_streaming": Peer("streaming", _mosaicml),
    "spdl": Peer("spdl", _spdl),
    "turboloader": Peer("turboloader", _turboloader),
}


@contextmanager
def peer_runs(store: Store, folder: Path, batch: int, workers: int) -> Iterator[dict[str, Run]]:
    """Yields a run for each installed peer by name, on the JPEGs of a store; ends the peers' processes at exit.

    folder: an empty temporary folder. A peer writes its format there in its first pass.
    """
    installed = {name: peer for name, peer in PEERS.items() if importlib.util.find_spec(peer.package)}
    files = write_files(store, folder / "files") if installed else []
    spawn = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        runs: dict[str, Run] = {}
        for name, peer in installed.items():
            process = stack.enter_context(ProcessPoolExecutor(1, mp_context=spawn))
            runs[name] = partial(_run, process, peer, tuple(files), folder / name, batch, workers)
        yield runs


def write_files(store: Store, folder: Path) -> list[Path]:
    """Writes a store's JPEGs, unchanged, to files of their own and returns their paths."""
    folder.mkdir(parents=True)
    files = [folder / f"{index:08}.jpg" for index in range(len(store))]
    for index, file in enumerate(files):
        file.write_bytes(store.images.data(index).tobytes())
    return files


def _run(process: ProcessPoolExecutor, *given: Any) -> int:
    return process.submit(_pass, *given).result()


def _pass(peer: Peer, files: tuple[Path, ...], folder: Path, batch: int, workers: int) -> int:
    """EPOCHS epochs of a peer, in its process; returns the number of images."""
    epoch = _opened(peer, files, folder, batch, workers)
    return sum(len(images) for _ in range(EPOCHS) for images in epoch())


@cache
def _opened(peer: Peer, files: tuple[Path, ...], folder: Path, batch: int, workers: int) -> Epoch:
    torch.set_num_threads(1)
    folder.mkdir()
    return peer.open(list(files), folder, batch, workers)
