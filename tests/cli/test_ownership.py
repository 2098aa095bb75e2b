"""The contract of every command that writes: what is not kamim's own stays as it is, and nothing is written through a
link."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer
from conftest import Inline
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from kamim.cli import app
from kamim.models import interop
from kamim.models.masked_image_model import MaskedImageModel
from kamim.storage import log_file, ownership
from kamim.training import checkpoint, run_folder

runner = CliRunner()

READS = {"doctor", "config list", "config show", "store info"}
FILES = {  # commands that write files that their options name, and no others
    "weights",
    "store preview",
    "replay",
    "bench loader",
    "bench preprocess",
    "bench fidelity",
    "bench eval",
    "bench train",
}


class World:
    """A folder with inputs of all commands in `given`; every command writes to `out`, in a folder of its own."""

    def __init__(self, root: Path, stores: dict[str, Path], images: Path, imported: Path):
        self.root, self.store, self.images, self.imported = root, stores["zarr"], images, imported
        self.out = root / "work/out"

    def arguments(self, command: str) -> list[str]:
        spec, store = f"A={self.imported}", str(self.store)
        trained = (
            "data.resolution=64",
            "data.workers=1",
            "model.name=vit_demo",
            "optim.batch_size=12",
            "seed=3",
            "optim.micro_batch=12",
            "optim.epochs=2",
            "optim.warmup_epochs=0",
            "compute.device=cpu",
            "checkpoint_epochs=1",
            "keep_checkpoints=3",
        )
        return {
            "preprocess": [
                "preprocess",
                "imagefolder",
                "--source",
                str(self.images),
                "--resolution",
                "64",
                "--workers",
                "1",
                "--out",
                str(self.out),
            ],
            "store verify": [
                "store",
                "verify",
                "--repair",
                "--source",
                str(self.images),
                "--workers",
                "1",
                str(self.out),
            ],
            "pretrain": ["pretrain", f"data.store={store}", f"out={self.out}", *trained],
            "eval": [
                "eval",
                "--mode",
                "knn",
                "--checkpoint",
                spec,
                "--train",
                store,
                "--val",
                store,
                "--out",
                str(self.out),
                "knn.k=[3]",
                "compute.device=cpu",
            ],
            "sweep": ["sweep", str(self.root / "sweep.yaml")],
            "analyze": [
                "analyze",
                "--figures",
                "2",
                "--checkpoint",
                spec,
                "--store",
                store,
                "--images",
                "8",
                "--out",
                str(self.out),
            ],
            "report run": ["report", "run", str(self.out)],
            "report eval": ["report", "eval", str(self.root / "results"), "--out", str(self.out)],
            "export": ["export", str(self.imported), "--out", f"{self.out}.safetensors"],
            "export huggingface": ["export", str(self.imported), "--layout", "huggingface", "--out", str(self.out)],
            "import": ["import", str(self.imported / "model.safetensors"), "--out", str(self.out)],
            "demo": ["demo", "--out", str(self.out)],
        }[command]

    def run(self, command: str) -> int:
        result = runner.invoke(app, self.arguments(command))
        assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
        return result.exit_code


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("checkpoints") / "random"
    return checkpoint.save_imported(
        out, interop.Foreign("vit_demo", 64, MaskedImageModel("vit_demo", 64).state_dict(), True)
    )


@pytest.fixture
def make(
    tmp_path: Path, stores: dict[str, Path], class_folder: Path, imported: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], World]:
    monkeypatch.setattr("preprocess.executors.ProcessPoolExecutor", Inline)
    fixture = json.loads((Path(__file__).parents[1] / "fixtures/results.json").read_text())
    results = fixture if isinstance(fixture, list) else list(fixture.values())

    def world(name: str) -> World:
        root = tmp_path / name
        (root / "work").mkdir(parents=True)
        made = World(root, stores, class_folder, imported)
        (root / "results/A/knn").mkdir(parents=True)
        (root / "results/A/knn/result.json").write_text(json.dumps(next(r for r in results if r["mode"] == "knn")))
        path = str(made.store)
        optim = {"batch_size": 12, "micro_batch": 12, "epochs": 1, "warmup_epochs": 0}
        (root / "sweep.yaml").write_text(
            json.dumps(
                {
                    "pretrain": {
                        "data": {"store": path, "resolution": 64},
                        "model": {"name": "vit_demo"},
                        "compute": {"device": "cpu"},
                        "optim": optim,
                    },
                    "axes": [{"key": "weighting.temperature", "name": "t", "values": [0.25]}],
                    "evaluation": {
                        "train": path,
                        "val": path,
                        "compute": {"device": "cpu"},
                        "linprobe": {"optim": optim},
                    },
                    "modes": ["linprobe"],
                    "out": str(made.out),
                }
            )
        )
        return made

    return world


NEW = ("preprocess", "pretrain", "eval", "sweep", "analyze", "report eval", "export", "export huggingface", "import")
AGAIN: dict[str, tuple[str, ...]] = {  # commands that write to a folder that exists, and what a rerun makes anew
    "preprocess": (),
    "pretrain": ("checkpoints/step-00000004",),
    "eval": ("A/knn/result.json",),
    "sweep": ("evaluation/t0.25/linprobe/result.json", "evaluation/t0.25/linprobe/checkpoints/step-00000002"),
    "analyze": (),
    "report eval": (),
    "report run": (),
    "store verify": ("keypoints.zarr",),
}


def tree(root: Path) -> dict[str, bytes | str]:
    """Everything below a folder: the content of files, the targets of links."""

    def content(path: Path) -> bytes | str:
        return str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else "folder"

    return {path.relative_to(root).as_posix(): content(path) for path in sorted(root.rglob("*"))}


def finished(world: World, command: str) -> World:
    """Runs what the command needs to find in `out`, or the command itself."""
    first = {"report run": "pretrain", "store verify": "preprocess"}.get(command, command)
    assert world.run(first) == 0
    return world


def test_every_command_has_a_part_in_this_contract() -> None:
    def commands(group: typer.Typer, before: str = "") -> Iterator[str]:
        for one in group.registered_commands:
            yield f"{before}{one.name or one.callback.__name__.strip('_').replace('_', '-')}"  # type: ignore[union-attr]
        for inner in group.registered_groups:
            yield from commands(inner.typer_instance, f"{inner.name} ")  # type: ignore[arg-type]

    assert {*commands(app)} == READS | FILES | {*NEW, *AGAIN, "demo"} - {"export huggingface"}


@pytest.mark.parametrize("command", NEW)
def test_files_of_a_user_stay(command: str, make: Callable[[str], World]) -> None:
    """Each file that the command would write is there before, alone; and beside OUT, files that are named like OUT."""
    written = [
        name for name, content in tree(finished(make("good"), command).root / "work").items() if content != "folder"
    ]
    assert written
    for number, name in enumerate(written):
        world = make(f"{number}")
        file = world.root / "work" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text('{"a": "the user\'s"}')
        before = tree(world.root / "work")
        assert world.run(command) == 1, name
        assert tree(world.root / "work") == before, name
    world = make("beside")
    for name in ("out.lock", "out.partial", "out.safetensors.lock", "out.safetensors.partial", "out.old", "out.tmp"):
        (world.root / "work" / name).mkdir()
        (world.root / "work" / name / "notes").write_text("the user's")
    before = tree(world.root / "work")
    assert world.run(command) == (1 if command == "preprocess" else 0)  # which builds in OUT.partial
    after = tree(world.root / "work")
    assert {name: after.get(name) for name in before} == before


def test_a_folder_that_holds_no_demo_stays(make: Callable[[str], World]) -> None:
    world = make("one")
    (world.out / "stores").mkdir(parents=True)
    (world.out / "crops.png").write_text("the user's")
    before = tree(world.out)
    assert world.run("demo") == 1
    assert tree(world.out) == before


@pytest.mark.parametrize("command", AGAIN)
def test_nothing_is_written_through_a_link(command: str, make: Callable[[str], World]) -> None:
    """Each file and folder that the command has written becomes a link to itself, moved elsewhere, or to nothing."""
    good = finished(make("good"), command)
    for name in AGAIN[command]:
        path = good.out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in tree(good.root / "work"):
        if name == "out" or (command == "sweep" and name.count("/") > 2):  # the user's name; parts of pretrain and eval
            continue
        shutil.rmtree(good.root / "outside", ignore_errors=True)
        work = shutil.copytree(good.root / "work", good.root / "copy", symlinks=True)
        (good.root / "outside").mkdir()
        path = good.root / "work" / name
        for target in ("moved", "nothing"):
            path.rename(good.root / "outside/moved")
            path.symlink_to(good.root / "outside" / target)
            before = tree(good.root / "outside")
            good.run(command)
            assert tree(good.root / "outside") == before, (name, target)
            shutil.rmtree(good.root / "work")
            shutil.copytree(work, good.root / "work", symlinks=True)
            shutil.rmtree(good.root / "outside")
            (good.root / "outside").mkdir()
        shutil.rmtree(work)


@pytest.mark.parametrize("command", ["pretrain", "eval", "analyze"])
def test_a_lock_that_is_a_link_is_not_followed(command: str, make: Callable[[str], World]) -> None:
    world = make("one")
    locked = world.out / "A" if command == "eval" else world.out
    locked.parent.mkdir(parents=True, exist_ok=True)
    ownership.lock_file(locked).symlink_to(world.root / "outside")
    assert world.run(command) == 1
    assert not (world.root / "outside").exists() and ownership.lock_file(locked).is_symlink()


def test_a_log_or_a_lock_that_is_a_pipe_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log")
    log_file.write_line(tmp_path / "log", "a line")  # ends no work
    with pytest.raises(ValueError, match="log: is not a regular file; remove it"):
        ownership.open_own(tmp_path / "log", os.O_RDWR)


@pytest.mark.parametrize("command", ["pretrain", "eval", "sweep", "analyze", "report eval"])
def test_folders_of_earlier_versions_are_known_by_their_content(command: str, make: Callable[[str], World]) -> None:
    """Earlier versions made no marker."""
    world = finished(make("one"), command)
    markers = list(world.root.glob(f"work/**/{ownership.MARKER}"))
    assert len(markers) == {"pretrain": 0, "sweep": 2}.get(command, 1)
    for marker in markers:
        marker.unlink()
    assert world.run(command) == 0
    if command in ("eval", "sweep"):  # stopped before the page was written
        for file in (*markers, *world.out.rglob("index.html")):
            file.unlink(missing_ok=True)
        assert world.run(command) == 0


def test_a_folder_belongs_to_one_command(make: Callable[[str], World]) -> None:
    world = finished(make("one"), "eval")
    before = tree(world.out)
    line = runner.invoke(app, world.arguments("analyze")).stderr.splitlines()[-1]
    assert "belongs to kamim eval; choose another folder for kamim analyze" in line
    assert world.run("report eval") == world.run("sweep") == world.run("pretrain") == 1
    assert tree(world.out) == before


# Runs


def test_folders_that_are_no_checkpoints_stay(make: Callable[[str], World]) -> None:
    """Names like those of checkpoints: of nine digits, later than the run, half-written."""
    world = finished(make("one"), "pretrain")
    checkpoints = world.out / "checkpoints"
    shutil.rmtree(checkpoints / "step-00000004")
    for name in ("step-000000012", "step-00000077", "step-00000004.partial.mine", "step-00000009.partial"):
        (checkpoints / name).mkdir()
        (checkpoints / name / "notes").write_text("the user's")
    (checkpoints / "step-000000003").mkdir()
    shutil.copytree(checkpoints / "step-00000002", checkpoints / "step-000000006")
    (checkpoints / "step-00000005.partial").mkdir()
    (checkpoints / "step-00000005.partial/model.safetensors").write_text("half-written")
    before = tree(checkpoints)
    assert checkpoint.saved(world.out) == [2]
    assert world.run("pretrain") == 0
    assert checkpoint.saved(world.out) == [2, 4]
    after = tree(checkpoints)
    assert {name for name in before if name not in after} == {
        "step-00000005.partial",
        "step-00000005.partial/model.safetensors",
    }
    assert all(after[name] == before[name] for name in before if name in after)


def test_a_checkpoint_with_notes_of_a_user_is_read_and_never_removed(make: Callable[[str], World]) -> None:
    world = finished(make("one"), "pretrain")
    noted = world.out / "checkpoints/step-00000004"
    (noted / "notes").write_text("the best so far")
    assert checkpoint.read(world.out).step == 4
    checkpoint.tidy(world.out, 8, checkpoint.Keep(1))
    (noted / "state.json").write_text("damaged")
    assert world.run("pretrain") == 1  # it cannot be written anew
    assert (noted / "notes").read_text() == "the best so far"


def test_links_of_a_user_in_a_run_are_no_concern_of_it(make: Callable[[str], World]) -> None:
    world = finished(make("one"), "pretrain")
    (world.out / "latest").symlink_to("checkpoints/step-00000004")
    (world.out / "store").symlink_to(world.store)
    shutil.rmtree(world.out / "checkpoints/step-00000004")
    assert world.run("pretrain") == 0


def damaged(world: World) -> Path:
    """A run whose newest checkpoint, of step 4, is damaged; the one before it is of step 2."""
    finished(world, "pretrain")
    file = world.out / "checkpoints/step-00000004/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    return world.out


def test_an_export_of_an_older_checkpoint_says_so(
    make: Callable[[str], World], caplog: pytest.LogCaptureFixture
) -> None:
    run = damaged(make("one"))
    out = run.with_name("weights.safetensors")
    done = runner.invoke(app, ["export", str(run), "--out", str(out)])
    assert done.exit_code == 0
    assert f"{out}: step 2 of {run}, since its newest checkpoint is damaged" in done.stdout.splitlines()
    assert "step-00000004/model.safetensors: is missing or damaged; using the checkpoint before it" in caplog.text
    refused = runner.invoke(app, ["export", str(run), "--strict", "--out", str(run.with_name("a.safetensors"))])
    assert refused.exit_code == 1 and len(refused.stderr.splitlines()) == 1
    assert "model.safetensors: is missing or damaged (--strict)" in refused.stderr
    assert not run.with_name("a.safetensors").exists()


def test_an_evaluation_of_an_older_checkpoint_says_so(
    make: Callable[[str], World], caplog: pytest.LogCaptureFixture
) -> None:
    run = damaged(make("one"))
    store, out = str(make("two").store), run.with_name("results")
    arguments = [
        "eval",
        "--mode",
        "knn",
        "--checkpoint",
        f"B={run}",
        "--train",
        store,
        "--val",
        store,
        "--out",
        str(out),
        "knn.k=[3]",
        "compute.device=cpu",
    ]
    refused = runner.invoke(app, [*arguments, "--strict"])
    assert refused.exit_code == 1 and "model.safetensors: is missing or damaged (--strict)" in refused.stderr
    assert not out.exists()
    done = runner.invoke(app, arguments)
    assert done.exit_code == 0 and done.stdout.startswith("knn B (step 2): ")
    assert caplog.text.count("using the checkpoint before it") == 1
    assert "step-00000004/model.safetensors: is missing or damaged" in (out / "B/knn/log.txt").read_text()


def test_a_run_that_resumes_before_a_damaged_checkpoint_logs_it(make: Callable[[str], World]) -> None:
    world = make("one")
    log = damaged(world) / run_folder.LOG
    assert "damaged" not in log.read_text()
    assert world.run("pretrain") == 0
    assert "step-00000004/model.safetensors: is missing or damaged" in log.read_text()


# Stores and exports


def test_a_store_that_holds_more_than_its_own_is_not_replaced(make: Callable[[str], World]) -> None:
    world = finished(make("one"), "preprocess")
    (world.out / "notes.txt").write_text("the user's")
    before = tree(world.out)
    more = runner.invoke(app, [*world.arguments("preprocess"), "--detectors", "sift"])
    assert more.exit_code == 1 and "notes.txt: is not the store's" in more.stderr
    assert tree(world.out) == before
    assert world.run("preprocess") == 0  # nothing to do


def test_a_log_of_another_program_is_not_continued(tmp_path: Path) -> None:
    file = tmp_path / "out.log"
    file.write_text("2026-01-01 00:00:00 epoch 1\n")
    with pytest.raises(ValueError, match=r"out\.log: is not a log of kamim; move it"):
        log_file.check_log(file)
    file.unlink()
    with log_file.logged(file, "work"):
        log_file.write_line(file, "a line")
    log_file.check_log(file)
    assert len(file.read_text().splitlines()) == 3


def test_an_export_replaces_exports_only(make: Callable[[str], World], imported: Path) -> None:
    world = finished(make("one"), "export")
    assert world.run("export") == 0
    file = world.out.with_name("out.safetensors")
    tensors = load_file(file)
    save_file(tensors, file)  # as timm's own file
    before = file.read_bytes()
    assert world.run("export") == 1
    assert file.read_bytes() == before


def test_a_file_that_the_user_names_is_replaced_with_a_word(class_folder: Path, tmp_path: Path) -> None:
    image = tmp_path / "photo.jpg"
    shutil.copy(next(class_folder.rglob("*.jpg")), image)
    arguments = ["weights", str(image), "--out", str(tmp_path / "w.npy")]
    assert runner.invoke(app, arguments).stderr == ""
    assert runner.invoke(app, arguments).stderr == f"--out {tmp_path / 'w.npy'}: exists and will be replaced\n"
    before = image.read_bytes()
    line = runner.invoke(app, ["weights", str(image), "--out", str(image)]).stderr.splitlines()[-1]
    assert "photo.jpg: would be replaced by what is computed from it" in line
    assert image.read_bytes() == before


@pytest.mark.parametrize("command", ["export", "export huggingface", "import"])
def test_what_a_killed_command_left_is_replaced(command: str, make: Callable[[str], World]) -> None:
    world = make("one")
    out = world.out.with_name("out.safetensors") if command == "export" else world.out
    left = ownership.unfinished(out)
    left.mkdir()
    (left / "config.json").write_text("half-written")
    assert world.run(command) == 0
    assert [path.name for path in (world.root / "work").iterdir()] == [out.name]
