"""What the loader is measured against: the released code's method, torchvision, stock FFCV and JPEG decoding alone."""

from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from kamim.bench.crops import PATCH_SIZE, RATIO, RESOLUTION, SCALE, TEMPERATURE
from kamim.bench.rounds import Run, even_batch
from kamim.method.weighting import counts_to_weights
from kamim.storage.store import Store
from preprocess.sources import Item, Source

EPOCHS, STOCK_EPOCHS = 32, 2  # in a measured pass, so that starting it does not weigh in; of the reference, 1


class ReferenceDataset(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Samples as the released code's data loader makes them: Pillow, torchvision v2, FAST and drawKeypoints."""

    def __init__(self, source: Source):
        self._source = source
        self._transform = v2.Compose(
            [
                v2.RandomResizedCrop(RESOLUTION, scale=SCALE, antialias=False),
                v2.RandomVerticalFlip(0.5),
                v2.RandomHorizontalFlip(0.5),
            ]
        )

    def __len__(self) -> int:
        return len(self._source.items)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        item: Item = self._source.items[index]
        image = Image.open(Path(self._source.location, item.key)).convert("RGB")
        crop = self._transform(F.pil_to_tensor(image))
        pixels = np.ascontiguousarray(crop.permute(1, 2, 0).numpy())
        keypoints = cv2.FastFeatureDetector_create().detect(pixels, None)  # type: ignore[attr-defined]
        canvas = cv2.drawKeypoints(np.zeros_like(pixels), keypoints, None, color=(255, 255, 255))  # type: ignore[call-overload]
        bitmap = torch.from_numpy(canvas[..., 0] > 0).float()[None]
        counts = torch.nn.functional.avg_pool2d(bitmap, PATCH_SIZE)[0] * PATCH_SIZE**2
        return crop, counts_to_weights(counts, PATCH_SIZE, TEMPERATURE)


class StoredDataset(torch.utils.data.Dataset[torch.Tensor]):
    """Crops of a store's JPEGs, decoded by torchvision: uint8 [3, R, R]."""

    def __init__(self, store: Store):
        self._images = store.images
        self._crop = v2.RandomResizedCrop(RESOLUTION, scale=SCALE, antialias=False)

    def __len__(self) -> int:
        return len(self._images.sizes)

    def __getitem__(self, index: int) -> torch.Tensor:
        data = torch.from_numpy(self._images.data(index).copy())
        crop: torch.Tensor = self._crop(decode_jpeg(data, ImageReadMode.RGB))
        return crop


def one_thread(_: int) -> None:
    """Sets OpenCV and torch to one thread, in a worker process of a DataLoader."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)


def reference(source: Source, batch: int, workers: int) -> Run:
    """Returns a pass of the released code's method on the original files, with one worker process per core."""
    loader = torch.utils.data.DataLoader(
        ReferenceDataset(source),
        even_batch(len(source.items), batch, workers),
        shuffle=True,
        num_workers=workers,
        persistent_workers=True,
        worker_init_fn=one_thread,
    )
    return lambda: sum(len(images) for images, _ in loader)


def torchvision_jpeg(store: Store, batch: int, workers: int) -> Run:
    """Returns a pass of decode_jpeg and RandomResizedCrop in a DataLoader with one process per core; no keypoints."""
    loader = torch.utils.data.DataLoader(
        StoredDataset(store),
        even_batch(len(store), batch, workers),
        shuffle=True,
        num_workers=workers,
        persistent_workers=True,
        worker_init_fn=one_thread,
    )
    return lambda: sum(len(images) for images in loader)


def decode_only(store: Store, workers: int) -> Run:
    """Returns passes that decode the store's own JPEGs in as many threads, and do nothing else."""

    def part(first: int) -> int:
        indices = range(first, len(store), workers)
        for _ in range(EPOCHS):
            for index in indices:
                simplejpeg.decode_jpeg(store.images.data(index))
        return EPOCHS * len(indices)

    def run() -> int:
        with ThreadPoolExecutor(workers) as pool:
            return sum(pool.map(part, range(workers)))

    return run


def stock_ffcv(process: ProcessPoolExecutor, file: Path, batch: int, workers: int) -> Run:
    """Returns passes of ffcv's own loader on a file of images, without keypoints, in a process of its own.

    Its OSCacheManager.state_type (ffcv 1.0.2) makes numba's type of uint8 arrays read-only for the whole process,
    after which no kernel that writes to one compiles.
    """
    return lambda: process.submit(_stock_pass, str(file), batch, workers).result()


def _stock_pass(file: str, batch: int, workers: int) -> int:
    loader = _stock_loader(file, batch, workers)
    return sum(len(images) for _ in range(STOCK_EPOCHS) for images, _ in loader)


@cache
def _stock_loader(file: str, batch: int, workers: int) -> Any:
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader as FfcvLoader
    from ffcv.loader import OrderOption
    from ffcv.transforms import ToTensor

    decoder = RandomResizedCropRGBImageDecoder((RESOLUTION, RESOLUTION), scale=SCALE, ratio=RATIO)
    return FfcvLoader(
        file,
        batch_size=batch,
        num_workers=workers,
        order=OrderOption.RANDOM,
        os_cache=True,
        pipelines={"image": [decoder, ToTensor()], "label": [IntDecoder(), ToTensor()]},
    )
