"""Full disks, limits of the system, files that are cut, outputs that cannot be written, two commands on one output."""

import errno
import functools
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import full_disk, make_store
from matplotlib.figure import Figure
from typer.testing import CliRunner

from kamim.analysis import analyze as analysis
from kamim.cli import app, console
from kamim.evaluation import evaluate as evaluation
from kamim.evaluation.features import reserve
from kamim.models import interop
from kamim.models.masked_image_model import MaskedImageModel
from kamim.reporting import page
from kamim.runtime import lock as rank_lock
from kamim.storage import lock
from kamim.storage.files import write_whole
from kamim.storage.ownership import MARKER, lock_file
from kamim.storage.store import Store
from kamim.training import checkpoint, pretrain, run_folder
from preprocess.build import Stopped

runner = CliRunner()
ODD = "o'd\"d\n\x1b[31m$x$"


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint."""
    out = tmp_path_factory.mktemp("checkpoints") / "random"
    return checkpoint.save_imported(
        out, interop.Foreign("vit_demo", 64, MaskedImageModel("vit_demo", 64).state_dict(), True)
    )


def one_line(*arguments: str, code: int = 1) -> str:
    """What a command that must fail says on stderr, behind its progress and a warning."""
    result = runner.invoke(app, arguments)
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    besides = ("eval: ", "sweep: ", "analyze ")
    said = [line for line in result.stderr.splitlines() if not line.startswith(besides)]
    assert len(said) == 1, said
    return said[0]


# The disk


def test_a_file_gets_all_of_its_place_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "features"
    reserve(file, 100_000)
    assert (file.stat().st_size, file.read_bytes()) == (100_000, bytes(100_000))
    assert file.stat().st_blocks * 512 >= 100_000
    file.write_bytes(b"x" * 1000)  # of an evaluation that was stopped before
    reserve(file, 100_000)
    assert file.read_bytes() == b"x" * 1000 + bytes(99_000)

    def lacking(error: Exception) -> Callable[..., None]:
        def fail(*_: object) -> None:
            raise error

        return fail

    for error in (AttributeError(), OSError(errno.EOPNOTSUPP, ""), OSError(errno.EINVAL, "")):
        monkeypatch.setattr(os, "posix_fallocate", lacking(error))
        reserve(file, 3_000_000)
        assert file.read_bytes() == b"x" * 1000 + bytes(2_999_000)
        assert file.stat().st_blocks * 512 >= 2_000_000
        file.write_bytes(b"x" * 1000)
    monkeypatch.setattr(os, "posix_fallocate", lacking(OSError(errno.ENOSPC, "No space left on device")))
    for name, left in (("features", True), ("new", False)):
        with pytest.raises(OSError, match=f"{name}: needs 3,000,000 bytes: No space left on device; free some space"):
            reserve(tmp_path / name, 3_000_000)
        assert (tmp_path / name).exists() == left


def test_an_evaluation_on_a_full_disk_is_one_line_and_goes_on(
    imported: Path, stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (
        "eval",
        "--mode",
        "knn",
        "--checkpoint",
        f"A={imported}",
        "--train",
        str(stores["zarr"]),
        "--val",
        str(stores["zarr"]),
        "--out",
        str(tmp_path / "out"),
        "knn.k=[3]",
        "compute.device=cpu",
    )
    with full_disk(4096):
        assert "6-mean-none: needs 6,144 bytes: File too large" in one_line(*arguments)
    assert runner.invoke(app, arguments).exit_code == 0
    whole = json.loads((tmp_path / "out/A/knn/result.json").read_text())
    assert whole["k"]["3"]["top1"] > 0


def test_a_disk_that_fills_up_is_named_with_its_file(
    imported: Path, stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("kamim.storage.files.fsync", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*/a\.txt'"):
            write_whole(tmp_path / "a.txt", b"a")
        with pytest.raises(OSError, match=r"No space left on device: '.*/a\.json'"):
            page.save_numbers({"a": 1}, tmp_path / "a.json")
    assert list(tmp_path.iterdir()) == []
    commands = {
        "figure-02-64px.png": (
            "analyze",
            "--figures",
            "2",
            "--checkpoint",
            f"A={imported}",
            "--store",
            str(stores["zarr"]),
            "--images",
            "8",
            "--out",
            str(tmp_path / "an"),
        ),
        "x.safetensors": ("export", str(imported), "--out", str(tmp_path / "x.safetensors")),
        "model.safetensors": ("export", str(imported), "--layout", "huggingface", "--out", str(tmp_path / "hf")),
    }
    with full_disk(4096):
        for name, arguments in commands.items():
            assert name in one_line(*arguments)
        with pytest.raises(OSError, match=r"File too large: '.*/a\.json'"):
            console.write_json(tmp_path / "a.json", "x" * 5000)
    with full_disk(100), pytest.raises(OSError, match=r"File too large: '.*/w\.png'"):
        page.save_picture(Figure(), tmp_path / "w.png")
    assert [file.name for file in tmp_path.iterdir()] == ["an"]
    assert [file.name for file in (tmp_path / "an").iterdir()] == [MARKER]


def test_numbers_that_json_lacks_are_null(tmp_path: Path) -> None:
    console.write_json(tmp_path / "a.json", {"a": [1.5, math.nan, (-math.inf, "NaN")]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1.5, None, [None, "NaN"]]}
    console.write_json(Path("/dev/null"), {})
    assert not Path("/dev/null").is_file()


def test_preprocessing_on_a_full_disk_can_go_on(folder: Path, tmp_path: Path) -> None:
    with (
        full_disk(20_000),
        pytest.raises(Stopped, match=r"limit of this shell .`ulimit -f`.; raise the limit and rerun"),
    ):
        make_store(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("**/.*.safetensors.*"))
    assert len(Store(make_store(folder, tmp_path / "out"))) == 12


# Limits and faults


def test_memory_that_runs_out_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def much(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("kamim.training.report.save_report", much)
    assert one_line("report", str(tmp_path)) == "error: out of memory; "


CUT = """
import mmap, os, sys
from kamim.cli.console import _explain_faults
_explain_faults()
with open(sys.argv[1], "r+b") as file:
    mapped = mmap.mmap(file.fileno(), 0)
    file.truncate(0)
    print(mapped[4096])
"""


def test_a_file_that_is_cut_while_it_is_mapped_leaves_a_word(tmp_path: Path) -> None:
    (tmp_path / "page").write_bytes(bytes(8192))
    run = [sys.executable, "-c", CUT, str(tmp_path / "page")]
    died = subprocess.run(run, capture_output=True, text=True, check=False)
    assert died.returncode == -signal.SIGBUS
    assert "Fatal Python error: Bus error" in died.stderr and 'File "<string>", line 8' in died.stderr


# Outputs


def test_two_commands_on_one_output(imported: Path, stores: dict[str, Path], tmp_path: Path) -> None:
    at = {name: str(tmp_path / name) for name in ("eval", "an", "x.safetensors", "hf", "import", "sweep")}
    spec, path = f"A={imported}", str(stores["zarr"])
    (tmp_path / "sweep.yaml").write_text(
        json.dumps(
            {
                "pretrain": {
                    "data": {"store": path, "resolution": 64},
                    "model": {"name": "vit_demo"},
                    "compute": {"device": "cpu"},
                    "optim": {"batch_size": 12, "micro_batch": 12, "epochs": 1, "warmup_epochs": 0},
                },
                "axes": [{"key": "weighting.temperature", "name": "t", "values": [0.25]}],
                "evaluation": {"train": path, "val": path, "compute": {"device": "cpu"}, "knn": {"k": [3]}},
                "modes": ["knn"],
                "out": at["sweep"],
            }
        )
    )
    weights = imported / "model.safetensors"
    commands = {
        "eval": ["eval", "--mode", "knn", "--checkpoint", spec, "--train", path, "--val", path, "--out", at["eval"]],
        "an": ["analyze", "--figures", "2", "--checkpoint", spec, "--store", path, "--out", at["an"], "--images", "8"],
        "x.safetensors": ["export", str(imported), "--out", at["x.safetensors"]],
        "hf": ["export", str(imported), "--layout", "huggingface", "--out", at["hf"]],
        "import": ["import", str(weights), "--out", at["import"]],
        "sweep": ["sweep", str(tmp_path / "sweep.yaml")],
    }
    locked = {name: tmp_path / name for name in commands}
    locked |= {"eval": tmp_path / "eval/A", "sweep": tmp_path / "sweep/t0.25"}  # others may work beside these
    for name, command in commands.items():
        more = ["knn.k=[3]", "compute.device=cpu"] if name == "eval" else []
        with lock.alone(locked[name], "out"):
            line = one_line(*command, *more)
        assert f"{locked[name]}: another process works there now; wait until it is done, or choose another" in line
        assert not locked[name].exists()
        assert not lock_file(locked[name]).exists()


def test_ranks_hear_of_a_lock_alike(tmp_path: Path) -> None:
    class Rank:
        is_main = False

        def gather(self, problem: str) -> list[str]:
            return ["out = x: another process works there now"]

    with pytest.raises(ValueError, match="another process works there now"), rank_lock.alone(tmp_path, "out", Rank()):  # type: ignore[arg-type]
        pass


def test_what_cannot_be_written_is_told_before_any_work(
    imported: Path, stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(stores["zarr"])
    (tmp_path / "file").touch()
    below = str(tmp_path / "file/out")
    for module, name in ((evaluation, "_run"), (analysis, "analyse"), (pretrain, "pretrain")):
        monkeypatch.setattr(module, name, None)
    evaluate = ["eval", "--mode", "knn", "--checkpoint", f"A={imported}", "--train", path, "--val", path, "knn.k=[3]"]
    analyze = ["analyze", "--checkpoint", f"A={imported}", "--store", path]
    assert f"--out {below}/A: " in one_line(*evaluate, "--out", below)
    assert f"--out {below}: " in one_line(*analyze, "--out", below)
    assert f"--json {below}: " in one_line(*evaluate, "--json", below)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # another user's, or read-only
    assert "cannot be written to" in one_line(*evaluate, "--json", str(tmp_path / "x.json"))
    assert "cannot be written to" in one_line("store", "preview", path, "--out", str(tmp_path / "x.png"))


def test_errors_of_the_system_name_the_path_and_a_remedy(
    stores: dict[str, Path], class_folder: Path, imported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, path = tmp_path / "file", str(stores["zarr"])
    file.touch()
    exists = f"error: {file}: File exists; it is a file where a folder is needed, choose another path"
    short = ("data.resolution=64", "optim.batch_size=8", "compute.device=cpu")
    assert one_line("pretrain", "-c", "demo", f"data.store={path}", f"out={file}", *short) == exists
    assert one_line("weights", str(class_folder / "coffee/0.jpg"), "--plot", str(tmp_path)).endswith(
        f"--plot {tmp_path}: is a folder; name a file"
    )
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # another user's, or read-only
    (tmp_path / "w.png").touch()  # would be replaced, for which the folder has to be writable
    assert f"cannot be written to, as {tmp_path} is not writable" in one_line(
        "weights", str(class_folder / "coffee/0.jpg"), "--plot", str(tmp_path / "w.png")
    )


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), "/a/b: Permission denied; choose another path"),
        (OSError(errno.EFBIG, "File too large"), "File too large; raise the limit of this shell, `ulimit -f`"),
        (OSError(errno.EFBIG, "needs 3 bytes: File too large", "/a"), "/a: needs 3 bytes: File too large"),
        (OSError("odd"), "odd"),
    ],
)
def test_an_error_of_the_system_is_path_reason_and_remedy(error: OSError, said: str) -> None:
    assert console.of_system(error) == said


def test_export_makes_the_folder_above(imported: Path, tmp_path: Path) -> None:
    for name, layout in (("a/b/x.safetensors", "timm"), ("c/d/hf", "huggingface")):
        arguments = ["export", str(imported), "--layout", layout, "--out", str(tmp_path / name)]
        assert runner.invoke(app, arguments).exit_code == 0
        assert (tmp_path / name).exists()


def test_outputs_may_be_called_anything(imported: Path, stores: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / ODD
    out.mkdir()
    path = str(stores["zarr"])
    commands = {
        "p.png": ["store", "preview", path, "--out", str(out / "p.png"), "--images", "1"],
        "x.safetensors": ["export", str(imported), "--out", str(out / "x.safetensors")],
        "hf/config.json": ["export", str(imported), "--layout", "huggingface", "--out", str(out / "hf")],
        "i/state.json": ["import", str(imported / "model.safetensors"), "--out", str(out / "i")],
    }
    for name, command in commands.items():
        result = runner.invoke(app, command)
        assert result.exit_code == 0, result.output
        assert (out / name).is_file()
        assert len(result.stdout.splitlines()) == 1 and "\x1b" not in result.output
        if command[0] == "export":  # the code that it prints is code
            code = result.stdout.partition(": ")[2]
            called = "loaded" + code[code.index("(") :]
            known = {"loaded": lambda *a, **k: (*a, *k.values()), "functools": functools, "torch": torch}
            assert str(out / name.partition("/")[0]) in eval(called, known)


def test_a_clock_that_goes_backwards_leaves_no_stale_page(
    stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runs import config, quiet

    from kamim.training.pretrain import pretrain as run_pretrain

    more = ("optim.epochs=1", "optim.warmup_epochs=0", "panel_epochs=null")
    run_pretrain(config(tmp_path / "run", stores["zarr"], *more), quiet)
    file = tmp_path / "run" / run_folder.REPORT
    text = file.read_text()
    file.write_text("of a later time")
    os.utime(file, (2**32, 2**32))
    (checkpoints,) = [tmp_path / "run/checkpoints"]
    for saved in checkpoints.iterdir():
        saved.rename(checkpoints / f"{saved.name}.partial")
    run_pretrain(config(tmp_path / "run", stores["zarr"], *more), quiet)
    assert "of a later time" not in file.read_text() and len(file.read_text()) > len(text) // 2
