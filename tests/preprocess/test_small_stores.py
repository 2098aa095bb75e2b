"""`kamim bench` and `kamim analyze` on next to nothing: each works, or says in one line what is missing."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import make_store
from PIL import Image
from typer.testing import CliRunner

from kamim.bench import baselines, evaluate, loader, small, startup
from kamim.cli import app
from kamim.models import interop
from kamim.models.masked_image_model import MaskedImageModel
from kamim.storage.store import Store
from kamim.training import checkpoint


@pytest.fixture(scope="module")
def root(photos: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources and stores (ROOT/stores/NAME) of one image, of ten in four classes, and of ten without labels.

    Of the four classes the first has unreadable files alone; the source `rejected` has no others.
    """
    root = tmp_path_factory.mktemp("small")
    for name, count, classes in (("one", 1, 1), ("ten", 10, 3), ("unlabelled", 10, 0)):
        for i in range(count):
            folder = root / name / (f"class{i % classes}" if classes else "")
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(photos[i % 3][5 * i : 5 * i + 80, 7 * i : 7 * i + 90]).save(folder / f"{i}.jpg")
    for folder in (root / "ten/bad", root / "rejected/bad"):
        folder.mkdir(parents=True)
        (folder / "0.jpg").write_bytes(b"\xff\xd8\xff and nothing more")
    for name in ("one", "ten", "unlabelled"):
        make_store(root / name, root / "stores" / name)
    make_store(root / "ten", root / "stores/raw", encoding="raw")
    make_store(root / "ten", root / "stores/sift", detectors=("sift",))
    shutil.copytree(root / "ten", root / "raw")
    shutil.copytree(root / "ten", root / "sift")
    model = MaskedImageModel("vit_demo", 64)
    checkpoint.save_imported(root / "run", interop.Foreign("vit_demo", 64, model.state_dict(), True))
    return root


def run(root: Path, command: str, name: str, *options: str) -> tuple[int, str]:
    """Exit code and output, of which errors are one line."""
    words, store, source = command.split(), ("--store", f"{root}/stores/{name}"), ("--source", f"{root / name}")
    given = {
        "analyze": ("--checkpoint", f"K={root / 'run'}", *store, "--out", f"{root}/out"),
        "preprocess": source,
        "fidelity": source,
    }.get(words[min(1, len(words) - 1)], (*store, *source))
    result = CliRunner().invoke(app, [*words, *given, *options])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    said = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert len(said) == result.exit_code
    return result.exit_code, said[0] if said else result.stdout


@pytest.mark.parametrize(
    ("command", "name", "said"),
    [
        ("bench loader", "rejected", "not a kamim store (no manifest.json); make one with `kamim preprocess`"),
        ("bench loader", "raw", "its images are raw; this benchmark compares JPEG stores"),
        ("bench loader", "sift", "has no 'fast' keypoints, only sift"),
        ("bench preprocess", "ten", "has 10 readable RGB or grey JPEGs, the benchmark needs 16"),
        ("bench preprocess", "rejected", "has 0 readable RGB or grey JPEGs, the benchmark needs 16"),
        ("bench fidelity", "ten", "ten has 11"),
        ("bench fidelity --images 1", "rejected", "bad/0.jpg: a JPEG that is truncated or damaged before its first"),
        ("bench eval", "raw", "its images are raw; this benchmark compares JPEG stores"),
        ("bench eval", "unlabelled", "has 10 images without a label; this benchmark mixes labels"),
        ("bench train --model vit_demo", "ten", "its keypoints are for resolution 64 and crop scale"),
        ("bench train --model vit_demo", "sift", "has no 'fast' keypoints, only sift"),
        ("bench train --model vit_demo", "rejected", "not a kamim store (no manifest.json)"),
        ("analyze", "one", "has 1 image; an analysis is over images and needs 2 or more"),
        ("analyze", "rejected", "not a kamim store (no manifest.json); make one with `kamim preprocess`"),
    ],
)
def test_what_is_missing_is_one_line(root: Path, command: str, name: str, said: str) -> None:
    if command.startswith("bench train"):
        pytest.importorskip("transformers")
    code, output = run(root, command, name)
    assert code == 1
    assert said in output


def test_bench_train_says_that_a_step_is_larger_than_the_store(photos: list[np.ndarray], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "one/a").mkdir(parents=True)
    Image.fromarray(photos[0]).save(tmp_path / "one/a/0.jpg")
    make_store(tmp_path / "one", tmp_path / "stores/one", resolution=192)
    assert (
        "batch_size = 256: is more than the store's 1 samples"
        in run(tmp_path, "bench train", "one", "--model", "vit_demo")[1]
    )


@pytest.mark.parametrize("name", ["one", "ten", "unlabelled"])
def test_bench_loader_measures_stores_smaller_than_a_batch(
    root: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ffcv's own loader, which drops a short batch, is measured in test_bench.py."""
    monkeypatch.setattr(baselines, "EPOCHS", 1)
    monkeypatch.setattr(loader, "FINER", 1)
    monkeypatch.setattr(small, "SAMPLES", 300)
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    monkeypatch.setattr(startup, "measure", lambda store: {})
    file = root / f"loader-{name}.json"
    assert run(root, "bench loader", name, "--rounds", "1", "--json", str(file))[0] == 0
    made = json.loads(file.read_text())
    assert made["batch"] == len(Store(root / "stores" / name))
    assert all(np.isfinite(value) and value > 0 for value in made["ratios"].values())


@pytest.mark.parametrize("name", ["one", "ten"])
def test_bench_eval_measures_small_stores(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(evaluate.SWEEP, "images", 1024)
    options = ("--model", "vit_demo", "--resolution", "64", "--rounds", "1")
    assert run(root, "bench eval", name, *options)[0] == 0


@pytest.mark.parametrize("name", ["one", "unlabelled"])
def test_bench_fidelity_measures_one_image(root: Path, name: str) -> None:
    code, said = run(root, "bench fidelity", name, "--images", "1", "--crops", "1", "--detectors", "fast")
    assert code == 0
    assert "fast  ring  correlation of W" in said


@pytest.mark.parametrize(("name", "shown"), [("ten", "3,4,5,10,features"), ("unlabelled", "4,5,6,features,cka")])
def test_ten_images_are_analysed(root: Path, name: str, shown: str) -> None:
    pytest.importorskip("sklearn")
    code, said = run(root, "analyze", name, "--figures", shown)
    assert code == 0, said
    about = json.loads((root / "out/analysis.json").read_text())["about"]
    assert about["classes"] == ([] if name == "unlabelled" else ["class0", "class1", "class2"])  # `bad` has no image
