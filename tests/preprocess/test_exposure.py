"""Images of few grey levels or without keypoints are reported when a store is made, and W of 1 when a run begins."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from conftest import make_store
from PIL import Image
from runs import config
from typer.testing import CliRunner

from kamim.cli import app
from kamim.storage.manifest import Encoding
from kamim.storage.store import Store
from kamim.training.data import few_weights
from preprocess import exposure


def write(folder: Path, photos: list[np.ndarray], low: int, high: int, count: int = 4) -> Path:
    """Grey TIFFs of 16 bits with values of `low` to `high`."""
    folder.mkdir(parents=True)
    for i in range(count):
        grey = photos[i % len(photos)][10 * i : 10 * i + 120, 20 * i : 20 * i + 150].mean(axis=2)
        scaled = (grey - grey.min()) / (grey.max() - grey.min())
        tifffile.imwrite(folder / f"{low}-{i}.tif", (low + scaled * (high - low)).astype(np.uint16))
    return folder


@pytest.mark.parametrize("encoding", ["jpeg", "raw", "yuv420", "original"])
def test_values_of_12_bits_in_16_are_reported(encoding: Encoding, photos: list[np.ndarray], tmp_path: Path) -> None:
    write(tmp_path / "a/x", photos, 81, 2153, count=3)
    write(tmp_path / "a/y", photos, 0, 65535, count=5)
    few_levels, without = exposure.cautions(Store(make_store(tmp_path / "a", tmp_path / "s", encoding=encoding)))
    assert few_levels.startswith("3 of 8 images looked at use less than a tenth of the range of 0 to 255")
    assert without == "3 of 8 images have no fast keypoints: their W is 1, as in SimMIM"


def test_a_bright_label_on_a_dark_image_does_not_hide_it(photos: list[np.ndarray], tmp_path: Path) -> None:
    dark = photos[0][:200, :200] // 16
    dark[:10, :10] = 255  # 0.25 % of the pixels
    (tmp_path / "a").mkdir()
    Image.fromarray(dark).save(tmp_path / "a/0.png")
    (few_levels,) = exposure.cautions(Store(make_store(tmp_path / "a", tmp_path / "s", encoding="raw")))
    assert few_levels.startswith("1 of 1 images looked at")


def test_photographs_are_not_reported(stores: dict[str, Path]) -> None:
    assert exposure.cautions(Store(stores["zarr"])) == []


def test_levels_are_those_of_numpys_quantiles() -> None:
    random = np.random.default_rng(0)
    for size in (1, 7, 999, 20_000):
        values = random.normal(100, 20, size).clip(0, 255).astype(np.uint8)
        low, high = np.quantile(values, [exposure.OUTSIDE, 1 - exposure.OUTSIDE], method="inverted_cdf")
        assert exposure._range(values) == high - low


def test_preprocess_says_it(photos: list[np.ndarray], tmp_path: Path) -> None:
    write(tmp_path / "a/x", photos, 81, 2153)
    command = ["preprocess", "imagefolder", "--source", str(tmp_path / "a"), "--out", str(tmp_path / "s")]
    shown = CliRunner().invoke(app, [*command, "--workers", "1", "--container", "zarr"])
    assert shown.exit_code == 0, shown.output
    assert "caution: 4 of 4 images looked at use less than a tenth of the range" in shown.stderr


@pytest.mark.parametrize("options", [(), ("weighting.footprint=point",), ("weighting.keypoints=online",)])
def test_a_run_whose_weights_are_1_warns(options: tuple[str, ...], photos: list[np.ndarray], tmp_path: Path) -> None:
    store = make_store(write(tmp_path / "a", photos, 81, 2153), tmp_path / "s")
    warned = few_weights(config(tmp_path / "run", store, *options), Store(store))
    assert warned.startswith("weighting: W is 1 nearly everywhere in 4 of 4 crops, so that KAMIM trains as SimMIM")


def test_a_run_on_photographs_warns_only_of_a_temperature_that_evens_the_weights_out(
    stores: dict[str, Path], tmp_path: Path
) -> None:
    store = Store(stores["zarr"])
    assert few_weights(config(tmp_path / "run", store.path), store) == ""
    assert few_weights(config(tmp_path / "run", store.path, "weighting=null"), store) == ""
    assert few_weights(config(tmp_path / "run", store.path, "weighting.temperature=1000"), store) != ""
