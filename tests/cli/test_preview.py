"""The preview of a store compares W with W of the pixels that are shown."""

import re
from pathlib import Path

import numpy as np
import pytest
from conftest import make_store
from PIL import Image
from typer.testing import CliRunner

from kamim.cli import app


def previewed(store: Path, out: Path) -> tuple[float, float, float]:
    """The mean W of stored keypoints and of those of the crops, and their correlation."""
    shown = CliRunner().invoke(app, ["store", "preview", str(store), "--out", str(out), "--images", "12"])
    assert shown.exit_code == 0 and out.is_file(), shown.output
    numbers = re.search(
        r"mean W ([0-9.]+) of stored .*, ([0-9.]+) of .* on the crops; correlation (-?[0-9.]+)", shown.stdout
    )
    assert numbers is not None, shown.stdout
    first, second, third = map(float, numbers.groups())
    return first, second, third


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Flat images under noise that only a store's pixels lose, since they are smaller and antialiased."""
    root, random = tmp_path_factory.mktemp("noisy"), np.random.default_rng(0)
    for i in range(12):
        strength = np.linspace(0, 30, 400)[:, None] * np.ones((400, 400))
        grey = (128 + strength * random.normal(size=(400, 400))).clip(0, 255).astype(np.uint8)
        Image.fromarray(grey).save(root / f"{i}.png")
    return make_store(root, tmp_path_factory.mktemp("stores") / "noisy")


def test_noise_that_the_stored_pixels_lost_shows(noisy: Path, stores: dict[str, Path], tmp_path: Path) -> None:
    mean, detected, correlation = previewed(noisy, tmp_path / "noisy.png")
    assert mean > 2 * detected
    mean, detected, better = previewed(stores["zarr"], tmp_path / "photos.png")
    assert detected == pytest.approx(mean, rel=0.4) and better > max(correlation, 0.7)
