"""kamim doctor: what it says of a store, and who waits for whom."""

import shutil
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import zarr
from typer.testing import CliRunner

from kamim.bench import doctor
from kamim.cli import app

runner = CliRunner()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SECONDS", 0.05)
    monkeypatch.setitem(doctor.STEPS, "cpu", 1)
    monkeypatch.setitem(doctor.BATCH, "cpu", 2)


def asked(store: Path, *overrides: str) -> tuple[int, str, str]:
    done = runner.invoke(app, ["doctor", "--store", str(store), *overrides])
    return done.exit_code, done.stdout, done.stderr


CONFIG = ("model.name=vit_demo", "data.resolution=64", "optim.batch_size=8", "compute.device=cpu", "data.workers=1")


def test_it_says_what_there_is(stores: dict[str, Path]) -> None:
    code, said, _ = asked(stores["zarr"])
    assert code == 0
    assert "24 images of 3 classes, JPEG q90 (zarr), for 64 px; keypoints: fast, sift; 0 rejected" in said
    assert "every image and keypoint lies within its file" in said
    assert "bottleneck" not in said


def test_it_checks_the_machine_alone() -> None:
    done = runner.invoke(app, ["doctor"])
    assert done.exit_code == 0, done.output
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert {"processor", "cores", "gpus", "torch", "ffcv", "libturbojpeg", "free"} < lines.keys()
    assert lines["store"].startswith("none given; --store STORE")


def test_a_configuration_names_the_store(stores: dict[str, Path]) -> None:
    done = runner.invoke(app, ["doctor", f"data.store={stores['zarr']}", *CONFIG])
    assert f"{stores['zarr']}: 24 images of 3 classes" in done.stdout
    assert "bottleneck" in done.stdout
    missing = runner.invoke(app, ["doctor", *CONFIG])
    assert missing.exit_code == 1
    assert missing.stderr.startswith("error: data.store: is missing")


def test_it_measures_loader_and_model(stores: dict[str, Path]) -> None:
    code, said, _ = asked(stores["zarr"], *CONFIG)
    lines = dict(line.split(maxsplit=1) for line in said.splitlines() if line[:1].strip())
    assert float(lines["loader"].split()[0].replace(",", "")) > 0
    assert float(lines["model"].split()[0].replace(",", "")) > 0
    assert (code == 0) == lines["bottleneck"].startswith("the cpu: the loader is")


@pytest.mark.parametrize(("loader", "code"), [(1000.0, 0), (109.0, 1), (10.0, 1)])
def test_it_says_who_waits(stores: dict[str, Path], loader: float, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_loader_rate", lambda batches: loader)
    monkeypatch.setattr(doctor, "_model_rate", lambda *_: 100.0)
    found, said, _ = asked(stores["zarr"], *CONFIG, "optim.epochs=100", "optim.warmup_epochs=1")
    assert found == code
    images, rate = 100 * 24, min(loader, 100.0)
    duration = timedelta(seconds=round(images / rate))
    assert f"{duration} (h:mm:ss) for 300 steps of 8 images at {rate:,.0f} images/s in one process" in said
    if code:
        assert f"the loader: it reaches {loader:.0f}% of the model's rate" in said
        assert f"{int(np.ceil(110 / loader))} cores would suffice" in said or "data.workers=2" in said
        assert "kamim preprocess --pixels yuv420" in said
    else:
        assert "the cpu: the loader is 10.0 times as fast" in said


def test_damage_is_said(stores: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(stores["zarr"], tmp_path / "copy")
    start = zarr.open_array(copy / "images.zarr/start", mode="r+")
    start[3] = 1 << 40
    code, said, error = asked(copy, *CONFIG)
    assert code == 1
    assert "24 images of 3 classes" in said
    assert "bottleneck" not in said
    assert f"{copy}/images.zarr: image 3 lies outside its file; put it right with `kamim store verify" in error


def test_mistakes_are_one_line(stores: dict[str, Path], tmp_path: Path) -> None:
    for given, message in (
        ((tmp_path,), "not a kamim store"),
        ((stores["zarr"], "model.name=vit_huge"), "must be one of"),
        ((stores["zarr"], *CONFIG, "weighting.detector=orb"), "has no 'orb' keypoints, only fast, sift"),
    ):
        code, _, said = asked(*given)  # type: ignore[arg-type]
        assert code == 1
        assert message in said
        assert said.count("\n") == 1
