"""What a message tells a newcomer to do."""

import os
import subprocess
from pathlib import Path

import pytest
from runs import config, quiet
from typer.testing import CliRunner

from kamim import KamimError
from kamim.cli import app
from kamim.models.file_kind import named
from kamim.storage.manifest import read_manifest
from kamim.storage.store import Store
from kamim.training.pretrain import pretrain
from kamim.training.run_folder import check_free
from pipelines.plan import largest_batch
from preprocess.sources import list_source

ROOT = Path(__file__).parents[2]


def test_a_store_that_is_not_there_says_what_is(class_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "two.partial").mkdir()
    for path, said in (
        (tmp_path / "two", f"{tmp_path}/two.partial is unfinished: rerun the `kamim preprocess` command"),
        (class_folder, f"`kamim preprocess imagefolder --source {class_folder} --out STORE`"),
        (tmp_path / "none", "make one with `kamim preprocess`"),
    ):
        with pytest.raises(KamimError, match="not a kamim store") as caught:
            read_manifest(path)
        assert said in str(caught.value)


@pytest.mark.parametrize(
    ("file", "dataset"), [("a-000.tar", "webdataset"), ("x/y.parquet", "huggingface"), ("x/data.arrow", "huggingface")]
)
def test_files_of_another_data_set_are_named_with_it(file: str, dataset: str, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    with pytest.raises(KamimError, match=f"; `kamim preprocess {dataset}` reads {Path(file).suffix} files"):
        list_source("imagefolder", tmp_path, "train")


def test_another_length_of_a_run_says_how_to_train_on(stores: dict[str, Path], tmp_path: Path) -> None:
    store, out = Store(stores["zarr"]), tmp_path / "run"
    pretrain(config(out, store.path, "optim.epochs=2", "panel_epochs=null"), quiet)
    with pytest.raises(KamimError, match=f"epochs: 2 there, epochs: 3 requested.*init_from={out} out=..."):
        check_free(config(out, store.path, "optim.epochs=3"), store, fresh=False)
    with pytest.raises(KamimError, match="holds a run of another configuration") as caught:
        check_free(config(out, store.path, "seed=4"), store, fresh=False)
    assert "init_from" not in str(caught.value)


@pytest.mark.parametrize(("samples", "size"), [(1, 1), (2, 2), (3, 2), (1073, 1024), (1024, 1024)])
def test_a_batch_size_that_fits_is_named(samples: int, size: int) -> None:
    assert largest_batch(samples) == size


def test_a_batch_that_is_too_large_says_what_to_type(stores: dict[str, Path], tmp_path: Path) -> None:
    arguments = ["pretrain", f"data.store={stores['zarr']}", "data.resolution=64", f"out={tmp_path / 'run'}"]
    refused = CliRunner().invoke(app, [*arguments, "compute.device=cpu"])
    assert refused.exit_code == 1 and "; set optim.batch_size=16 or less" in refused.stderr


@pytest.mark.parametrize(
    ("spec", "name"), [("runs/a", "a"), ("K=runs/a", "K"), ("random:runs/a", "random a"), ("timm:vit_tiny", "vit_tiny")]
)
def test_a_checkpoint_has_a_name_without_one(spec: str, name: str) -> None:
    assert named(spec) == (name, spec.partition("=")[2] or spec)


def test_setup_with_a_python_that_is_not_there(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": "nosuch"}
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci/setup").write_text((ROOT / ".ci/setup").read_text())
    (tmp_path / "pyproject.toml").touch()
    done = subprocess.run(
        ["bash", ".ci/setup"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("setup: nosuch: no such program; kamim needs Python 3.11 or newer; set PYTHON=")
