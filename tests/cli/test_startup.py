"""Commands import what they need when they run, and a wheel needs no clone beside it."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

import kamim
from kamim.cli import app
from kamim.config.pretrain import Pretrain
from kamim.config.schema import Section, document, load, presets
from kamim.evaluation.options import Evaluation
from kamim.sweep.grid import Grid

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "timm", "matplotlib", "torchvision", "tensorboard"}
RUN = """
import json, sys
from kamim.cli import app
try:
    app(sys.argv[2:], standalone_mode=False)
finally:
    with open(sys.argv[1], "w") as file:
        json.dump(sorted(sys.modules), file)
"""


@pytest.mark.parametrize(
    "command",
    [
        "--help",
        "--version",
        "config list",
        "config show vit_base_kamim",
        "weights {image}",
        "store info {store}",
        "store verify {store} --deep",
        "preprocess imagefolder --source {source} --out {out} --workers 1 --detectors fast,sift",
    ],
)
def test_commands_that_train_nothing_import_no_torch(
    command: str, stores: dict[str, Path], class_folder: Path, tmp_path: Path
) -> None:
    paths = {
        "image": next(class_folder.glob("*/*.jpg")),
        "store": stores["zarr"],
        "source": class_folder,
        "out": tmp_path / "out",
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path / "modules"), *command.format(**paths).split()],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    imported = set(json.loads((tmp_path / "modules").read_text()))
    assert not HEAVY & imported
    if command.startswith("weights"):
        assert "scipy.linalg" not in imported, "numba imports it with the first compiled loop, which takes 0.4 s"


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("eval --mode lineprobe", "--mode lineprobe: must be one of linprobe,"),
        ("eval --val {store}", "--checkpoint: is missing"),
        ("eval --checkpoint x=random:{none} --val {store}", "--checkpoint x=random:{none}: no such file or folder"),
        (
            "eval --checkpoint {image} --train {store} --val {store}",
            "{image}: is a JPEG image; weights are .safetensors",
        ),
        ("import {image} --out {out}", "{image}: is a JPEG image; weights are .safetensors files, or state dicts that"),
        ("eval --checkpoint {source} --train {none} --val {store}", "{none}: not a kamim store"),
        ("eval --checkpoint {source} --val {store} knn.kk=3", "knn.kk: unknown key; allowed are"),
        ("eval --checkpoint {source} --val {store}", "--train: is missing; this mode needs a store to train on"),
        ("eval --checkpoint {source} --train {store} --val {marked}", "--val {marked}: its 1 classes are not the 3 of"),
        ("sweep table9", "-c table9: neither a file nor a preset"),
        ("sweep table2 out={out}", "stores/imagenet-train: not a kamim store"),
        ("pretrain -c demo out={out} data.store={none}", "{none}: not a kamim store"),
        (
            "pretrain -c demo out={out} data.store={store} init_from={none}",
            "init_from = {none}: no such file or folder",
        ),
        ("pretrain -c demo out={out} data.store={store}", "data.store = {store}: its keypoints are for resolution"),
        (
            "pretrain -c demo out={out} data.store={store} weighting.detector=orb",
            "{store}: has no 'orb' keypoints, only",
        ),
        ("pretrain -c demo out={store} data.store={store} weighting=null", "out = {store}: is a store"),
        ("analyze --checkpoint x={none} --store {store} --out {out}", "--checkpoint x={none}: no such file or folder"),
        (
            "analyze --checkpoint {source}= --store {store} --out {out}",
            "--checkpoint {source}=: must be [NAME=]CHECKPOINT",
        ),
        (
            "analyze --checkpoint x={source} --store {store} --out {out} --classes coffee,tea,milk",
            "--classes coffee,tea,milk: 'tea' is not one of the 3 of {store} (astronaut, chelsea, coffee)",
        ),
        (
            "analyze --checkpoint x={source} --store {store} --out {out} --classes coffee",
            "--classes coffee: must be 3 different ones",
        ),
        ("analyze --checkpoint x={source} --store {store} --out {out} --images 25", "--images 25: {store} has 24"),
        ("analyze --checkpoint x={source} --store {store} --out {out} --figures 11", "--figures 11: '11' is none"),
        ("report {none}", "{none}: no such file or folder"),
        ("report eval {source} {none}", "{none}: no such file or folder"),
        ("replay {none}", "{none}: no such file or folder"),
        ("replay {source}", "{source}: not a run of `kamim pretrain`"),
        ("replay {run}", "{run}: all recorded losses are finite; give the --step N to replay, 0 to 1"),
        ("replay {run} --step 2", "--step 2: the run has steps 0 to 1"),
        ("replay {run} --step 1 --source {out}", "--source {out}: no such folder"),
        ("import {none} --out {out}", "{none}: no such file or folder"),
        ("import {source} --out {source}", "--out {source}: exists already; choose another or remove it"),
        ("export {none} --out {out}", "{none}: no such file or folder"),
        ("export {source} --out {out}", "--out {out}: must be a file whose name ends in .safetensors"),
        ("export {source} --layout huggingface --out {source}", "--out {source}: exists already"),
        ("doctor --store {none}", "{none}: not a kamim store"),
    ],
)
def test_a_mistake_is_told_before_torch_is_imported(
    command: str, line: str, stores: dict[str, Path], marked_store: Path, class_folder: Path, tmp_path: Path
) -> None:
    paths = {
        "store": stores["zarr"],
        "marked": marked_store,
        "source": class_folder,
        "image": class_folder / "coffee/1.jpg",
    } | {n: tmp_path / n for n in ("out", "none", "run")}
    paths["run"].mkdir()
    (paths["run"] / "config.yaml").write_text(
        f"out: x\ndata: {{store: '{stores['zarr']}'}}\noptim: {{batch_size: 12, epochs: 1, warmup_epochs: 0}}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path / "modules"), *command.format(**paths).split()],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
        cwd=tmp_path,
    )
    assert done.stderr.startswith(f"error: {line.format(**paths)}")
    assert done.stderr.count("\n") == 1
    assert not HEAVY & set(json.loads((tmp_path / "modules").read_text()))


def test_public_names_are_imported_when_they_are_used() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sys, kamim; assert 'numpy' not in sys.modules; print(kamim.Store.__module__)"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.stdout == "kamim.storage.store\n", done.stderr
    for name in kamim.__all__:
        assert getattr(kamim, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'loader'"):
        kamim.loader  # noqa: B018


def test_a_wheel_works_without_its_clone(tmp_path: Path) -> None:
    """Its presets are found by name, in an empty folder."""
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(ROOT)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("kamim-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    modules = {
        file.relative_to(ROOT)
        for package in ("kamim", "preprocess", "pipelines")
        for file in (ROOT / package).rglob("*.py")
    }
    assert modules <= {file.relative_to(tmp_path / "site") for file in (tmp_path / "site").rglob("*.py")}
    assert (tmp_path / "site/kamim/py.typed").is_file()
    assert (tmp_path / "site/kamim/reporting/templates/page.html").is_file()
    (tmp_path / "empty").mkdir()
    for command in (["config", "list"], ["pretrain", "-c", "demo", "--print-config"]):
        done = subprocess.run(
            [sys.executable, "-m", "kamim", *command],
            cwd=tmp_path / "empty",
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "demo" in done.stdout


@pytest.mark.parametrize("kind", [Pretrain, Evaluation, Grid])
def test_every_key_says_what_it_means(kind: type[Section]) -> None:
    keys = list(document(kind))
    assert len({key for key, _, _ in keys}) == len(keys) > 4
    for key, _, meaning in keys:
        assert meaning, key
        assert not re.search(r"\b[Aa]s in (linprobe|knn)|^(Of|Those) ", meaning), key


def test_presets_are_found_by_name() -> None:
    assert set(presets(Pretrain)) >= {"demo", "vit_base_kamim", "swin_tiny_simmim"}
    by_name = load(Pretrain, Path("vit_base_kamim"))
    assert by_name == load(Pretrain, ROOT / "configs/pretrain/vit_base_kamim.yaml")
    with pytest.raises(
        ValueError, match=r"-c vit_huge: neither a file nor a preset; presets are cifar10, demo, .*swin_base"
    ):
        load(Pretrain, Path("vit_huge"))


def test_config_show_names_value_default_and_meaning() -> None:
    result = CliRunner().invoke(app, ["config", "show", "pretrain/demo"])
    assert result.exit_code == 0
    assert "data.resolution = 96 (default 192)\n    Side of the crops in px." in result.output
    ambiguous = CliRunner().invoke(app, ["config", "show", "demo"])
    assert ambiguous.exit_code == 1
    assert (
        "demo: is the name of 2 presets; type `kamim config show pretrain/demo` or `kamim config show eval/demo`"
        in ambiguous.output
    )
    sweep = CliRunner().invoke(app, ["config", "show", "table2"]).output
    assert "pretrain = {'preset': 'vit_base_kamim'}\n" in sweep
    assert "modes = ['linprobe'] (default [linprobe])\n" in sweep
    assert "out = runs/table2\n" in sweep
    assert "sweeps/table2\n" in CliRunner().invoke(app, ["config", "list"]).output
    assert CliRunner().invoke(app, ["--version"]).output == f"kamim {kamim.__version__}\n"
