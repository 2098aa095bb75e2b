"""The measurements measure what they say; none asserts a time."""

import json
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch
import zarr
from conftest import HAS_FFCV, make_store, plan_job
from test_peers import fake
from torchvision.transforms.v2 import functional as F
from typer.testing import CliRunner

from kamim.bench import baselines, evaluate, fidelity, loader, peers, pixels, preprocess, small, startup, train
from kamim.cli import app
from kamim.models.masked_image_model import MaskedImageModel
from kamim.storage.images import ZarrImages
from kamim.storage.store import Store
from preprocess.decode import decode
from preprocess.record import stored_image
from preprocess.sources import list_source


def test_fidelity_of_the_crop_itself_is_perfect(class_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the crop unmoved the floor is 1; cached keypoints lie between chance and it."""
    monkeypatch.setattr(fidelity, "_moved", lambda box, height, width: box)
    source = list_source("imagefolder", class_folder, "train")
    rows = fidelity.fidelity(source, ("fast",), fidelity.FidelityCase(), 12, 2, lambda done, total: None)["keypoints"]
    assert {(row["detector"], row["footprint"]) for row in rows} == {("fast", "ring"), ("fast", "point")}
    for row in rows:
        assert row["weight_correlation_floor"] == pytest.approx(1)
        assert row["l1_of_normalised_weights_floor"] == pytest.approx(0)
        low, high = row["share_of_floor_interval"]
        assert low < row["share_of_floor"] < high
    assert 0.5 < rows[0]["weight_correlation"] < 1


def test_an_interval_is_what_resampling_images_gives() -> None:
    """Against np.corrcoef of resampled images, with the same draws."""
    random = np.random.default_rng(3)
    cached, online, moved = (random.random((3 * 40, 2, 2)) + np.arange(120)[:, None, None] / 60 for _ in range(3))
    images = np.arange(120).reshape(40, 3)
    shares = []
    for draw in np.random.default_rng(0).multinomial(40, np.full(40, 1 / 40), 1000):
        chosen = np.repeat(images, draw, axis=0).ravel()
        ours, floor = (np.corrcoef(w[chosen].ravel(), online[chosen].ravel())[0, 1] for w in (cached, moved))
        shares.append(ours / floor)
    expected = np.percentile(shares, (2.5, 97.5))
    np.testing.assert_allclose(fidelity._share_interval(cached, online, moved, 3), expected)


def test_pixels_are_compared_with_torchvisions(class_folder: Path) -> None:
    """A whole image whose sides are even, so that the box lies between no two pixels."""
    source = list_source("imagefolder", class_folder, "train")
    job, _ = plan_job(class_folder, encoding="raw")
    original = decode(source.read(source.items[0]))
    image = pixels.StoredImage(job, original, original, 0, 2)
    assert image.bytes == stored_image(job, original, original)[0].size
    planes = torch.from_numpy(original).permute(2, 0, 1)
    whole = (0.0, 0.0, *map(float, original.shape[:2]))
    for antialias, made in ((True, pixels._antialiased), (False, pixels._plain)):
        theirs = F.resize(planes, [64, 64], antialias=antialias).permute(1, 2, 0).numpy().astype(int)
        assert np.abs(made(original, whole, 64) - theirs).max() <= 1
    measured = pixels.compare_pixels(job, [image])
    assert measured["psnr_antialiased"] > 30
    assert measured["whole"]["psnr_antialiased"] > 30
    assert 0.7 < measured["sharpness_antialiased"] < 1.3
    assert pixels._psnr(original, original) > 60
    assert pixels._psnr(np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)) == 0


@pytest.mark.parametrize(
    ("box", "moved"),
    [
        ((0, 0, 5, 5), (0, 1, 5, 5)),
        ((0, 5, 5, 5), (0, 4, 5, 5)),
        ((0, 0, 5, 10), (1, 0, 5, 10)),
        ((3, 0, 5, 10), (2, 0, 5, 10)),
        ((0, 0, 8, 10), (0, 1, 8, 9)),
    ],
)
def test_a_box_is_moved_by_one_pixel_within_the_image(box: tuple[int, ...], moved: tuple[int, ...]) -> None:
    assert fidelity._moved(np.array([*box, 1, 0]), 8, 10).tolist() == [*moved, 1, 0]


def test_the_reference_loader_weighs_as_the_released_code(class_folder: Path) -> None:
    dataset = baselines.ReferenceDataset(list_source("imagefolder", class_folder, "train"))
    crop, weights = dataset[3]
    assert crop.shape == (3, 192, 192)
    assert weights.shape == (24, 24)
    assert float(weights.min()) == 1
    assert float(weights.max()) > 1


def test_bench_loader_reports_rates_and_ratios(
    class_folder: Path, stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "EPOCHS", 2)
    monkeypatch.setattr(loader, "FINER", 1)
    monkeypatch.setattr(small, "SAMPLES", 300)
    monkeypatch.setattr(startup, "measure", lambda store: {"first_batch_seconds": 1.0})
    given_peers = {"fake": peers.Peer("json", fake), "absent": peers.Peer("no_such_package", fake)}
    monkeypatch.setattr(peers, "PEERS", given_peers)
    given = ["bench", "loader", "--source", str(class_folder), "--store", str(stores["zarr"])]
    result = CliRunner().invoke(app, [*given, "--rounds", "1", "--json", str(tmp_path / "r.json")])
    assert result.exit_code == 0, result.output
    made = json.loads((tmp_path / "r.json").read_text())
    rates, ratios = made["images_per_second"], made["ratios"]
    assert made["batch"] == 24  # all there are
    with_ffcv = {"short_side", "short_side_stock_ffcv", "raw"} if HAS_FFCV else set()
    of_kamim = {"simmim", "fast", "sift", "yuv420", "small_1", "small_2"}
    assert set(rates) == {"reference", "jpeg_decode", "torchvision_jpeg", "fake"} | of_kamim | with_ffcv
    assert ratios["two_threads_over_one"] == pytest.approx(rates["small_2"] / rates["small_1"])
    assert ratios["ratio_to_fake"] == pytest.approx(rates["simmim"] / rates["fake"])
    assert "ratio_to_absent" not in ratios
    assert ratios["yuv420_over_jpeg"] == pytest.approx(rates["yuv420"] / rates["fast"])
    assert np.isfinite(made["python_us_per_image"])
    assert min(made["pixels"]["jpeg_psnr"], made["pixels"]["yuv420_psnr"]) > 35
    assert made["pixels"]["jpeg_mean_difference"] <= 1.5
    assert ratios["ratio_to_reference"] == pytest.approx(rates["fast"] / rates["reference"])
    finer = made["finer_rounds"]
    assert ratios["sift_over_simmim"] == pytest.approx(finer["sift"][0] / finer["simmim"][0])
    assert all(np.isfinite(rate) for rate in rates.values())
    assert numba.uint8[::1].mutable  # which ffcv's own loader changes, in whatever process it runs


@pytest.mark.parametrize("command", ["loader", "eval"])
@pytest.mark.parametrize("damage", ["cut", "size", "keypoints", "source"])
def test_damaged_files_are_one_line(
    command: str, damage: str, class_folder: Path, stores: dict[str, Path], tmp_path: Path
) -> None:
    if (command, damage) in (("eval", "keypoints"), ("eval", "source")):
        pytest.skip("it reads no keypoints, and the source only as torchvision does")
    store, source = shutil.copytree(stores["zarr"], tmp_path / "store"), shutil.copytree(class_folder, tmp_path / "all")
    images = store / "images.zarr"
    if damage == "cut":
        array = zarr.open_array(images / "length", mode="r+")
        array[5] = array[5] - 100
    if damage == "size":
        zarr.open_array(images / "size", mode="r+")[5] = (7, 7)
    if damage == "keypoints":
        zarr.open_array(store / "keypoints.zarr/fast/gaps", mode="r+")[...] = 254
    if damage == "source":
        file = sorted(source.rglob("*.jpg"))[5]
        file.write_bytes(file.read_bytes()[:-100])
    given = ["bench", command, "--store", str(store), "--source", str(source), "--batch", "8", "--rounds", "1"]
    given += ["--model", "vit_demo", "--resolution", "64"] if command == "eval" else []
    result = CliRunner().invoke(app, given)
    errors = [line for line in result.stderr.splitlines() if not line.startswith("bench ")]
    assert (result.exit_code, len(errors)) == (1, 1), result.output
    assert {"cut": "image 5 is not a JPEG", "size": "image 5 is of shape", "keypoints": "sample ", "source": "5.jpg: "}[
        damage
    ] in errors[0]


def test_bench_eval_reports_rates_and_ratios(
    class_folder: Path, stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(evaluate.SWEEP, "images", 2048)
    monkeypatch.setattr(evaluate, "ATTENTIVE_IMAGES", 64)
    given = [
        "bench",
        "eval",
        "--store",
        str(stores["zarr"]),
        "--source",
        str(class_folder),
        "--model",
        "vit_demo",
        "--resolution",
        "64",
    ]
    result = CliRunner().invoke(app, [*given, "--batch", "8", "--rounds", "1", "--json", str(tmp_path / "r.json")])
    assert result.exit_code == 0, result.output
    made = json.loads((tmp_path / "r.json").read_text())
    rates, ratios = made["images_per_second"], made["ratios"]
    theirs = {"torchvision_resized", "torchvision", "torchvision_stored"}
    ours = {"loader", "augmented", "mixed", "forward", "forward_to_block", "ep", "abmilp", "mean"}
    assert set(rates) == theirs | ours
    assert ratios["ep_over_mean_time"] == pytest.approx(rates["mean"] / rates["ep"])
    assert ratios["loader_over_torchvision"] == pytest.approx(rates["loader"] / rates["torchvision_resized"])
    assert ratios["augmented_over_torchvision"] == pytest.approx(rates["augmented"] / rates["torchvision"])
    assert ratios["probe_over_sweep"] == pytest.approx(made["hours"]["probe"] / made["hours"]["sweep"])
    assert (made["block"], made["sweep"]["readouts"]) == (6, 18)


def test_bench_preprocess_reports_steps_and_ratios(
    class_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preprocess, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(workers))
    given = ["bench", "preprocess", "--source", str(class_folder), "--detectors", "fast,orb", "--rounds", "1"]
    result = CliRunner().invoke(app, [*given, "--json", str(tmp_path / "r.json")])
    assert result.exit_code == 0, result.output
    made = json.loads((tmp_path / "r.json").read_text())
    rates, ratios = made["images_per_second"], made["ratios"]
    steps = {"read", "jpeg_decode", "decode", "resize", "encode", "fast", "orb", "write", "whole_fast"}
    steps |= {"fast_found", "fast_found_by_opencv"}
    assert set(rates) == steps | {f"workers_{n}_{kind}" for n in (1, 2) for kind in ("wall", "busiest")}
    assert all(np.isfinite(rate) and rate > 0 for rate in rates.values())
    assert ratios["whole_fast_over_jpeg_decode"] == pytest.approx(rates["whole_fast"] / rates["jpeg_decode"])
    assert ratios["two_workers_over_one"] == pytest.approx(rates["workers_2_wall"] / rates["workers_1_wall"])
    assert made["images"] == 16
    assert made["machine"]["cores"] >= 1
    assert f"whole_fast_over_jpeg_decode {ratios['whole_fast_over_jpeg_decode']:7.2f}" in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--detectors", "fast,surf"], "'surf': must be one of fast"), ([], "the benchmark needs 16")],
)
def test_bench_preprocess_says_what_it_needs(arguments: list[str], said: str, folder: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "preprocess", "--source", str(folder), *arguments])
    assert result.exit_code == 1
    assert said in result.stderr


def test_what_a_loader_costs_at_the_start_is_measured(stores: dict[str, Path], tmp_path: Path) -> None:
    store = str(stores["zarr"])
    assert startup.first_batch_seconds(store, time.time()) > 0
    assert startup.write_images(store, str(tmp_path), 2000) == 2000
    images = ZarrImages(tmp_path / "images.zarr")
    np.testing.assert_array_equal(images.data(1999), Store(store).images.data(0))
    assert startup.open_seconds(str(tmp_path)) > 0
    buffers = 4 * 256 * 192 * 192 * 3 / 2**20  # all that so few images need, but for a little
    assert buffers < startup._elsewhere(f"resident_mb({str(tmp_path)!r})") < buffers + 100


def test_every_run_makes_every_image(class_folder: Path, stores: dict[str, Path]) -> None:
    store, source = Store(stores["zarr"]), list_source("imagefolder", class_folder, "train")
    runs = [
        baselines.reference(source, 8, 1),
        baselines.decode_only(store, 2),
        loader.ours(store, store.keypoints("fast"), 8, 2, epochs=3),
    ]
    assert [run() for run in runs] == [24, baselines.EPOCHS * 24, 3 * 24]


class InProcess:
    """Stands in for a pool of one process: runs everything here, with its own state."""

    def __init__(self, workers: int, mp_context: object, initializer: Callable[..., None], initargs: tuple[Any, ...]):
        initializer(*initargs)
        self._steps = train._steps

    def __enter__(self) -> "InProcess":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, work: Callable[[], Any]) -> "Future[Any]":
        train._steps = self._steps
        future: Future[Any] = Future()
        future.set_result(work())
        return future


def test_bench_train_reports_rates_ratios_and_use(
    class_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "matmul", lambda: lambda: 1000)
    monkeypatch.setattr(train, "ProcessPoolExecutor", InProcess)
    store = make_store(class_folder, tmp_path / "store", resolution=192)
    given = ["bench", "train", "--source", str(class_folder), "--store", str(store), "--model", "vit_demo"]
    options = ["--batch", "4", "--steps", "2", "--rounds", "1", "--json", str(tmp_path / "r.json")]
    result = CliRunner().invoke(app, [*given, *options, "compute.compile=false"])
    assert result.exit_code == 0, result.output
    made = json.loads((tmp_path / "r.json").read_text())
    rates = made["images_per_second"]
    assert set(rates) == {"kamim", "simmim", "plain"}
    assert made["ratios"]["kamim_over_plain"] == pytest.approx(rates["kamim"] / rates["plain"])
    for name, rate in rates.items():
        use = rate * made["flops_per_image"] / made["matmul_flops_per_second"]
        assert made["flop_utilisation"][name] == pytest.approx(use)
        assert 0 <= made["data_wait_share"][name] <= 1
    assert "of the matmul rate, data-wait" in result.output


def test_flops_are_those_counted_by_hand() -> None:
    """ViT-Ti at 192 px: products of matrices alone; backward costs twice, but for the images' gradient."""
    tokens, width, hidden, patch = 145, 192, 768, 768
    block = 2 * tokens * width * (3 * width + width + 2 * hidden) + 2 * 2 * tokens * tokens * width
    embed, head = 2 * 144 * patch * width, 2 * 144 * width * patch
    assert train.flops("vit_tiny") == pytest.approx(3 * (12 * block + head) + 2 * embed, rel=0.01)


def test_the_plain_loop_sees_what_the_released_code_does(class_folder: Path) -> None:
    source = list_source("imagefolder", class_folder, "train")
    dataset = train.OnlineDataset(source, 30)
    image, weights, mask = dataset[29]
    assert (len(dataset), image.shape, weights.shape, mask.shape) == (30, (3, 192, 192), (24, 24), (6, 6))
    assert int(mask.sum()) == 22
    assert float(weights.min()) == 1
    ours, theirs = MaskedImageModel("vit_demo", 192), train.hugging_face("vit_demo")
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())


def test_the_plain_loop_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="model = swin_tiny: must be a ViT"):
        train.hugging_face("swin_tiny")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="needs the transformers package: pip install transformers"):
        train.hugging_face("vit_demo")
