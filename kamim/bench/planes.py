"""YCbCr planes in place of RGB: the images of a store so encoded, and how close crops of planes are to crops of RGB."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import simplejpeg

from kamim.bench.startup import Bare
from kamim.method import geometry
from kamim.method.colour import planes_bytes, to_planes
from kamim.storage.images import Images, ZarrImages, write_zarr_images
from kamim.storage.store import Store
from pipelines.batch import Batch
from pipelines.crop import crop_resize
from pipelines.loader import Crop, Loader
from pipelines.plan import Plan


def write_planes(store: Store, folder: Path) -> Bare:
    """Writes the images of a JPEG store in the encoding yuv420."""

    def images() -> Iterator[tuple[np.ndarray, int, int, int, bool]]:
        for index, label in enumerate(store.images.labels):
            rgb = simplejpeg.decode_jpeg(store.images.data(index))
            yield to_planes(rgb), *rgb.shape[:2], int(label), False

    sizes = planes_bytes(*store.images.sizes.astype(np.int64).T)
    write_zarr_images(folder / "images.zarr", images(), int(sizes.sum()), "yuv420", int(sizes.max()))
    return Bare(folder, ZarrImages(folder / "images.zarr"))


def planes_quality(store: Store, planes: Images, resolution: int) -> dict[str, float]:
    """Compares crops of the store's JPEGs as the loader decodes them, and of write_planes' images, with crops of RGB.

    Returns the PSNR in dB, over RGB and all crops, and the mean absolute difference in grey levels.
    """
    result = {}
    for name, images in (("jpeg", store), ("yuv420", planes)):
        squared = absolute = 0.0
        for batch in _crops(images, resolution):
            difference = batch.images.numpy().astype(np.float32) - _rgb_crops(store, batch.indices, resolution)
            squared += float(np.square(difference).sum(dtype=np.float64))
            absolute += float(np.abs(difference).sum(dtype=np.float64))
        values = len(store) * resolution**2 * 3
        result[f"{name}_psnr"] = float(10 * np.log10(255**2 / max(squared / values, 1e-9)))
        result[f"{name}_mean_difference"] = absolute / values
    return result


def _crops(images: Images, resolution: int) -> Iterator[Batch]:
    """Yields a random crop of every image, as the loader makes it."""
    plan = Plan(len(images.images.labels), len(images.images.labels), 128, seed=0, order="stored")
    return Loader(images, plan, resolution, crop=Crop()).micro_batches(0, 1)


def _rgb_crops(store: Store, indices: np.ndarray, resolution: int) -> np.ndarray:
    """Returns the same crops of whole images, decoded to RGB: uint8 [n, R, R, 3]."""
    crop, out = Crop(), np.empty((len(indices), resolution, resolution, 3), np.uint8)
    views = geometry.crop_views(store.images.sizes[indices], crop.scale, crop.ratio, 0, 0, indices)
    for row, (index, view) in enumerate(zip(indices.tolist(), views, strict=True)):
        crop_resize(simplejpeg.decode_jpeg(store.images.data(index)), view, out[row])
    return out
