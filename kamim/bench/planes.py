"""YCbCr planes in place of RGB: the images of a store so encoded, and how close crops of planes are to crops of RGB."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import simplejpeg

from kamim.bench.startup import Bare
from kamim.method import geometry
from kamim.method.colour import planes_bytes, to_planes
from kamim.storage.store import Images, Store, ZarrImages, write_zarr_images
from pipelines.crop import crop_resize
from pipelines.loader import Crop, Loader
from pipelines.plan import Plan


def write_planes(store: Store, folder: Path) -> Bare:
    """The images of a JPEG store in the encoding yuv420."""

    def images() -> Iterator[tuple[np.ndarray, int, int, int, bool]]:
        for index, label in enumerate(store.images.labels):
            rgb = simplejpeg.decode_jpeg(store.images.data(index))
            yield to_planes(rgb), *rgb.shape[:2], int(label), False

    sizes = planes_bytes(*store.images.sizes.astype(np.int64).T)
    write_zarr_images(folder / "images.zarr", images(), int(sizes.sum()), "yuv420", int(sizes.max()))
    return Bare(folder, ZarrImages(folder / "images.zarr"))


def planes_quality(store: Store, planes: Images, resolution: int) -> dict[str, float]:
    """Crops of the store's JPEGs as the loader decodes them, and of write_planes' images, against crops of whole RGB.

    PSNR in dB, over RGB and all crops, and the mean absolute difference in grey levels.
    """
    exact = _rgb_crops(store, resolution)
    result = {}
    for name, images in (("jpeg", store), ("yuv420", planes)):
        difference = _crops(images, resolution).astype(np.float32) - exact
        result[f"{name}_psnr"] = float(10 * np.log10(255**2 / max(np.square(difference).mean(), 1e-9)))
        result[f"{name}_mean_difference"] = float(np.abs(difference).mean())
    return result


def _crops(images: Images, resolution: int) -> np.ndarray:
    """A random crop of every image, as the loader makes it: uint8 [N, R, R, 3]."""
    count = len(images.images.labels)
    plan = Plan(count, count, 128, seed=0, order="stored")
    parts = Loader(images, plan, resolution, crop=Crop()).steps(0, 1)
    return np.concatenate([part.images.numpy().copy() for part in parts])


def _rgb_crops(store: Store, resolution: int) -> np.ndarray:
    """The same crops of whole images, decoded to RGB: uint8 [N, R, R, 3]."""
    crop, out = Crop(), np.empty((len(store), resolution, resolution, 3), np.uint8)
    views = geometry.crop_views(store.images.sizes, crop.scale, crop.ratio, 0, 0, np.arange(len(store)))
    for index, view in enumerate(views):
        crop_resize(simplejpeg.decode_jpeg(store.images.data(index)), view, out[index])
    return out
