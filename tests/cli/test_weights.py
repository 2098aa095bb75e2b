"""kamim weights: what it prints of an image, as it is and as training sees it."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from PIL import Image
from skimage import data
from typer.testing import CliRunner

from kamim.cli import app
from kamim.cli.pictures import image_weights, largest_crop
from kamim.config.pretrain import Weighting
from kamim.method import geometry
from kamim.reporting import plots


def test_the_smallest_density_and_its_effect_are_printed(tmp_path: Path) -> None:
    """An image of noise has no empty cell until one is painted grey; then W of the other cells rises to e^4 at most."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    painted = noise.copy()
    painted[16:48, 16:48] = 128
    for name, pixels, smallest in (("noise", noise, None), ("painted", painted, 0.0)):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        omega = image_weights(pixels, Weighting()).omega
        assert smallest is None or omega.min() == smallest
        done = CliRunner().invoke(app, ["weights", str(tmp_path / f"{name}.png"), "--out", str(tmp_path / "w.npy")])
        assert done.exit_code == 0
        assert f"density min {omega.min():.4f}, mean {omega.mean():.4f}" in done.output
        assert f"W = exp((density - {omega.min():.4f}) / 0.25)" in done.output
        np.testing.assert_allclose(np.load(tmp_path / "w.npy"), np.exp((omega - omega.min()) / 0.25), rtol=1e-5)


def test_normalised_weights_have_mean_1_in_every_picture(
    stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the definition of weighting.normalize, with which the loss is computed."""
    sheets: list[tuple[list[np.ndarray], str]] = []

    def sheet(rows: list[tuple[str, np.ndarray, np.ndarray, np.ndarray]], _: int, caption: str, file: Path) -> None:
        sheets.append(([weights for *_, weights in rows], caption))

    monkeypatch.setattr(plots, "weights_sheet", sheet)
    Image.fromarray(data.astronaut()[:64, :64]).save(tmp_path / "a.png")
    run, picture = CliRunner().invoke, str(tmp_path / "w.png")
    for command in (["weights", str(tmp_path / "a.png"), "--plot", picture], ["store", "preview", str(stores["zarr"])]):
        more = [] if command[0] == "weights" else ["--out", picture]
        for normalize in ([], ["--normalize"]):
            done = run(app, [*command, *more, *normalize])
            assert done.exit_code == 0, done.output
            (plain, caption) = sheets.pop()
            assert caption.endswith(", normalised") == bool(normalize)
            assert all((w.mean() == pytest.approx(1, abs=1e-5)) == bool(normalize) for w in plain)
        assert command[0] != "weights" or ", divided by its mean" in done.output


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [(200, 240, (0, 0, 200, 240)), (100, 400, (0, 133, 100, 133)), (401, 90, (140, 0, 120, 90))],
)
def test_resolution_shows_the_largest_crop_of_training(height: int, width: int, box: tuple[int, ...]) -> None:
    photo = cv2.resize(data.astronaut(), (width, height))
    top, left, h, w = box
    expected = cv2.resize(photo[top : top + h, left : left + w], (96, 96), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(largest_crop(photo, 96), expected)


@pytest.mark.parametrize(("height", "width"), [(100, 400), (400, 100), (90, 91)])
def test_no_crop_of_training_is_larger(height: int, width: int) -> None:
    views = geometry.crop_views(
        np.tile((height, width), (2000, 1)), (0.05, 1.0), geometry.CROP_RATIO, 0, 0, np.arange(2000)
    )
    _, _, h, w = geometry.largest_box(height, width, *geometry.CROP_RATIO)
    assert (views[:, 2] * views[:, 3]).max() <= h * w


def test_a_resolution_has_whole_cells(tmp_path: Path) -> None:
    Image.fromarray(data.astronaut()[:64, :64]).save(tmp_path / "a.png")
    done = CliRunner().invoke(app, ["weights", str(tmp_path / "a.png"), "--resolution", "190"])
    assert done.exit_code == 1
    assert done.stderr == "error: --resolution 190: must be a multiple of --patch-size 8\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("{folder}/a.png --plot {folder}/w.txt", "--plot {folder}/w.txt: must end in .png"),
        ("{folder}/a.png --plot {folder}/none/w.png", "--plot {folder}/none/w.png: the folder {folder}/none does"),
        ("{folder}/a.png --out {folder}/none/w.npy", "--out {folder}/none/w.npy: the folder {folder}/none does"),
        ("{folder}", "{folder}: is a folder, not an image"),
    ],
)
def test_a_mistake_is_one_line(arguments: str, line: str, tmp_path: Path) -> None:
    """And nothing is computed before it."""
    Image.fromarray(data.astronaut()[:64, :64]).save(tmp_path / "a.png")
    done = CliRunner().invoke(app, ["weights", *arguments.format(folder=tmp_path).split()])
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {line.format(folder=tmp_path)}") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("largest", [2.0, 7.4, 20.0, 54.6, 99.0, 101.0, 3e3, 5e8])
def test_ticks_do_not_collide(largest: float) -> None:
    """On the axis, which is logarithmic from 1, neighbours are at least a twentieth of its length apart."""
    ticks = plots.weight_ticks(largest)
    assert 1.0 in ticks and max(ticks) <= largest and 2 <= len(ticks) <= 8
    assert np.diff(np.log(ticks)).min() > np.log(largest) / 20


@pytest.mark.parametrize("smallest", [0.9, 0.3, 0.04, 1e-3, 1e-12])
def test_ticks_of_normalised_weights_lie_on_their_axis(smallest: float) -> None:
    for largest in (2.0, 9.0, 60.0):
        ticks = plots.weight_ticks(largest, smallest)
        assert 1.0 in ticks and smallest <= min(ticks) and max(ticks) <= largest and len(ticks) <= 9


def test_rows_share_one_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The axis at the right holds for all rows, though their largest weights differ."""
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    grey, empty = np.full((64, 64, 3), 90, np.uint8), np.zeros((64, 64), bool)
    rows = [(f"{most}", grey, empty, np.linspace(1, most, 64).reshape(8, 8)) for most in (3.0, 40.0, 7.0)]
    plots.weights_sheet(rows, 8, "caption", tmp_path / "w.png")
    (figure,) = drawn
    heats = [image for axes in figure.axes for image in axes.images if isinstance(image.norm, LogNorm)]
    assert [(heat.norm.vmin, heat.norm.vmax) for heat in heats] == [(1, 40)] * 3
    assert len(figure.axes) == 3 * 3 + 1
